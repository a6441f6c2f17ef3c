"""The paper's ablations on our data (docs/ablations.md).

    python -m benchmarks.ablations train --weights W --data TRAIN --cache RUN/cache   readers on a frozen net
    python -m benchmarks.ablations track --weights W --data TRAIN --dev DEV --jobs 2  all else, then report
    python -m benchmarks.ablations compare NAME=FILE ... --data TRAIN --dev DEV       other checkpoints, added
    python -m benchmarks.ablations report                                             tables and plots

All of it goes on where it was interrupted. --runs (runs/ablations) holds what is large; the CSV files and
pictures go to benchmarks/results/ablations, the tables into docs/ablations.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import cv2
import torch

from benchmarks.ablations import background, readers, report, track
from benchmarks.ablations.settings import COMPARED, READER, compared_of, readers_of, settings_of
from benchmarks.ablations.unseen import write_unseen
from dmv_fast.evaluation import datasets
from dmv_fast.evaluation.results import environment
from dmv_fast.files import write_text
from dmv_fast.runtime.load import load_network
from dmv_fast.runtime.precision import fast_precision
from dmv_fast.weights import find, sha256

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        {"train": _train, "track": _track, "compare": _compare, "report": _report}[args.command](args)
    except (ValueError, OSError) as error:
        print(f"ablations: error: {error}", file=sys.stderr)
        return 2
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    summary = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=summary)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the readers of Table 1 side by side")
    tracking = commands.add_parser("track", help="run every setting, then the report")
    comparing = commands.add_parser("compare", help="run other checkpoints, add them to the tables")
    tables = commands.add_parser("report", help="tables and plots from the CSV files")
    for command in (train, tracking):
        command.add_argument("--weights", default="dmv18", help="shipped name or .safetensors file (dmv18)")
    for command in (train, tracking, comparing):
        command.add_argument("--data", type=Path, required=command is train, help="training folder")
        command.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="large files")
    for command in (tracking, comparing, tables):
        command.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/ablations")
        command.add_argument("--doc", type=Path, default=ROOT / "docs/ablations.md")
    train.add_argument("--cache", type=Path, help="a training run's feature cache, not drawn samples")
    train.add_argument("--samples", type=int, default=2000)
    train.add_argument("--held-out", type=int, default=readers.HELD_OUT, help="held-out samples")
    train.add_argument("--readers", default=",".join(readers.VARIANTS), help="comma-separated")
    train.add_argument("--seeds", default="0,1,2", help="comma-separated")
    train.add_argument("--steps", type=int, default=readers.RECIPE.steps)
    dtypes = ("float32", "bfloat16", "bfloat16x3", "int16")
    for command in (tracking, comparing):
        command.add_argument("--dev", type=Path, required=True, help="folder of sequences, any known layout")
        command.add_argument("--sequences", nargs="+", help="only these of --dev")
        command.add_argument("--dtype", choices=dtypes, help="default: what auto is")
        command.add_argument("--jobs", type=int, default=1)
    comparing.add_argument(
        "checkpoints", nargs="+", metavar="NAME=FILE",
        help="compared with the first of them (grid 16 and 32 of one recipe, say)",
    )  # fmt: skip
    return parser.parse_args(argv)


def _train(args: argparse.Namespace) -> None:
    names, seeds = args.readers.split(","), [int(seed) for seed in args.seeds.split(",")]
    if unknown := set(names) - set(readers.VARIANTS):
        raise ValueError(f"readers: {sorted(unknown)} not known; there are {list(readers.VARIANTS)}")
    train_on, held_out = readers.prepare(
        args.weights, args.runs, data=args.data, cache=args.cache, samples=args.samples,
        held_out=args.held_out,
    )  # fmt: skip
    for seed in seeds:  # all readers of a seed before the next seed: an early end still compares all
        for name in names:
            readers.train(
                args.weights, args.runs, train_on=train_on, held_out=held_out, variant=name, seed=seed,
                steps=args.steps,
            )  # fmt: skip


def _track(args: argparse.Namespace) -> None:
    dtype, data = args.dtype or fast_precision(CPU), _data(args)
    trained = readers_of(args.runs, dtype)
    chosen = settings_of(args.weights, dtype)
    rows = track.track_all(chosen + trained, data, args.runs / "tracked", jobs=args.jobs)
    ran = {row["setting"] for row in rows}
    kept = [row for row in _rows_so_far(args) if _of_others(row["setting"]) and row["setting"] not in ran]
    write_text(args.results / "sequences.csv", readers.as_csv(rows + kept))
    _write_readers(args.runs, args.results)
    looks = _write_background(args, dtype, data["dev"], chosen[0].k)
    notes = {run.name: Path(run.weights).with_name("run.json").read_text() for run in trained}
    page = args.results / "about.json"
    before = json.loads(page.read_text())["readers"] if page.is_file() else {}
    about = {
        "weights": Path(args.weights).stem, "sha256": sha256(find(args.weights)), "dtype": dtype,
        "jobs": args.jobs, "frames": {name: sum(map(len, s)) for name, s in data.items()}, "looks": looks,
        "bootstrap": {"resamples": report.RESAMPLES, "seed": report.SEED}, "environment": environment(),
        "readers": before | {name: json.loads(note) for name, note in notes.items()},
    }  # fmt: skip
    write_text(page, json.dumps(about, indent=1) + "\n")
    _report(args)


def _compare(args: argparse.Namespace) -> None:
    dtype = args.dtype or fast_precision(CPU)
    others = compared_of(args.checkpoints, dtype)
    rows = track.track_all(others, _data(args), args.runs / "tracked", jobs=args.jobs)
    kept = [row for row in _rows_so_far(args) if not row["setting"].startswith(COMPARED)]
    write_text(args.results / "sequences.csv", readers.as_csv(kept + rows))
    _report(args)


def _data(args: argparse.Namespace) -> dict[str, list[datasets.Sequence]]:
    """The sequences to run, by the name of their set."""
    data = {"dev": datasets.load("auto", args.dev, args.sequences)}
    if args.data is not None:
        data["held-out"] = datasets.load("otb", write_unseen(args.data, args.runs / "held-out"))
    return data


def _rows_so_far(args: argparse.Namespace) -> list[dict[str, str]]:
    path = args.results / "sequences.csv"
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _of_others(setting: str) -> bool:
    """Whether a row is of other weights than those tracked: it stays where this run has none of its own."""
    return setting.startswith((COMPARED, READER))


def _write_readers(runs: Path, results: Path) -> None:
    """The held-out figures of every trained reader in one file."""
    rows = []
    for path in sorted(runs.glob("*/held_out.csv")):
        variant, seed = path.parent.name.rsplit("-", 1)
        with open(path, newline="") as file:
            rows += [{"variant": variant, "seed": seed, **row} for row in csv.DictReader(file)]
    if rows:
        write_text(results / "readers.csv", readers.as_csv(rows))


def _write_background(
    args: argparse.Namespace, dtype: str, sequences: list[datasets.Sequence], k: int
) -> int:
    network = load_network(args.weights, CPU, dtype, "auto")
    looks = list(background.look_at(network, sequences, k))
    rows = [row for look in looks for row in look.rows]
    if rows:
        write_text(args.results / "background.csv", readers.as_csv(rows))
        cv2.imwrite(str(args.results / "background.png"), background.picture(looks))
    return len(looks)


def _report(args: argparse.Namespace) -> None:
    report.write_report(args.results, args.doc)
    print(f"written to {args.results} and {args.doc}")


if __name__ == "__main__":
    sys.exit(main())
