"""Checkpoints that went on from the same weights, averaged: often better than each of them ("model soups").

    python -m dmv_fast.training.average A.safetensors B.safetensors --out MEAN.safetensors

The statistics of batch norms are averaged with the weights. To measure them anew on training crops brought
nothing (benchmarks/results/notes.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dmv_fast.model.dmv import DMV
from dmv_fast.weights import load_model, save_model


def average(weights: Sequence[str | Path]) -> DMV:
    """The mean of checkpoints of one shape (shipped names or .safetensors files), in evaluation mode.

    Raises ValueError for checkpoints of different shapes, or fewer than two.
    """
    if len(weights) < 2:
        raise ValueError(f"weights is {list(weights)}; it takes two checkpoints or more")
    models = [load_model(name) for name in weights]
    for name, model in zip(weights, models, strict=True):
        if model.config != models[0].config:
            raise ValueError(f"{name} is {model.config}; {weights[0]} is {models[0].config}")
    states = [model.state_dict() for model in models]
    mean = {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}
    models[0].load_state_dict(mean)
    return models[0]


def main() -> int:
    """Command line."""
    summary = "The mean of checkpoints that went on from the same weights."
    parser = argparse.ArgumentParser(prog="python -m dmv_fast.training.average", description=summary)
    parser.add_argument("weights", nargs="+", help="shipped names or .safetensors files")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    args = parser.parse_args()
    try:
        print(f"wrote {args.out}: sha256 {save_model(average(args.weights), args.out)}")
    except (ValueError, OSError) as error:
        print(f"average: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
