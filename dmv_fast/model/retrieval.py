"""Voting-based memory retrieval (paper section 3.2): match, select K candidates, vote."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmv_fast import ops
from dmv_fast.model.voting import CandidateMlp, VotingNet

SIMILARITIES = ("cosine", "dot")


class Similarity(nn.Module):
    """Queries and keys from feature maps, and the null column's value: what every read begins with.

    The similarity is eq. 1: a softmax over [0, q.k_1 .. q.k_N], the leading 0 being the null column, whose
    value is learned (ours). "cosine" (ours): vectors of unit length, the query times a learned temperature;
    "dot": the paper's plain product.
    """

    start_temperature = 12.0

    def __init__(self, value_dim: int, similarity: str = "cosine"):
        super().__init__()
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity is {similarity!r}; it must be one of {SIMILARITIES}")
        self.similarity = similarity
        self.log_temperature = nn.Parameter(torch.tensor(math.log(self.start_temperature)))
        self.null_value = nn.Parameter(torch.randn(value_dim))

    def query(self, features: Tensor) -> Tensor:
        """Feature map (B, D, H, W) -> query (B, M, D)."""
        tokens = features.flatten(2).transpose(1, 2)
        if self.similarity == "dot":
            return tokens
        return F.normalize(tokens, dim=-1) * self.log_temperature.exp()

    def key(self, features: Tensor) -> Tensor:
        """Feature map (B, D, H, W) -> keys (B, M, D), as the memory holds them."""
        tokens = features.flatten(2).transpose(1, 2)
        return tokens if self.similarity == "dot" else F.normalize(tokens, dim=-1)


class MemoryRead(Similarity):
    """From a query map and the memory bank to one target-aware value a location.

    The K best columns' values go to the voting network, or for comparison (Table 1) to an MLP that sees each
    by itself. score_use "renormalised" (ours): each value is weighted by its score renormalised over the K,
    the only way for a gradient to reach the similarity; "none": the values as they are, as in the paper.
    mean_beside (ours, not in the shipped checkpoints): the candidates' mean by their scores is added to what
    they vote for, so that a vote has to learn only what it knows better (docs/ablations.md).
    """

    def __init__(
        self, key_dim: int, value_dim: int, vote_dim: int, heads: int, similarity: str = "cosine", *,
        voting: type[VotingNet] | type[CandidateMlp] = VotingNet, score_use: str = "renormalised",
        mean_beside: bool = False,
    ):  # fmt: skip
        super().__init__(value_dim, similarity)
        self.score_use, self.mean_beside = score_use, mean_beside
        self.voting = voting(key_dim, value_dim, vote_dim, heads)

    def forward(
        self, features: Tensor, keys: Tensor, values: Tensor, k: int, *,
        valid: int | Tensor | None = None, backend: str = "auto",
    ) -> Tensor:  # fmt: skip
        """features (B, D, H, W), keys (B, N, D), values (B, N, V) -> retrieved values (B, M, V)."""
        vote = self.voting
        query = self.query(features).to(keys.dtype)
        projected = vote.value_in(values)  # (B, N, C)
        null = vote.value_in(self.null_value).to(projected.dtype)
        query_part = vote.query_in(features.flatten(2).transpose(1, 2))  # (B, M, C)
        with torch.autocast(features.device.type, enabled=False):  # the operators choose their precision
            scores, indices = ops.retrieve(query, keys, k, valid=valid, backend=backend)
            if self.score_use == "none":
                scores = torch.ones_like(scores)
            rows = ops.gather_candidates(  # (B, M, K, C)
                projected, null, query_part, indices, scores, backend=backend
            )
            weighted = None
            if self.mean_beside:
                nothing = values.new_zeros(*indices.shape[:2], values.shape[-1])
                null = self.null_value.to(values.dtype)
                weighted = ops.gather_candidates(values, null, nothing, indices, scores, backend=backend)
        return vote(rows) if weighted is None else vote(rows) + weighted.mean(2)


class SoftmaxRead(Similarity):
    """The space-time memory network's read (Table 1, "Softmax"): the mean of all values by their scores.

    No vote. best_only: of the K best columns alone, the null column one of them, as a vote has them; else k
    is accepted, as MemoryRead has it, and means nothing. So does backend.
    """

    def __init__(self, value_dim: int, similarity: str = "cosine", *, best_only: bool = False):
        super().__init__(value_dim, similarity)
        self.best_only = best_only

    def forward(
        self, features: Tensor, keys: Tensor, values: Tensor, k: int, *,
        valid: int | Tensor | None = None, backend: str = "auto",
    ) -> Tensor:  # fmt: skip
        """features (B, D, H, W), keys (B, N, D), values (B, N, V) -> retrieved values (B, M, V)."""
        if isinstance(valid, int):
            keys, values, valid = keys[:, :valid], values[:, :valid], None
        query = self.query(features)
        with torch.autocast(features.device.type, enabled=False):
            logits = query.float() @ keys.float().mT  # (B, M, N)
            if valid is not None:
                absent = torch.arange(keys.shape[1], device=keys.device) >= valid[:, None, None]
                logits = logits.masked_fill(absent, -torch.inf)
                values = values.masked_fill(absent.mT, 0.0)
            logits = F.pad(logits, (1, 0))  # the null column leads, its logit is 0
            if self.best_only:
                least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            weights = logits.softmax(-1)
            rows = weights[..., 1:].to(values.dtype) @ values
            return rows + (weights[..., :1] * self.null_value).to(values.dtype)
