"""`dmv-fast track`: one target through one source, frame by frame."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dmv_fast.commands import DTYPES
from dmv_fast.files import check_target, replaced_when_complete

if TYPE_CHECKING:
    import numpy as np

    from dmv_fast.insight import Watch
    from dmv_fast.insight.live import LiveWindow
    from dmv_fast.tracker import FastDMVTracker, TrackResult
    from dmv_fast.vision.video import VideoSource

Box = tuple[float, float, float, float]
CSV_HEADER = "frame,x,y,w,h,score,found"
_SELECT_SIDE = 1000  # pixels; a larger frame is shown smaller to draw the box on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, box, outputs, and how the tracker runs."""
    parser.add_argument(
        "source", metavar="SOURCE",
        help="video file, folder or 'glob' of images, camera number, rtsp:// or http://",
    )  # fmt: skip
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--box", type=parse_box, metavar="X,Y,W,H", help="the target in the first frame")
    where.add_argument("--select", action="store_true", help="draw the box by mouse (needs a display)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="first frame, counted from 0")
    parser.add_argument("--max-frames", type=int, metavar="N", help="stop after so many frames")
    parser.add_argument("--output", metavar="OUT.mp4", help="video with box and score drawn")
    parser.add_argument("--boxes", metavar="OUT.csv", help=CSV_HEADER)
    parser.add_argument("--json", metavar="OUT.json", help="the same with the settings and the speed")
    parser.add_argument(
        "--view", action="store_true",
        help="show frame, box and score curve in a window; m there: the inside, too (needs a display)",
    )  # fmt: skip
    parser.add_argument("--rerun", metavar="OUT.rrd", help="a recording for the Rerun viewer (extra: rerun)")
    parser.add_argument("--weights", default="dmv18", help="a shipped network or a file (dmv18)")
    parser.add_argument("-k", "--k", type=int, metavar="K", help="candidates a location (the network's own)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    parser.add_argument("--dtype", default="auto", help=DTYPES)
    parser.add_argument("--backend", default="auto", help="auto, or one that `dmv-fast doctor` lists (auto)")


def parse_box(text: str) -> Box:
    """X,Y,W,H as four floats, sizes above 0; ArgumentTypeError for anything else."""
    try:
        x, y, w, h = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be four numbers X,Y,W,H, not {text!r}") from None
    if not all(math.isfinite(v) for v in (x, y, w, h)):
        raise argparse.ArgumentTypeError(f"must be finite numbers, not {text!r}")
    if w <= 0 or h <= 0:
        raise argparse.ArgumentTypeError(f"must have a width and height above 0, not {text!r}")
    return x, y, w, h


def run(args: argparse.Namespace) -> int:
    """Track; 0 at the end of the source, 128 + the signal's number if stopped (130 for Ctrl-C)."""
    _check(args)
    from dmv_fast.vision.video import open_source

    with open_source(args.source, start=args.start) as source:
        first = next(source)
        if args.view and not _has_display():
            elsewhere = "give --output OUT.mp4 instead, for the same picture in a file"
            raise ValueError(f"--view needs a display, and OpenCV can open no window here; {elsewhere}")
        box = select_box(first) if args.select else args.box
        # After the cheap checks: this import brings torch, and the constructor reads the weights.
        from dmv_fast.tracker import FastDMVTracker

        tracker = FastDMVTracker(
            weights=args.weights, k=args.k, device=args.device, dtype=args.dtype, backend=args.backend
        )
        return _track(args, source, first, box, tracker)


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything slow is loaded."""
    if args.start < 0:
        raise ValueError(f"--start must be 0 or more, not {args.start}")
    if args.max_frames is not None and args.max_frames < 1:
        raise ValueError(f"--max-frames must be 1 or more, not {args.max_frames}")
    for name in ("output", "boxes", "json", "rerun"):
        if getattr(args, name) == "":  # an unset variable of a shell
            raise ValueError(f"--{name} is empty; it must be a file's name")
        if getattr(args, name) == "-":
            raise ValueError(f"--{name} is '-'; it must be a file's name (./- for one called so)")
    if args.output and Path(args.output).suffix.lower() != ".mp4":
        raise ValueError(f"--output must end in .mp4, not {args.output!r}")
    if args.rerun and Path(args.rerun).suffix.lower() != ".rrd":
        raise ValueError(f"--rerun must end in .rrd, not {args.rerun!r}")
    if args.rerun and find_spec("rerun") is None:
        raise ImportError('--rerun needs the rerun-sdk package: pip install "dmv-fast[rerun]"')
    taken = {Path(args.source).resolve()}
    for target in _outputs(args):
        path = check_target(target).resolve()
        if path in taken:
            raise ValueError(f"{target}: is the source or another output as well; give each its own name")
        taken.add(path)


def _outputs(args: argparse.Namespace) -> list[str]:
    """The files that were asked for."""
    return [path for path in (args.output, args.boxes, args.json, args.rerun) if path]


@dataclass
class _Tally:
    """What the summary tells, and nothing that grows with the video."""

    start: int
    frames: int = 0
    found: int = 0
    tracking_s: float = 0.0  # in tracker.track alone, the first frame (init) left out
    started: float = field(default_factory=time.perf_counter)

    def number(self) -> int:
        """Of the frame at hand, in the source."""
        return self.start + self.frames - 1

    def tracker_fps(self) -> float:
        return (self.frames - 1) / self.tracking_s if self.tracking_s else 0.0

    def whole_fps(self) -> float:
        return self.frames / max(time.perf_counter() - self.started, 1e-9)


def _track(
    args: argparse.Namespace, source: VideoSource, first: np.ndarray, box: Box, tracker: FastDMVTracker
) -> int:
    from tqdm import tqdm

    total = None if source.length is None else source.length - args.start
    if args.max_frames is not None:
        total = args.max_frames if total is None else min(total, args.max_frames)
    tally = _Tally(args.start)
    last: tuple[Box, float, bool] = (box, 1.0, True)
    with _Stop().listening() as stop, ExitStack() as outputs:
        watch = _watch(tracker, args)
        sinks = list(_open_sinks(args, source, box, tally, watch, outputs))
        view = outputs.enter_context(_open_view(watch, stop)) if args.view and watch else None
        bar = outputs.enter_context(tqdm(total=total, unit=" frames", dynamic_ncols=True, disable=None))
        frame: np.ndarray | None = first
        while frame is not None:
            with stop.breakable():
                last = _step(tracker, frame, box, tally)
            for sink in sinks:
                sink(tally.number(), frame, *last)
            bar.set_postfix_str(f"score {last[1]:.2f}, tracker {tally.tracker_fps():.0f} FPS", refresh=False)
            bar.update()
            if view is not None and watch is not None:
                _show(view, tracker, watch, tally, frame, last)
            if stop.signal or tally.frames == args.max_frames or (view is not None and view.closed):
                break
            with stop.breakable():
                frame = next(source, None)
    print(_summary(args, source, tally, last))
    return 128 + stop.signal if stop.signal else 0


def _step(tracker: FastDMVTracker, frame: np.ndarray, box: Box, tally: _Tally) -> tuple[Box, float, bool]:
    """Box, score and found of this frame; the first frame's are the given box's."""
    tally.frames += 1
    if tally.frames == 1:
        tracker.init(frame, box)
        tally.found += 1
        return box, 1.0, True
    begin = time.perf_counter()
    try:
        result: TrackResult = tracker.track(frame)
    except ValueError as error:
        raise ValueError(f"frame {tally.number()}: {error}") from error
    tally.tracking_s += time.perf_counter() - begin
    tally.found += result.found
    return result.box, float(result.score), bool(result.found)


def _watch(tracker: FastDMVTracker, args: argparse.Namespace) -> Watch | None:
    """What --view and --rerun look inside with; nothing is kept for it without them."""
    if not (args.view or args.rerun):
        return None
    from dmv_fast.insight import Watch

    watch = Watch(tracker)
    watch.first_frame = args.start
    return watch


def _open_view(watch: Watch, stop: _Stop) -> LiveWindow:
    from dmv_fast.insight.live import LiveWindow

    return LiveWindow(watch, lambda: stop.signal != 0)


def _show(
    view: LiveWindow, tracker: FastDMVTracker, watch: Watch, tally: _Tally, frame: np.ndarray,
    last: tuple[Box, float, bool],
) -> None:  # fmt: skip
    """Show the frame; where the person draws another box, track that from here on."""
    box = view.show(tally.number(), frame, *last, tally.tracker_fps())
    while box is not None:
        watch.first_frame = tally.number()
        tracker.init(frame, box)
        box = view.show(tally.number(), frame, box, 1.0, True, tally.tracker_fps())


_Sink = Callable[[int, "np.ndarray", Box, float, bool], None]


def _open_sinks(
    args: argparse.Namespace, source: VideoSource, box: Box, tally: _Tally, watch: Watch | None,
    outputs: ExitStack,
) -> Iterator[_Sink]:  # fmt: skip
    """The asked-for outputs, each a function of (frame number, frame, box, score, found)."""
    from dmv_fast.vision.draw import draw_box
    from dmv_fast.vision.video import VideoWriter

    def under(target: str) -> Path:
        whole = replaced_when_complete(check_target(target), keep_suffix=True, keep_interrupted=True)
        return outputs.enter_context(whole)

    if args.output:
        video = outputs.enter_context(VideoWriter(args.output, source.fps))
        yield lambda number, frame, box, score, found: video.write(draw_box(frame, box, score, found=found))
    if args.boxes:
        table = outputs.enter_context(open(under(args.boxes), "w", encoding="utf-8"))
        table.write(CSV_HEADER + "\n")
        yield lambda number, frame, box, score, found: write_csv_row(table, number, box, score, found)
    if args.json:
        yield outputs.enter_context(_json_rows(under(args.json), args, source, box, tally))
    if args.rerun and watch is not None:
        from dmv_fast.insight.recording import recording

        yield outputs.enter_context(recording(under(args.rerun), watch)).write


def write_csv_row(table: TextIO, number: int, box: Box, score: float, found: bool) -> None:
    """One frame's line under CSV_HEADER."""
    table.write(f"{number},{','.join(f'{v:.3f}' for v in box)},{score:.4f},{int(found)}\n")


@contextmanager
def _json_rows(
    path: Path, args: argparse.Namespace, source: VideoSource, box: Box, tally: _Tally
) -> Iterator[_Sink]:
    """Yields the function that writes a frame's line; the settings come before the lines, the speed after."""
    settings = {"source": source.name, "start": args.start, "size": source.size, "box": box, "k": args.k}
    settings |= {name: getattr(args, name) for name in ("weights", "device", "dtype", "backend")}
    with open(path, "w", encoding="utf-8") as out:
        out.write(json.dumps(settings)[:-1] + ', "frames": [')

        def write(number: int, frame: np.ndarray, box: Box, score: float, found: bool) -> None:
            row = {"frame": number, "box": [round(v, 3) for v in box]}
            row |= {"score": round(score, 4), "found": found}
            out.write(("\n" if tally.frames == 1 else ",\n") + json.dumps(row))

        try:
            yield write
        finally:
            speed = {"tracker_fps": round(tally.tracker_fps(), 2), "whole_fps": round(tally.whole_fps(), 2)}
            out.write("\n], " + json.dumps(speed)[1:] + "\n")


def _summary(
    args: argparse.Namespace, source: VideoSource, tally: _Tally, last: tuple[Box, float, bool]
) -> str:
    box, score, found = last
    lines = [
        f"{source.name}: frames {tally.start} to {tally.number()} ({tally.frames}), found in {tally.found}",
        f"last box {','.join(f'{v:.1f}' for v in box)}, score {score:.2f}{'' if found else ', lost'}",
        f"mean FPS: tracker {tally.tracker_fps():.1f}, with reading and writing {tally.whole_fps():.1f}",
    ]
    written = _outputs(args)
    return "\n".join(lines + ([f"wrote {', '.join(written)}"] if written else []))


class _Stop:
    """Ctrl-C, SIGTERM, a closed terminal: the first is only noted; the loop ends between two frames.

    A second one raises KeyboardInterrupt, the way out of a source that blocks, but never while files are
    written or finished.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._breakable = False

    def _handle(self, number: int, _: object) -> None:
        if self.signal and self._breakable:
            self._breakable = False
            raise KeyboardInterrupt
        self.signal = self.signal or number

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Within the block a second signal raises KeyboardInterrupt."""
        self._breakable = True
        try:
            yield
        finally:
            self._breakable = False

    @contextmanager
    def listening(self) -> Iterator[_Stop]:
        """Within the block; a signal that the process was told to ignore stays ignored."""
        heeded = []
        if threading.current_thread() is threading.main_thread():  # no other may have handlers
            names = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is not known to Windows
            heeded = [getattr(signal, name) for name in names if hasattr(signal, name)]
        heeded = [number for number in heeded if signal.getsignal(number) is not signal.SIG_IGN]
        former = {number: signal.signal(number, self._handle) for number in heeded}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def select_box(frame: np.ndarray) -> Box:
    """Let a person draw the box on the frame; ValueError without a display or without a box."""
    if not _has_display():
        raise ValueError("--select needs a display, and OpenCV can open no window here; give --box X,Y,W,H")
    import cv2

    from dmv_fast.insight.x11 import leave_events_to_qt

    leave_events_to_qt()
    scale = min(1.0, _SELECT_SIDE / max(frame.shape[:2]))
    shown = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    title = "Draw the box, then Enter (c: cancel)"
    drawn = cv2.selectROI(title, shown, showCrosshair=False, printNotice=False)
    x, y, w, h = (v / scale for v in drawn)
    cv2.destroyWindow(title)
    if w <= 0 or h <= 0:
        raise ValueError("--select: no box was drawn")
    print(f"--box {x:.1f},{y:.1f},{w:.1f},{h:.1f}", file=sys.stderr)
    return x, y, w, h


def _has_display() -> bool:
    """Whether a window opens: tried in a child, because without a display Qt aborts the whole process."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    script = "import cv2; cv2.namedWindow('is there a display?'); cv2.destroyAllWindows()"
    probe = [sys.executable, "-c", script]
    return subprocess.run(probe, capture_output=True, timeout=30, check=False).returncode == 0
