"""Which number format a frame runs in, where the user leaves it to us."""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import torch
from torch import Tensor

from dmv_fast.runtime.convolution import Convolution, amx_runs, int16_runs
from dmv_fast.runtime.parts import Products

_WORTH = 0.8  # bfloat16 must take at most this share of float32's time
_REPEATS = 7


class Precision(NamedTuple):
    """What a frame's numbers are."""

    dtype: torch.dtype
    products: Products = "own"
    """How large ones of float32 are made (FastNetwork)."""


_NAMED = {
    "float32": Precision(torch.float32),
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
    "bfloat16x3": Precision(torch.float32, "bfloat16x3"),
    "int16": Precision(torch.float32, "int16"),
}


def precision_of(name: str, device: torch.device) -> Precision:
    """By the name that a user gives it, "auto" among them. Raises ValueError where it is unknown."""
    name = without_auto(name, device)
    if name not in _NAMED:
        raise ValueError(f"dtype is {name!r}; it must be auto or one of {sorted(_NAMED)}")
    return _NAMED[name]


def without_auto(name: str, device: torch.device) -> str:
    """The name itself, or of "auto" what it is on a device."""
    return fast_precision(device) if name == "auto" else name


def fast_precision(device: torch.device) -> str:
    """The name of what "auto" is on a device.

    On a CPU with AMX bfloat16x3: bfloat16 takes two thirds of its time, but its rounding decides between
    look-alikes. With AVX512_VNNI int16: two thirds of float32's time, and the same boxes but for a hundredth.
    On other CPUs float32, unless bfloat16 is timed to be faster (with Winograd's convolution float32 usually
    is).
    """
    if device.type == "cpu" and amx_runs():
        return "bfloat16x3"
    if device.type == "cpu" and int16_runs():
        return "int16"
    return str(fast_dtype(device)).removeprefix("torch.")


@functools.cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """float16 on CUDA; on a CPU bfloat16 or float32, whichever a convolution of the backbone runs faster in.

    Processors that list bfloat16 instructions may be slower with them, so it is timed: about 50 ms, once a
    process. Set the dtype by hand where two runs must agree bit for bit.
    """
    if device.type == "cuda":
        return torch.float16
    half, full = _probe(torch.bfloat16), _probe(torch.float32)
    best = {torch.bfloat16: float("inf"), torch.float32: float("inf")}
    for _ in range(_REPEATS):  # in turns, so that a busy machine slows both
        for dtype, (convolution, x) in ((torch.bfloat16, half), (torch.float32, full)):
            began = time.perf_counter()
            convolution(x)
            best[dtype] = min(best[dtype], time.perf_counter() - began)
    return torch.bfloat16 if best[torch.bfloat16] < _WORTH * best[torch.float32] else torch.float32


def _probe(dtype: torch.dtype) -> tuple[Convolution, Tensor]:
    """layer3's 3 x 3 convolution of 128 channels on a 32 x 32 map, and its input."""
    c, cpu = 128, torch.device("cpu")
    convolution = Convolution(
        torch.full((c, c, 3, 3), 0.01), torch.zeros(c), relu=True, padding=1, dtype=dtype, device=cpu
    )
    return convolution, torch.ones(1, 32, 32, c, dtype=dtype)
