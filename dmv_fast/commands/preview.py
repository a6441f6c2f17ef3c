"""`dmv-fast preview`: a contact sheet of what a recipe's network sees, and how fast a core makes it."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dmv_fast.files import replaced_when_complete

if TYPE_CHECKING:
    import numpy as np

    from dmv_fast.training.data import SampleStream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `dmv-fast preview`."""
    parser.add_argument("recipe", type=Path, help="YAML file (see recipes/)")
    parser.add_argument("--data", type=Path, required=True, help="the folder that training is given")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), help="PNG or JPEG (sheet.png)")
    parser.add_argument("--samples", type=int, default=12, help="rows of the sheet (12)")
    parser.add_argument("--kind", help="only samples of this kind, paste or got10k for instance")
    parser.add_argument("--held-out", action="store_true", help="the part kept for validation")
    parser.add_argument("--seed", type=int, help="instead of the recipe's")


def run(args: argparse.Namespace) -> int:
    """Draw the samples, write the sheet, print the pace. Bad input is a ValueError."""
    import cv2

    from dmv_fast.training.data import contact_sheet, recipe_stream
    from dmv_fast.training.recipe import load_recipe

    if args.samples < 1:
        raise ValueError(f"samples is {args.samples}; it must be at least 1")
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"out is {str(args.out)!r}; its name must end in .png or .jpg")
    recipe = load_recipe(args.recipe)
    if args.seed is not None:
        recipe = replace(recipe, seed=args.seed)
    stream = recipe_stream(recipe, args.data, held_out=args.held_out)
    if args.kind is not None and args.kind not in stream.mix:
        raise ValueError(f"kind is {args.kind!r}; this recipe has {', '.join(stream.mix)} here")
    cv2.setNumThreads(1)
    numbers = _first(stream, args.kind, args.samples)
    samples = [stream[number] for number in numbers]
    began = time.process_time()
    for number in numbers:  # once more, for the pace: now every clip is in memory, as it is in a long run
        stream[number]
    pace = len(numbers) / (time.process_time() - began)
    _write(args.out, contact_sheet(samples, [f"{number} {stream.kind(number)}" for number in numbers]))
    total = sum(stream.mix.values())
    shares = ", ".join(f"{kind} {weight / total:.2f}" for kind, weight in stream.mix.items())
    print(f"{len(samples)} samples of {stream.frames} frames ({shares})")
    print(f"{pace:.1f} samples a second on one core")
    print(f"wrote {args.out}")
    return 0


def _first(stream: SampleStream, kind: str | None, count: int) -> list[int]:
    """Numbers of the stream's first samples of a kind."""
    numbers: list[int] = []
    index = 0
    while len(numbers) < count:
        if kind is None or stream.kind(index) == kind:
            numbers.append(index)
        index += 1
    return numbers


def _write(out: Path, sheet: np.ndarray) -> None:
    import cv2

    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_when_complete(out, keep_suffix=True) as partial:
        if not cv2.imwrite(str(partial), sheet):
            raise OSError(f"out: cannot write {out}")
