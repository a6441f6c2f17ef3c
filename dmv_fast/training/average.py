"""Checkpoints that went on from the same weights, averaged: often better than each of them ("model soups").

    python -m dmv_fast.training.average A.safetensors B.safetensors --data DATA --out MEAN.safetensors

The statistics of batch norms do not average with the weights that they follow. Those that differ between the
checkpoints are measured anew, on crops made from the training data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from dmv_fast.model.dmv import DMV
from dmv_fast.training.data import SampleStream
from dmv_fast.training.recipe import Recipe
from dmv_fast.training.unroll import Unroll, stem_layers
from dmv_fast.weights import load_model, save_model

_FRAMES, _BATCH = 4, 16  # crops of a sample, samples at a time


def average(weights: Sequence[str | Path], *, data: Path, samples: int = 480) -> DMV:
    """The mean of checkpoints of one shape, a network in evaluation mode.

    Args:
        weights: shipped names or .safetensors files.
        data: training folder, from which crops for the batch norms are made.
        samples: how many samples of four crops.

    Raises:
        ValueError: checkpoints of different shapes, or fewer than two.
    """
    if len(weights) < 2:
        raise ValueError(f"weights is {list(weights)}; it takes two checkpoints or more")
    models = [load_model(name) for name in weights]
    for name, model in zip(weights, models, strict=True):
        if model.config != models[0].config:
            raise ValueError(f"{name} is {model.config}; {weights[0]} is {models[0].config}")
    states = [model.state_dict() for model in models]
    mean = {name: torch.stack([s[name].double() for s in states]).mean(0) for name in states[0]}
    stale = [
        name
        for name, module in models[0].named_modules()
        if isinstance(module, nn.BatchNorm2d)
        and not all(torch.equal(s[f"{name}.running_var"], states[0][f"{name}.running_var"]) for s in states)
    ]
    models[0].load_state_dict(mean)
    if stale:
        _measure(models[0], stale, data, samples)
    return models[0].eval()


@torch.no_grad()
def _measure(model: DMV, norms: list[str], data: Path, samples: int) -> None:
    """Mean and variance of these batch norms over that many samples."""
    in_stem = {id(module) for layer in stem_layers(model) for module in layer.modules()}
    frozen = not any(id(model.get_submodule(name)) in in_stem for name in norms)
    unroll = Unroll(model, Recipe(freeze_stem=frozen)).eval()
    for name in norms:
        norm = model.get_submodule(name)
        norm.reset_running_stats()
        norm.momentum = None  # all batches count alike
        norm.train()
    stream = SampleStream(data, seed=0, frames=_FRAMES)
    for first in tqdm(range(0, samples, _BATCH), unit="batch", desc="batch norms"):
        crops = [torch.from_numpy(stream.sample(first + i, _FRAMES).crops) for i in range(_BATCH)]
        with torch.autocast("cpu", unroll.precision):
            unroll.features(torch.stack(crops))


def main() -> int:
    """Command line."""
    summary = "The mean of checkpoints, their batch norms measured anew."
    parser = argparse.ArgumentParser(prog="python -m dmv_fast.training.average", description=summary)
    parser.add_argument("weights", nargs="+", help="shipped names or .safetensors files")
    parser.add_argument("--data", type=Path, required=True, help="training folder")
    parser.add_argument("--samples", type=int, default=480, help="of four crops, for the batch norms (480)")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    args = parser.parse_args()
    try:
        mean = average(args.weights, data=args.data, samples=args.samples)
        print(f"wrote {args.out}: sha256 {save_model(mean, args.out)}")
    except (ValueError, OSError) as error:
        print(f"average: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
