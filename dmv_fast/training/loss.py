"""The loss of one predicted frame (paper section 3.3, eq. 2-5)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dmv_fast.model.dmv import Prediction
from dmv_fast.vision import boxes

POSITIVE_IOU = 0.5
NEGATIVE_IOU = 0.4
NEGATIVES_PER_POSITIVE = (
    3  # ours: at the paper's 1 to 1 negatives stay near 0.5, above the memory's score floor
)
NEGATIVES_WITHOUT_TARGET = 12  # hard negatives of a frame that does not show the target
SMOOTH_L1_BETA = 1 / 9  # as Faster R-CNN's sigma = 3; at 1 an error of 6 pixels would weigh next to nothing


class Labels(NamedTuple):
    """What each anchor should say. All (B, A, H, W) but `deltas`."""

    positive: Tensor
    negative: Tensor
    deltas: Tensor
    """(B, A, 4, H, W); meaningful at positive anchors."""


class Loss(NamedTuple):
    """Per-frame losses (B,): the total and its two parts."""

    total: Tensor
    centre: Tensor
    box: Tensor


def label(box: Tensor, anchors: Tensor) -> Labels:
    """Anchors against the true box (eq. 3): positive over IoU 0.5 and always the best, negative under 0.4.

    box (B, 4) xywh in crop pixels, a row of NaN where the target is absent; anchors (A, H, W, 4).
    """
    known = box.isfinite().all(-1)
    target = torch.where(known[:, None], box, torch.ones_like(box))[:, None, None, None]  # (B, 1, 1, 1, 4)
    overlap = boxes.iou(target, anchors) * known[:, None, None, None]
    best = overlap.flatten(1).amax(1).clamp(min=1e-6)[:, None, None, None]
    positive = (overlap > POSITIVE_IOU) | (overlap >= best)
    negative = (overlap < NEGATIVE_IOU) & ~positive
    return Labels(positive, negative, boxes.encode(target, anchors).movedim(-1, 2))


def hard_negatives(logits: Tensor, labels: Labels) -> Tensor:
    """The highest-scored negatives of each frame, a fixed number for each positive: mask (B, A, H, W)."""
    positives = labels.positive.flatten(1).sum(1)
    wanted = torch.where(positives > 0, positives * NEGATIVES_PER_POSITIVE, NEGATIVES_WITHOUT_TARGET)
    scores = logits.detach().masked_fill(~labels.negative, -torch.inf).flatten(1)
    rank = scores.argsort(1, descending=True).argsort(1)
    return (rank < wanted[:, None]).view_as(labels.negative) & labels.negative


def frame_loss(prediction: Prediction, box: Tensor, anchors: Tensor, *, box_weight: float = 1.0) -> Loss:
    """Eq. 2 for each of B frames, divided by its number of positive anchors.

    prediction: logits (B, A, H, W), deltas (B, A, 4, H, W); box (B, 4) xywh in crop pixels, NaN where absent.
    """
    labels = label(box, anchors)
    logits = prediction.logits.float()
    negative = hard_negatives(logits, labels)
    x = logits.sigmoid()
    # Eq. 4, with log(x) and log(1 - x) taken from the logit so that neither overflows.
    focal = labels.positive * (1 - x) ** 2 * -F.logsigmoid(logits) + negative * x**2 * -F.logsigmoid(-logits)
    count = labels.positive.flatten(1).sum(1).clamp(min=1)
    centre = focal.flatten(1).sum(1) / count
    distance = F.smooth_l1_loss(
        prediction.deltas.float(), labels.deltas, beta=SMOOTH_L1_BETA, reduction="none"
    ).sum(2)  # (B, A, H, W), eq. 5
    box_loss = torch.where(labels.positive, distance, 0.0).flatten(1).sum(1) / count
    return Loss(centre + box_weight * box_loss, centre, box_loss)
