"""to_detections in supervision's own video loop, with its annotators and a line counter."""

from __future__ import annotations

import importlib
import sys

import cv2
import numpy as np
import pytest
from adapter_clip import blocks, clip, native, write_video

sv = pytest.importorskip("supervision", reason="supervision (the extra of that name) is not installed")
from dmv_fast import TrackResult  # noqa: E402
from dmv_fast.adapters.supervision import to_detections  # noqa: E402
from dmv_fast.multi import MultiTracker  # noqa: E402


def result(box=(10.5, 20.25, 30.0, 40.0), score=0.75, found=True) -> TrackResult:
    return TrackResult(box=box, score=score, found=found, memory_written=False)


def test_boxes_scores_and_numbers():
    detections = to_detections({7: result(), 3: result(score=0.5), 4: result(found=False)})
    np.testing.assert_array_equal(detections.xyxy, [[10.5, 20.25, 40.5, 60.25]] * 2)
    assert detections.confidence.tolist() == [0.75, 0.5]
    assert detections.tracker_id.tolist() == [7, 3] and detections.class_id.tolist() == [0, 0]
    assert to_detections(result()).tracker_id.tolist() == [0]


def test_a_lost_target_is_no_detection():
    detections = to_detections(result(found=False))
    assert len(detections) == 0 and detections.xyxy.shape == (0, 4)
    assert detections.tracker_id.shape == detections.confidence.shape == (0,)
    assert len(sv.Detections.merge([detections, to_detections(result())])) == 1


def test_the_page_in_supervisions_loop(tmp_path, monkeypatch):
    """The page's script writes a video in which our box is drawn, in every frame but the first."""
    frames, boxes, _ = clip()
    read = write_video(tmp_path / "video.mp4", frames)
    monkeypatch.chdir(tmp_path)
    seen = []

    def spy(results):
        seen.append(to_detections(results))
        return seen[-1]

    (block,) = blocks("supervision", "python")
    monkeypatch.setattr("dmv_fast.adapters.supervision.to_detections", spy)
    exec(block, {})
    expected, scores = native(read, boxes[0])
    xyxy = np.concatenate([expected[:, :2], expected[:, :2] + expected[:, 2:]], 1)
    np.testing.assert_allclose([d.xyxy[0] for d in seen], xyxy[1:], rtol=0, atol=1e-4)
    np.testing.assert_allclose([d.confidence[0] for d in seen], scores[1:], rtol=1e-6)
    capture = cv2.VideoCapture("annotated.mp4")
    assert len([0 for _ in frames if capture.read()[0]]) == len(frames)


def test_traces_labels_and_a_line_counter_follow_the_numbers():
    """Of two targets only one crosses the line; it is counted once."""
    frames, blue, red = clip(18)
    tracker = MultiTracker(capacity=2)
    ids = [tracker.add(frames[0], boxes[0]) for boxes in (blue, red)]
    line = sv.LineZone(sv.Point(140, 239), sv.Point(140, 0), triggering_anchors=[sv.Position.CENTER])
    trace = sv.TraceAnnotator(color_lookup=sv.ColorLookup.TRACK)
    label = sv.LabelAnnotator()
    for frame in frames[1:]:
        detections = to_detections(tracker.track(frame))
        assert detections.tracker_id.tolist() == ids
        line.trigger(detections)
        drawn = trace.annotate(frame.copy(), detections)
        drawn = label.annotate(drawn, detections, [f"#{i}" for i in detections.tracker_id])
        assert (drawn != frame).any()
    assert line.in_count + line.out_count == 1 and blue[-1, 0] + 24 > 140 > blue[0, 0] + 24


def test_without_supervision_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    monkeypatch.delitem(sys.modules, to_detections.__module__)
    with pytest.raises(ImportError, match=r'pip install "dmv-fast\[supervision\]"'):
        importlib.import_module(to_detections.__module__)
