"""A new backbone that first learns what another network's backbone says.

The read, the vote and the head know the features they were trained on. A backbone that gives the same
features can take them over, and learns to do so from single crops, every location of which teaches: far
quicker than a network that starts anew.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmv_fast.model.dmv import DMV
from dmv_fast.training.frozen import FrozenStem
from dmv_fast.training.unroll import Outcome, Unroll
from dmv_fast.vision.crop import normalise


def take_over(model: DMV, teacher: DMV) -> None:
    """Copy all of the teacher but its backbone into a model of another backbone.

    Raises ValueError where anything but the backbone (and the K in use) differs.
    """
    ours, theirs = model.config, teacher.config
    if replace(theirs, backbone=ours.backbone, candidates=ours.candidates) != ours:
        raise ValueError(f"recipe: model is {ours}; the teacher is {theirs}")
    for name in ("read", "head", "value_encoder"):
        getattr(model, name).load_state_dict(getattr(teacher, name).state_dict())


class Teaching(nn.Module):
    """The loss of crops by how far their features are from the teacher's, as one module for DDP."""

    def __init__(self, unroll: Unroll, teacher: DMV):
        super().__init__()
        self.unroll = unroll
        teacher = teacher.requires_grad_(False).eval()
        stem = FrozenStem(teacher.backbone, unroll.precision)
        self._teacher = lambda crops: teacher.backbone.tail(stem(crops))  # not a part: nothing of it is saved

    def forward(self, frames: Tensor, *_: object) -> Outcome:
        """Takes what Unroll.forward takes; frames: crops (B, N, 256, 256, 3) uint8 BGR.

        Of the outcome only the loss is known: the mean square difference of features whose mean square is 1.
        """
        with torch.no_grad():
            told = self._teacher(normalise(frames.flatten(0, 1)))
        loss = F.mse_loss(self.unroll.features(frames).float(), told.float())
        return Outcome(loss, *[loss.new_tensor(float("nan"))] * (len(Outcome._fields) - 1))
