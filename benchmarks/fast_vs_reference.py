"""Does the fast path track as the plain float32 network does? Both over a data set, box against box.

    python benchmarks/fast_vs_reference.py DATASETS/OTB --weights dmv18 --output OUT

Each tracker follows its own boxes, so one early difference may part them for good. What is wanted: a mean IoU
between their boxes of 0.95 in every sequence, and mean AUCs no more than 0.005 apart. What is in --output
already, of the same weights and settings, is not run again; agreement.csv has a row a sequence.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from dmv_fast.evaluation import datasets
from dmv_fast.evaluation.metrics import overlap, score_sequence
from dmv_fast.evaluation.results import load_run
from dmv_fast.evaluation.runner import evaluate
from dmv_fast.evaluation.trackers import DMVFactory
from dmv_fast.files import write_text

WANTED_IOU, WANTED_AUC = 0.95, 0.005


@dataclass(frozen=True)
class Agreement:
    """Two runs over one sequence; the first frame, where both were told the box, is left out."""

    sequence: str
    frames: int
    mean_iou: float
    lowest_iou: float
    parted_at: int | None
    """The first frame from the start with an IoU under 0.5."""
    fast_auc: float
    reference_auc: float


def agreement(sequence: datasets.Sequence, fast: np.ndarray, reference: np.ndarray) -> Agreement:
    """fast, reference: boxes (n, 4) xywh, NaN before the start."""
    ious = overlap(fast[sequence.start + 1 :], reference[sequence.start + 1 :])
    apart = np.flatnonzero(ious < 0.5)
    scores = [score_sequence(boxes, sequence.boxes).auc for boxes in (fast, reference)]
    parted = int(apart[0]) + 1 if len(apart) else None
    return Agreement(sequence.name, len(ious), float(ious.mean()), float(ious.min()), parted, *scores)


def compare(sequences: list[datasets.Sequence], factory: DMVFactory, out: Path, jobs: int) -> list[Agreement]:
    """Run what is not in `out` yet, the fast path and the reference, and compare them."""
    paths = {"fast": factory, "reference": replace(factory, dtype="float32", backend="reference")}
    for name, path in paths.items():
        evaluate(path, sequences, out=out / name, jobs=jobs, progress=True)
    found = []
    for sequence in sequences:
        runs = [load_run(out / name, sequence, path.settings()) for name, path in paths.items()]
        found.append(agreement(sequence, *(run.boxes for run in runs)))
    return found


def table(found: list[Agreement]) -> str:
    """What is printed: a line a sequence, the means, and whether that is enough."""
    lines = [f"{'sequence':<16} frames  mean IoU  lowest  parted at  AUC fast  reference"]
    for a in found:
        parted = "-" if a.parted_at is None else str(a.parted_at)
        lines.append(
            f"{a.sequence:<16} {a.frames:6d}  {a.mean_iou:8.3f}  {a.lowest_iou:6.3f}  {parted:>9}  "
            f"{a.fast_auc:8.3f}  {a.reference_auc:9.3f}"
        )
    iou, fast, reference = (
        np.mean([getattr(a, name) for a in found]) for name in ("mean_iou", "fast_auc", "reference_auc")
    )
    enough = sum(a.mean_iou >= WANTED_IOU for a in found)
    lines.append(f"{'mean':<16} {'':6}  {iou:8.3f}  {'':6}  {'':9}  {fast:8.3f}  {reference:9.3f}")
    lines.append(
        f"mean IoU of {WANTED_IOU} or more in {enough} of {len(found)} sequences; "
        f"mean AUC {abs(fast - reference):.4f} apart (wanted: {WANTED_AUC} at most)"
    )
    return "\n".join(lines)


def write(found: list[Agreement], path: Path) -> None:
    """agreement.csv: a row a sequence."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(asdict(found[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: round(v, 4) if isinstance(v, float) else v for key, v in asdict(a).items()} for a in found
    )
    write_text(path, stream.getvalue())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="the folder of a data set")
    parser.add_argument(
        "--dataset", default="auto", choices=[*datasets.READERS, "auto"], help="its layout (told from it)"
    )
    parser.add_argument("--sequences", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--weights", default="dmv18", help="shipped network or .safetensors file (dmv18)")
    parser.add_argument("-k", type=int, metavar="K", help="candidates a location (the network's own)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ... (auto)")
    parser.add_argument("--dtype", default="auto", help="of the fast path: auto, bfloat16x3 ... (auto)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, a thread each (1)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="predictions and agreement.csv; else none")
    args = parser.parse_args()
    try:
        sequences = datasets.load(args.dataset, args.root, args.sequences)
        factory = DMVFactory(args.weights, args.k, args.device, args.dtype)
        with tempfile.TemporaryDirectory(prefix="dmv_fast_agreement_") as folder:
            out = args.output or Path(folder)
            found = compare(sequences, factory, out, args.jobs)
            if args.output:
                write(found, out / "agreement.csv")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
