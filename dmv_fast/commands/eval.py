"""`dmv-fast eval`: a tracker, or predictions that are there already, against a dataset."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from dmv_fast.commands import DTYPES
from dmv_fast.evaluation import datasets
from dmv_fast.evaluation.datasets import Sequence
from dmv_fast.evaluation.results import Results, score_predictions
from dmv_fast.evaluation.runner import evaluate
from dmv_fast.evaluation.trackers import OPENCV_TRACKERS, DMVFactory, OpenCVFactory
from dmv_fast.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `dmv-fast eval`."""
    parser.add_argument(
        "dataset", metavar="DATASET", choices=[*datasets.READERS, "auto"],
        help=f"{', '.join(datasets.READERS)}, or auto: told from the files",
    )  # fmt: skip
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="the folder of the data set")
    parser.add_argument(
        "--sequences", nargs="+", metavar="NAME", help="only these; @FILE stands for the names in a file"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--tracker", default="dmv", help=f"dmv, or opencv:{'|'.join(OPENCV_TRACKERS)} (dmv)")
    what.add_argument(
        "--predictions", nargs="+", type=Path, metavar="DIR", help="run nothing, score these predictions"
    )
    parser.add_argument("--weights", default="dmv18", help="shipped network or .safetensors file (dmv18)")
    parser.add_argument("-k", "--k", type=int, metavar="K", help="candidates a location (the network's own)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    parser.add_argument("--dtype", default="auto", help=DTYPES)
    parser.add_argument("--backend", default="auto", help="auto, or one that `dmv-fast doctor` lists (auto)")
    parser.add_argument("--no-memory", action="store_true", help="remember the first frame alone")
    parser.add_argument("--nano-dir", type=Path, metavar="DIR", help="the two .onnx files of opencv:nano")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes, a thread each (1: this one)"
    )
    where.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster: HOST:PORT, auto, local (extra: ray)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results (default: eval/ROOT-TRACKER)")
    parser.add_argument("--rerun", action="store_true", help="run again what --out already has")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write the files; the exit code. Bad input is a ValueError."""
    sequences = datasets.load(args.dataset, args.root, args.sequences)
    if args.predictions:
        return _score(args, sequences)
    factory = _factory(args)
    out = args.out or Path("eval") / f"{args.root.resolve().name}-{factory.label}"
    gpu = factory.settings().get("device", "cpu") != "cpu"
    out.mkdir(parents=True, exist_ok=True)  # now, not when the first sequence is done
    results = evaluate(
        factory, sequences, out=out, jobs=args.jobs, ray=args.ray, gpu=gpu, resume=not args.rerun,
        progress=True,
    )  # fmt: skip
    # Where the frames are, for `dmv-fast report`.
    write_text(out / "dataset.json", json.dumps({"dataset": args.dataset, "root": str(args.root.resolve())}))
    print(results.table())
    _plot([results], out)
    print(f"written to {out}")
    return 0


def _score(args: argparse.Namespace, sequences: list[Sequence]) -> int:
    name, count = Counter(folder.resolve().name for folder in args.predictions).most_common(1)[0]
    if count > 1:
        raise ValueError(f"--predictions has {count} folders named {name}; their names must differ")
    if args.out is not None and args.out.resolve() in [folder.resolve() for folder in args.predictions]:
        raise ValueError(f"--out {args.out} is among --predictions; its results.json would be lost")
    scored = [score_predictions(folder, sequences) for folder in args.predictions]
    for results in scored:
        print(results.table())
    if args.out is not None:
        for results in scored:
            results.write(args.out if len(scored) == 1 else args.out / results.tracker)
        _plot(scored, args.out)
        print(f"written to {args.out}")
    return 0


def _factory(args: argparse.Namespace) -> DMVFactory | OpenCVFactory:
    if args.tracker.startswith("opencv:"):
        return OpenCVFactory(args.tracker.removeprefix("opencv:"), args.nano_dir)
    if args.tracker != "dmv":
        known = ", ".join(["dmv", *(f"opencv:{kind}" for kind in OPENCV_TRACKERS)])
        raise ValueError(f"tracker is {args.tracker!r}; known: {known}")
    return DMVFactory(args.weights, args.k, args.device, args.dtype, args.backend, memory=not args.no_memory)


def _plot(results: list[Results], out: Path) -> None:
    try:
        from dmv_fast.evaluation.plots import plot_curves
    except ImportError:
        print("no plots: they need matplotlib (pip install 'dmv-fast[eval]')", file=sys.stderr)
        return
    plot_curves({result.tracker: result.score for result in results}, out)
