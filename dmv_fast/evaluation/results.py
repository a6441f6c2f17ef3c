"""What an evaluation leaves behind: files of each sequence, the table, CSV and JSON."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np

from dmv_fast.evaluation.datasets import DatasetError, Sequence, read_rows
from dmv_fast.evaluation.metrics import (
    IOU_THRESHOLDS,
    NORMALISED_THRESHOLDS,
    PIXEL_THRESHOLDS,
    Score,
    mean_score,
    score_sequence,
)
from dmv_fast.files import write_text

Value = TypeVar("Value")

TABLE_NOTE = """\
AUC, P20, NP (normalised precision, mean over 0..0.5): last row is the mean over sequences.
AO, SR: first frame left out, last row is the mean over all frames. All as the got10k toolkit has them.
FPS: frames / seconds in the tracker, its start included; 1/t: mean of 1 / seconds; read: reading included."""


@dataclass(frozen=True, eq=False)
class Run:
    """What one tracker did on one sequence of n frames; NaN in the frames before it was started."""

    boxes: np.ndarray
    """(n, 4) xywh, to the four decimals of the prediction file."""
    seconds: np.ndarray
    """(n,) in the tracker's own call; the first one is `init`."""
    scores: np.ndarray
    """(n,) the tracker's confidence, NaN where it has none."""
    found: np.ndarray
    """(n,) bool."""
    wall: float
    """Seconds for all of it, reading the frames included."""


class Speed(NamedTuple):
    """Frames a second, NaN where nothing was timed."""

    fps: float
    """Tracked frames over the seconds spent in the tracker (pytracking's definition)."""
    fps_mean: float
    """Mean over frames of 1 / seconds (got10k's definition, always the higher of the two)."""
    fps_read: float
    """Tracked frames over wall time: reading and decoding included."""


NOT_TIMED = Speed(math.nan, math.nan, math.nan)


def speed(seconds: np.ndarray, wall: float = math.nan) -> Speed:
    """Seconds a frame (NaN or 0 = not timed) and the wall time of all -> Speed."""
    timed = seconds[seconds > 0]
    if not len(timed):
        return NOT_TIMED
    return Speed(float(len(timed) / timed.sum()), float(np.mean(1 / timed)), len(timed) / wall)


@dataclass(frozen=True, eq=False)
class SequenceResult:
    """One row of the table."""

    name: str
    frames: int
    score: Score
    seconds: np.ndarray
    """In the tracker, a frame each; empty where nothing was timed."""
    wall: float
    """Seconds for all, reading included; NaN where not known."""

    @property
    def speed(self) -> Speed:
        """Of this sequence."""
        return speed(self.seconds, self.wall)


@dataclass(frozen=True, eq=False)
class Results:
    """One tracker on a data set."""

    tracker: str
    settings: dict[str, object]
    sequences: tuple[SequenceResult, ...]

    @property
    def score(self) -> Score:
        """All sequences together."""
        return mean_score(result.score for result in self.sequences)

    @property
    def speed(self) -> Speed:
        """`fps` and `fps_read` over all frames; `fps_mean` the mean over sequences, as got10k has it."""
        timed = [result for result in self.sequences if result.speed.fps > 0]
        if not timed:
            return NOT_TIMED
        wall = sum(result.wall for result in timed)
        whole = speed(np.concatenate([result.seconds for result in timed]), wall)
        return whole._replace(fps_mean=float(np.mean([result.speed.fps_mean for result in timed])))

    def rows(self) -> list[dict[str, object]]:
        """A dict a sequence and one more, "mean", with the columns of results.csv."""
        parts = [(r.name, r.frames, r.score, r.speed) for r in self.sequences]
        parts.append(("mean", sum(r.frames for r in self.sequences), self.score, self.speed))
        return [
            {"sequence": name, "frames": frames, "annotated": score.frames, **score.row(), **pace._asdict()}
            for name, frames, score, pace in parts
        ]

    def table(self) -> str:
        """The table that is printed."""
        head = ("sequence", "frames", "AUC", "P20", "NP", "AO", "SR.50", "SR.75", "FPS", "1/t", "read")
        keys = ("auc", "precision_20px", "norm_precision", "ao", "sr_0.50", "sr_0.75")
        lines: list[tuple[str, ...]] = [head]
        for row in self.rows():
            figures = [_cell(row[key], 3) for key in keys] + [_cell(row[key], 1) for key in Speed._fields]
            lines.append((str(row["sequence"]), str(row["frames"]), *figures))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines
        ]
        rule = "-" * len(text[0])
        return "\n".join([self.tracker, text[0], rule, *text[1:-1], rule, text[-1], TABLE_NOTE])

    def write(self, out: Path) -> None:
        """results.csv and results.json (with the curves) into `out`."""
        rows = self.rows()
        stream = io.StringIO()
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _finite(value) for key, value in row.items()} for row in rows)
        write_text(out / "results.csv", stream.getvalue())
        scores = [result.score for result in self.sequences] + [self.score]
        content = {
            "tracker": self.tracker,
            "definitions": "got10k toolkit; docs/metrics.md",
            "settings": self.settings,
            "environment": environment(),
            "thresholds": {
                "iou": IOU_THRESHOLDS.tolist(),
                "pixels": PIXEL_THRESHOLDS.tolist(),
                "normalised": NORMALISED_THRESHOLDS.tolist(),
            },
            "rows": [
                {key: _finite(value) for key, value in row.items()} | {"curves": _curves(score)}
                for row, score in zip(rows, scores, strict=True)
            ],
        }
        write_text(out / "results.json", json.dumps(content, indent=1) + "\n")


