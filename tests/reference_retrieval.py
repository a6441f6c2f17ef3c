"""What the tests of the retrieval operators share: the backends that run here, and brute force in float64."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from torch import Tensor

from dmv_fast import ops

CPU_ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "generic")
BACKENDS = ("reference", *(f"cpu:{isa}" for isa in CPU_ISAS), "triton", "cuda")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require(backend: str) -> None:
    """Skips the calling test where the backend cannot run here."""
    name, _, isa = backend.partition(":")
    reason = ops.available_backends(device_of(backend))[name]
    if reason is None and isa and isa not in torch.ops.dmv_fast.cpu_isas().split():
        reason = f"this processor has no {isa}"
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def device_of(backend: str) -> str:
    return "cpu" if backend.startswith("cpu") else DEVICE


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """Triton's interpreter multiplies the bit patterns of bfloat16."""
    interpreted = backend == "triton" and DEVICE == "cpu"
    return (torch.float32, torch.float16) if interpreted else DTYPES


@contextlib.contextmanager
def instruction_set(backend: str):
    """The CPU kernels read their choice from the environment at each call."""
    before = os.environ.pop("DMV_FAST_CPU_ISA", None)
    if ":" in backend:
        os.environ["DMV_FAST_CPU_ISA"] = backend.partition(":")[2]
    try:
        yield
    finally:
        os.environ.pop("DMV_FAST_CPU_ISA", None)
        if before is not None:
            os.environ["DMV_FAST_CPU_ISA"] = before


def retrieve(backend: str, query: Tensor, keys: Tensor, k: int, valid: Tensor | int | None = None):
    """``ops.retrieve`` on the backend's device; the results on the CPU."""
    device = device_of(backend)
    with instruction_set(backend):
        scores, indices = ops.retrieve(
            query.to(device), keys.to(device), k,
            valid=valid.to(device) if isinstance(valid, Tensor) else valid, backend=backend.partition(":")[0],
        )  # fmt: skip
    return scores.cpu(), indices.cpu()


def exact_logits(query: Tensor, keys: Tensor, valid: Tensor | int | None = None) -> Tensor:
    """(B, M, 1 + N) float64: the null column, then the keys; those that do not exist are -inf."""
    logits = query.double() @ keys.double().mT
    if valid is not None:
        valid = torch.as_tensor(valid).view(-1, 1, 1)
        logits = logits.masked_fill(torch.arange(keys.shape[1]) >= valid, -torch.inf)
    return torch.cat([logits.new_zeros(*logits.shape[:2], 1), logits], dim=-1)


def rounding(query: Tensor, keys: Tensor) -> Tensor:
    """(B, M, 1): how far a float32 sum of D products may lie from the exact one, in whatever order."""
    size = (query.double().abs() @ keys.double().abs().mT).amax(-1, keepdim=True) if keys.shape[1] else 0.0
    return query.shape[-1] * 2.0**-24 * torch.as_tensor(size) + 1e-30


def assert_exact(query, keys, k, scores, indices, valid=None) -> None:
    """A true top-k within float32's rounding, its scores the softmax of all columns, the rest padded."""
    logits = exact_logits(query, keys, valid)
    assert scores.shape == indices.shape == (*query.shape[:2], k)
    assert scores.dtype == torch.float32 and indices.dtype == torch.int32
    columns = (logits > -torch.inf).sum(-1, keepdim=True)  # existing columns, null included
    real = torch.arange(k) < columns
    assert (indices.masked_fill(real, -1) == -1).all() and (scores.masked_fill(real, 0) == 0).all()
    assert (indices >= -1).all() and (indices + 1 < columns).all()

    chosen = torch.zeros(logits.shape).scatter_add_(-1, indices.long() + 1, real.expand_as(scores).float())
    assert chosen.max() <= 1, "a column was returned twice"
    tolerance = 2 * rounding(query, keys)
    top = logits.gather(-1, indices.long() + 1).masked_fill(~real, -torch.inf)
    kth = logits.sort(dim=-1, descending=True).values[..., :k][..., -1:]
    assert (top >= torch.where(real, kth - tolerance, -torch.inf)).all(), "not among the k highest"
    assert (top[..., :-1] >= top[..., 1:] - tolerance).all() and (scores[..., :-1] >= scores[..., 1:]).all()

    expected = torch.exp(top - logits.logsumexp(-1, keepdim=True))
    error = (scores.double() - expected).abs()
    assert (error <= (2 * tolerance + 1e-5) * expected + 1e-30).all(), f"scores are off by {error.max():.2e}"
