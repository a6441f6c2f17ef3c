"""The VOT toolkit, from `vot evaluate` to the report, over a made workspace, by both protocols."""

from __future__ import annotations

import configparser
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from adapter_clip import blocks, clip, native

from dmv_fast.adapters.vot import VotTracker, main

PYTHON, TRAX = "DMV18", "DMV18trax"
LATE = 4  # the frame in which the second object of the sequence `both` enters
STACK = """\
title: made
experiments:
  baseline:
    type: unsupervised
    multiobject: True
    analyses:
      - type: average_accuracy
        name: accuracy
        burnin: 0
"""
EVERY = """\
title: every
experiments:
  supervised:
    type: supervised
  multistart:
    type: multistart
  realtime:
    type: unsupervised
    realtime:
      grace: 3
  realtime_supervised:
    type: supervised
    realtime:
      grace: 3
"""
ANCHORS = {0: 1, 5: 1, 9: -1}  # where multistart begins, forwards and backwards


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sequences in the toolkit's layout, and the page's trackers.ini."""
    folder = tmp_path_factory.mktemp("workspace")
    frames, blue, red = clip()
    write_sequence(folder / "sequences" / "one", frames, {"groundtruth.txt": blue})
    late = red.copy()
    late[:LATE] = np.nan
    both = {"groundtruth_1.txt": blue, "groundtruth_2.txt": late}
    write_sequence(folder / "sequences" / "both", frames, both)
    (folder / "sequences" / "list.txt").write_text("one\nboth\n")
    (folder / "config.yaml").write_text("registry:\n- ./trackers.ini\nstack: ./stack.yaml\n")
    (folder / "stack.yaml").write_text(STACK)
    (folder / "trackers.ini").write_text("\n".join(blocks("VOT toolkit", "ini")))
    return folder


def write_sequence(folder: Path, frames: list[np.ndarray], truth: dict[str, np.ndarray]) -> None:
    (folder / "color").mkdir(parents=True)
    for i, frame in enumerate(frames):
        cv2.imwrite(str(folder / "color" / f"{i + 1:08d}.jpg"), frame)
    for name, boxes in truth.items():
        lines = ("0" if np.isnan(box).any() else ",".join(f"{v:g}" for v in box) for box in boxes)
        (folder / name).write_text("\n".join(lines) + "\n")
    lines = (f"name={folder.name}", "fps=30", "channel.default=color", "channels.color=color/%08d.jpg")
    (folder / "sequence").write_text("\n".join(lines) + "\n")


def read(workspace: Path, sequence: str) -> list[np.ndarray]:
    return [
        cv2.imread(str(path)) for path in sorted((workspace / "sequences" / sequence).glob("color/*.jpg"))
    ]


def vot(workspace: Path, command: str) -> subprocess.CompletedProcess[str]:
    """One of the page's commands, in the workspace; offline, as the toolkit looks for news of itself."""
    program, *arguments = shlex.split(command)
    assert program == "vot"
    code = "from vot.utilities.cli import main; main()"
    environment = os.environ | {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=workspace, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def recorded(
    workspace: Path, tracker: str, sequence: str, name: str, experiment: str = "baseline"
) -> tuple[list, list[str]]:
    """Regions and confidences as the toolkit keeps them."""
    from vot.region.io import read_trajectory

    folder = workspace / "results" / tracker / experiment / sequence
    with open(folder / f"{name}.bin", "rb") as file:
        regions = read_trajectory(file)
    return regions, (folder / f"{name}_confidence.value").read_text().splitlines()


@pytest.mark.slow
def test_evaluate_analysis_and_report(workspace):
    """The page's commands; boxes and confidences of both protocols are ours to float32's rounding."""
    pytest.importorskip("trax", reason="the VOT toolkit (extra `vot`) is not installed")
    pytest.importorskip("vot", reason="the VOT toolkit (extra `vot`) is not installed")
    (commands,) = (block for block in blocks("VOT toolkit", "sh") if not block.startswith("pip"))
    for command in commands.splitlines():
        run = vot(workspace, command)
        assert run.returncode == 0, run.stdout + run.stderr
        assert "success" in run.stdout + run.stderr, run.stdout + run.stderr  # errors exit with 0 as well

    frames = read(workspace, "one")
    _, blue, red = clip()
    first, second = native(frames, blue[0]), native(frames[LATE:], red[LATE])
    for tracker in (PYTHON, TRAX):
        for sequence, name, start, (boxes, scores) in (
            ("one", "one_001", 0, first),
            ("both", "both_1_001", 0, first),
            ("both", "both_2_001", LATE, second),
        ):
            regions, confidences = recorded(workspace, tracker, sequence, name)
            assert len(regions) == len(frames)
            got = [(r.x, r.y, r.width, r.height) for r in regions[start + 1 :]]
            np.testing.assert_allclose(got, boxes[1:], rtol=0, atol=2e-4)
            np.testing.assert_allclose(np.array(confidences[start + 1 :], float), scores[1:], atol=1e-5)
    (analysis,) = (workspace / "analysis").rglob("*.json")
    assert set(json.loads(analysis.read_text())["trackers"]) == {PYTHON, TRAX}
    (report,) = (workspace / "reports").rglob("report.html")
    assert PYTHON in report.read_text()


def toolkit() -> tuple[int, ...]:
    """The version that a subprocess of this one gets."""
    pytest.importorskip("trax", reason="the VOT toolkit (extra `vot`) is not installed")
    version = pytest.importorskip("vot.version", reason="the VOT toolkit (extra `vot`) is not installed")
    return tuple(int(part) for part in version.__version__.split("."))


def test_other_experiments_are_beyond_toolkit_0_9():
    """The reasons that the page gives; the day this fails, the page and the next test want a look."""
    if toolkit() < (0, 8):
        pytest.skip("this toolkit runs them")
    from vot.region import Rectangle
    from vot.tracker import FrameResult, ObjectQuery, ObjectStatus
    from vot.tracker import OnlineTrackerRuntime as Online
    from vot.tracker import RealtimeTrackerRuntime as Realtime

    status = ObjectStatus(Rectangle(1, 2, 3, 4), {})
    with pytest.raises(TypeError, match="ObjectQuery.state must be a Region"):
        ObjectQuery(status, {}, 0)
    assert not issubclass(Realtime, Online) and Realtime.run is not Online.run
    assert isinstance(FrameResult(status, 0.1).objects, list)


@pytest.mark.slow
def test_every_experiment_of_toolkit_0_7(workspace, tmp_path):
    """multistart, supervised and realtime, by TraX."""
    if toolkit() >= (0, 8):
        reason = "toolkits 0.8 and 0.9 cannot (docs/adapters.md): "
        pytest.skip(reason + "pip install --no-deps --target DIR vot-toolkit==0.7.3; PYTHONPATH=DIR pytest")
    frames, blue, _ = clip()
    folder = tmp_path / "sequences" / "one"
    write_sequence(folder, frames, {"groundtruth.txt": blue})
    (folder / "anchor.value").write_text("".join(f"{ANCHORS.get(i, 0)}\n" for i in range(len(frames))))
    (tmp_path / "sequences" / "list.txt").write_text("one\n")
    (tmp_path / "stack.yaml").write_text(EVERY)
    (tmp_path / "config.yaml").write_text((workspace / "config.yaml").read_text())
    (tmp_path / "trackers.ini").write_text(blocks("VOT toolkit", "ini")[1])
    run = vot(tmp_path, f"vot evaluate {TRAX}")
    assert run.returncode == 0 and "success" in run.stdout + run.stderr, run.stdout + run.stderr
    results = tmp_path / "results" / TRAX
    names = {path.relative_to(results).as_posix() for path in results.rglob("*.bin")}
    wanted = {f"multistart/one/one_{frame:08d}.bin" for frame in ANCHORS}
    assert names == wanted | {
        f"{kind}/one/one_001.bin" for kind in ("supervised", "realtime", "realtime_supervised")
    }
    regions, _ = recorded(tmp_path, TRAX, "one", "one_001", "supervised")
    got = [(r.x, r.y, r.width, r.height) for r in regions[1:]]
    np.testing.assert_allclose(got, native(read(tmp_path, "one"), blue[0])[0][1:], rtol=0, atol=2e-4)


def test_trackers_ini_means_what_the_page_says(workspace):
    """The command of `python` is a class, its arguments are VotTracker's, and text is read as a number."""
    ini = configparser.ConfigParser()
    ini.read(workspace / "trackers.ini")
    assert ini.sections() == [PYTHON, TRAX]
    assert ini[PYTHON]["command"] == f"{VotTracker.__module__}:{VotTracker.__name__}"
    arguments = {name[4:]: value for name, value in ini[PYTHON].items() if name.startswith("arg_")}
    assert arguments == {"weights": "dmv18", "k": "4"}
    assert VotTracker(**arguments).multiobject
    with pytest.raises(ValueError, match="k is 40"):
        VotTracker(k="40")


def test_frames_are_read_as_bgr_and_objects_come_in_order(workspace):
    paths = [str(path) for path in sorted((workspace / "sequences" / "one" / "color").iterdir())]
    _, blue, red = clip()
    tracker = VotTracker()
    statuses = [tracker.init(paths[0], [(tuple(blue[0]), {})], {})]
    statuses += [tracker.update({"color": paths[1], "depth": "none"}, [(tuple(red[1]), {})], {})]
    statuses += [tracker.update(path, [], {}) for path in paths[2:]]
    frames = read(workspace, "one")
    boxes, scores = native(frames, blue[0])
    np.testing.assert_array_equal([status[0][0] for status in statuses], boxes)
    np.testing.assert_array_equal([status[0][1]["confidence"] for status in statuses], scores)
    np.testing.assert_array_equal([status[1][0] for status in statuses[1:]], native(frames[1:], red[1])[0])
    assert all(isinstance(box, tuple) for status in statuses for box, _ in status), "or it is no rectangle"
    assert len(tracker.init(paths[0], (tuple(blue[0]), {}), {})) == 1, (
        "a single-object experiment sends no list"
    )


def test_regions_other_than_rectangles(workspace):
    path = str(workspace / "sequences" / "one" / "color" / "00000001.jpg")
    ((box, _),) = VotTracker().init(path, [([(70.0, 40.0), (100.0, 60.5), (80.0, 90.0)], {})])
    assert box == (70.0, 40.0, 30.0, 50.0)
    with pytest.raises(ValueError, match="region is ndarray; .* set `convert = rectangle` in trackers.ini"):
        VotTracker().init(path, [(np.ones((4, 4)), {})])
    with pytest.raises(ValueError, match="nothing.jpg: not an image that OpenCV can read"):
        VotTracker().init("nothing.jpg", [((1, 2, 30, 40), {})])


def test_a_refused_object_spoils_none_of_the_others(workspace):
    first, second = sorted(str(path) for path in (workspace / "sequences" / "one" / "color").iterdir())[:2]
    _, blue, _ = clip()
    tracker, again = VotTracker(), VotTracker()
    for one in (tracker, again):
        one.init(first, [(tuple(blue[0]), {})])
    for refused in (tracker.init, tracker.update):
        with pytest.raises(ValueError, match="outside"):
            refused(second, [((5000, 5000, 10, 10), {})])
    assert tracker.update(second) == again.update(second)


def test_without_trax_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trax", None)
    with pytest.raises(ImportError, match=r'pip install "dmv-fast\[vot\]"'):
        main()