def _cell(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) and math.isfinite(value) else "-"


def _finite(value: Value) -> Value | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _curves(score: Score) -> dict[str, list[float | None]]:
    curves = {
        "success": score.success,
        "precision": score.precision_curve,
        "norm_precision": score.normalised_curve,
    }
    return {name: [_finite(v) for v in curve.tolist()] for name, curve in curves.items()}


def environment() -> dict[str, object]:
    """Where the figures come from: versions and processor."""
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "gpu": gpu,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "torch": getattr(torch, "__version__", None),
    }


# ---- files of a sequence ----


def format_boxes(boxes: np.ndarray) -> str:
    """(n, 4) -> the text of a prediction file."""
    return "".join(",".join(f"{v:.4f}" for v in box) + "\n" for box in boxes)


def _paths(out: Path, name: str) -> tuple[Path, Path, Path, Path]:
    predictions = out / "predictions"
    return (
        predictions / f"{name}.txt",
        predictions / "times" / f"{name}_time.txt",
        out / "scores" / f"{name}.txt",
        out / "runs" / f"{name}.json",
    )


def _fingerprint(sequence: Sequence) -> str:
    frames = [sequence.frames] if isinstance(sequence.frames, Path) else sequence.frames
    content = sequence.boxes.tobytes() + "\n".join(path.name for path in frames).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def save_run(out: Path, sequence: Sequence, run: Run, settings: dict[str, object]) -> None:
    """Predictions and times in got10k's layout, scores; last of all the record that says it is done."""
    boxes, times, scores, record = _paths(out, sequence.name)
    write_text(boxes, format_boxes(run.boxes))
    write_text(times, "".join(f"{v:.9f}\n" for v in run.seconds))
    pairs = zip(run.scores, run.found, strict=True)
    write_text(scores, "".join(f"{score:.6f},{found:d}\n" for score, found in pairs))
    content = {"settings": settings, "annotation": _fingerprint(sequence), "wall_seconds": run.wall}
    write_text(record, json.dumps(content, indent=1) + "\n")


def load_run(out: Path, sequence: Sequence, settings: dict[str, object]) -> Run | None:
    """The run saved in `out`, or None where there is none, or one of other settings or another annotation."""
    boxes, times, scores, record = _paths(out, sequence.name)
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        same_settings = content["settings"] == json.loads(json.dumps(settings))
        if not same_settings or content["annotation"] != _fingerprint(sequence):
            return None
        score, found = np.loadtxt(scores, delimiter=",", ndmin=2).T
        seconds, wall = np.loadtxt(times, ndmin=1), float(content["wall_seconds"])
        run = Run(read_rows(boxes), seconds, score, found > 0, wall)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return run if len(run.boxes) == len(run.seconds) == len(run.scores) == len(sequence) else None


def summarise_runs(
    tracker: str, settings: dict[str, object], sequences: Iterable[Sequence], runs: dict[str, Run]
) -> Results:
    """Runs by sequence name -> Results."""
    rows = []
    for sequence in sequences:
        run = runs[sequence.name]
        score = score_sequence(run.boxes, sequence.boxes, sequence.frame_size())
        rows.append(SequenceResult(sequence.name, len(sequence), score, run.seconds, run.wall))
    return Results(tracker, settings, tuple(rows))


def score_predictions(folder: Path | str, sequences: Iterable[Sequence]) -> Results:
    """Score a folder of prediction files without running anything.

    folder: an `--out` folder of ours, or NAME.txt files, or GOT-10k's NAME/NAME_001.txt; x,y,w,h a line, a
    line a frame. Times are read where got10k would have put them. Raises DatasetError naming a file that is
    missing, or has another count of lines than the sequence has frames.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"predictions is {str(folder)!r}; no such folder")
    label = folder.name
    if (folder / "predictions").is_dir():
        folder = folder / "predictions"
    rows = []
    for sequence in sequences:
        path, times = _find_prediction(folder, sequence.name)
        boxes = read_rows(path)
        if len(boxes) != len(sequence):
            raise DatasetError(f"{path}: {len(boxes)} boxes; {sequence.name} has {len(sequence)} frames")
        seconds = np.loadtxt(times, delimiter=",", ndmin=1).ravel() if times.is_file() else np.empty(0)
        score = score_sequence(boxes, sequence.boxes, sequence.frame_size())
        rows.append(SequenceResult(sequence.name, len(sequence), score, seconds, math.nan))
    return Results(label, {"predictions": label}, tuple(rows))


def _find_prediction(folder: Path, name: str) -> tuple[Path, Path]:
    """The prediction file of a sequence and where its times would be."""
    leaf = name.rsplit("/", 1)[-1]
    layouts = (
        (folder / f"{name}.txt", folder / "times" / f"{name}_time.txt"),
        (folder / name / f"{leaf}_001.txt", folder / name / f"{leaf}_time.txt"),
    )
    for path, times in layouts:
        if path.is_file():
            return path, times
    raise DatasetError(f"{layouts[0][0]}: no prediction of {name} (nor {layouts[1][0].relative_to(folder)})")
