"""A network for the tests of whole frames, here and on a GPU."""

from __future__ import annotations

import torch

from dmv_fast.model.dmv import DMV, DMVConfig


def lively(config: DMVConfig) -> DMV:
    """Random weights whose boxes and scores differ from place to place."""
    torch.manual_seed(0)
    model = DMV(config).eval().requires_grad_(False)
    for branch in (model.head.centre, model.head.box):
        branch[-1].weight.mul_(20)
        branch[-1].bias.normal_()
    return model
