"""The pytracking family's adapter in stand-ins for the hosts' loops, which are not on PyPI.

They follow the interface of pytracking's `evaluation/tracker.py` (several objects by numbers, some entering
late; MultiObjectWrapper and its deep copies) and of STARK's `lib/test/evaluation/tracker.py`.
"""

from __future__ import annotations

import copy
import importlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from adapter_clip import blocks, clip, native, swapped

from dmv_fast.adapters.pytracking import DMV, get_tracker_class, parameters
from dmv_fast.tracker import TrackerConfig


class Host:
    """One sequence through a tracker, as the hosts run it: RGB images, outputs collected by name."""

    names = ("target_bbox", "time", "segmentation", "object_presence_score")

    def __init__(self, tracker):
        self.tracker = tracker
        self.output: dict[str, list] = {name: [] for name in self.names}

    def run(self, images, infos):
        """infos: what the host says of each frame."""
        out = self.tracker.initialize(images[0], infos[0]) or {}
        self.store(
            out,
            {"target_bbox": infos[0].get("init_bbox"), "time": 0.1, "object_presence_score": 1.0},
        )
        previous = OrderedDict(out)
        for image, info in zip(images[1:], infos[1:], strict=True):
            out = self.tracker.track(image, {**info, "previous_output": previous})
            previous = OrderedDict(out)
            self.store(out, {"time": 0.1})
        params = self.tracker.params
        assert not params.visualization and not params.save_all_boxes and params.debug == 0
        self.output["threshold"] = params.get("object_presence_score_threshold", 0.55)
        return self.output

    def store(self, out, defaults):
        for name in self.names:
            value = out.get(name, defaults.get(name))
            if value is not None:
                self.output[name].append(value)


def save_boxes(rows: list) -> np.ndarray:
    """What `save_bb` of the hosts' running.py writes: truncated to whole pixels."""
    return np.array(rows).astype(int)


def by_object(rows: list[dict]) -> dict:
    """What running.py makes of several objects' rows before it saves them."""
    collected: dict = {}
    for row in rows:
        for number, value in row.items():
            collected.setdefault(number, []).append(value)
    return collected


