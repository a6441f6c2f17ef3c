"""`dmv-fast bench`: how long a frame takes on this machine."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dmv_fast.commands import DTYPES
from dmv_fast.commands.track import parse_box

if TYPE_CHECKING:
    from dmv_fast.evaluation.speed import Bench, Clip

SECTIONS = {
    "k": "K = 1 to 32",
    "memory": "1 to 64 frames remembered",
    "network": "DMV18 and DMV50, grid 16 and 32, untrained",
    "path": "the fast path against the reference",
    "targets": "1, 4, 16 targets in one call against as many trackers",
    "peers": "OpenCV's trackers",
    "stages": "stage by stage",
    "peak": "the most memory taken, a process each",
}
ENDURANCE = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `dmv-fast bench`."""
    parser.add_argument("--weights", default="dmv18", help="a shipped name or a checkpoint (default dmv18)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ... (default auto)")
    parser.add_argument("--dtype", default="auto", help=DTYPES)
    parser.add_argument(
        "-k", "--k", type=int, default=4, help="candidates where a section does not vary them (default 4)"
    )
    parser.add_argument("--frames", type=int, default=60, help="timed frames a setting (default 60)")
    parser.add_argument(
        "--only", metavar="SECTIONS",
        help="some sections, separated by commas: "
        + "; ".join(f"{name} ({what})" for name, what in SECTIONS.items()),
    )  # fmt: skip
    parser.add_argument("--video", help="a video or a folder of images, with --box; default: a made clip")
    parser.add_argument(
        "--box", type=parse_box, metavar="X,Y,W,H", help="the target in the video's first frame"
    )
    parser.add_argument("--nano-dir", type=Path, help="folder of the ONNX files of OpenCV's TrackerNano")
    parser.add_argument(
        "--endurance", type=int, nargs="?", const=ENDURANCE, metavar="FRAMES",
        help=f"follow one target for so many frames (default {ENDURANCE}): memory, p50, p99; "
        "instead of the sections, or after those of --only",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="of PyTorch and of OpenCV (default: one a core)")
    parser.add_argument(
        "--output", "--out", type=Path, metavar="DIR", help="folder for the tables (CSV) and plots (PNG)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Bad input is a ValueError."""
    import cv2
    import torch

    from dmv_fast.evaluation import speed, speed_report
    from dmv_fast.runtime.network import FastNetwork
    from dmv_fast.runtime.precision import without_auto

    sections = _sections(args)
    if args.output is not None:  # now, not when the first section is measured
        args.output.mkdir(parents=True, exist_ok=True)
    if args.frames < 2:
        raise ValueError(f"frames is {args.frames}; it must be at least 2")
    if args.endurance is not None and args.endurance < 2:
        raise ValueError(f"endurance is {args.endurance}; it must be at least 2 frames")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"threads is {args.threads}; it must be at least 1")
        torch.set_num_threads(args.threads)
        cv2.setNumThreads(args.threads)
    base = speed.Setting(weights=args.weights, k=args.k, device=args.device, dtype=args.dtype)
    bench = speed.Bench(_clip(args), base, args.frames, nano_dir=args.nano_dir)
    network = bench.frame_step(base).network
    facts = speed_report.machine(network.device)
    fast = isinstance(network, FastNetwork)
    dtype = without_auto(args.dtype, network.device) if fast else "float32"
    facts |= {"clip": bench.clip.name, "dtype": dtype, "timed": speed_report.TIMED}
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
    for section in sections:
        began = time.perf_counter()
        try:
            getattr(bench, section)()
        finally:  # after each, and of one that fails or is stopped what it has: what was measured is not lost
            if args.output is not None:
                speed_report.write(bench, facts, args.output)
        print(f"{section}: {time.perf_counter() - began:.0f} s", flush=True)
    if args.endurance is not None:
        _endure(bench, args.endurance, facts, args.output)
    if args.output is not None:
        print(f"written to {args.output}")
    return 0


def _sections(args: argparse.Namespace) -> list[str]:
    if args.only is None:
        return [] if args.endurance is not None else list(SECTIONS)
    sections = [name for name in args.only.split(",") if name]
    for name in sections:
        if name not in SECTIONS:
            raise ValueError(f"only is {args.only!r}; {name!r} is none of {', '.join(SECTIONS)}")
    return sections


def _endure(bench: Bench, frames: int, facts: dict[str, object], output: Path | None) -> None:
    from dmv_fast.evaluation import speed_report
    from dmv_fast.evaluation.endurance import endure
    from dmv_fast.files import write_text
    from dmv_fast.model.memory import MemoryPolicy

    # Every 30th frame is remembered whatever it scores, so that the memory fills and then drops its oldest.
    tracker = bench.follower(MemoryPolicy(interval=30, threshold=0.0))
    found = endure(tracker, bench.clip, frames, print)
    line = found.line() + f"; load {facts['load']}"
    print(line)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        found.write(output / "endurance.csv")
        write_text(output / "endurance.txt", line + "\n")
        if not bench.rows:
            speed_report.write_machine(facts, output / "endurance.json")


def _clip(args: argparse.Namespace) -> Clip:
    from dmv_fast.evaluation import speed
    from dmv_fast.vision.frames import check_box
    from dmv_fast.vision.video import open_source

    if args.video is None:
        if args.box is not None:
            raise ValueError("--box is of no use without --video; the made clip has its own")
        return speed.synthetic_clip()
    if args.box is None:
        raise ValueError("box is missing; with --video, say where the target is in the first frame: x,y,w,h")
    frames = []
    with open_source(args.video) as source:
        for frame in source:
            frames.append(frame)
            if len(frames) == 100:  # what is decoded stays in memory
                break
    if len(frames) < 2:
        raise ValueError(f"video {args.video} has {len(frames)} frames; 2 are needed at least")
    check_box(args.box, frames[0].shape[1], frames[0].shape[0])
    return speed.Clip(frames, args.box, Path(args.video).name)
