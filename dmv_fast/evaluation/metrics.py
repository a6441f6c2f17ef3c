"""Scores of one-pass evaluation, as the got10k toolkit computes them (others beside it: docs/metrics.md).

Boxes are (n, 4) float64 xywh. Frames whose annotation is NaN are left out; a prediction of NaN is a miss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

IOU_THRESHOLDS = np.linspace(0, 1, 21)
PIXEL_THRESHOLDS = np.arange(0, 51)
NORMALISED_THRESHOLDS = np.linspace(0, 0.5, 51)


def overlap(boxes: np.ndarray, truth: np.ndarray, bound: tuple[int, int] | None = None) -> np.ndarray:
    """Intersection over union -> (n,) in [0, 1]. bound: (width, height) that both are first cut to."""
    if bound is not None:
        boxes, truth = _cut(boxes, bound), _cut(truth, bound)
    left_top = np.maximum(boxes[:, :2], truth[:, :2])
    right_bottom = np.minimum(boxes[:, :2] + boxes[:, 2:], truth[:, :2] + truth[:, 2:])
    inter = np.prod(np.maximum(right_bottom - left_top, 0), axis=1)
    union = np.prod(boxes[:, 2:], axis=1) + np.prod(truth[:, 2:], axis=1) - inter
    return np.nan_to_num(np.clip(inter / (union + np.finfo(float).eps), 0.0, 1.0))


def _cut(boxes: np.ndarray, bound: tuple[int, int]) -> np.ndarray:
    """The toolkit's cut: corner, then size, so that a box over the left or top border is moved inside whole,
    not trimmed. Kept as it is, for the scores to agree."""
    corner = np.clip(boxes[:, :2], 0, bound)
    return np.concatenate([corner, np.clip(boxes[:, 2:], 0, np.asarray(bound) - corner)], axis=1)


def centre_error(boxes: np.ndarray, truth: np.ndarray, *, normalised: bool = False) -> np.ndarray:
    """Distance of the centres -> (n,): pixels, or shares of the true width and height (1 px or more each)."""
    shift = boxes[:, :2] + (boxes[:, 2:] - 1) / 2 - (truth[:, :2] + (truth[:, 2:] - 1) / 2)
    if normalised:
        shift = shift / np.maximum(1.0, truth[:, 2:])
    return np.nan_to_num(np.sqrt(np.sum(np.power(shift, 2), axis=1)), nan=np.inf)


@dataclass(frozen=True)
class Score:
    """What a tracker reached on one sequence, or on several (`mean_score`). NaN: nothing was measured."""

    success: np.ndarray
    """(21,) share of frames with IoU > t, t = 0, 0.05 .. 1."""
    precision_curve: np.ndarray
    """(51,) share of frames with a centre error <= 0 .. 50 px."""
    normalised_curve: np.ndarray
    """(51,) share of frames with a normalised centre error <= 0, 0.01 .. 0.5."""
    overlaps: np.ndarray
    """IoU behind AO and SR: cut to the frame, first frame left out."""
    frames: int
    """Frames that count for the curves: the annotated ones."""

    @property
    def auc(self) -> float:
        """Area under the success curve."""
        return float(np.mean(self.success))

    @property
    def precision(self) -> float:
        """Precision at 20 px."""
        return float(self.precision_curve[20])

    @property
    def normalised_precision(self) -> float:
        """Mean of the normalised precision curve over 0 .. 0.5 (got10k, LaSOT)."""
        return float(np.mean(self.normalised_curve))

    @property
    def normalised_precision_at_20(self) -> float:
        """The normalised precision curve at 0.20 (pytracking, PySOT)."""
        return float(self.normalised_curve[20])

    @property
    def ao(self) -> float:
        """Average overlap."""
        return float(np.mean(self.overlaps)) if len(self.overlaps) else float("nan")

    def success_rate(self, threshold: float) -> float:
        """Share of the overlaps of AO above a threshold: SR0.5, SR0.75."""
        return float(np.mean(self.overlaps > threshold)) if len(self.overlaps) else float("nan")

    def row(self) -> dict[str, float]:
        """Every figure by its name in the tables."""
        return {
            "auc": self.auc,
            "precision_20px": self.precision,
            "norm_precision": self.normalised_precision,
            "norm_precision_at_0.2": self.normalised_precision_at_20,
            "ao": self.ao,
            "sr_0.50": self.success_rate(0.5),
            "sr_0.75": self.success_rate(0.75),
        }


def score_sequence(boxes: np.ndarray, truth: np.ndarray, bound: tuple[int, int] | None = None) -> Score:
    """Predicted and true boxes (n, 4) -> Score. bound: (width, height) of the frame, for AO and SR.

    The first annotated frame is where the tracker was told the box: it counts as a perfect prediction for the
    curves, as in the OTB, LaSOT and UAV123 protocols, and not at all for AO and SR, as in GOT-10k's.
    Raises ValueError where the counts of boxes differ.
    """
    boxes, truth = np.asarray(boxes, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if boxes.shape != truth.shape or truth.ndim != 2 or truth.shape[1] != 4:
        raise ValueError(f"boxes have shape {boxes.shape}, truth {truth.shape}; both must be (n, 4)")
    known = ~np.isnan(truth).any(axis=1)
    boxes, truth = boxes[known], truth[known]
    if len(truth) < 2:  # the given box alone measures nothing
        nothing = np.full(51, np.nan)
        return Score(np.full(21, np.nan), nothing, nothing, np.empty(0), len(truth))
    boxes[0] = truth[0]
    return Score(
        success=np.mean(overlap(boxes, truth)[:, None] > IOU_THRESHOLDS, axis=0),
        precision_curve=np.mean(centre_error(boxes, truth)[:, None] <= PIXEL_THRESHOLDS, axis=0),
        normalised_curve=np.mean(
            centre_error(boxes, truth, normalised=True)[:, None] <= NORMALISED_THRESHOLDS, axis=0
        ),
        overlaps=overlap(boxes[1:], truth[1:], bound),
        frames=len(truth),
    )


def mean_score(scores: Iterable[Score]) -> Score:
    """Several sequences as one, as got10k has it: curves are means over sequences, AO and SR over frames.

    Sequences without a measured frame are left out.
    """
    kept = [score for score in scores if len(score.overlaps)]
    if not kept:
        return score_sequence(np.empty((0, 4)), np.empty((0, 4)))
    return Score(
        success=np.mean([score.success for score in kept], axis=0),
        precision_curve=np.mean([score.precision_curve for score in kept], axis=0),
        normalised_curve=np.mean([score.normalised_curve for score in kept], axis=0),
        overlaps=np.concatenate([score.overlaps for score in kept]),
        frames=sum(score.frames for score in kept),
    )
