"""The convolutions of our own for AMX processors: against float64, over a network's shapes and odd ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from maps import ENDS, convolved, expected_end, random_map
from threads import on_threads
from torch import Tensor
from torch.nn import functional as F

from dmv_fast import FastDMVTracker
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.ops.screened import pack_keys
from dmv_fast.runtime import convolution, load
from dmv_fast.runtime.convolution import Convolution, amx_runs
from dmv_fast.runtime.network import FastNetwork, PlainNetwork
from dmv_fast.runtime.parts import bfloat16_parts
from dmv_fast.runtime.pixels import PixelsAmx

CPU = torch.device("cpu")
needs_amx = pytest.mark.skipif(not amx_runs(), reason="no AMX in this processor, or no C++ extension")

# (batch, C_in, C_out, height, width, kernel, stride, dilation, groups)
GEOMETRIES = [
    (1, 64, 64, 64, 64, 3, 1, 1, 1),
    (1, 64, 128, 64, 64, 3, 2, 1, 1),
    (1, 64, 128, 64, 64, 1, 2, 1, 1),
    (1, 128, 64, 32, 32, 3, 1, 2, 1),
    (3, 96, 64, 16, 16, 3, 1, 1, 1),
    (1, 512, 64, 16, 16, 1, 1, 1, 1),
    (1, 64, 64, 16, 16, 3, 1, 1, 2),
    (2, 32, 32, 7, 21, 3, 1, 1, 1),  # columns that fill no tile, and tiles that fill no pair
    (2, 32, 32, 5, 9, 1, 1, 1, 1),
    (1, 32, 96, 9, 35, 3, 2, 1, 1),
    (1, 32, 32, 33, 33, 1, 2, 1, 1),
    (1, 32, 32, 1, 1, 3, 1, 2, 1),
]


def make(
    c_in: int, c_out: int, kernel: int, *, relu: bool, products: int, scaled: bool = False, **geometry
) -> Convolution:
    """With its weights in .weight and .bias, before three products round them.

    products: 1 in bfloat16; of float32 3, or 2 with weights that are bfloat16 numbers. scaled: with a scale.
    """
    weight = torch.randn(c_out, c_in // geometry.get("groups", 1), kernel, kernel)
    weight /= weight[0].numel() ** 0.5
    weight = weight if products == 3 else weight.bfloat16().float()
    bias, scale = torch.randn(c_out), torch.rand(c_out) + 0.5 if scaled else None
    dtype = torch.bfloat16 if products == 1 else torch.float32
    made = Convolution(
        weight, bias, scale=scale, relu=relu, dtype=dtype, device=CPU,
        products="bfloat16x3" if products > 1 else "own", **geometry,
    )  # fmt: skip
    assert made._run == made._amx and made._weight.numel() == weight.numel() * (2 if products == 3 else 1)
    made.weight, made.bias = weight if scale is None else weight * scale[:, None, None, None], bias
    return made


@needs_amx
@pytest.mark.parametrize("products", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_equals_float64(geometry, products):
    batch, c_in, c_out, height, width, kernel, stride, dilation, groups = geometry
    torch.manual_seed(0)
    where = {
        "stride": stride, "dilation": dilation, "groups": groups, "padding": dilation * (kernel // 2)
    }  # fmt: skip
    x = random_map(batch, c_in, height, width)
    x = x if products > 1 else x.bfloat16()
    # The products are exact in bfloat16, the result is rounded once; two parts leave 2^-17 of each factor.
    tolerance = 5e-5 if products > 1 else 2**-8
    for relu, residual in ENDS:
        made = make(c_in, c_out, kernel, relu=relu, products=products, scaled=residual, **where)
        onto, expected = expected_end(x, made.weight, made.bias, relu=relu, residual=residual, **where)
        found = made(x, onto)
        assert found.dtype == x.dtype and found.is_contiguous()
        torch.testing.assert_close(
            found.double(), expected, atol=tolerance * (1 if products > 1 else 0.1), rtol=tolerance
        )


def test_two_parts_leave_a_hundred_thousandth():
    x = torch.randn(3, 48, 64) * torch.logspace(-6, 6, 64)
    assert ((bfloat16_parts(x).double().sum(0) - x).abs() <= 2**-17 * x.abs()).all()
    assert bfloat16_parts(x.bfloat16().float())[1].count_nonzero() == 0


@needs_amx
@pytest.mark.parametrize("products", [2, 3])
def test_parts_round_a_hundred_times_finer_than_one_product(products):
    torch.manual_seed(0)
    made = make(128, 32, 3, relu=False, products=products, padding=1)
    x = random_map(1, 128, 16, 16)
    exact = convolved(x.double(), made.weight.double(), made.bias.double(), padding=1)

    def error(found: Tensor) -> float:
        return (found - exact).square().mean().sqrt().item()

    halves = x.bfloat16().double(), made.weight.bfloat16().double()
    assert error(made(x)) < 0.01 * error(convolved(*halves, made.bias.double(), padding=1))


@needs_amx
@pytest.mark.parametrize("products", [1, 2, 3])
@pytest.mark.parametrize("c_in, c_out, size", [(32, 64, 64), (128, 128, 16)])
def test_threads_and_neighbours_change_nothing(products, c_in, c_out, size):
    """Bit for bit: a crop alone, among others, on one thread and on three."""
    torch.manual_seed(0)
    made = make(c_in, c_out, 3, relu=True, products=products, padding=1)
    x = random_map(4, c_in, size, size)
    x = x if products > 1 else x.bfloat16()
    pairs = on_threads((1, 3), lambda: (made(x), torch.cat([made(crop[None]) for crop in x])))
    answers = [answer for pair in pairs for answer in pair]
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@needs_amx
def test_a_nan_stays_where_it_is_seen():
    made = make(32, 32, 3, relu=False, products=1, padding=1)
    x = random_map(2, 32, 16, 16).bfloat16()
    x[0, 8, 8, 3] = torch.nan
    bad = made(x).isnan().any(-1)
    assert bad[0, 7:10, 7:10].all() and bad.sum() == 9


@needs_amx
def test_wrong_tensors_are_refused():
    made = make(32, 32, 3, relu=True, products=1, padding=1)
    x = random_map(1, 32, 16, 16)
    weights = made._weight
    made._weight = weights[:, :2].contiguous()
    with pytest.raises(RuntimeError, match="weight: must be contiguous bfloat16 of 9216 elements"):
        made(x)
    made._weight = weights
    with pytest.raises(RuntimeError, match="multiples of 32"):
        made(x[..., :16])


@needs_amx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pixels_to_pooled_map(dtype):
    """On pixels less the true mean, zero beyond the crop, though whole numbers are subtracted."""
    torch.manual_seed(0)
    weight, bias = torch.randn(64, 3, 7, 7) / 12 / 50, torch.randn(64)
    mean = torch.tensor([103.53, 116.28, 123.675])
    crops = torch.randint(0, 256, (3, 128, 64, 3), dtype=torch.uint8)
    if dtype == torch.bfloat16:
        weight = weight.bfloat16().float()
    pixels = (crops.double() - mean.double()).permute(0, 3, 1, 2)
    expected = F.max_pool2d(F.conv2d(pixels, weight.double(), bias.double(), 2, 3).relu(), 3, 2, 1)
    found = PixelsAmx(weight, bias, mean, dtype)(crops)
    assert found.dtype == dtype and found.is_contiguous()
    tolerance = 5e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(
        found.double(), expected.permute(0, 2, 3, 1), atol=tolerance, rtol=tolerance
    )
    alone = torch.cat([PixelsAmx(weight, bias, mean, dtype)(crop[None]) for crop in crops])
    assert torch.equal(found, alone)


@needs_amx
def test_the_network_of_three_products_is_nearly_the_float32_one():
    torch.manual_seed(0)
    model = DMV(DMVConfig()).eval().requires_grad_(False)
    crops = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    crops = crops.repeat_interleave(8, 1).repeat_interleave(8, 2)
    exact = PlainNetwork(model, backend="reference")
    keys, values = F.normalize(torch.randn(1, 704, 256), dim=-1), torch.randn(1, 704, 256)
    with torch.inference_mode():
        seen = exact.look(crops)
        expected = exact.predict(seen, keys, values, 4, 704)
        projected = model.read.voting.value_in(values)
        errors = []
        for dtype in (torch.bfloat16, torch.float32):
            products = "bfloat16x3" if dtype == torch.float32 else "own"
            fast = FastNetwork(model, dtype=dtype, device=CPU, backend="auto", products=products)
            maps = fast.look(crops)
            stored = pack_keys(keys) if fast.key_dtype == torch.uint8 else keys.to(dtype)
            found = fast.predict(maps, stored, projected.to(dtype), 4, 704)
            errors.append((relative(maps[..., :256], seen), relative(found.deltas, expected.deltas)))
    assert errors[1][0] < 1e-4 and errors[1][1] < 2e-3
    assert errors[1][0] < 0.02 * errors[0][0] and errors[1][1] < 0.1 * errors[0][1]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


@needs_amx
def test_a_tracker_takes_its_name(weights):
    frame = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    tracker = FastDMVTracker(weights, device="cpu", dtype="bfloat16x3")
    tracker.init(frame, (40, 30, 30, 20))
    exact = FastDMVTracker(weights, device="cpu", dtype="float32")
    exact.init(frame, (40, 30, 30, 20))
    for _ in range(2):
        found, expected = tracker.track(frame), exact.track(frame)
        np.testing.assert_allclose(found.box, expected.box, atol=0.02)
        assert abs(found.score - expected.score) < 1e-3


def test_a_processor_without_amx_says_so(monkeypatch, weights):
    monkeypatch.setattr(load, "amx_runs", lambda: False)
    with pytest.raises(ValueError, match="'bfloat16x3' does not run on cpu: it needs .* AMX"):
        FastDMVTracker(weights, device="cpu", dtype="bfloat16x3")


def test_without_amx_it_is_onednn_or_pytorch(monkeypatch):
    monkeypatch.setattr(convolution, "amx_runs", lambda: False)
    made = Convolution(
        torch.ones(32, 32, 1, 1), None, relu=False, dtype=torch.float32, device=CPU, products="bfloat16x3"
    )
    assert torch.equal(made(torch.ones(1, 4, 4, 32)), torch.full((1, 4, 4, 32), 32.0))
