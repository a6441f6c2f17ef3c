"""What `dmv-fast track --view` shows: a look inside a frame, the window's keys and clicks."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from dmv_fast import ops
from dmv_fast.commands import track
from dmv_fast.insight import Insight, Remembered, Watch, live, panel
from dmv_fast.insight.curve import ScoreCurve
from dmv_fast.insight.overlay import heat
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.runtime.network import FastNetwork
from dmv_fast.tracker import FastDMVTracker, TrackerConfig
from dmv_fast.vision.crop import Window
from dmv_fast.vision.draw import FOUND, LOST, text_bar

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
    for owner, name in ((ops, "retrieve"), (FastNetwork, "match")):  # match does without it in float32 on AMX
        retrieve = getattr(owner, name)
        noting = lambda *a, do=retrieve, **o: read.append(do(*a, **o)) or read[-1]  # noqa: E731
        monkeypatch.setattr(owner, name, noting)
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
        np.testing.assert_allclose(insight.scores, scores / scores.sum(-1, keepdims=True), rtol=1e-6)
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
        assert insight.votes(location).sum() <= 1 + 1e-6
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


def test_a_watch_that_comes_late_waits_for_the_next_start(checkpoint, frames):
    tracker, alone = tracker_of(checkpoint), tracker_of(checkpoint)
    for one in (tracker, alone):
        one.init(frames[0], BOX)
    watch = Watch(tracker)
    for frame in frames:
        assert tracker.track(frame) == alone.track(frame)
        assert watch.look() is None
    tracker.init(frames[0], BOX)
    tracker.track(frames[1])
    assert watch.look() is not None


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


# ---- the score curve, under every frame ------------------------------------------------------------------


def coloured(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns (2, n) of the pixels of about that colour."""
    return np.array(np.nonzero(np.abs(picture.astype(int) - colour).max(-1) < 30))


def curve_under(picture: np.ndarray) -> np.ndarray:
    """The strip of a window 480 pixels wide: below 360 rows of frame and 42 of text."""
    return picture[402:458]


def test_the_curve_goes_with_the_score(window, screen, frames):
    levels, ends = {}, []
    for score in (1.0, 0.75, 0.5, 0.0):
        for _ in range(8):
            window.show(1, frames[1], BOX, score, True, 20.0)
        rows, columns = coloured(curve_under(screen.shown[-1]), FOUND)
        ends.append(columns.max())
        (levels[score],) = set(rows[columns > ends[-1] - 6])
    assert ends == sorted(set(ends)), "it grows to the right"
    height = levels[0.0] - levels[1.0]
    assert height > 30
    for score, row in levels.items():
        assert abs(row - (levels[0.0] - score * height)) <= 1


def test_lost_frames_are_red_in_the_curve(window, screen, frames):
    for score, found in [(0.9, True)] * 20 + [(0.1, False)] * 20 + [(0.8, True)] * 20:
        window.show(1, frames[1], BOX, score, found, 20.0)
    strip = curve_under(screen.shown[-1])
    green, red = coloured(strip, FOUND), coloured(strip, LOST)
    left, right = red[1].min(), red[1].max()
    assert 24 < right - left < 36, "20 of 300 frames"
    assert ((green[1] < left + 4) | (green[1] > right - 4)).all()
    assert np.median(red[0]) > np.median(green[0]) + 20, "a low score lies low"


def test_the_curve_keeps_the_last_frames_only():
    curve = ScoreCurve()
    for i in range(5_000):
        curve.add(0.5, i >= 4_700)
    assert len(curve._scores) == 300
    picture = curve.picture(480, 0.3)
    assert not coloured(picture, LOST).size and coloured(picture, FOUND)[1].max() > 470


