"""`dmv-fast track --view` in a real window: an X server without a screen, somebody's keys and clicks."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from dmv_fast.insight import live
from dmv_fast.vision.draw import text_bar

ROOT = Path(__file__).resolve().parent.parent
FRAMES = 6_000  # of the video that the window shows


def test_qt_finds_the_systems_own_library_for_events():
    """The one in OpenCV's wheels would let some events be lost, and with them a window's picture."""
    try:
        ctypes.CDLL("libX11-xcb.so.1")
    except OSError:
        pytest.skip("needs libX11-xcb (Debian: libx11-xcb1)")
    found = "import ctypes; ctypes.CDLL(None).XSetEventQueueOwner"
    ready = "from dmv_fast.insight.x11 import leave_events_to_qt; leave_events_to_qt()"
    scripts = (found, f"{ready}; {found}")
    commands = ([sys.executable, "-c", script] for script in scripts)
    done = [subprocess.run(command, cwd=ROOT, capture_output=True).returncode for command in commands]
    assert done == [1, 0]


@pytest.fixture
def display(tmp_path) -> Iterator[str]:
    """An X server without a screen, whose picture lies in tmp_path/Xvfb_screen0."""
    missing = [name for name in ("Xvfb", "xdotool") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} (Debian: xvfb, xdotool)")
    if not cv2.currentUIFramework():
        pytest.skip("this OpenCV opens no windows: opencv-python does, opencv-python-headless does not")
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


class Person:
    """Who sits before the window: looks until something is so, and tries again where nothing came of a key.

    A busy machine takes its time: nothing here counts on a time to have passed, and nothing is done before
    the last thing shows. A key that seems lost is pressed again, but late, since two may undo each other.
    """

    def __init__(self, process: subprocess.Popen, env: dict[str, str], folder: Path):
        self._process, self._env, self._folder = process, env, folder
        self._said = folder / "said.txt"
        self._paused, playing = (self.word(text) for text in ("paused", "frame"))
        named = ("search", "--onlyvisible", "--name", f"^{live.TITLE}$")
        self._window = self.until(lambda: self.xdotool(*named))
        self.until(lambda: self.reads(playing))

    def xdotool(self, *words: object) -> str:
        command = ["xdotool", *map(str, words)]
        return subprocess.run(command, env=self._env, capture_output=True, text=True).stdout.strip()

    def until(self, condition: Callable, seconds: float = 180):
        """Wait until the condition holds; its value. Not longer than the program runs."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            if self._process.poll() is not None and (value := condition()):
                return value  # its end was waited for
            said = self._said.read_text()
            assert self._process.poll() is None, f"it ended: {said}"
            assert time.monotonic() < end, f"nothing happens; it says: {said}"
            time.sleep(0.05)
        return value

    def insist(self, act: Callable[[], object], condition: Callable) -> None:
        """Act, and again only where nothing came of it for long."""
        end = time.monotonic()

        def shows() -> bool:
            nonlocal end
            if condition():
                return True
            if time.monotonic() >= end:
                act()
                end = time.monotonic() + 15
            return False

        self.until(shows)

    def press(self, key: str, condition: Callable) -> None:
        """With the focus each time: a window that is not there yet gets none, and there is no manager."""
        words = ("windowfocus", self._window, "key", "--window", self._window, key)
        self.insist(lambda: self.xdotool(*words), condition)

    def mouse(self, x: int, y: int, *words: object) -> None:
        """The pointer to a pixel of the window, and what it does there."""
        self.xdotool("mousemove", "--window", self._window, x, y, *words)

    def sees(self) -> np.ndarray:
        """The window (height, width, 3) BGR: it is the only one, in the screen's corner."""
        return picture_on(self._folder)

    def hears(self, words: str) -> bool:
        return words in self._said.read_text()

    @staticmethod
    def word(text: str) -> np.ndarray:
        """As the line under the frame has it, grey."""
        bar = cv2.cvtColor(text_bar([text], 60), cv2.COLOR_BGR2GRAY)
        return bar[6:22, 6:52]

    def reads(self, word: np.ndarray) -> bool:
        """Whether the line under the frame has the word, wherever the figures before it end."""
        line = cv2.cvtColor(self.sees()[360:386, :480], cv2.COLOR_BGR2GRAY)
        return cv2.matchTemplate(line, word, cv2.TM_CCOEFF_NORMED).max() > 0.8

    def sees_paused(self) -> bool:
        return self.reads(self._paused)

    def step(self) -> None:
        """One frame; the window is paused then, whatever it was before."""
        before = self.sees()
        self.press("n", lambda: (self.sees() != before).any() and self.sees_paused())


@pytest.fixture
def two_patches(tmp_path) -> Path:
    """A video that outlasts any test, 320 x 240: two checked patches that stand still on grey."""
    frame = np.full((240, 320, 3), 90, np.uint8)
    noise = np.random.default_rng(1)
    for x, y in ((40, 100), (220, 60)):
        small = noise.integers(0, 255, (5, 5, 3), np.uint8)
        frame[y : y + 50, x : x + 50] = cv2.resize(small, (50, 50), interpolation=cv2.INTER_NEAREST)
    folder = tmp_path / "patches"
    folder.mkdir()
    cv2.imwrite(str(tmp_path / "frame.png"), frame)
    for i in range(FRAMES):
        (folder / f"{i:06d}.png").symlink_to(tmp_path / "frame.png")
    return folder


def test_a_person_pauses_clicks_takes_another_box_and_quits(display, two_patches, tmp_path):
    table = tmp_path / "boxes.csv"
    env = {**os.environ, "DISPLAY": display, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("WAYLAND_DISPLAY", None)
    command = [sys.executable, "-m", "dmv_fast", "track", str(two_patches), "--box", "40,100,50,50"]
    with open(tmp_path / "said.txt", "w") as out:
        process = subprocess.Popen([*command, "--view", "--boxes", str(table)], env=env, stderr=out)
    try:
        person = Person(process, env, tmp_path)
        person.step()
        person.press("space", lambda: not person.sees_paused())
        person.press("space", person.sees_paused)
        person.step()  # also beyond the first frame, in which nothing is matched
        assert (person.sees()[460:] == 0).all(), "no panel yet"
        person.insist(lambda: person.mouse(98, 188, "click", 1), lambda: person.hears("voted"))
        person.until(lambda: (person.sees()[460:] != 0).any())

        person.press("r", lambda: person.hears("draw the box"))
        left, right = np.s_[95:160, 325:335], np.s_[95:160, 400:410]  # of the box to be drawn

        def shows(side: tuple, colour: tuple[int, int, int]) -> bool:
            return (person.sees()[side] == colour).all(-1).any()

        def draw() -> None:
            person.mouse(330, 90, "mousedown", 1)
            person.mouse(370, 120)
            person.mouse(405, 165, "mouseup", 1)

        blue, green = (255, 0, 0), (60, 220, 60)  # being drawn, and tracked
        person.insist(draw, lambda: shows(left, blue) and shows(right, blue))
        person.press("Return", lambda: shows(left, green))
        for _ in range(3):
            person.step()
        person.press("q", lambda: process.poll() is not None)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
    rows = np.loadtxt(table, delimiter=",", skiprows=1)
    assert list(rows[:, 0]) == list(range(len(rows))) and 3 < len(rows) < FRAMES
    np.testing.assert_allclose(rows[0, 1:5], (40, 100, 50, 50))
    np.testing.assert_allclose(rows[-1, 1:5], (220, 60, 50, 50), atol=12)
