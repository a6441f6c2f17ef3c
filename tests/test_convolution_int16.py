"""Convolutions by products of 16-bit whole numbers: against float64, and where such could go wrong."""

from __future__ import annotations

import pytest
import torch
from maps import ENDS, THREE_BY_THREE, convolved, expected_end, random_map
from threads import on_threads
from torch import Tensor

from dmv_fast import FastDMVTracker
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.runtime.convolution import Convolution, int16_runs
from dmv_fast.runtime.network import FastNetwork
from dmv_fast.vision.crop import normalise

CPU = torch.device("cpu")
needs_int16 = pytest.mark.skipif(
    not int16_runs(), reason="no AVX512_VNNI in this processor, or no C++ extension"
)


def make(weight: Tensor, bias: Tensor | None = None, *, relu: bool = False, **geometry: int) -> Convolution:
    return Convolution(
        weight, bias, relu=relu, dtype=torch.float32, device=CPU, products="int16", **geometry
    )


def random_weight(c_out: int, c_in: int, size: int) -> Tensor:
    return torch.randn(c_out, c_in, size, size) / (c_in * size * size) ** 0.5


def off(found: Tensor, exact: Tensor) -> float:
    """The error's share of the whole, root mean square."""
    return ((found - exact).square().mean() / exact.square().mean()).sqrt().item()