def test_the_threshold_is_a_line_and_odd_scores_do_no_harm(window, screen, frames):
    faint = (80, 80, 80)
    lines = {t: np.unique(coloured(ScoreCurve().picture(480, t)[:, 100:], faint)[0]) for t in (0.0, 0.3, 2.0)}
    bottom, top = lines[0.0].max(), lines[0.0].min()
    assert len(lines[0.0]) == len(lines[2.0]) == 2
    assert abs(lines[0.3][1] - (bottom - 0.3 * (bottom - top))) <= 1
    show(window, frames)
    rows = coloured(curve_under(screen.shown[-1])[:, 100:], faint)[0]
    assert set(rows) == set(lines[0.0]), "of the tracker that is watched: EAGER"
    for score in (float("nan"), -1.0, 7.0):
        window.show(1, frames[1], BOX, score, False, 20.0)
    assert coloured(curve_under(screen.shown[-1]), LOST).size


def test_the_curve_starts_anew_with_another_box(window, screen, frames):
    for _ in range(40):
        show(window, frames)
    assert coloured(curve_under(screen.shown[-1]), FOUND)[1].max() > 70
    screen.actions, screen.drawn = ["r"], (0, 0, 0, 0)
    show(window, frames)
    show(window, frames)
    assert coloured(curve_under(screen.shown[-1]), FOUND)[1].max() > 70, "cancelled"
    screen.actions, screen.drawn = ["r"], (30, 60, 90, 120)
    show(window, frames)
    show(window, frames)
    columns = coloured(curve_under(screen.shown[-1]), FOUND)[1]
    assert len(columns) and columns.max() < 30, "one frame"


# ---- m: the inside -----------------------------------------------------------------------------------------


def made_insight(remembered: int, k: int, window: Window) -> Insight:
    """Random scores; the crops are black, and the weights of a location's candidates sum to 0.9."""
    rng = np.random.default_rng(0)
    crop = np.zeros((256, 256, 3), np.uint8)
    memory = tuple(Remembered(10 * i, Window(7 * i, -i, 64 + i), crop) for i in range(remembered))
    scores = -np.sort(-rng.dirichlet(np.ones(k), 256).astype(np.float32)) * np.float32(0.9)
    index, locations = rng.integers(-1, remembered, (256, k)), rng.integers(0, 256, (256, k))
    score_map = rng.random((16, 16), np.float32)
    return Insight(window, score_map, 100, scores, index, locations, memory, remembered)


def weights_shown(insight: Insight, clicked: int | None, width: int, monkeypatch) -> dict[int, float]:
    """Frame -> weight, in the order of the tiles: what is written under them."""
    written = []
    bar = lambda lines, width: written.append(lines) or text_bar(lines, width)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(panel, "text_bar", bar)
        panel.memory_panel(insight, clicked, width)
    return {int(lines[0].split()[1]): float(lines[1]) for lines in written if len(lines) == 2}


def values_of(on: np.ndarray, off: np.ndarray) -> np.ndarray:
    """The score map (h, w) that was laid over a picture; NaN where something else was drawn."""
    colours = cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_VIRIDIS).reshape(256, 3)
    laid = (on.astype(np.float32) - 0.6 * off.astype(np.float32)) / 0.4
    away = np.stack([np.abs(laid - colour.astype(np.float32)).max(-1) for colour in colours])
    return np.where(away.min(0) < 4, away.argmin(0) / 255, np.nan)


def test_m_switches_the_inside_on_and_off(window, screen, frames, monkeypatch):
    looks, look = [], window._watch.look
    monkeypatch.setattr(window._watch, "look", lambda: looks.append(0) or look())
    screen.actions = [" ", None, "m", None, "m", None, "m", None, "m", " "]
    show(window, frames)
    playing, off, on, off_again, on_again, off_at_last = screen.shown
    np.testing.assert_array_equal(off_again, off)
    np.testing.assert_array_equal(off_at_last, off)
    np.testing.assert_array_equal(on_again, on)
    assert on.shape[0] > off.shape[0] and (on[:360] != off[:360]).any()
    assert len(looks) == 1, "a frame is matched again once, and only on demand"
    show(window, frames)
    assert len(looks) == 1
    screen.actions = ["m"]
    show(window, frames)
    show(window, frames)
    assert len(looks) == 2 and screen.shown[-1].shape == on.shape, "it stays on for the frames that follow"


