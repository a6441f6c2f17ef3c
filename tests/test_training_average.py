"""The mean of checkpoints."""

from __future__ import annotations

import pytest
import torch

from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.training.average import average
from dmv_fast.weights import load_model, save_model

SMALL = DMVConfig(key_dim=64, value_dim=32, vote_dim=16, heads=2)


def random_checkpoint(path, seed: int, config: DMVConfig = SMALL):
    torch.manual_seed(seed)
    model = DMV(config)
    model.backbone.bn1.running_var.uniform_(0.5, 2.0)
    save_model(model, path, dtype=torch.float32)
    return path


def test_weights_and_statistics_are_averaged(tmp_path):
    files = [random_checkpoint(tmp_path / f"{seed}.safetensors", seed) for seed in range(3)]
    states = [load_model(file).state_dict() for file in files]
    mean = average(files)
    for name, found in mean.state_dict().items():
        if found.is_floating_point():
            torch.testing.assert_close(found, sum(state[name] for state in states) / 3)
    assert not mean.training


def test_only_checkpoints_of_one_shape(tmp_path):
    one = random_checkpoint(tmp_path / "one.safetensors", 0)
    other = random_checkpoint(tmp_path / "other.safetensors", 0, DMVConfig(value_dim=64, heads=2))
    with pytest.raises(ValueError, match="value_dim=64"):
        average([one, other])
    with pytest.raises(ValueError, match="two checkpoints"):
        average([one])
