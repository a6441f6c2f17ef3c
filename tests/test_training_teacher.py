"""A new backbone that learns another's features, and the stem that is not trained."""

from __future__ import annotations

import math

import pytest
import torch

from dmv_fast.model.backbone import Backbone
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.training.frozen import FrozenStem
from dmv_fast.training.recipe import Recipe
from dmv_fast.training.teach import Teaching, take_over
from dmv_fast.training.unroll import Unroll

SMALL = {"key_dim": 64, "value_dim": 32, "vote_dim": 16, "heads": 2}


def with_statistics(module: torch.nn.Module) -> torch.nn.Module:
    """Batch norms as after training, none of them an identity."""
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2.0)
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.normal_(0, 0.2)
    return module


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_frozen_stem_is_the_stem(name):
    torch.manual_seed(0)
    backbone = with_statistics(Backbone(name, key_dim=64)).eval()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    crops = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = backbone.stem(crops)
    found = FrozenStem(backbone, torch.float32)(crops)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_teaching_brings_the_features_closer():
    torch.manual_seed(0)
    model, teacher = DMV(DMVConfig(**SMALL)), with_statistics(DMV(DMVConfig(**SMALL)))
    unroll = Unroll(model, Recipe(freeze_stem=True, precision="float32"))
    teaching = Teaching(unroll, teacher).train()
    crops = torch.randint(0, 255, (1, 2, 256, 256, 3), dtype=torch.uint8)
    optimiser = torch.optim.Adam([p for p in model.backbone.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(6):
        outcome = teaching(crops)
        optimiser.zero_grad()
        outcome.loss.backward()
        optimiser.step()
        losses.append(outcome.loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert math.isnan(outcome.iou)
    assert not [name for name, _ in teaching.named_parameters() if "teacher" in name]


def test_a_teacher_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="the teacher is"):
        take_over(DMV(DMVConfig(backbone="resnet50")), DMV(DMVConfig(vote_dim=32)))


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher": "dmv18"},
        {"teacher_steps": 5},
        {"teacher": "dmv18", "teacher_steps": 5, "freeze_stem": True, "cached_samples": 8},
    ],
)
def test_half_a_teacher_is_refused(settings):
    with pytest.raises(ValueError, match="teacher"):
        Recipe(**settings)
