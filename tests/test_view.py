"""What `dmv-fast track --view` shows: a look inside a frame, the window's keys and clicks, a real window."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from dmv_fast import ops
from dmv_fast.insight import Watch
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.tracker import FastDMVTracker, TrackerConfig
from dmv_fast.vision import live

ROOT = Path(__file__).resolve().parent.parent
BOX = (60.0, 50.0, 40.0, 30.0)
# Every second frame is remembered, whatever its score, and the memory is soon full.
EAGER = TrackerConfig(capacity=3, policy=MemoryPolicy(interval=2, threshold=0.0), found_score=0.0)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """A smooth random picture that drifts: eight frames of 160 x 120."""
    picture = np.random.default_rng(0).integers(0, 255, (20, 26, 3), np.uint8)
    picture = cv2.resize(picture, (208, 160), interpolation=cv2.INTER_CUBIC)
    return [picture[i : i + 120, 2 * i : 2 * i + 160].copy() for i in range(8)]


def tracker_of(checkpoint: Path, **options) -> FastDMVTracker:
    return FastDMVTracker(str(checkpoint), k=4, device="cpu", config=EAGER, **options)


# ---- a look inside ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dtype": "float32", "backend": "reference"}], ids=["fast", "plain"])
def test_candidates_are_those_that_the_network_read(checkpoint, frames, options, monkeypatch):
    tracker, plain = tracker_of(checkpoint, **options), tracker_of(checkpoint, **options)
    watch = Watch(tracker)
    read = []
    retrieve = ops.retrieve
    monkeypatch.setattr(ops, "retrieve", lambda *a, **o: read.append(retrieve(*a, **o)) or read[-1])
    for each in (tracker, plain):
        each.init(frames[0], BOX)
    assert watch.look() is None, "nothing is matched in the first frame"
    slots, remembered = {0: 0}, []
    for number, frame in enumerate(frames[1:], start=1):
        read.clear()
        result = tracker.track(frame)
        scores, indices = (part[0].numpy() for part in read[0])
        assert plain.track(frame) == result, "watching changes nothing"
        insight = watch.look()
        assert [memory.frame for memory in insight.memory] == list(slots.values())
        np.testing.assert_array_equal(insight.scores, scores)
        rebuilt = np.where(insight.memory_index < 0, -1, insight.memory_index * 256 + insight.locations)
        np.testing.assert_array_equal(rebuilt, indices)
        assert insight.score_map.shape == (16, 16)
        assert insight.score_map.flat[insight.chosen] >= np.float32(result.score)
        if result.memory_written:
            remembered.append(number)
            slots[2 - len(remembered) % 2] = number
    assert remembered == [2, 4, 6], "the full memory was written to as well, or this test shows little"


def test_a_frame_seen_again_votes_for_itself(checkpoint, frames):
    tracker = tracker_of(checkpoint)
    watch = Watch(tracker)
    watch.first_frame = 40
    tracker.init(frames[0], BOX)
    tracker.track(frames[0])
    insight = watch.look()
    for location in range(256):
        best, *others = insight.candidates(location)
        assert best.memory.frame == 40 and best.place == insight.centre(location)
        assert best.score >= max(candidate.score for candidate in others)
        assert insight.votes(location).sum() <= 1
    first = insight.memory[0]
    assert first.crop.shape == (256, 256, 3) and first.window == insight.window


def test_locations_and_pixels_of_the_frame(checkpoint, frames):
    tracker = tracker_of(checkpoint)
    watch = Watch(tracker)
    tracker.init(frames[0], BOX)
    tracker.track(frames[0])
    insight = watch.look()
    assert [insight.location_at(*insight.centre(i)) for i in range(256)] == list(range(256))
    x, y = BOX[0] + BOX[2] / 2, BOX[1] + BOX[3] / 2
    assert insight.location_at(x, y) == 8 * 16 + 8, "an anchor is centred on the middle of the search window"
    window = insight.window
    assert insight.location_at(window.x0 - 1, y) is None
    assert insight.location_at(x, window.y0 + window.side) is None


def test_no_more_crops_are_kept_than_the_memory_holds(checkpoint, frames):
    tracker = tracker_of(checkpoint)
    watch = Watch(tracker)
    tracker.init(frames[0], BOX)
    for frame in frames * 2:
        tracker.track(frame)
        watch.look()
        assert len(watch._remembered) <= EAGER.capacity + 1, "the one that a write has just replaced too"


# ---- the window, its keys and clicks played --------------------------------------------------------------


class Screen:
    """OpenCV's window functions, with what the person does: keys, clicks as (x, y), or "close"."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.shown: list[np.ndarray] = []
        self.actions: list = []
        self.drawn = (0, 0, 0, 0)
        self.visible = 1.0
        monkeypatch.setattr(cv2, "namedWindow", lambda *_: None)
        monkeypatch.setattr(cv2, "setMouseCallback", lambda _, react: setattr(self, "react", react))
        monkeypatch.setattr(cv2, "imshow", lambda _, image: self.shown.append(image.copy()))
        monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: self.visible)
        monkeypatch.setattr(cv2, "destroyAllWindows", lambda: None)
        monkeypatch.setattr(cv2, "selectROI", lambda *_, **__: self.drawn)
        monkeypatch.setattr(cv2, "waitKey", lambda _: self.act())

    def act(self) -> int:
        action = self.actions.pop(0) if self.actions else None
        if isinstance(action, tuple):
            self.react(cv2.EVENT_LBUTTONDOWN, *action, 0, None)
        if action == "close":
            self.visible = 0.0
        return ord(action) if isinstance(action, str) and len(action) == 1 else -1


