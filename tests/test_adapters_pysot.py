"""DMVTracker in PySOT's loop, which is not on PyPI: its `tools/test.py` is followed from its interface."""

from __future__ import annotations

import numpy as np
from adapter_clip import blocks, clip, native, swapped

from dmv_fast.adapters.pysot import DMVTracker


def one_pass(tracker, video) -> tuple[list, list]:
    """PySOT's one pass: a centre x + w / 2 goes in as a corner whose centre is at x + (w - 1) / 2."""
    boxes, scores = [], []
    for i, (image, (x, y, w, h)) in enumerate(video):
        if i == 0:
            cx, cy = x + w / 2, y + h / 2
            start = [cx - (w - 1) / 2, cy - (h - 1) / 2, w, h]
            tracker.init(image, start)
            boxes.append(start)
            scores.append(None)
        else:
            outputs = tracker.track(image)
            boxes.append(outputs["bbox"])
            scores.append(outputs["best_score"])
    return boxes, scores


def test_pysots_loop_gives_our_own_boxes_and_scores():
    frames, truth, _ = clip()
    boxes, scores = one_pass(DMVTracker(), zip(frames, truth, strict=True))
    expected, expected_scores = native(frames, truth[0])
    np.testing.assert_allclose(boxes[1:], expected[1:], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(scores[1:], expected_scores[1:])
    assert all(isinstance(box, list) and len(box) == 4 for box in boxes)
    assert all("{:.6f}".format(score) for score in scores[1:])  # noqa: UP032 (how PySOT writes them)


def test_bgr():
    frames, truth, _ = clip()
    boxes, _ = one_pass(DMVTracker(), zip(swapped(frames), truth, strict=True))
    assert np.abs(np.array(boxes[1:]) - native(frames, truth[0])[0][1:]).max() > 1


def test_init_starts_over():
    """PySOT keeps one tracker for all videos, and starts it again after a failure."""
    frames, truth, other = clip()
    tracker = DMVTracker()
    one_pass(tracker, zip(frames, other, strict=True))
    boxes, _ = one_pass(tracker, zip(frames, truth, strict=True))
    np.testing.assert_allclose(boxes[1:], native(frames, truth[0])[0][1:], rtol=0, atol=1e-9)


def test_the_page():
    (block,) = blocks("PySOT", "python")
    names: dict = {}
    exec(block, names)
    assert isinstance(names["tracker"], DMVTracker)
