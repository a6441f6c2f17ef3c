"""Candidate gather: retrieved values, weighted and joined with the query's part (paper section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from dmv_fast.ops.backends import available_backends, check_backend
from dmv_fast.ops.retrieve import key_rows, with_contiguous_rows


def gather_reference(
    values: Tensor, null_value: Tensor, query_part: Tensor, indices: Tensor, scores: Tensor
) -> Tensor:
    """The specification: rows = K * scores / sum(scores) * value + query_part."""
    weights = scores * (scores.shape[-1] / scores.sum(-1, keepdim=True))
    selected = _select(values, indices)
    selected = torch.where((indices < 0).unsqueeze(-1), null_value, selected).float()
    return (weights.unsqueeze(-1) * selected + query_part.float().unsqueeze(2)).to(values.dtype)


def _select(values: Tensor, indices: Tensor) -> Tensor:
    """(B, M, K, C): each index's value, anything for the null column."""
    if values.shape[1] == 0:
        return values.new_zeros(*indices.shape, values.shape[2])
    rows = key_rows(indices, values.shape[1]).flatten()
    return values.reshape(-1, values.shape[2]).index_select(0, rows).view(*indices.shape, values.shape[2])


_library = torch.library.Library("dmv_fast", "FRAGMENT")
_library.define(
    "gather_candidates(Tensor values, Tensor null_value, Tensor query_part, Tensor indices, Tensor scores,"
    " str backend) -> Tensor"
)
_gather = torch.ops.dmv_fast.gather_candidates.default


@torch.library.impl(_library, "gather_candidates", "CompositeExplicitAutograd")
def _run(
    values: Tensor, null_value: Tensor, query_part: Tensor, indices: Tensor, scores: Tensor, backend: str
) -> Tensor:
    backend = check_backend(backend, values.device.type)
    if backend == "cuda":  # the C++ side has no gather of its own
        backend = "triton" if available_backends("cuda")["triton"] is None else "reference"
    values, query_part = with_contiguous_rows(values), with_contiguous_rows(query_part)
    arguments = (values, null_value.contiguous(), query_part, indices.contiguous(), scores.contiguous())
    if backend == "cpu":
        return torch.ops.dmv_fast.gather_candidates_cpu.default(*arguments)
    if backend == "triton":
        from dmv_fast.kernels.gather import gather_candidates as gather_triton

        return gather_triton(*arguments)
    return gather_reference(*arguments)


@torch.library.register_fake("dmv_fast::gather_candidates", lib=_library)
def _fake(
    values: Tensor, null_value: Tensor, query_part: Tensor, indices: Tensor, scores: Tensor, backend: str
) -> Tensor:
    return values.new_empty(*indices.shape, values.shape[2])


def _save(ctx, inputs, output) -> None:
    values, null_value, query_part, indices, scores, _backend = inputs
    ctx.save_for_backward(values, null_value, indices, scores)
    ctx.query_dtype = query_part.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """w_c = K s_c / S, S = sum s: dv = w_c g, dq = sum_c g, ds_c = K / S (g.v_c - sum_j w_j g.v_j / K)."""
    values, null_value, indices, scores = ctx.saved_tensors
    B, N, C = values.shape
    k = scores.shape[-1]
    grad = grad.float()  # (B, M, K, C)
    scale = k / scores.sum(-1, keepdim=True)
    is_null = indices < 0
    null_row = B * N  # one row more than there are values
    rows = key_rows(indices, N).masked_fill(is_null, null_row).flatten()
    weighted = ((scores * scale).unsqueeze(-1) * grad).reshape(-1, C)
    grad_table = grad.new_zeros(null_row + 1, C).index_add_(0, rows, weighted)
    grad_values = grad_table[:-1].view(values.shape).to(values.dtype)
    grad_null = grad_table[-1].to(null_value.dtype)
    along = torch.where(is_null, grad @ null_value.float(), (grad * _select(values, indices)).sum(-1))
    grad_scores = scale * (along - (along * scores).sum(-1, keepdim=True) * (scale / k))
    return grad_values, grad_null, grad.sum(2).to(ctx.query_dtype), None, grad_scores, None


torch.library.register_autograd("dmv_fast::gather_candidates", _backward, setup_context=_save, lib=_library)


def _check(values: Tensor, null_value: Tensor, query_part: Tensor, indices: Tensor, scores: Tensor) -> None:
    if values.dim() != 3:
        raise ValueError(f"values: has shape {tuple(values.shape)}, it must be (B, N, C)")
    if indices.dim() != 3:
        raise ValueError(f"indices: has shape {tuple(indices.shape)}, it must be (B, M, K)")
    B, _, C = values.shape
    M = indices.shape[1]
    for name, tensor, shape in (
        ("null_value", null_value, (C,)),
        ("query_part", query_part, (B, M, C)),
        ("indices", indices, (B, M, indices.shape[2])),
        ("scores", scores, tuple(indices.shape)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, it must be {shape}")
    for name, tensor, dtype in (
        ("null_value", null_value, values.dtype),
        ("query_part", query_part, values.dtype),
        ("indices", indices, torch.int32),
        ("scores", scores, torch.float32),
    ):
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: is {tensor.dtype}, it must be {dtype}")
        if tensor.device != values.device:
            raise ValueError(f"{name}: is on {tensor.device}, it must be on {values.device} as values is")


def gather_candidates(
    values: Tensor,  # (B, N, C)
    null_value: Tensor,  # (C,)
    query_part: Tensor,  # (B, M, C)
    indices: Tensor,  # (B, M, K)
    scores: Tensor,  # (B, M, K)
    *,
    backend: str = "auto",
) -> Tensor:
    """The voting net's input rows, straight from what ``retrieve`` returned (paper section 3.2).

    rows[b, m, c] = K * scores[b, m, c] / sum(scores[b, m]) * value + query_part[b, m], where value is
    values[b, indices[b, m, c]], or null_value for index -1. float32 inside.

    Args:
        values: (B, N, C) float32, bfloat16 or float16.
        null_value: (C,), query_part: (B, M, C): dtype and device of values.
        indices: (B, M, K) int32, -1 or 0..N-1. scores: (B, M, K) float32.
        backend: as for ``retrieve``.

    Returns:
        rows: (B, M, K, C), dtype of values. Differentiable in everything but indices.

    Raises:
        ValueError: naming the argument, what it is and what it must be (shapes, dtypes, devices, backend).
        RuntimeError: backend "cpu" only: an index outside -1..N-1. The others do not look: it is the caller's
            promise, as checking would wait for the device.
    """
    _check(values, null_value, query_part, indices, scores)
    return _gather(values, null_value, query_part, indices, scores, backend)
