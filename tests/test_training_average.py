"""The mean of checkpoints."""

from __future__ import annotations

import pytest
import torch
from photographs import write_photographs
from torch import nn

from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.training.average import average
from dmv_fast.weights import load_model, save_model

SMALL = DMVConfig(key_dim=64, value_dim=32, vote_dim=16, heads=2)


@pytest.fixture
def pair(tmp_path):
    """Two networks that differ but for their stem."""
    paths = []
    for seed in (0, 1):
        torch.manual_seed(0)
        model = DMV(SMALL)
        torch.manual_seed(seed)
        for part in (model.backbone.layer4, model.backbone.neck4, model.head):
            for p in part.parameters():
                p.data.add_(0.01 * torch.randn_like(p))
            for norm in part.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.running_var.uniform_(0.5, 2.0)
        paths.append(tmp_path / f"{seed}.safetensors")
        save_model(model, paths[-1], dtype=torch.float32)
    return paths


def test_weights_are_averaged_and_statistics_measured(pair, tmp_path):
    write_photographs(tmp_path / "data")
    mean = average(pair, data=tmp_path / "data", samples=16)
    a, b, found = (model.state_dict() for model in (*map(load_model, pair), mean))
    for name in a:
        if "layer4" in name and "running" in name:
            assert not torch.allclose(found[name], a[name]) and not torch.allclose(found[name], b[name])
        elif a[name].is_floating_point() and "running" not in name:
            torch.testing.assert_close(found[name], (a[name] + b[name]) / 2)
    stem = "backbone.layer2.0.bn1.running_var"
    assert torch.equal(found[stem], a[stem])
    assert not any(module.training for module in mean.modules())


def test_only_checkpoints_of_one_shape(pair, tmp_path):
    other = tmp_path / "other.safetensors"
    save_model(DMV(DMVConfig(key_dim=64, value_dim=64, vote_dim=16, heads=2)), other)
    with pytest.raises(ValueError, match="value_dim=64"):
        average([pair[0], other], data=tmp_path)
    with pytest.raises(ValueError, match="two checkpoints"):
        average(pair[:1], data=tmp_path)
