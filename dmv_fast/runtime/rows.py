"""What is done to rows of features between convolutions: a kernel each, or plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dmv_fast.ops.backends import cpu_operator_runs
from dmv_fast.runtime import hardware

_EPSILON = 1e-6  # Backbone.tail's


def join(left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor, *, unit_scale: bool) -> None:
    """[left, right] + bias, at unit mean square where unit_scale says so, into out: the end of the backbone.

    left, right (B, H, W, D / 2); bias (D,) float32 or None; out (B, H, W, D), rows evenly spaced.
    """
    if hardware.triton_runs(out.device):
        from dmv_fast.kernels.rows import join as join_triton

        return join_triton(left, right, bias, out, _EPSILON if unit_scale else None)
    if bias is None and _ours(out, "join_rows_cpu"):
        epsilon = _EPSILON if unit_scale else -1.0
        return torch.ops.dmv_fast.join_rows_cpu.default(left.contiguous(), right.contiguous(), out, epsilon)
    return join_plain(left, right, bias, out, unit_scale=unit_scale)


def join_plain(left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor, *, unit_scale: bool) -> None:
    """What `join` computes."""
    half = left.shape[-1]
    out[..., :half] = left if bias is None else left + bias[:half]
    out[..., half:] = right if bias is None else right + bias[half:]
    if unit_scale:
        mean_square = torch.linalg.vector_norm(out, dim=-1, keepdim=True, dtype=torch.float32).square_()
        out *= torch.rsqrt_(mean_square.div_(out.shape[-1]).add_(_EPSILON))


def with_length(rows: Tensor, length: float) -> Tensor:
    """rows (B, M, D), of any stride, brought to that length."""
    if hardware.triton_runs(rows.device):
        from dmv_fast.kernels.rows import with_length as with_length_triton

        return with_length_triton(rows, length)
    if _ours(rows, "rows_with_length_cpu"):
        return torch.ops.dmv_fast.rows_with_length_cpu.default(rows, length)
    return with_length_plain(rows, length)


def with_length_plain(rows: Tensor, length: float) -> Tensor:
    """What `with_length` computes."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
    return (rows * (length / norm.clamp(min=1e-12))).to(rows.dtype)


def _ours(rows: Tensor, operator: str) -> bool:
    """Whether that operator of csrc/rows_cpu.cpp takes such rows."""
    return (rows.device.type, rows.dtype) == ("cpu", torch.float32) and cpu_operator_runs(operator)


class Projection:
    """rows (B, M, D), of any stride -> rows @ weight.T + bias (B, M, C).

    weight (C, D), bias (C,). epsilon: the rows are first divided by their root mean square, as a layer norm
    does it; None: they are taken as they are.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, *, dtype: torch.dtype, device: torch.device,
        epsilon: float | None = None,
    ):  # fmt: skip
        powers = all(size >= 16 and size & (size - 1) == 0 for size in weight.shape)
        self._fused = hardware.triton_runs(device) and dtype != torch.float32 and powers
        self._weight = weight.to(device, dtype).contiguous()
        self._bias = bias.to(device, torch.float32 if self._fused else dtype)
        self._epsilon = epsilon

    def __call__(self, rows: Tensor) -> Tensor:
        if self._fused:
            from dmv_fast.kernels.rows import project

            return project(rows, self._weight, self._bias, self._epsilon)
        if self._epsilon is not None:
            scale = torch.rsqrt(rows.float().square().mean(-1, keepdim=True) + self._epsilon)
            rows = (rows * scale).to(rows.dtype)
        return F.linear(rows, self._weight, self._bias)