def test_the_map_is_brightest_where_the_target_is(screen, monkeypatch):
    """With trained weights: a checked patch on grey, and the search window reaches outside the frame."""
    frame = np.full((240, 320, 3), 90, np.uint8)
    small = np.random.default_rng(1).integers(0, 255, (5, 5, 3), np.uint8)
    frame[20:70, 30:80] = cv2.resize(small, (50, 50), interpolation=cv2.INTER_NEAREST)
    tracker = FastDMVTracker("dmv18", device="cpu")
    watch = Watch(tracker)
    tracker.init(frame, (30, 20, 50, 50))
    result = tracker.track(frame)
    assert result.found and watch.look().window.y0 < 0
    screen.actions = [" ", "m", None, "n"]
    live.LiveWindow(watch, lambda: False).show(1, frame, result.box, result.score, result.found, 20.0)
    _, off, on = screen.shown
    values = values_of(on[:360], off[:360])
    y, x = np.unravel_index(np.nanargmax(values), values.shape)
    left, top, width, height = (v * 1.5 for v in result.box)
    assert left < x < left + width and top < y < top + height
    assert np.nanmax(values) > 0.6 > 0.3 > np.nanmedian(values)
    x, y = (round(v * 1.5) for v in watch.look().centre(watch.look().chosen))
    assert tuple(on[y, x]) == FOUND != tuple(off[y, x]), "the chosen location is marked"


@pytest.mark.parametrize("corner", [(20.0, 10.0), (-37.5, 61.5), (150.0, -80.0)])
def test_each_score_lies_on_its_location(corner):
    side, step = 160.0, 10.0
    picture = np.full((180, 240, 3), 120, np.uint8)
    score_map = np.random.default_rng(0).random((16, 16), np.float32)
    laid = heat(picture, score_map, corner, side)
    values = values_of(laid, picture)
    seen = 0
    for row, column in np.ndindex(16, 16):
        x, y = corner[0] + column * step, corner[1] + row * step
        if 0 < x < 239 and 0 < y < 179 and row and column:
            # A location is a point between pixels, or in the middle of one.
            around = values[int(y - 0.5) : int(y) + 1, int(x - 0.5) : int(x) + 1].mean()
            assert abs(around - score_map[row, column]) < 0.08
            seen += 1
    assert seen > 40
    ys, xs = np.nonzero((laid != picture).any(-1))
    assert xs.min() >= max(0, corner[0] - 0.5) and xs.max() <= corner[0] + side
    assert ys.min() >= max(0, corner[1] - 0.5) and ys.max() <= corner[1] + side
    np.testing.assert_array_equal(heat(picture, score_map, (500.0, 20.0), side), picture)


