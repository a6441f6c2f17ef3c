"""1 x 1 convolutions and the first stage in float32: against float64, over a network's shapes and others."""

from __future__ import annotations

import pytest
import torch
from maps import ENDS, convolved, expected_end, random_map
from threads import on_threads
from torch.nn import functional as F

from dmv_fast.ops.backends import cpu_kernel_runs
from dmv_fast.runtime.convolution import Convolution
from dmv_fast.runtime.pixels import Pixels, PixelsFloat32, pixels_to_map

CPU = torch.device("cpu")
MEAN = torch.tensor([103.53, 116.28, 123.675])
pytestmark = pytest.mark.skipif(
    not cpu_kernel_runs("convolve_pointwise_cpu"), reason="no AVX2 in this processor, or no C++ extension"
)


@pytest.fixture(params=["", "avx2"])
def isa(request, monkeypatch) -> str:
    monkeypatch.setenv("DMV_FAST_CPU_ISA", request.param)
    return request.param


def pointwise(c_in: int, c_out: int, **how) -> Convolution:
    """With its weight in .weight and its bias in .bias."""
    weight, bias = torch.randn(c_out, c_in, 1, 1) / c_in**0.5, torch.randn(c_out)
    made = Convolution(weight, bias, **{"relu": False, "dtype": torch.float32, "device": CPU} | how)
    made.weight, made.bias = weight, bias
    return made


@pytest.mark.parametrize(
    "batch, c_in, c_out, height, width, stride",
    [
        (1, 64, 128, 64, 64, 2),
        (1, 256, 512, 32, 32, 2),
        (2, 512, 128, 16, 16, 1),
        (3, 16, 32, 5, 7, 1),  # no whole number of products' rows
        (2, 48, 96, 7, 9, 2),
        (1, 32, 64, 6, 5, 3),
        (1, 32, 32, 1, 1, 2),
        (0, 32, 32, 4, 4, 1),
    ],
)
def test_a_pixel_at_a_time_equals_float64(isa, batch, c_in, c_out, height, width, stride):
    torch.manual_seed(0)
    x = random_map(batch, c_in, height, width)
    for relu, residual in ENDS:
        made = pointwise(c_in, c_out, relu=relu, stride=stride)
        assert made._run == made._pointwise
        end = {"relu": relu, "residual": residual}
        onto, expected = expected_end(x, made.weight, made.bias, stride=stride, **end)
        found = made(x, onto)
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_scale_and_no_bias():
    torch.manual_seed(0)
    weight, scale, x = torch.randn(32, 64, 1, 1), torch.randn(32), random_map(1, 64, 8, 8)
    made = Convolution(weight, None, scale=scale, relu=False, dtype=torch.float32, device=CPU)
    expected = convolved(x, weight) * scale
    torch.testing.assert_close(made(x), expected, atol=1e-4, rtol=1e-4)


def test_threads_and_neighbours_change_nothing():
    """Bit for bit: a crop alone, among others, on one thread and on three."""
    torch.manual_seed(0)
    made, x = pointwise(64, 96), random_map(4, 64, 9, 11)
    pairs = on_threads((1, 3), lambda: (made(x), torch.cat([made(crop[None]) for crop in x])))
    answers = [answer for pair in pairs for answer in pair]
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@pytest.mark.parametrize(
    "c_in, c_out, how",
    [(24, 32, {}), (32, 20, {}), (64, 64, {"groups": 2}), (32, 32, {"padding": 1}), (1024, 256, {})],
)
def test_what_it_does_not_take(c_in, c_out, how):
    torch.manual_seed(0)
    weight, x = torch.randn(c_out, c_in // how.get("groups", 1), 1, 1), random_map(1, c_in, 8, 8)
    made = Convolution(weight, None, relu=False, dtype=torch.float32, device=CPU, **how)
    assert made._run != made._pointwise
    torch.testing.assert_close(made(x), convolved(x, weight, **how), atol=1e-3, rtol=1e-4)


def test_wrong_tensors_are_refused():
    made, x = pointwise(32, 32, relu=True), random_map(1, 32, 16, 16)
    weights = made._weight
    made._weight = weights[:, :16].contiguous()
    with pytest.raises(RuntimeError, match="weight: must be contiguous float32 of 1024 elements"):
        made(x)
    made._weight = weights
    with pytest.raises(RuntimeError, match="x: must be contiguous float32"):
        made(x.double())
    with pytest.raises(RuntimeError, match="multiples of 16"):
        made(x[..., :8])
    with pytest.raises(RuntimeError, match="out: must not lie in x"):
        made(x, onto=x)


@pytest.mark.parametrize(
    "shape", [(1, 256, 256, 3), (3, 128, 64, 3), (2, 4, 16, 3), (1, 20, 48, 3), (1, 40, 48, 3)]
)
def test_pixels_to_pooled_map(isa, shape):
    """On pixels less the mean, zero beyond the crop."""
    torch.manual_seed(0)
    weight, bias = torch.randn(64, 3, 7, 7) / 600, torch.randn(64)
    crops = torch.randint(0, 256, shape, dtype=torch.uint8)
    pixels = (crops.double() - MEAN.double()).permute(0, 3, 1, 2)
    expected = F.max_pool2d(F.conv2d(pixels, weight.double(), bias.double(), 2, 3).relu(), 3, 2, 1)
    stage = PixelsFloat32(weight, bias, MEAN)
    found = stage(crops)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected.permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)
    assert torch.equal(found, torch.cat([stage(crop[None]) for crop in crops]))
    alone, shared = on_threads((1, 3), lambda: stage(crops))
    assert torch.equal(alone, found) and torch.equal(shared, found)


@pytest.mark.parametrize("isa, kind", [("avx2", PixelsFloat32), ("generic", Pixels)])
def test_the_first_stage_of_float32(monkeypatch, isa, kind):
    monkeypatch.setenv("DMV_FAST_CPU_ISA", isa)
    where = {"dtype": torch.float32, "device": CPU}
    assert isinstance(pixels_to_map(torch.zeros(64, 3, 7, 7), torch.zeros(64), MEAN, **where), kind)


def test_wrong_crops_are_refused():
    stage = PixelsFloat32(torch.zeros(64, 3, 7, 7), torch.zeros(64), MEAN)
    for size in ((18, 32, 3), (16, 24, 3), (16, 0, 3), (16, 32, 4)):
        with pytest.raises(RuntimeError, match="crops: must be .B, H, W, 3."):
            stage(torch.zeros(1, *size, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="crops: must be contiguous uint8"):
        stage(torch.zeros(1, 16, 32, 3))
