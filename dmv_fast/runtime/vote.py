"""The folded voting net: the fused kernel that fits the device, or plain PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dmv_fast import ops
from dmv_fast.ops.backends import cpu_kernel_runs
from dmv_fast.runtime import hardware
from dmv_fast.runtime.fold import VoteWeights, panels, whole_panels
from dmv_fast.runtime.parts import Products, bfloat16_parts

_FUSED_WIDTH = 64  # C that the fused kernels are written for
_FUSED_HEADS = 8  # heads that the float32 kernel always runs; missing ones are zero


def vote_plain(rows: Tensor, weights: VoteWeights) -> Tensor:
    """rows (B, M, K, C) -> retrieved values (B, M, V): what the fused kernels compute."""
    alone = rows.shape[2] == 1  # such a candidate hears nothing
    heard = rows if alone else torch.cat([_heard(rows, weights), rows], -1)
    x = F.linear(heard, weights.mix[:, -heard.shape[-1] :], weights.mix_bias)
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + weights.epsilon)
    return F.linear((x * scale).to(rows.dtype), weights.out, weights.out_bias).amax(2)


def _heard(rows: Tensor, weights: VoteWeights) -> Tensor:
    """(B, M, K, C) -> (B, M, K, H * C): the neighbours' mean by each head's weights, not yet mixed."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (weights.heads, -1)).transpose(2, 3)  # (B, M, H, K, C / 4)

    q, k = split(F.linear(rows, weights.to_q, weights.q_bias)), split(F.linear(rows, weights.to_k))
    logits = (q @ k.mT).float() * math.log(2)  # the folded logits are of powers of 2
    itself = torch.eye(rows.shape[2], dtype=torch.bool, device=rows.device)
    attention = logits.masked_fill(itself, -torch.inf).softmax(-1).to(rows.dtype)
    return (attention @ rows.unsqueeze(2)).transpose(2, 3).flatten(3)


class Chosen(NamedTuple):
    """Candidates that stay where they are; see ops.gather_candidates."""

    values: Tensor
    query_part: Tensor
    indices: Tensor
    scores: Tensor


class WithMean(NamedTuple):
    """Candidates, and the mean of their values by their scores (B, M, V)."""

    candidates: Tensor | Chosen
    mean: Tensor


Candidates = Tensor | Chosen | WithMean


class RowVote:
    """Candidates are gathered as rows, as wide as the memory's values, and vote afterwards.

    run: rows (B, M, K, C) and where the retrieved values go, (B, M, V), rows of any stride.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], object], null: Tensor, backend: str):
        self._run, self._null, self._backend = run, null, backend
        self.width = len(null)

    def store(self, values: Tensor) -> Tensor:
        """Values (B, M, C) as the memory keeps them: (B, M, width)."""
        return values

    def gather(self, values: Tensor, query_part: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
        """values (B, N, width), else as ops.gather_candidates -> what a call takes."""
        return ops.gather_candidates(values, self._null, query_part, indices, scores, backend=self._backend)

    def __call__(self, rows: Candidates, out: Tensor) -> None:
        """What was gathered -> retrieved values out (B, M, V), rows of any stride."""
        assert isinstance(rows, Tensor)
        self._run(rows, out)


class SpreadVote:
    """The memory holds all that the voting net makes of a value by itself, in float32 on a CPU.

    A candidate is a weighted value and what its location adds, so every projection of it is the weighted
    projection of the value, found when that was written, and the location's: at K = 32 three fifths of the
    vote's products are not made in a frame. 13 C numbers a value, for C.

    whole: the last layer, two fifths of what is left, in whole numbers of 16 bits (AVX512_VNNI).
    """

    def __init__(self, weights: VoteWeights, *, whole: bool = False):
        self._spread = spread_rows(weights)
        self._null = self._spread @ weights.null
        self.width = len(self._spread)
        *heads, itself = weights.mix.double().split(_FUSED_WIDTH, 1)
        mix = torch.cat([itself, itself + sum(heads)]).float()
        q_bias = _by_number(weights.q_bias, weights.heads)
        out, out_scale = whole_panels(weights.out) if whole else (panels(weights.out), None)
        self._weights = (
            panels(self._spread[: len(q_bias)]), q_bias, panels(mix), weights.mix_bias,
            out, out_scale, weights.out_bias, weights.epsilon,
        )  # fmt: skip

    def store(self, values: Tensor) -> Tensor:
        """As RowVote's."""
        return F.linear(values, self._spread)

    def gather(self, values: Tensor, query_part: Tensor, indices: Tensor, scores: Tensor) -> Chosen:
        """As RowVote's; nothing is read yet."""
        return Chosen(values, query_part, indices, scores)

    def __call__(self, chosen: Candidates, out: Tensor) -> None:
        """As RowVote's."""
        assert isinstance(chosen, Chosen)
        values, *candidates = chosen
        run = torch.ops.dmv_fast.vote_float32_cpu.default
        out.copy_(run(values, self._null, *candidates, *self._weights))


