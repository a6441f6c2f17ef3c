"""Retrieval: the K highest columns of softmax([0, q.k1 .. q.kN]) for every query (paper section 3.2)."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from dmv_fast.ops.backends import check_backend

MAX_K = 32
MAX_D = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def retrieve_reference(query: Tensor, keys: Tensor, k: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The specification: the whole score matrix, softmax over [null, keys], top-k."""
    logits = query.float() @ keys.float().mT
    if valid is not None:
        absent = torch.arange(keys.shape[1], device=keys.device) >= valid[:, None, None]
        logits = logits.masked_fill(absent, -torch.inf)
    logits = torch.cat([logits.new_zeros(*logits.shape[:2], 1), logits], dim=-1)
    top, columns = logits.topk(min(k, logits.shape[-1]), dim=-1)
    scores = torch.exp(top - logits.logsumexp(dim=-1, keepdim=True))
    indices = torch.where(top == -torch.inf, -1, columns - 1).int()
    missing = (0, k - scores.shape[-1])
    return torch.nn.functional.pad(scores, missing), torch.nn.functional.pad(indices, missing, value=-1)


def key_rows(indices: Tensor, count: int) -> Tensor:
    """indices (B, M, K) -> int64 rows of the (B * count, ...) matrix; null becomes its item's first row."""
    first_row = torch.arange(indices.shape[0], device=indices.device).view(-1, 1, 1) * count
    return indices.clamp(min=0).long() + first_row


def with_contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor itself, as the memory bank always is; a copy only of maps that come channels first."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


_library = torch.library.Library("dmv_fast", "FRAGMENT")
_library.define(
    "retrieve(Tensor query, Tensor keys, int k, Tensor? valid, str backend)"
    " -> (Tensor scores, Tensor indices)"
)
_retrieve = torch.ops.dmv_fast.retrieve.default


@torch.library.impl(_library, "retrieve", "CompositeExplicitAutograd")
def _run(query: Tensor, keys: Tensor, k: int, valid: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    device_type = query.device.type
    backend = check_backend(backend, device_type)
    if valid is not None and device_type == "cpu":  # reading it on another device would wait for that device
        counts = valid.tolist()
        if not all(0 <= n <= keys.shape[1] for n in counts):
            raise ValueError(f"valid: holds {counts}, it must lie in 0..{keys.shape[1]}, as there are keys")
    if backend == "reference" or keys.shape[1] == 0:
        return retrieve_reference(query, keys, k, valid)
    query, keys = with_contiguous_rows(query), with_contiguous_rows(keys)
    valid = None if valid is None else valid.contiguous()
    if backend == "triton":
        from dmv_fast.kernels.retrieve import retrieve as retrieve_triton

        return retrieve_triton(query, keys, k, valid)
    kernel = torch.ops.dmv_fast.retrieve_cpu if backend == "cpu" else torch.ops.dmv_fast.retrieve_cuda
    return kernel.default(query, keys, k, valid)


@torch.library.register_fake("dmv_fast::retrieve", lib=_library)
def _fake(query: Tensor, keys: Tensor, k: int, valid: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[1], k)
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.int32)


def _save(ctx, inputs, output) -> None:
    query, keys, *_ = inputs
    scores, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(query, keys, scores, indices)


def _backward(ctx, grad_scores: Tensor, _grad_indices) -> tuple[Tensor | None, ...]:
    """ds_c/dx_j = s_c (1[c = j] - s_j) over the selected columns c, j; the other columns count as constants.

    That is the exact gradient wherever the scores are used renormalised over the selected columns (the
    softmax's denominator cancels), and wherever every column is selected. It never forms an M x N matrix.
    """
    query, keys, scores, indices = ctx.saved_tensors
    B, N, D = keys.shape
    if N == 0:
        return torch.zeros_like(query), torch.zeros_like(keys), None, None, None
    grad = scores * (grad_scores - (grad_scores * scores).sum(-1, keepdim=True))
    grad = grad.masked_fill(indices < 0, 0.0)  # (B, M, K); the null logit is the constant 0
    rows = key_rows(indices, N)
    bags = (rows.reshape(-1, rows.shape[-1]), keys.reshape(-1, D).float())
    grad_query = torch.nn.functional.embedding_bag(*bags, mode="sum", per_sample_weights=grad.flatten(0, 1))
    spread = (grad.unsqueeze(-1) * query.float().unsqueeze(2)).reshape(-1, D)
    grad_keys = spread.new_zeros(B * N, D).index_add_(0, rows.flatten(), spread)
    grad_query, grad_keys = grad_query.view(query.shape), grad_keys.view(keys.shape)
    return grad_query.to(query.dtype), grad_keys.to(keys.dtype), None, None, None


