"""The mean of checkpoints that began as one, which often tracks better than each of them.

`python -m dmv_fast.training.average OUT.safetensors A.safetensors B.safetensors ...`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from dmv_fast.model.dmv import DMV
from dmv_fast.weights import load_model, save_model


def average(models: Sequence[DMV]) -> DMV:
    """The first model, made the mean of all: weights and the batch norms' statistics alike.

    Raises ValueError where there are fewer than two, or not all of one configuration.
    """
    first, *others = models
    if not others:
        raise ValueError("average: one model; it must be two or more")
    for other in others:
        if other.config != first.config:
            raise ValueError(f"average: models must be alike; {other.config} is not {first.config}")
    states = [model.state_dict() for model in models]
    for name, value in states[0].items():
        if value.is_floating_point():  # the others count batches
            value.copy_(torch.stack([state[name].double() for state in states]).mean(0))
    return first


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    parser.add_argument("checkpoints", nargs="+", metavar="A.safetensors", help="or a shipped network's name")
    args = parser.parse_args(argv)
    try:
        save_model(average([load_model(name) for name in args.checkpoints]), args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
