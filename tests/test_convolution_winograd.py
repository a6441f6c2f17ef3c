"""Winograd's convolution in float32: against float64, over a network's shapes and odd ones."""

from __future__ import annotations

import pytest
import torch
from maps import ENDS, THREE_BY_THREE, convolved, expected_end, random_map
from threads import on_threads
from torch import Tensor

from dmv_fast.ops.backends import cpu_kernel_runs
from dmv_fast.runtime.convolution import Convolution

CPU = torch.device("cpu")
needs_winograd = pytest.mark.skipif(
    not cpu_kernel_runs("convolve_winograd_cpu"), reason="no AVX2 in this processor, or no C++ extension"
)


def make(c_in: int, c_out: int, *, relu: bool = False, groups: int = 1, **geometry) -> Convolution:
    """With its weight in .weight and its bias in .bias."""
    weight = torch.randn(c_out, c_in // groups, 3, 3)
    weight /= weight[0].numel() ** 0.5
    bias = torch.randn(c_out)
    made = Convolution(weight, bias, relu=relu, dtype=torch.float32, device=CPU, groups=groups, **geometry)
    made.weight, made.bias = weight, bias
    return made


@needs_winograd
@pytest.mark.parametrize("isa", ["", "avx2"])
@pytest.mark.parametrize("geometry", THREE_BY_THREE, ids=str)
def test_equals_float64(monkeypatch, geometry, isa):
    monkeypatch.setenv("DMV_FAST_CPU_ISA", isa)
    batch, c_in, c_out, height, width, stride, padding, dilation, groups = geometry
    torch.manual_seed(0)
    where = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    x = random_map(batch, c_in, height, width)
    for relu, residual in ENDS:
        made = make(c_in, c_out, relu=relu, **where)
        assert made._run == made._winograd
        onto, expected = expected_end(x, made.weight, made.bias, relu=relu, residual=residual, **where)
        found = made(x, onto)
        assert found.dtype == torch.float32 and found.is_contiguous()
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)


@needs_winograd
@pytest.mark.parametrize("stride", [1, 2])
def test_rounding_is_near_that_of_the_sum(stride):
    torch.manual_seed(0)
    where = {"padding": 1, "stride": stride}
    made, x = make(512, 64, **where), random_map(1, 512, 16, 16).relu()
    exact = convolved(x.double(), made.weight.double(), made.bias.double(), **where)
    summed = convolved(x, made.weight, made.bias, **where)

    def error(found: Tensor) -> float:
        return (found - exact).square().mean().sqrt().item()

    assert error(made(x)) < 10 * error(summed)


@needs_winograd
@pytest.mark.parametrize("c_in, c_out, size", [(32, 64, 40), (256, 256, 12)])
def test_threads_and_neighbours_change_nothing(c_in, c_out, size):
    """Bit for bit: a crop alone, among others, on one thread and on three."""
    torch.manual_seed(0)
    made, x = make(c_in, c_out, relu=True, padding=1), random_map(4, c_in, size, size)
    pairs = on_threads((1, 3), lambda: (made(x), torch.cat([made(crop[None]) for crop in x])))
    answers = [answer for pair in pairs for answer in pair]
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@needs_winograd
def test_more_tiles_than_there_is_room_for():
    torch.manual_seed(0)
    made, x = make(256, 512, padding=1), random_map(6, 256, 32, 32)  # 384 tiles, some 70 at a time
    expected = convolved(x, made.weight, made.bias, padding=1)
    torch.testing.assert_close(made(x), expected, atol=2e-5, rtol=1e-5)


@needs_winograd
@pytest.mark.parametrize(
    "kernel, stride, c_in, c_out", [(3, 3, 32, 32), (1, 1, 32, 32), (3, 1, 24, 32), (3, 1, 32, 20)]
)
def test_what_it_does_not_take_is_onednn_or_pytorch(kernel, stride, c_in, c_out):
    torch.manual_seed(0)
    weight, x = torch.randn(c_out, c_in, kernel, kernel), random_map(1, c_in, 8, 8)
    made = Convolution(weight, None, relu=False, stride=stride, dtype=torch.float32, device=CPU)
    assert made._run != made._winograd
    torch.testing.assert_close(made(x), convolved(x, weight, stride=stride), atol=1e-4, rtol=1e-4)


@needs_winograd
def test_wrong_tensors_are_refused():
    made, x = make(32, 32, relu=True, padding=1), random_map(1, 32, 16, 16)
    weights = made._weight
    made._weight = weights[:18].contiguous()
    with pytest.raises(RuntimeError, match="weight: must be contiguous float32 of 36864 elements"):
        made(x)
    made._weight = weights
    with pytest.raises(RuntimeError, match="x: must be contiguous float32"):
        made(x.double())
    with pytest.raises(RuntimeError, match="multiples of 16"):
        made(x[..., :8])
    with pytest.raises(RuntimeError, match="out: must not lie in x"):
        made(x, onto=x)


@needs_winograd
def test_a_processor_without_avx2_takes_onednn_or_pytorch(monkeypatch):
    monkeypatch.setenv("DMV_FAST_CPU_ISA", "generic")
    made = make(32, 32, padding=1)
    assert made._run != made._winograd
    x = random_map(1, 32, 6, 6)
    torch.testing.assert_close(made(x), convolved(x, made.weight, made.bias, padding=1), atol=1e-5, rtol=1e-5)
