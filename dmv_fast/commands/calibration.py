"""`dmv-fast calibration`: does the score mean something?"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

from dmv_fast.evaluation import datasets
from dmv_fast.evaluation.calibration import plot_reliability, read_results, reliability
from dmv_fast.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `dmv-fast calibration`."""
    parser.add_argument("dataset", metavar="DATASET", choices=[*datasets.READERS, "auto"])
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="the folder of the data set")
    parser.add_argument("--sequences", nargs="+", metavar="NAME", help="only these, as for `dmv-fast eval`")
    parser.add_argument(
        "--results", type=Path, required=True, metavar="DIR", help="the --out folder of `dmv-fast eval`"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; write reliability.csv and reliability.png beside the results; the exit code."""
    sequences = datasets.load(args.dataset, args.root, args.sequences)
    found = reliability(*read_results(args.results, sequences))
    if not found.count.sum():
        raise ValueError(f"results {args.results}: no annotated frame has a score; this tracker gives none")
    print(found.table())
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(found.rows())
    write_text(args.results / "reliability.csv", stream.getvalue())
    try:
        plot_reliability(found, args.results / "reliability.png", args.results.resolve().name)
    except ImportError:
        print("no plot: it needs matplotlib (pip install 'dmv-fast[eval]')")
    return 0
