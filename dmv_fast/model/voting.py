"""The voting network (paper section 3.2 "Top-K Voting" and supplement section 6, Fig. 7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VotingNet(nn.Module):
    """K candidates of a location compare notes and agree on one value; blind to their order.

    Linear bottleneck to C, one transformer layer in which nobody listens to himself, linear bottleneck to V,
    max-pool over the candidates. The first bottleneck works on [v_c ; q_i]; it is two linear maps whose sum
    is the one on the concatenation, so that the part on q_i is computed once a location and the part on v_c
    once a memory entry. Parameters at D = V = 256, C = 64, H = 8: 0.14 M.
    """

    def __init__(self, key_dim: int, value_dim: int, vote_dim: int, heads: int = 8):
        super().__init__()
        if vote_dim % 4:
            raise ValueError(f"vote_dim is {vote_dim}; it must be a multiple of 4")
        self.heads, self.head_dim = heads, vote_dim // 4
        self.value_in = nn.Linear(value_dim, vote_dim, bias=False)
        self.query_in = nn.Linear(key_dim, vote_dim)
        self.to_q = nn.Linear(vote_dim, heads * self.head_dim)
        self.to_k = nn.Linear(vote_dim, heads * self.head_dim)
        self.to_v = nn.Linear(vote_dim, heads * vote_dim, bias=False)
        self.message = nn.Linear(heads * vote_dim, vote_dim, bias=False)
        self.merge = nn.Linear(2 * vote_dim, vote_dim)
        self.norm = nn.LayerNorm(vote_dim)
        self.out = nn.Linear(vote_dim, value_dim)

    def forward(self, rows: Tensor) -> Tensor:
        """rows (B, M, K, C), each `value_in(v_c) + query_in(q_i)` -> retrieved values (B, M, V)."""
        x = self.norm(self.merge(torch.cat([rows, self._hear_others(rows)], -1)))
        return self.out(x).amax(2)

    def _hear_others(self, x: Tensor) -> Tensor:
        """Messages between the candidates of a location: (B, M, K, C) -> (B, M, K, C)."""
        B, M, K, C = x.shape
        if K == 1:  # nobody to hear; a softmax over nothing would be NaN (ours, the paper is silent)
            return torch.zeros_like(x)

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(2, 3)

        q, k, v = split(self.to_q(x)), split(self.to_k(x)), split(self.to_v(x))  # (B, M, heads, K, .)
        logits = q @ k.transpose(-1, -2) * self.head_dim**-0.5  # (B, M, heads, K, K)
        itself = torch.eye(K, dtype=torch.bool, device=x.device)
        weights = logits.masked_fill(itself, float("-inf")).softmax(-1)
        return self.message((weights @ v).transpose(2, 3).reshape(B, M, K, self.heads * C))


class CandidateMlp(nn.Module):
    """The paper's "Top-k + MLP" (Table 1): as VotingNet, but each candidate goes its way alone.

    A hidden layer of 5/4 * H * C units stands where the attention was, so that both have as many
    parameters (within 1 % at D = V = 256, C = 64, H = 8).
    """

    def __init__(self, key_dim: int, value_dim: int, vote_dim: int, heads: int = 8):
        super().__init__()
        width = 5 * heads * vote_dim // 4
        self.value_in = nn.Linear(value_dim, vote_dim, bias=False)
        self.query_in = nn.Linear(key_dim, vote_dim)
        self.hidden = nn.Linear(vote_dim, width)
        self.message = nn.Linear(width, vote_dim, bias=False)
        self.merge = nn.Linear(2 * vote_dim, vote_dim)
        self.norm = nn.LayerNorm(vote_dim)
        self.out = nn.Linear(vote_dim, value_dim)

    def forward(self, rows: Tensor) -> Tensor:
        """rows (B, M, K, C), each `value_in(v_c) + query_in(q_i)` -> retrieved values (B, M, V)."""
        message = self.message(F.relu(self.hidden(rows)))
        x = self.norm(self.merge(torch.cat([rows, message], -1)))
        return self.out(x).amax(2)
