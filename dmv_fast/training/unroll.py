"""One training sample through time: predict, write what was predicted, predict again (paper section 3.4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmv_fast.model.dmv import DMV, Prediction
from dmv_fast.training.frozen import FrozenStem
from dmv_fast.training.loss import frame_loss
from dmv_fast.training.recipe import Recipe
from dmv_fast.vision import boxes as box_ops
from dmv_fast.vision.crop import CROP_SIZE, normalise

_DRIFT = 0.3  # standard deviation of the logarithm of a drifted size; twice that, 1.8 times, is the most


class Outcome(NamedTuple):
    """Loss of a batch, and what one wants to see of it. Scalars."""

    loss: Tensor
    centre: Tensor
    box: Tensor
    iou: Tensor
    """Mean IoU of the highest-scored boxes with the truth, where the target is present."""
    score_present: Tensor
    score_absent: Tensor
    """Mean highest score of frames with and without the target."""


class FrameOutcome(NamedTuple):
    """What a batch's frames of one time are, each weighing as much. All (B,)."""

    loss: Tensor
    centre: Tensor
    box: Tensor
    iou: Tensor
    """0 where the target is absent."""
    score: Tensor


class Unroll(nn.Module):
    """The loss of whole samples as one module, so that DDP wraps one forward pass."""

    def __init__(self, model: DMV, recipe: Recipe):
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.precision = getattr(torch, recipe.precision)
        self._stem = FrozenStem(model.backbone, self.precision) if recipe.freeze_stem else model.backbone.stem

    def train(self, mode: bool = True) -> Unroll:
        super().train(mode)
        recipe = self.recipe
        if mode and (recipe.freeze_stem or recipe.pretrained or recipe.start_from):
            # A pretrained stem keeps its statistics: a batch of a few videos has none worth having, and
            # where they were folded into the weights any others would undo the pretraining.
            for layer in stem_layers(self.model):
                layer.eval()
        return self

    def forward(
        self, frames: Tensor, boxes: Tensor, k: int, generator: torch.Generator | None = None
    ) -> Outcome:
        """frames: crops (B, N, 256, 256, 3) uint8 BGR, or layer3 features (B, N, C3, 32, 32);
        boxes (B, N, 4) xywh in crop pixels, NaN where the target is absent. generator: of what is written in
        training; in evaluation mode nothing is drawn.
        """
        return over_time(self.each_frame(frames, boxes, k, generator), boxes)

    def each_frame(
        self, frames: Tensor, boxes: Tensor, k: int, generator: torch.Generator | None = None
    ) -> list[FrameOutcome]:
        """What `forward` takes -> frames 1 to N - 1, each predicted from all frames before it."""
        model, N = self.model, frames.shape[1]
        features = self.features(frames).unflatten(0, frames.shape[:2])  # (B, N, D, H, W)
        drift = self._drift(len(frames), generator).to(boxes.device)
        memory = [model.remember(features[:, 0], *model.exact_maps(boxes[:, 0]))]
        outcomes: list[FrameOutcome] = []
        for t in range(1, N):
            keys = torch.cat([keys for keys, _ in memory], 1)
            values = torch.cat([values for _, values in memory], 1)
            prediction = model(features[:, t], keys, values, k=k, backend=self.recipe.backend)
            loss = frame_loss(prediction, boxes[:, t], model.anchors, box_weight=self.recipe.box_weight)
            outcomes.append(FrameOutcome(*loss, *self._measure(prediction, boxes[:, t])))
            if t + 1 < N:
                scores, deltas = self._written(prediction, boxes[:, t], drift, generator)
                memory.append(model.remember(features[:, t], scores, deltas))
        return outcomes

    def features(self, frames: Tensor) -> Tensor:
        """Crops or layer3 features as in `forward` -> (B * N, D, H, W)."""
        frames = frames.flatten(0, 1)
        if frames.dtype == torch.uint8:
            layer3 = self._stem(normalise(frames).contiguous(memory_format=torch.channels_last))
        else:
            layer3 = frames.contiguous(memory_format=torch.channels_last)
        if not torch.is_autocast_enabled(frames.device.type):
            layer3 = layer3.float()
        return self.model.backbone.tail(layer3)

    @torch.no_grad()
    def _measure(self, prediction: Prediction, box: Tensor) -> tuple[Tensor, Tensor]:
        """IoU (B,) of the highest-scored box with the truth, and its score (B,)."""
        score, best = prediction.logits.float().sigmoid().flatten(1).max(1)
        decoded = self.model.decode(prediction.deltas.float()).flatten(1, 3)  # (B, A * M, 4)
        chosen = decoded.gather(1, best[:, None, None].expand(-1, 1, 4))[:, 0]
        return box_ops.iou(chosen, box).nan_to_num(0), score

    def _drift(self, samples: int, generator: torch.Generator | None) -> Tensor:
        """By how much drifted boxes are too wide and too high, (B, 2)."""
        if not (self.training and self.recipe.write_drifted):
            return torch.ones(samples, 2)
        both, each = (torch.randn(samples, n, generator=generator) for n in (1, 2))
        return (_DRIFT * (both + each / 4).clamp(-2, 2)).exp()

    @torch.no_grad()
    def _written(
        self, prediction: Prediction, box: Tensor, drift: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """What the memory is told of a frame: the prediction; in training at times the truth or a wrong box.

        box (B, 4), drift (B, 2) -> scores (B, A, H, W), deltas (B, A, 4, H, W).
        """
        scores, deltas = prediction.logits.float().sigmoid(), prediction.deltas.float()
        wrong = self.recipe.write_wrong
        truth = wrong + self.recipe.write_truth
        drifted = truth + self.recipe.write_drifted
        if not self.training or drifted == 0:
            return scores, deltas
        draw = torch.rand(len(box), generator=generator).to(box.device)
        place = torch.rand(len(box), 2, generator=generator).to(box.device) * (CROP_SIZE - 64)
        elsewhere = torch.cat([place, box[:, 2:].nan_to_num(64.0)], 1)
        resized = torch.cat([box[:, :2] + box[:, 2:] * (1 - drift) / 2, box[:, 2:] * drift], 1)
        told = torch.where((draw < truth)[:, None], box, resized)
        told = torch.where((draw < wrong)[:, None], elsewhere, told)
        exact_scores, exact_deltas = self.model.exact_maps(told)
        exact = draw < drifted
        return (
            torch.where(exact[:, None, None, None], exact_scores, scores),
            torch.where(exact[:, None, None, None, None], exact_deltas, deltas),
        )


def over_time(outcomes: list[FrameOutcome], boxes: Tensor) -> Outcome:
    """Frames 1 to N - 1 of samples with boxes (B, N, 4) -> what the whole of them is."""
    total, centre, box, iou, score = (torch.stack(column) for column in zip(*outcomes, strict=True))
    N = len(outcomes) + 1
    # Section 3.4: the further from the first frame, the more a loss weighs; the mean weight is 1.
    weight = torch.tensor([2 * t / N for t in range(1, N)], device=total.device)[:, None]
    present = boxes[:, 1:].isfinite().all(-1).T  # (N - 1, B)
    return Outcome(
        (total * weight).mean(), centre.mean().detach(), box.mean().detach(), _mean(iou, present),
        _mean(score, present), _mean(score, ~present),
    )  # fmt: skip


def stem_layers(model: DMV) -> tuple[nn.Module, ...]:
    """The part of the backbone that has pretrained weights."""
    trunk = model.backbone
    return trunk.conv1, trunk.bn1, trunk.layer1, trunk.layer2, trunk.layer3


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the masked values; NaN where none."""
    return (values * mask).sum() / mask.sum()
