"""DMV (paper section 3, Fig. 2): the whole network, top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmv_fast.model.backbone import Backbone
from dmv_fast.model.head import BoxHead
from dmv_fast.model.memory import ValueEncoder
from dmv_fast.model.retrieval import MemoryRead, SoftmaxRead
from dmv_fast.model.voting import CandidateMlp, VotingNet
from dmv_fast.vision import boxes
from dmv_fast.vision.crop import CROP_SIZE


@dataclass(frozen=True)
class DMVConfig:
    """What a checkpoint is built for. DMV18 and DMV50 are `backbone="resnet18"` and `"resnet50"`."""

    backbone: str = "resnet18"
    grid: int = 16
    """H = W: 16, or 32 for the dense variant."""
    key_dim: int = 256
    """D."""
    value_dim: int = 256
    """V."""
    vote_dim: int = 64
    """C."""
    heads: int = 8
    candidates: int = 4
    """K in use unless another is asked for; 1 to 32, not tied to the weights."""
    similarity: str = "cosine"
    """Or "dot", the paper's plain product."""
    anchor_ratios: tuple[float, ...] = (1 / 3, 1 / 2, 1.0, 2.0, 3.0)
    """Height over width of the A anchors of a location."""
    anchor_side: float = 64.0
    reader: str = "vote"
    """Or, to compare with (Table 1): "mlp" (top-k + MLP), "softmax", "mean" (softmax of the K best alone),
    "vote+mean" (both, added). The fast path knows "vote" and "vote+mean"."""
    score_use: str = "renormalised"
    """Or "none", the paper's: candidates do not carry their score (see MemoryRead; fast path: not known)."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("reader", ("vote", "mlp", "softmax", "mean", "vote+mean")),
            ("score_use", ("renormalised", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {allowed}")
        if not 1 <= self.candidates <= 32:
            raise ValueError(f"candidates (K) is {self.candidates}; it must be 1 to 32")


class Prediction(NamedTuple):
    """What the head says of a search crop."""

    logits: Tensor
    """(B, A, H, W): the centre probability before its sigmoid."""
    deltas: Tensor
    """(B, A, 4, H, W): displacements of each anchor."""


class DMV(nn.Module):
    """search crop -> features -> retrieval from memory -> head; and features + prediction -> memory.

    Parameters at the defaults: 14.5 M (resnet18), 27.1 M (resnet50).
    """

    anchors: Tensor  # (A, H, W, 4) xywh in crop pixels

    def __init__(self, config: DMVConfig):
        super().__init__()
        self.config = config
        A = len(config.anchor_ratios)
        unit_scale = config.similarity == "cosine"
        self.backbone = Backbone(
            config.backbone, grid=config.grid, key_dim=config.key_dim, unit_scale=unit_scale
        )
        self.read = _read(config)
        self.head = BoxHead(config.key_dim, config.value_dim, A)
        self.value_encoder = ValueEncoder(config.key_dim, config.value_dim, A)
        anchors = boxes.anchor_grid(config.grid, CROP_SIZE, config.anchor_ratios, config.anchor_side)
        self.register_buffer("anchors", anchors, persistent=False)

    @property
    def locations(self) -> int:
        """M = H * W."""
        return self.config.grid**2

    def forward(
        self, features: Tensor, keys: Tensor, values: Tensor, *,
        k: int | None = None, valid: int | Tensor | None = None, backend: str = "auto",
    ) -> Prediction:  # fmt: skip
        """features (B, D, H, W), keys (B, N, D), values (B, N, V) -> Prediction."""
        k = self.config.candidates if k is None else k
        retrieved = self.read(features, keys, values, k, valid=valid, backend=backend)
        return Prediction(*self.head(features, retrieved))

    def remember(self, features: Tensor, scores: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, M, D) and values (B, M, V) of a frame whose target is where scores and deltas say.

        features (B, D, H, W), scores (B, A, H, W) in [0, 1], deltas (B, A, 4, H, W).
        """
        return self.read.key(features), self.value_encoder(features, scores, deltas)

    def exact_maps(self, box: Tensor) -> tuple[Tensor, Tensor]:
        """Soft representation of a known box (section 3.1): one-hot scores (B, A, H, W), exact deltas.

        box (B, 4) xywh in crop pixels; the score is 1 at the anchor that overlaps it most. A row of NaN
        (no target) gives zero scores and zero deltas.
        """
        known = box.isfinite().all(-1)
        whole_crop = box.new_tensor([0, 0, CROP_SIZE, CROP_SIZE])
        target = torch.where(known[:, None], box, whole_crop)[:, None, None, None]  # (B, 1, 1, 1, 4)
        overlap = boxes.iou(target, self.anchors)  # (B, A, H, W)
        best = overlap.flatten(1).argmax(1)
        scores = torch.zeros_like(overlap).flatten(1).scatter(1, best[:, None], 1.0).view_as(overlap)
        deltas = boxes.encode(target, self.anchors).movedim(-1, 2)  # (B, A, 4, H, W)
        mask = known.to(box.dtype)
        return scores * mask[:, None, None, None], deltas * mask[:, None, None, None, None]

    def decode(self, deltas: Tensor) -> Tensor:
        """Deltas (B, A, 4, H, W) -> boxes (B, A, H, W, 4) xywh in crop pixels."""
        return boxes.decode(deltas.movedim(2, -1), self.anchors)


def _read(config: DMVConfig) -> MemoryRead | SoftmaxRead:
    """The memory read that a configuration asks for."""
    if config.reader in ("softmax", "mean"):
        return SoftmaxRead(config.value_dim, config.similarity, best_only=config.reader == "mean")
    return MemoryRead(
        config.key_dim, config.value_dim, config.vote_dim, config.heads, config.similarity,
        voting=CandidateMlp if config.reader == "mlp" else VotingNet, score_use=config.score_use,
        mean_beside=config.reader == "vote+mean",
    )  # fmt: skip