@pytest.fixture
def screen(monkeypatch) -> Screen:
    return Screen(monkeypatch)


@pytest.fixture
def window(screen, checkpoint, frames) -> live.LiveWindow:
    """The window, and behind it a tracker that has just tracked one frame."""
    tracker = tracker_of(checkpoint)
    watch = Watch(tracker)
    tracker.init(frames[0], BOX)
    tracker.track(frames[1])
    return live.LiveWindow(watch, lambda: False)


def show(window: live.LiveWindow, frames: list[np.ndarray]) -> tuple | None:
    return window.show(1, frames[1], BOX, 0.5, True, 20.0)


def test_small_frames_are_shown_larger_and_playing_waits_for_nobody(window, screen, frames):
    assert show(window, frames) is None and not window.closed
    (picture,) = screen.shown
    assert picture.shape[1] == 480 and picture.shape[0] > 360, "three times 160 x 120, and a line of text"


def test_space_pauses_until_space(window, screen, frames):
    screen.actions = [" ", None, None, " ", "q"]
    assert show(window, frames) is None
    assert screen.actions == ["q"] and not window.closed


def test_n_lets_one_frame_pass(window, screen, frames):
    screen.actions = [" ", None, "n"]
    show(window, frames)
    assert screen.actions == []
    screen.actions = [None, "n", " "]
    show(window, frames)
    assert screen.actions == [" "], "it had stopped at the next frame"


@pytest.mark.parametrize("action", ["q", "\x1b", "close"])
def test_ways_out(window, screen, frames, action):
    screen.actions = [" ", action, "n"]
    show(window, frames)
    assert window.closed and screen.actions == ["n"]


def test_a_signal_ends_a_pause(window, screen, frames):
    told = iter([False, False, True])
    window._stopped = lambda: next(told)
    screen.actions = [" "]
    show(window, frames)
    assert next(told, None) is None


def test_r_gives_a_box_in_pixels_of_the_frame(window, screen, frames):
    screen.actions, screen.drawn = ["r"], (30, 60, 90, 120)
    assert show(window, frames) == (10, 20, 30, 40)
    screen.actions, screen.drawn = ["r"], (0, 0, 0, 0)
    assert show(window, frames) is None, "cancelled"


def test_a_click_shows_and_prints_the_candidates(window, screen, frames, capsys):
    insight = window._watch.look()
    location = insight.location_at(80, 65)
    screen.actions = [" ", (240, 195), None, "n"]
    show(window, frames)
    heights = [picture.shape[0] for picture in screen.shown]
    assert heights[0] < heights[-1] and len({picture.shape[1] for picture in screen.shown}) == 1
    said = capsys.readouterr().err
    x, y = insight.centre(location)
    assert said.count("\n") == 1 and said.startswith(f"at {x:.0f},{y:.0f} voted: ")
    assert said.count("frame 0 at") + said.count("null") == 4
    best = insight.candidates(location)[0]
    assert f"frame 0 at {best.place[0]:.0f},{best.place[1]:.0f} {best.score:.3f}" in said


def test_a_click_where_nothing_is_matched_says_so(window, screen, frames, capsys):
    screen.actions = [" ", (3, 3), None, "n"]
    window._watch._last[1].__dict__.update(x0=50, y0=40, side=20)
    show(window, frames)
    assert "outside the search window" in capsys.readouterr().err


# ---- a real window ---------------------------------------------------------------------------------------


@pytest.fixture
def display(tmp_path) -> Iterator[str]:
    """An X server without a screen, whose picture lies in tmp_path/Xvfb_screen0."""
    missing = [name for name in ("Xvfb", "xdotool") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} (Debian: xvfb, xdotool)")
    reading, writing = os.pipe()
    command = ["Xvfb", "-displayfd", str(writing), "-screen", "0", "800x700x24", "-fbdir", str(tmp_path)]
    command += ["-noreset"]  # else it starts anew, and turns clients away, whenever xdotool was its only one
    server = subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.DEVNULL)
    os.close(writing)
    with open(reading) as told:
        number = told.readline().strip()
    if not number:
        server.wait()
        pytest.skip("Xvfb does not start here")
    yield f":{number}"
    server.terminate()
    server.wait()