@needs_int16
@pytest.mark.parametrize("geometry", THREE_BY_THREE, ids=str)
def test_three_by_three_is_near_float64(geometry):
    batch, c_in, c_out, height, width, stride, padding, dilation, groups = geometry
    torch.manual_seed(0)
    where = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    weight, bias = random_weight(c_out, c_in // groups, 3), torch.randn(c_out)
    x = random_map(batch, c_in, height, width)
    for relu, residual in ENDS:
        made = make(weight, bias, relu=relu, **where)
        assert made._run == (made._winograd_int16 if groups == 1 else made._winograd)
        onto, expected = expected_end(x, weight, bias, relu=relu, residual=residual, **where)
        found = made(x, onto)
        assert found.dtype == torch.float32 and found.is_contiguous()
        assert off(found, expected) < 1e-3


@needs_int16
@pytest.mark.parametrize(
    "batch, c_in, c_out, height, width, stride",
    [
        (1, 64, 256, 64, 64, 1),
        (2, 2048, 512, 16, 16, 1),
        (1, 256, 512, 32, 32, 2),
        (3, 16, 32, 5, 7, 1),  # no whole number of products' rows
        (1, 32, 32, 1, 1, 2),
        (0, 32, 32, 4, 4, 1),
    ],
)
def test_one_by_one_is_near_float64(batch, c_in, c_out, height, width, stride):
    torch.manual_seed(0)
    weight, bias = random_weight(c_out, c_in, 1), torch.randn(c_out)
    x = random_map(batch, c_in, height, width)
    for relu, residual in ENDS:
        made = make(weight, bias, relu=relu, stride=stride)
        assert made._run == made._pointwise_int16
        onto, expected = expected_end(x, weight, bias, relu=relu, residual=residual, stride=stride)
        found = made(x, onto)
        assert found.shape == expected.shape
        assert not batch or off(found, expected) < 5e-4


@needs_int16
@pytest.mark.parametrize("c", [16, 32, 512, 4096])
@pytest.mark.parametrize("of_row", ["alike", "one"])
@pytest.mark.parametrize("of_weight", ["alike", "one"])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_sum_leaves_32_bits(c, of_row, of_weight, sign):
    """The longest ones: a row and a column that are parallel, of many numbers or of one."""

    def vector(kind: str) -> Tensor:
        return torch.ones(c) if kind == "alike" else torch.eye(c)[0]

    row, column = vector(of_row), sign * vector(of_weight)
    found = make(column.view(1, c, 1, 1).repeat(32, 1, 1, 1))(row.repeat(1, 3, 3, 1))
    torch.testing.assert_close(found, torch.full((1, 3, 3, 32), (row @ column).item()), atol=0, rtol=2e-3)


@needs_int16
@pytest.mark.parametrize("size", [1e-11, 1.0, 1e16])
def test_each_row_has_a_scale_of_its_own(size):
    """A pixel beside a million times larger ones is as right as they are, of whatever size they all are."""
    torch.manual_seed(0)
    weight, x = random_weight(32, 64, 1), size * random_map(1, 64, 8, 8)
    x[:, ::2] *= 1e-6
    expected, found = convolved(x.double(), weight.double()), make(weight)(x)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        assert off(found[:, rows].double() / size, expected[:, rows] / size) < 3e-4


@needs_int16
def test_each_column_of_weights_has_a_scale_of_its_own():
    torch.manual_seed(0)
    weight, x = random_weight(64, 64, 3), random_map(1, 64, 8, 8)
    weight[::2] *= 1e-6
    expected, found = convolved(x.double(), weight.double(), padding=1), make(weight, padding=1)(x)
    for channels in (slice(0, None, 2), slice(1, None, 2)):
        assert off(found[..., channels], expected[..., channels]) < 1e-3


@needs_int16
@pytest.mark.parametrize("size", [1, 3])
def test_nothing_is_nothing(size):
    weight, bias = random_weight(32, 32, size), torch.randn(32)
    of_zeros = make(weight, bias, padding=size // 2)(torch.zeros(1, 5, 5, 32))
    by_zeros = make(0 * weight, bias, padding=size // 2)(random_map(1, 32, 5, 5))
    assert torch.equal(of_zeros, bias.expand(1, 5, 5, 32)) and torch.equal(by_zeros, of_zeros)


@needs_int16
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_is_no_number_stays_in_its_row(bad, relu):
    """NaN there, and the other pixels as if nothing were."""
    torch.manual_seed(0)
    made, x = make(random_weight(32, 64, 1), relu=relu), random_map(1, 64, 4, 4)
    expected = made(x)
    x[0, 1, 2, 5] = bad
    found = made(x)
    there = torch.zeros(1, 4, 4, 32, dtype=torch.bool)
    there[0, 1, 2] = True
    assert torch.equal(found[~there], expected[~there]) and found[there].isnan().all()


@needs_int16
@pytest.mark.parametrize("size", [1e-19, 1e-22, 1e-30, 1e-44])
def test_what_is_next_to_nothing_is_nothing(size):
    """Squares that are denormal would make a row seem shorter than it is."""
    found = make(torch.ones(32, 32, 1, 1))(torch.full((1, 2, 2, 32), size))
    assert torch.equal(found, torch.zeros(1, 2, 2, 32))


@needs_int16
@pytest.mark.parametrize("size, c_in, c_out, side", [(3, 32, 64, 40), (3, 256, 256, 12), (1, 64, 64, 20)])
def test_threads_and_neighbours_change_nothing(size, c_in, c_out, side):
    """Bit for bit: a crop alone, among others, on one thread and on three."""
    torch.manual_seed(0)
    made, x = make(random_weight(c_out, c_in, size), padding=size // 2), random_map(4, c_in, side, side)
    pairs = on_threads((1, 3), lambda: (made(x), torch.cat([made(crop[None]) for crop in x])))
    answers = [answer for pair in pairs for answer in pair]
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@needs_int16
def test_more_tiles_than_there_is_room_for():
    torch.manual_seed(0)
    weight, x = random_weight(512, 256, 3), random_map(8, 256, 32, 32)  # 512 tiles, some 90 at a time
    expected = convolved(x, weight, padding=1)
    assert off(make(weight, padding=1)(x), expected) < 1e-3


@needs_int16
def test_wrong_tensors_are_refused():
    three, one = make(random_weight(32, 32, 3), padding=1), make(random_weight(32, 32, 1))
    x = torch.ones(1, 8, 8, 32)
    for made, elements in ((three, 36 * 32 * 32), (one, 32 * 32)):
        weight, scale = made._weight, made._scale
        made._weight = weight.float()
        with pytest.raises(RuntimeError, match=f"weight: must be contiguous int16 of {elements} elements"):
            made(x)
        made._weight, made._scale = weight, scale[..., :16].contiguous()
        with pytest.raises(RuntimeError, match="scale: must be contiguous float32"):
            made(x)
        made._scale = scale
        with pytest.raises(RuntimeError, match="out: must not lie in x"):
            made(x, onto=x)
    for size in (1, 3):
        wide = make(torch.zeros(32, 4112, size, size), padding=size // 2)
        with pytest.raises(RuntimeError, match="x: must have at most 4096 channels"):
            wide(torch.ones(1, 2, 2, 4112))


@needs_int16
@pytest.mark.parametrize("size", [1, 3])
def test_channels_may_lie_anyhow(size):
    torch.manual_seed(0)
    made, x = make(random_weight(32, 64, size), padding=size // 2), random_map(1, 64, 9, 7)
    apart = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not apart.is_contiguous() and torch.equal(made(apart), made(x))


@needs_int16
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_network_of_it_is_near_the_reference(backbone):
    """All of the backbone's convolutions but the first; the head and the value encoder stay float32."""
    torch.manual_seed(0)
    model = DMV(DMVConfig(backbone=backbone)).eval().requires_grad_(False)
    fast = FastNetwork(model, dtype=torch.float32, device=CPU, backend="auto", products="int16")
    blocks = [block for stage in (*fast._trunk._stem, fast._trunk._layer4) for block in stage]
    trunk = [c for chain in (*fast._trunk._necks, *(block._chain for block in blocks)) for c in chain]
    trunk += [c for block in blocks for c in (block._shortcut, block._last) if c is not None]
    assert {c._run.__name__ for c in trunk} == {"_winograd_int16", "_pointwise_int16"}
    assert not any("int16" in c._run.__name__ for c in (*fast._head, *fast._encoder._convolutions))
    crops = torch.randint(0, 256, (2, 256, 256, 3), dtype=torch.uint8)
    features = fast.look(crops)[..., : model.config.key_dim]
    expected = model.backbone(normalise(crops)).permute(0, 2, 3, 1)
    assert 1e-6 < off(features, expected) < 5e-3


@needs_int16
def test_a_tracker_of_it_finds_what_float32_does():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (180, 240, 3), dtype=torch.uint8)
    frames = [image.roll(2 * step, dims=1).numpy() for step in range(4)]
    boxes = []
    for dtype in ("int16", "float32"):
        tracker = FastDMVTracker(device="cpu", dtype=dtype)
        tracker.init(frames[0], (90, 60, 40, 50))
        boxes.append(torch.tensor([tracker.track(frame).box for frame in frames[1:]]))
    assert not torch.equal(*boxes)  # it is another network
    torch.testing.assert_close(*boxes, atol=1.0, rtol=0)


def test_a_processor_without_it_says_so(monkeypatch):
    monkeypatch.setenv("DMV_FAST_CPU_ISA", "avx2" if int16_runs() else "")
    with pytest.raises(ValueError, match="dtype 'int16' does not run on cpu: .* AVX512_VNNI"):
        FastDMVTracker(device="cpu", dtype="int16")
    if int16_runs():
        monkeypatch.setenv("DMV_FAST_CPU_ISA", "")
        one, three = make(torch.ones(32, 32, 1, 1)), make(torch.ones(32, 32, 3, 3), padding=1)
        monkeypatch.setenv("DMV_FAST_CPU_ISA", "avx2")
        for made, name in ((one, "pointwise"), (three, "winograd")):
            with pytest.raises(RuntimeError, match=f"convolve_{name}_int16_cpu: .* no AVX512_VNNI"):
                made(torch.ones(1, 4, 4, 32))
