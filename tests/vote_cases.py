"""The voting net at random, and what it should be, for the tests of its float32 kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmv_fast.runtime.fold import VoteWeights
from dmv_fast.runtime.parts import Products
from dmv_fast.runtime.vote import Chosen, RowVote, SpreadVote, fused_vote, vote_plain

C = 64
GOOD = {  # arguments of vote_float32_cpu, but for the last
    "values": torch.zeros(1, 7, 13 * C), "null_value": torch.zeros(13 * C),
    "query_part": torch.zeros(1, 9, C),
    "indices": torch.zeros(1, 9, 4, dtype=torch.int32), "scores": torch.ones(1, 9, 4),
    "to_q": torch.zeros(128 * C), "q_bias": torch.zeros(128), "mix": torch.zeros(2 * C * C),
    "mix_bias": torch.zeros(C), "out": torch.zeros(32 * C), "out_scale": None, "out_bias": torch.zeros(32),
}  # fmt: skip


def make_weights(heads: int = 4, value_width: int = 256, seed: int = 0) -> VoteWeights:
    """Folded weights at random, such that what is heard matters as much as the candidate itself."""
    torch.manual_seed(seed)
    mix, mix_bias = torch.randn(C, (heads + 1) * C) / C**0.5, 0.1 * torch.randn(C)
    attention = torch.randn(heads * 16, C) / 8, 0.3 * torch.randn(heads * 16), torch.randn(heads * 16, C) / 8
    out = torch.randn(value_width, C) / 8, 0.1 * torch.randn(value_width)
    into = torch.zeros(C, value_width), torch.zeros(C), torch.zeros(C, C), torch.zeros(C)
    return VoteWeights(*into, *attention, mix - mix.mean(0), mix_bias - mix_bias.mean(), *out, epsilon=1e-5)


def offset_logits(offset: float, k: int) -> tuple[Tensor, VoteWeights]:
    """Rows and weights that add the same number to all of a candidate's logits."""
    weights = make_weights()
    weights.to_q[::16] = weights.to_k[::16] = 0
    weights.q_bias[::16], weights.to_k[::16, 0] = offset, 1
    rows = torch.randn(1, 37, k, C)
    rows[..., 0] = 1
    return rows, weights


def as_candidates(vote: RowVote | SpreadVote, rows: Tensor) -> Tensor | Chosen:
    """Rows (B, M, K, C) the way that vote takes them: values of weight 1, and nothing of their locations."""
    if isinstance(vote, RowVote):
        return rows
    batch, locations, k, _ = rows.shape
    indices = torch.arange(locations * k, dtype=torch.int32).view(1, locations, k).repeat(batch, 1, 1)
    nothing, alike = torch.zeros(batch, locations, C), torch.ones(batch, locations, k)
    return vote.gather(vote.store(rows.flatten(1, 2)), nothing, indices, alike)


def fused_float32(rows: Tensor, weights: VoteWeights, *, products: Products = "own") -> Tensor:
    """By fused_vote, into room with neighbours, which has to leave those alone."""
    width = len(weights.out)
    room = torch.full((*rows.shape[:2], width + 44), torch.nan)
    vote = fused_vote(weights, torch.float32, torch.device("cpu"), products=products)
    vote(as_candidates(vote, rows), room[..., 44:])
    assert room[..., :44].isnan().all()
    return room[..., 44:]


def exactly(rows: Tensor, weights: VoteWeights) -> Tensor:
    """In float64."""
    return vote_plain(rows.double(), VoteWeights(*(w.double() for w in weights[:-1]), weights.epsilon))


def error(found: Tensor, expected: Tensor) -> float:
    """The largest, of the largest number expected; NaN where there is one."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