def picture_on(folder: Path) -> np.ndarray:
    """What Xvfb shows, (height, width, 3) uint8 BGR: its file is an XWD image."""
    data = (folder / "Xvfb_screen0").read_bytes()
    header = np.frombuffer(data, ">u4", 25)
    start, height, line = int(header[0] + 12 * header[19]), int(header[5]), int(header[12])
    rows = np.frombuffer(data, np.uint8, height * line, start).reshape(height, line)
    return rows.reshape(height, -1, 4)[..., :3]


def until(condition, seconds: float = 200.0):
    """Wait until the condition holds; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)
    return value


@pytest.fixture
def two_patches(tmp_path) -> Path:
    """A video of 900 frames, 320 x 240: two checked patches that stand still on grey."""
    path = tmp_path / "patches.mp4"
    frame = np.full((240, 320, 3), 90, np.uint8)
    noise = np.random.default_rng(1)
    for x, y in ((40, 100), (220, 60)):
        small = noise.integers(0, 255, (5, 5, 3), np.uint8)
        frame[y : y + 50, x : x + 50] = cv2.resize(small, (50, 50), interpolation=cv2.INTER_NEAREST)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, (320, 240))
    for _ in range(900):
        writer.write(frame)
    writer.release()
    return path


@pytest.mark.slow
@pytest.mark.skipif(
    "DMV_FAST_WINDOW_TEST" not in os.environ,
    reason="DMV_FAST_WINDOW_TEST=1 runs it, alone: beside other tests a real window may miss keys",
)
def test_a_person_pauses_clicks_takes_another_box_and_quits(display, two_patches, tmp_path):
    table, said = tmp_path / "boxes.csv", tmp_path / "said.txt"
    env = {**os.environ, "DISPLAY": display, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("WAYLAND_DISPLAY", None)

    def xdotool(*words: object) -> str:
        command = ["xdotool", *map(str, words)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30).stdout.strip()

    command = [sys.executable, "-m", "dmv_fast", "track", str(two_patches), "--box", "40,100,50,50"]
    with open(said, "w") as out:
        process = subprocess.Popen([*command, "--view", "--boxes", str(table)], env=env, stderr=out)
    try:
        shown = until(lambda: process.poll() is not None or xdotool("search", "--name", live.TITLE))
        assert process.poll() is None, said.read_text()
        window = shown.splitlines()[-1]
        # The ground of the text under the frame; the mouse pointer stands in the middle of the screen.
        until(lambda: (picture_on(tmp_path)[362, :300] == 32).all())
        xdotool("windowfocus", window)

        def press(key: str) -> None:
            xdotool("key", "--window", window, key)

        def insist(key: str, condition) -> None:
            """Press until it shows: a busy machine's window may not have the focus yet and miss a key."""
            for _ in range(20):
                press(key)
                end = time.monotonic() + 10
                while time.monotonic() < end:
                    if condition():
                        return
                    time.sleep(0.1)
            raise AssertionError(f"{key} does nothing")

        def step() -> None:
            before = picture_on(tmp_path)
            insist("n", lambda: (picture_on(tmp_path) != before).any())

        def ask() -> bool:
            step()  # also beyond the first frame, in which nothing is matched
            xdotool("mousemove", "--window", window, 98, 188, "click", 1)
            time.sleep(1)
            return "voted" in said.read_text()

        press("space")
        step()
        assert (picture_on(tmp_path)[460:] == 0).all(), "no panel yet"
        until(ask)
        until(lambda: (picture_on(tmp_path)[460:] != 0).any())
        insist("r", lambda: "draw the box" in said.read_text())
        edge = np.s_[95:160, 325:335]  # where the drawn box's left side will be
        before = picture_on(tmp_path)[edge]

        def draw() -> bool:
            xdotool("mousemove", "--window", window, 330, 90, "mousedown", 1)
            xdotool("mousemove", "--window", window, 370, 120)
            xdotool("mousemove", "--window", window, 405, 165, "mouseup", 1)
            time.sleep(1)
            return (picture_on(tmp_path)[edge] != before).any()

        until(draw)
        insist("Return", lambda: (picture_on(tmp_path)[edge] == (60, 220, 60)).all(-1).any())
        for _ in range(3):
            step()
        insist("q", lambda: process.poll() is not None)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
    rows = np.loadtxt(table, delimiter=",", skiprows=1)
    assert list(rows[:, 0]) == list(range(len(rows))) and 3 < len(rows) < 900
    np.testing.assert_allclose(rows[0, 1:5], (40, 100, 50, 50))
    np.testing.assert_allclose(rows[-1, 1:5], (220, 60, 50, 50), atol=12)
