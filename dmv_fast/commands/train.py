"""`dmv-fast train`: train a network by a recipe, or go on with a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dmv_fast.training.loop import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `dmv-fast train`."""
    parser.add_argument("recipe", type=Path, help="YAML file (see recipes/)")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with annotations.jsonl, images/, clips/"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument(
        "--minutes", type=float, help="stop after this much training time, resumed runs counted"
    )
    parser.add_argument(
        "--pause-after", type=float, metavar="MINUTES",
        help="stop after this much of this call, to go on with --resume; the learning rate's schedule stays",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, help="processes that prepare samples")


def run(args: argparse.Namespace) -> int:
    """Train; the exit code."""
    try:
        model = train(
            args.recipe, data=args.data, out=args.out, minutes=args.minutes, resume=args.resume,
            device=args.device, workers=args.workers, pause_after=args.pause_after,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"stopped; go on with --resume --out {args.out}", file=sys.stderr)
        return 130
    print(f"wrote {model}")
    return 0