class MeanBeside:
    """A vote to whose answer the candidates' mean is added (`reader="vote+mean"`).

    The memory holds a value as the vote wants it and, behind that, as it is. null (V,): the null column's.
    """

    def __init__(self, vote: RowVote | SpreadVote, null: Tensor, backend: str):
        self._vote, self._null, self._backend = vote, null, backend
        self.width = vote.width + len(null)

    def store(self, values: Tensor) -> Tensor:
        """Values (B, M, C + V), what the vote stores of a value and the value, -> (B, M, width)."""
        entering, own = self._apart(values)
        return torch.cat([self._vote.store(entering), own], -1)

    def gather(self, values: Tensor, query_part: Tensor, indices: Tensor, scores: Tensor) -> WithMean:
        """As RowVote's."""
        voting, own = self._apart(values)
        nothing = own.new_zeros(*indices.shape[:2], own.shape[-1])
        rows = ops.gather_candidates(own, self._null, nothing, indices, scores, backend=self._backend)
        return WithMean(self._vote.gather(voting, query_part, indices, scores), rows.mean(2))

    def __call__(self, both: Candidates, out: Tensor) -> None:
        """As RowVote's."""
        assert isinstance(both, WithMean)
        self._vote(both.candidates, out)
        out += both.mean

    def _apart(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """What is the vote's, and the values as they are."""
        own = len(self._null)
        return values[..., :-own], values[..., -own:]


Vote = RowVote | SpreadVote | MeanBeside


def spread_rows(weights: VoteWeights) -> Tensor:
    """What the float32 vote makes of a value: (13 C, C), in the order of csrc/vote_cpu.h.

    Queries and keys; what each head passes on, half of its numbers after the other; the value itself.
    """
    *heads, itself = weights.mix.split(_FUSED_WIDTH, 1)
    absent = [torch.zeros_like(itself)] * (_FUSED_HEADS - weights.heads)
    heard = torch.stack([*heads, *absent]).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
    asked = [_by_number(x, weights.heads) for x in (weights.to_q, weights.to_k)]
    return torch.cat([*asked, heard, itself]).contiguous()


def fused_vote(
    weights: VoteWeights, dtype: torch.dtype, device: torch.device, *,
    products: Products = "own", backend: str = "auto",
) -> RowVote | SpreadVote:  # fmt: skip
    """The vote of this device, its weights brought into its layout.

    products: of float32; "bfloat16x3" where the processor has AMX, "int16" where it has AVX512_VNNI.
    backend: of the gather.
    """
    width, value_width = weights.mix.shape[0], weights.out.shape[0]
    fits = width == _FUSED_WIDTH and value_width % 32 == 0 and weights.heads in (2, 4, 6, 8)
    half = fits and dtype != torch.float32
    on_cpu = device.type == "cpu" and not hardware.on_gpu(device)
    run: Callable[[Tensor], Tensor]
    if half and hardware.triton_runs(device):
        from dmv_fast.kernels.vote import make_vote

        return RowVote(make_vote(weights, dtype, device), weights.null.to(device, dtype), backend)
    if half and dtype == torch.bfloat16 and on_cpu and cpu_kernel_runs("vote_cpu"):
        run = _cpu_vote(weights)
    elif fits and products == "bfloat16x3" and not half and on_cpu and cpu_kernel_runs("vote_split_cpu"):
        run = _split_vote(weights)
    elif fits and not half and on_cpu and backend in ("auto", "cpu") and cpu_kernel_runs("vote_float32_cpu"):
        return SpreadVote(weights, whole=products == "int16")
    else:
        local = VoteWeights._make(w.to(device, dtype) if isinstance(w, Tensor) else w for w in weights)
        run = functools.partial(vote_plain, weights=local)
    return RowVote(lambda rows, out: out.copy_(run(rows)), weights.null.to(device, dtype), backend)


def _cpu_vote(weights: VoteWeights) -> Callable[[Tensor], Tensor]:
    run = torch.ops.dmv_fast.vote_cpu.default
    heads = weights.mix.unflatten(1, (-1, _FUSED_WIDTH)).transpose(0, 1)  # (H + 1, C, C)
    attention = weights.to_q.bfloat16(), weights.q_bias, _pairs(weights.to_k)
    mixed = heads.bfloat16().contiguous(), weights.mix_bias
    packed = (*attention, *mixed, _pairs(weights.out), weights.out_bias, weights.epsilon)
    return lambda rows: run(rows, *packed)


def _split_vote(weights: VoteWeights) -> Callable[[Tensor], Tensor]:
    run = torch.ops.dmv_fast.vote_split_cpu.default
    heads = weights.mix.unflatten(1, (-1, _FUSED_WIDTH)).transpose(0, 1).flatten(0, 1)  # ((H + 1) * C, C)
    attention = _tiles_of_parts(weights.to_q), weights.q_bias, _tiles_of_parts(weights.to_k)
    packed = (*attention, _tiles_of_parts(heads), weights.mix_bias, _tiles_of_parts(weights.out))
    return lambda rows: run(rows, *packed, weights.out_bias, weights.epsilon)


def _tiles_of_parts(weight: Tensor) -> Tensor:
    """(out, in) -> bfloat16 (out / 32, in / 32, parts, 2, 16, 16, 2): tiles of 32 in, in pairs, by 16 out."""
    blocks = bfloat16_parts(weight).view(2, len(weight) // 32, 2, 16, -1, 16, 2)
    return blocks.permute(1, 4, 0, 2, 5, 3, 6).contiguous()


def _by_number(weight: Tensor, heads: int) -> Tensor:
    """(H * C/4, ...) -> (C/4 * 8, ...): number 0 of all heads, then number 1, ...; zero past head H."""
    numbers = weight.unflatten(0, (heads, -1)).transpose(0, 1)
    absent = numbers.new_zeros(len(numbers), _FUSED_HEADS - heads, *numbers.shape[2:])
    return torch.cat([numbers, absent], 1).flatten(0, 1)


def _pairs(weight: Tensor) -> Tensor:
    """(out, in) -> bfloat16 (out / 16, in / 2, 16, 2), the right side of a processor's products of pairs."""
    return weight.unflatten(0, (-1, 16)).unflatten(2, (-1, 2)).transpose(1, 2).bfloat16().contiguous()
