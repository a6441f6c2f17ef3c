"""supervision: what was tracked, as `sv.Detections` for its annotators and zones (extra `supervision`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dmv_fast.tracker import TrackResult

try:
    import supervision as sv
except ImportError as error:
    raise ImportError(
        'the supervision adapter needs the package supervision: pip install "dmv-fast[supervision]"'
    ) from error


def to_detections(results: TrackResult | Mapping[int, TrackResult]) -> sv.Detections:
    """One frame's targets that were found, as detections.

    Args:
        results: of FastDMVTracker.track (the target's number is then 0), or of MultiTracker.track.

    Returns:
        xyxy (n, 4) float32, confidence (n,) the centre probability, tracker_id (n,) the targets' numbers and
        class_id (n,) zeros, which the annotators want for their colours. A lost target is left out.
    """
    targets = {0: results} if isinstance(results, TrackResult) else results
    found = {number: result for number, result in targets.items() if result.found}
    boxes = np.array([result.box for result in found.values()], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return sv.Detections(
        xyxy=boxes,
        confidence=np.array([result.score for result in found.values()], np.float32),
        class_id=np.zeros(len(found), int),
        tracker_id=np.array(list(found), int),
    )
