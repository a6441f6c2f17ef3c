"""From the head's answer to the target's box and score, in one operator or plainly."""

from __future__ import annotations

import torch
from torch import Tensor

from dmv_fast.model.dmv import Prediction
from dmv_fast.model.pick import PickConfig, pick
from dmv_fast.ops.backends import cpu_operator_runs
from dmv_fast.vision.boxes import decode


def choose_reference(
    prediction: Prediction, anchors: Tensor, window: Tensor, sizes: Tensor, config: PickConfig
) -> tuple[Tensor, Tensor]:
    """Prediction of n crops -> (n, 5): box xywh in crop pixels and score; all scores (n, A, H, W).

    anchors (A, H, W, 4), window (A, H, W), both contiguous; last sizes (n, 2) in crop pixels. All float32.
    """
    scores = prediction.logits.sigmoid()
    chosen = pick(scores, decode(prediction.deltas.movedim(2, -1), anchors), sizes, window, config)
    return torch.cat([chosen.box, chosen.score[:, None]], 1), scores


def choose(
    prediction: Prediction, anchors: Tensor, window: Tensor, sizes: Tensor, config: PickConfig
) -> tuple[Tensor, Tensor]:
    """As `choose_reference`: on a CPU by csrc/choose_cpu.cpp, where some twenty small steps are one."""
    if prediction.logits.device.type != "cpu" or not cpu_operator_runs("choose_box_cpu"):
        return choose_reference(prediction, anchors, window, sizes, config)
    terms = float(config.size_penalty), float(config.window), float(config.smoothing)
    return torch.ops.dmv_fast.choose_box_cpu.default(
        *prediction, anchors, window, sizes.contiguous(), *terms
    )