def test_weights_shown_are_those_of_the_vote(window, screen, frames, monkeypatch):
    insight = window._watch.look()
    shown = weights_shown(insight, None, 480, monkeypatch)
    np.testing.assert_allclose(list(shown.values()), insight.votes(insight.chosen), rtol=0.01)
    large = made_insight(64, 32, Window(0, 0, 100))
    for clicked in (None, 3, 77):
        votes = large.votes(large.chosen if clicked is None else clicked)
        for width, fit in ((33, 1), (480, 6), (1280, 16)):
            shown = weights_shown(large, clicked, width, monkeypatch)
            assert len(shown) == fit and sum(shown.values()) <= 1
            np.testing.assert_allclose(list(shown.values()), np.sort(votes)[::-1][:fit], rtol=0.01)
            np.testing.assert_allclose([votes[n // 10] for n in shown], list(shown.values()), rtol=0.01)


def test_bars_and_squares_tell_the_weights(monkeypatch):
    insight = made_insight(32, 3, Window(0, 0, 100))
    insight.scores[5], insight.memory_index[5] = (0.4, 0.2, 0.1), (9, 4, 4)
    insight.locations[5] = (8 * 16 + 8, 2 * 16 + 4, 12 * 16 + 11)
    picture = panel.memory_panel(insight, 5, 480)
    tiles = [picture[26:, 80 * i : 80 * i + 80] for i in range(6)]
    lengths = [int((tile[86] == FOUND).all(-1).sum()) for tile in tiles]
    assert lengths[0] > 70 and abs(lengths[1] - 0.75 * lengths[0]) <= 1 and lengths[2:] == [0] * 4
    marks = [coloured(tile[:80], (60, 200, 255)) for tile in tiles]
    assert [bool(mark.size) for mark in marks] == [True, True] + [False] * 4
    np.testing.assert_allclose((marks[0].min(1) + marks[0].max(1)) / 2, (40, 40), atol=1)
    upper, lower = (marks[1][:, rows] for rows in (marks[1][0] < 35, marks[1][0] >= 35))
    np.testing.assert_allclose((upper.min(1) + upper.max(1)) / 2, (10, 20), atol=1)
    np.testing.assert_allclose((lower.min(1) + lower.max(1)) / 2, (60, 55), atol=1)
    sizes = [np.ptp(mark[0]) for mark in (marks[0], upper, lower)]
    assert sizes[0] > sizes[1] > sizes[2], "the heavier, the larger"


def test_a_click_turns_the_remembered_frames_to_its_place(window, screen, frames, monkeypatch):
    asked = []
    shown = lambda insight, clicked, width: asked.append(clicked) or text_bar([""], width)  # noqa: E731
    monkeypatch.setattr(live, "memory_panel", shown)
    place = window._watch.look().location_at(240.5 / 3, 195.5 / 3)
    screen.actions = [" ", "m", (240, 195), None, "n"]
    show(window, frames)
    assert asked == [None, place]


@pytest.mark.parametrize("shape", [(100, 100, 3), (77, 101, 3), (100, 161), (480, 33, 3), (723, 1283, 3)])
def test_the_inside_of_any_frame_also_the_first(screen, checkpoint, shape):
    frame = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    tracker = tracker_of(checkpoint)
    watch = Watch(tracker)
    window = live.LiveWindow(watch, lambda: False)
    box = (shape[1] * 0.4, shape[0] * 0.4, shape[1] * 0.2, shape[0] * 0.2)
    tracker.init(frame, box)
    screen.actions = [" ", "m", "n"]
    window.show(0, frame, box, 1.0, True, 0.0)
    result = tracker.track(frame)
    middle = tuple(int((box[i] + box[i + 2] / 2) * window._scale) for i in (0, 1))
    screen.actions = [None, middle, "n"]
    window.show(1, frame, result.box, result.score, result.found, 20.0)
    playing, paused, first, second, clicked = screen.shown
    assert first.shape == second.shape and clicked.shape[0] > second.shape[0] > paused.shape[0]
    np.testing.assert_array_equal(first[: len(paused)], paused, "nothing to lay over a first frame")


def test_the_help_line_fits_the_smallest_picture_and_says_what_the_page_says():
    keys = re.findall(r"(\w+):", live._HELP)
    rows = re.findall(r"^\| (\w+)\b.* \| .+ \|$", (ROOT / "docs" / "inspect.md").read_text(), re.MULTILINE)
    assert "m" in keys and set(keys) <= set(rows)
    assert cv2.getTextSize(live._HELP, cv2.FONT_HERSHEY_SIMPLEX, 0.42, 1)[0][0] <= 480 - 2 * 6


@pytest.mark.parametrize("option", ["--view", "--select"])
def test_events_are_left_to_qt_before_a_window_opens(option, screen, monkeypatch):
    order = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name, **_: order.append(name))
    monkeypatch.setattr(cv2, "namedWindow", lambda *_: order.append("window"))
    monkeypatch.setattr(cv2, "selectROI", lambda *_, **__: order.append("window") or (1, 1, 2, 2))
    monkeypatch.setattr(cv2, "destroyWindow", lambda _: None)
    monkeypatch.setattr(track, "_has_display", lambda: True)
    if option == "--view":
        live.LiveWindow(None, None)
    else:
        track.select_box(np.zeros((48, 64, 3), np.uint8))
    assert order == ["libX11-xcb.so.1", "window"]
