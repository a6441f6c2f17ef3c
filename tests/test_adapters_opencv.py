"""TrackerDMV against cv2.Tracker: the same script with either, and what scripts rely on."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from adapter_clip import ROOT, blocks, clip, native, swapped, write_video

from dmv_fast.adapters.opencv import TrackerDMV, TrackerDMV_create, TrackerDMV_Params
from dmv_fast.tracker import TrackerConfig

SCRIPT = ROOT / "examples" / "opencv_swap.py"
# opencv-python 5 left CSRT to opencv-contrib-python; TrackerMIL is in both and is made in the same way
THEIRS = "TrackerCSRT" if hasattr(cv2, "TrackerCSRT") else "TrackerMIL"


@pytest.fixture(scope="module")
def made():
    return clip()


def run_script(source: str, video: Path, box: np.ndarray, capsys) -> list[list[str]]:
    """What the example prints, its source given: one row a frame."""
    module = ModuleType("swap")
    exec(compile(source, "swap", "exec"), module.__dict__)
    assert module.main(str(video), tuple(int(v) for v in box)) == 0
    return [line.split(",") for line in capsys.readouterr().out.split()]


def test_one_line_makes_an_opencv_script_ours(made, tmp_path, capsys):
    frames, boxes, _ = made
    read = write_video(tmp_path / "video.mp4", frames)
    ours = SCRIPT.read_text()
    line = "tracker = TrackerDMV.create()  # was: tracker = cv2.TrackerCSRT.create()"
    assert ours.count(line) == 1
    theirs = ours.replace(line, f"tracker = cv2.{THEIRS}.create()")
    rows = {"theirs": run_script(theirs, tmp_path / "video.mp4", boxes[0], capsys)}
    rows["ours"] = run_script(ours, tmp_path / "video.mp4", boxes[0], capsys)
    for printed in rows.values():
        assert len(printed) == len(frames) - 1
        assert all(row[4] in ("found", "lost") and np.array(row[:4], int).shape == (4,) for row in printed)
    expected, _ = native(read, boxes[0])
    np.testing.assert_array_equal(np.array([row[:4] for row in rows["ours"]], int), expected[1:].round())


def test_the_example_says_what_it_needs():
    run = subprocess.run([sys.executable, str(SCRIPT), "video.mp4"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("usage") and "Traceback" not in run.stderr


def test_signatures_are_those_of_cv2(made):
    """Both made by create(), and asked in the same words; ours also takes floats, which OpenCV refuses."""
    frames, boxes, _ = made
    box = tuple(int(v) for v in boxes[0])
    for create in (TrackerDMV.create, TrackerDMV_create, cv2.TrackerMIL.create, cv2.TrackerMIL_create):
        tracker = create()
        assert tracker.init(image=frames[0], boundingBox=box) is None
        found, answer = tracker.update(image=frames[1])
        assert isinstance(found, bool) and isinstance(answer, tuple)
        assert [type(v) for v in answer] == [int] * 4
        assert isinstance(tracker.getTrackingScore(), float)
    assert not isinstance(TrackerDMV.create(), cv2.Tracker), "a subclass made in Python ends the process"


def test_boxes_are_rounded_and_never_fed_back(made):
    frames, boxes, _ = made
    given = (boxes[0] + [0.4, 0.6, 0.3, -0.3]).astype(np.float32)
    expected, scores = native(frames, given)
    tracker = TrackerDMV.create()
    tracker.init(frames[0], given)
    for frame, box, score in zip(frames[1:], expected[1:], scores[1:], strict=True):
        assert tracker.update(frame)[1] == tuple(round(v) for v in box.tolist())
        assert tracker.getTrackingScore() == score
    assert np.abs(expected - expected.round()).max() > 0.2, "nothing to round: the test would not see it"


def test_bgr(made):
    frames, boxes, _ = made
    tracker = TrackerDMV.create()

    def run(images):
        tracker.init(images[0], boxes[0])
        return np.array([tracker.update(image)[1] for image in images[1:]])

    expected = native(frames, boxes[0])[0][1:].round()
    np.testing.assert_array_equal(run(frames), expected)
    assert np.abs(run(swapped(frames)) - expected).max() > 1


def test_a_lost_target_keeps_its_box(made):
    frames, boxes, _ = made
    tracker = TrackerDMV.create()
    tracker.init(frames[0], boxes[0])
    last = [tracker.update(frame) for frame in frames[1:4]][-1][1]
    found, box = tracker.update(np.full_like(frames[0], 127))
    assert found is False and box == last
    assert tracker.getTrackingScore() < TrackerConfig().found_score


def test_params(made):
    frames, boxes, _ = made
    params = TrackerDMV_Params()
    params.k, params.device, params.dtype, params.backend = 1, "cpu", "float32", "reference"
    tracker = TrackerDMV.create(params)
    tracker.init(frames[0], boxes[0])
    other = TrackerDMV.create()
    other.init(frames[0], boxes[0])
    tracker.update(frames[1]), other.update(frames[1])
    assert tracker.getTrackingScore() != other.getTrackingScore()
    with pytest.raises(ValueError, match="k is 99"):
        TrackerDMV.create(TrackerDMV.Params(k=99))
    with pytest.raises(TypeError, match=r"parameters is dict; it must be TrackerDMV.Params\(\)"):
        TrackerDMV.create({"k": 4})


def test_update_before_init_is_an_error_and_no_crash(made):
    with pytest.raises(RuntimeError, match="before init"):
        TrackerDMV.create().update(made[0][0])


def test_a_deep_copy_goes_its_own_way(made):
    frames, boxes, _ = made
    tracker = TrackerDMV.create()
    tracker.init(frames[0], boxes[0])
    twin = copy.deepcopy(tracker)
    assert isinstance(twin, TrackerDMV)
    expected = [tracker.update(frame) for frame in frames[1:]]
    assert [twin.update(frame) for frame in frames[1:]] == expected


def test_the_page(made, tmp_path, monkeypatch, capsys):
    frames, _, _ = made
    write_video(tmp_path / "video.mp4", frames)
    monkeypatch.chdir(tmp_path)
    first, options = blocks("OpenCV", "python")
    exec(first, {})
    assert capsys.readouterr().out.startswith("True (6")
    names: dict = {}
    exec(options, names)
    assert isinstance(names["tracker"], TrackerDMV)
