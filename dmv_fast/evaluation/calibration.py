"""Does the score mean something: scores against the overlap that was reached.

Well calibrated: of the frames that a tracker gives the score s, the share s has an IoU over 0.5.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmv_fast.evaluation.datasets import DatasetError, Sequence, read_rows
from dmv_fast.evaluation.metrics import overlap

GOOD = 0.5  # IoU above which a box counts as right
BINS = 10


@dataclass(frozen=True)
class Reliability:
    """Frames by their score, in bins of equal width over 0..1; NaN in a bin without frames."""

    count: np.ndarray
    """(bins,) frames."""
    score: np.ndarray
    """(bins,) their mean score."""
    iou: np.ndarray
    """(bins,) their mean IoU."""
    good: np.ndarray
    """(bins,) share with an IoU over 0.5."""

    @property
    def error(self) -> float:
        """Expected calibration error: mean over frames of |mean score - share over 0.5| of a frame's bin."""
        filled = self.count > 0
        gaps = np.abs(self.score - self.good)[filled]
        return float(np.average(gaps, weights=self.count[filled])) if filled.any() else float("nan")

    def rows(self) -> list[list[str]]:
        """The table, its head first."""
        lines = [["score", "frames", "mean score", "mean IoU", f"IoU > {GOOD}"]]
        edges = np.linspace(0, 1, len(self.count) + 1)
        for low, high, *figures in zip(
            edges, edges[1:], self.count, self.score, self.iou, self.good, strict=False
        ):
            count, *means = figures
            cells = ["-" if np.isnan(value) else f"{value:.3f}" for value in means]
            lines.append([f"{low:.1f}-{high:.1f}", str(count), *cells])
        return lines

    def table(self) -> str:
        """The table and the error, as they are printed."""
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        text = ["  ".join(map(str.rjust, row, widths)) for row in rows]
        return "\n".join([*text, f"expected calibration error {self.error:.3f}, {self.count.sum()} frames"])


def reliability(scores: np.ndarray, overlaps: np.ndarray, bins: int = BINS) -> Reliability:
    """scores (n,) in 0..1 and IoUs (n,) of the same frames -> Reliability. Frames with a NaN are left out.

    Raises ValueError where the shapes differ or a score is not a probability.
    """
    if scores.shape != overlaps.shape or scores.ndim != 1:
        raise ValueError(f"scores have shape {scores.shape}, overlaps {overlaps.shape}; both must be (n,)")
    known = ~(np.isnan(scores) | np.isnan(overlaps))
    scores, overlaps = scores[known], overlaps[known]
    if ((scores < 0) | (scores > 1)).any():
        raise ValueError(f"scores reach from {scores.min():g} to {scores.max():g}; they must be 0 to 1")
    place = np.minimum((scores * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(place, values, bins) / np.where(count > 0, count, np.nan)

    return Reliability(count, mean(scores), mean(overlaps), mean((overlaps > GOOD).astype(float)))


def read_results(folder: Path, sequences: Iterable[Sequence]) -> tuple[np.ndarray, np.ndarray]:
    """What `dmv-fast eval` left in its --out folder -> scores (n,) and IoUs (n,) of all annotated frames.

    The frame in which the tracker was told the box is left out, and so are frames without a true box: not all
    data sets say whether they are without a target. Raises DatasetError naming a file that is missing or does
    not fit.
    """
    scores, overlaps = [np.empty(0)], [np.empty(0)]
    for sequence in sequences:
        boxes = read_rows(folder / "predictions" / f"{sequence.name}.txt")
        path = folder / "scores" / f"{sequence.name}.txt"
        try:
            said = np.loadtxt(path, delimiter=",", ndmin=2)[:, 0]
        except (OSError, ValueError, IndexError) as error:
            raise DatasetError(f"{path}: not the scores of an evaluation ({error})") from None
        if not len(boxes) == len(said) == len(sequence):
            counts = f"{len(boxes)} boxes and {len(said)} scores"
            raise DatasetError(f"{path}: {counts}; {sequence.name} has {len(sequence)} frames")
        judged = ~np.isnan(sequence.boxes[:, 0])
        judged[: sequence.start + 1] = False
        scores.append(said[judged])
        overlaps.append(overlap(boxes[judged], sequence.boxes[judged]))
    return np.concatenate(scores), np.concatenate(overlaps)


def plot_reliability(found: Reliability, path: Path, title: str) -> None:
    """The reliability diagram as a PNG: share over 0.5 and mean IoU by score, above a histogram of scores."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot((0, 1), (0, 1), color="0.7", linestyle=":", label="calibrated")
    upper.plot(found.score, found.good, marker="o", label=f"share with IoU > {GOOD}")
    upper.plot(found.score, found.iou, marker="s", label="mean IoU")
    upper.set(ylabel="of the frames with that score", ylim=(0, 1), title=f"{title}: ECE {found.error:.3f}")
    upper.legend(loc="lower right")
    bins = len(found.count)
    lower.bar((np.arange(bins) + 0.5) / bins, found.count, width=0.9 / bins, color="0.6")
    lower.set(xlabel="score", ylabel="frames", xlim=(0, 1))
    for axes in (upper, lower):
        axes.set_axisbelow(True)
        axes.grid(True, color="0.9")
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