@pytest.fixture
def host_tree(tmp_path, monkeypatch):
    """Packages as pytracking and STARK have them, with the page's files in their places."""
    for block in blocks("pytracking, STARK, OSTrack and their like", "python"):
        first, code = block.split("\n", 1)
        path = tmp_path / first.removeprefix("# ")
        assert path.suffix == ".py" and first.startswith("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    for folder in ("pytracking", "lib"):
        for place in [tmp_path / folder, *(p for p in (tmp_path / folder).rglob("*") if p.is_dir())]:
            (place / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def test_pytrackings_files_and_loop(host_tree):
    """The page's two files, found as pytracking finds them; boxes and scores are our own, unrounded."""
    frames, truth, _ = clip()
    tracker_class = importlib.import_module("pytracking.tracker.dmv").get_tracker_class()
    params = importlib.import_module("pytracking.parameter.dmv.dmv18").parameters()
    params.debug, params.tracker_name, params.param_name = 0, "dmv", "dmv18"
    tracker = tracker_class(params)
    tracker.visdom = None
    output = Host(tracker).run(swapped(frames), [{"init_bbox": truth[0].tolist()}, *[{}] * (len(frames) - 1)])
    boxes, scores = native(frames, truth[0])
    np.testing.assert_array_equal(output["target_bbox"], boxes)
    np.testing.assert_array_equal(output["object_presence_score"], scores)
    assert output["threshold"] == TrackerConfig().found_score
    np.testing.assert_array_equal(save_boxes(output["target_bbox"]), boxes.astype(int))
    assert importlib.import_module("pytracking.parameter.dmv.k8").parameters().k == 8


def test_starks_files_and_loop(host_tree):
    """The constructor has the data set's name too, and `parameters` is called with the parameter file's."""
    frames, truth, _ = clip()
    tracker_class = importlib.import_module("lib.test.tracker.dmv").get_tracker_class()
    params = importlib.import_module("lib.test.parameter.dmv").parameters("dmv18")
    assert params.weights == "dmv18"
    host = Host(tracker_class(params, "otb"))
    host.names = ("target_bbox", "time")
    output = host.run(swapped(frames), [{"init_bbox": truth[0].tolist()}, *[{}] * (len(frames) - 1)])
    np.testing.assert_array_equal(output["target_bbox"], native(frames, truth[0])[0])


def test_rgb_unless_said_otherwise():
    """Their run_video hands over BGR: without `color` the boxes differ, with it they are right."""
    frames, truth, _ = clip()
    infos = [{"init_bbox": truth[0].tolist()}, *[{}] * (len(frames) - 1)]
    expected, _ = native(frames, truth[0])
    assert np.abs(Host(DMV(parameters())).run(frames, infos)["target_bbox"] - expected).max() > 1
    params = parameters()
    params.color = "bgr"
    np.testing.assert_array_equal(Host(DMV(params)).run(frames, infos)["target_bbox"], expected)
    params.color = "BGRA"
    with pytest.raises(ValueError, match="params.color is 'BGRA'; it must be 'rgb' or 'bgr'"):
        DMV(params)


def test_grey_and_rgba_images():
    frames, truth, _ = clip(4)
    grey = [frame[:, :, 1] for frame in frames]
    infos = [{"init_bbox": truth[0].tolist()}, *[{}] * 3]
    output = Host(DMV(parameters())).run(grey, infos)
    np.testing.assert_array_equal(output["target_bbox"], native(grey, truth[0])[0])
    rgba = [np.dstack([frame, frame[:, :, 0]]) for frame in swapped(frames)]
    output = Host(DMV(parameters())).run(rgba, infos)
    np.testing.assert_array_equal(output["target_bbox"], native(frames, truth[0])[0])


def test_several_objects_one_of_them_late():
    """Boxes by number, each as if it were alone, from the frame in which it enters."""
    frames, blue, red = clip()
    late, ids = 3, ["1", "2"]
    infos = [{} for _ in frames]
    infos[0] = {
        "init_bbox": OrderedDict({"1": blue[0].tolist()}),
        "init_object_ids": ["1"],
        "object_ids": ids,
    }
    infos[late] = {"init_bbox": OrderedDict({"2": red[late].tolist()}), "init_object_ids": ["2"]}
    output = Host(DMV(parameters())).run(swapped(frames), infos)
    boxes, scores = by_object(output["target_bbox"]), by_object(output["object_presence_score"])
    for number, expected in {"1": native(frames, blue[0]), "2": native(frames[late:], red[late])}.items():
        np.testing.assert_array_equal(boxes[number], expected[0])
        np.testing.assert_array_equal(scores[number], expected[1])
    assert isinstance(output["target_bbox"][-1], OrderedDict) and save_boxes(boxes["2"]).dtype.kind == "i"


def test_a_refused_object_spoils_none_of_the_others():
    frames, blue, _ = clip(3)
    tracker, again = DMV(parameters()), DMV(parameters())
    with pytest.raises(RuntimeError, match="initialize"):
        tracker.track(frames[0])
    for one in (tracker, again):
        one.initialize(frames[0], {"init_bbox": OrderedDict({"1": blue[0].tolist()})})
    outside = {"init_bbox": OrderedDict({"2": [5000, 5000, 10, 10]})}
    for refused in (tracker.initialize, tracker.track):
        with pytest.raises(ValueError, match="outside"):
            refused(frames[1], outside)
    assert tracker.track(frames[1]) == again.track(frames[1])


def test_the_hosts_live_video_speaks_of_one_object_by_number():
    frames, truth, _ = clip(4)
    tracker = get_tracker_class()(parameters())
    tracker.initialize(
        swapped(frames)[0], {"init_bbox": OrderedDict({1: truth[0].tolist()}), "object_ids": [1]}
    )
    boxes = [tracker.track(image)["target_bbox"][1] for image in swapped(frames)[1:]]
    np.testing.assert_array_equal(boxes, native(frames, truth[0])[0][1:])
    tracker.initialize(swapped(frames)[0], {"init_bbox": truth[0].tolist()})
    assert isinstance(tracker.track(swapped(frames)[1])["target_bbox"], list)


def test_deep_copies_are_trackers_of_their_own():
    """MultiObjectWrapper copies one unstarted tracker for each object, and hides it where that fails."""
    frames, blue, red = clip()
    original = DMV(parameters())
    trackers = {number: copy.deepcopy(original) for number in (1, 2)}
    images = swapped(frames)
    for number, box in {1: blue[0], 2: red[0]}.items():
        trackers[number].initialize(images[0], {"init_bbox": box.tolist()})
    got = {number: [] for number in trackers}
    for i, image in enumerate(images[1:], start=1):
        if i == 4:
            trackers = copy.deepcopy(trackers)  # started ones too
        for number, tracker in trackers.items():
            got[number].append(tracker.track(image)["target_bbox"])
    np.testing.assert_array_equal(got[1], native(frames, blue[0])[0][1:])
    np.testing.assert_array_equal(got[2], native(frames, red[0])[0][1:])


def test_drawing_in_the_hosts_viewer():
    class Visdom:
        def register(self, what, mode, level, title):
            self.shown = what

    tracker = DMV(parameters())
    tracker.visdom = Visdom()
    tracker.visdom_draw_tracking("image", [1, 2, 3, 4])
    assert tracker.visdom.shown == ("image", [1, 2, 3, 4])
    tracker.visdom_draw_tracking("image", OrderedDict({1: [1, 2, 3, 4], 2: [5, 6, 7, 8]}))
    assert tracker.visdom.shown == ("image", [1, 2, 3, 4], [5, 6, 7, 8])


def test_parameters_are_asked_as_pytracking_asks():
    params = parameters("dmv18")
    assert params.has("weights") and not params.has("nothing") and params.get("nothing", 3) == 3
    with pytest.raises(AttributeError):
        params.get("nothing")
    assert Path(params.weights).suffix == ""
