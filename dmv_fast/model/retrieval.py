"""Voting-based memory retrieval (paper section 3.2): match, select K candidates, vote."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmv_fast import ops
from dmv_fast.model.voting import VotingNet

SIMILARITIES = ("cosine", "dot")


class MemoryRead(nn.Module):
    """From a query map and the memory bank to one target-aware value a location.

    The similarity is eq. 1: a softmax over [0, q.k_1 .. q.k_N], the leading 0 being the null column, whose
    value is learned (ours). "cosine" (ours): vectors of unit length, the query times a learned temperature;
    "dot": the paper's plain product. The K best columns' values, weighted by their score renormalised over
    the K (ours: the only way for a gradient to reach the similarity), go to the voting network.
    """

    start_temperature = 12.0

    def __init__(self, key_dim: int, value_dim: int, vote_dim: int, heads: int, similarity: str = "cosine"):
        super().__init__()
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity is {similarity!r}; it must be one of {SIMILARITIES}")
        self.similarity = similarity
        self.log_temperature = nn.Parameter(torch.tensor(math.log(self.start_temperature)))
        self.null_value = nn.Parameter(torch.randn(value_dim))
        self.voting = VotingNet(key_dim, value_dim, vote_dim, heads)

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
            rows = ops.gather_candidates(projected, null, query_part, indices, scores)  # (B, M, K, C)
        return vote(rows)