torch.library.register_autograd("dmv_fast::retrieve", _backward, setup_context=_save, lib=_library)


def _check(query: Tensor, keys: Tensor, k: int, valid: Tensor | int | None) -> None:
    for name, tensor, shape in (("query", query, "(B, M, D)"), ("keys", keys, "(B, N, D)")):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: is a {type(tensor).__name__}, it must be a Tensor of shape {shape}")
        if tensor.dim() != 3:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, it must be {shape}")
    B, _, D = query.shape
    if keys.shape[0] != B or keys.shape[2] != D:
        shape = f"({B}, N, {D})"
        raise ValueError(f"keys: has shape {tuple(keys.shape)}, it must be {shape} as query says")
    if not 1 <= D <= MAX_D:
        raise ValueError(f"query: has shape {tuple(query.shape)}, its last dimension must be 1..{MAX_D}")
    if query.dtype not in DTYPES:
        raise ValueError(f"query: is {query.dtype}, it must be float32, bfloat16 or float16")
    if keys.dtype != query.dtype:
        raise ValueError(f"keys: is {keys.dtype}, it must be {query.dtype} as query is")
    if keys.device != query.device:
        raise ValueError(f"keys: is on {keys.device}, it must be on {query.device} as query is")
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k: is {k}, it must be 1..{MAX_K}")
    if isinstance(valid, int) and not 0 <= valid <= keys.shape[1]:
        raise ValueError(f"valid: is {valid}, it must be 0..{keys.shape[1]}, the number of keys")
    if isinstance(valid, Tensor):
        if valid.dtype != torch.int32 or valid.shape != (B,):
            found = f"{valid.dtype} of shape {tuple(valid.shape)}"
            raise ValueError(f"valid: is {found}, it must be torch.int32 of shape ({B},)")
        if valid.device != query.device:
            raise ValueError(f"valid: is on {valid.device}, it must be on {query.device} as query is")


def _whole(name: str, number: int) -> int:
    """The number itself as an int, numpy's too."""
    if isinstance(number, int | torch.SymInt):
        return number
    try:
        return operator.index(number)
    except TypeError:
        raise ValueError(f"{name}: is {number!r}, it must be a whole number") from None


def retrieve(
    query: Tensor,  # (B, M, D)
    keys: Tensor,  # (B, N, D)
    k: int,
    *,
    valid: Tensor | int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k highest columns of softmax([0, query . keys]) for each query (paper section 3.2).

    Args:
        query: (B, M, D) float32, bfloat16 or float16, D in 1..512.
        keys: (B, N, D), same dtype and device: the memory bank itself, it is not copied (only where the last
            stride of keys or query is not 1, that one is).
        k: columns to return, 1..32.
        valid: how many leading keys exist: None (all), an int, or an int32 tensor (B,) on the same device
            (on a CUDA device its values are the caller's promise: checking them would wait for the device).
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        scores: (B, M, k) float32, highest first; softmax over the null column (logit 0) and all valid keys.
        indices: (B, M, k) int32; -1 is the null column, else 0..N-1. Where fewer than k columns exist the
            rest is score 0, index -1.

    The set is an exact top-k of the float32 logits. Same inputs, same bits out. A row with NaN or +inf among
    its logits has a NaN score, no other row has; a logit of -inf gives the same or is as a key that does not
    exist, depending on the backend. Gradients reach query and keys through the selected columns, see
    ``_backward``.

    Raises:
        ValueError: naming the argument, what it is and what it must be.
    """
    k = _whole("k", k)
    if valid is not None and not isinstance(valid, Tensor):
        valid = _whole("valid", valid)
    _check(query, keys, k, valid)
    if isinstance(valid, int):
        keys, valid = keys[:, :valid], None
    return _retrieve(query, keys, k, valid, backend)
