"""`dmv-fast bench`: how long a frame takes on this machine."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from dmv_fast.commands.track import parse_box

SECTIONS = ("k", "memory", "network", "path", "targets", "peers", "stages")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `dmv-fast bench`."""
    parser.add_argument("--weights", help="a shipped name or a checkpoint; default: an untrained DMV18")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ... (default auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default auto)")
    parser.add_argument(
        "--k", type=int, default=4, help="candidates where a section does not vary them (default 4)"
    )
    parser.add_argument("--frames", type=int, default=60, help="timed frames a setting (default 60)")
    parser.add_argument("--only", help=f"sections, separated by commas; default all: {','.join(SECTIONS)}")
    parser.add_argument("--video", help="a video or a folder of images, with --box; default: a made clip")
    parser.add_argument(
        "--box", type=parse_box, metavar="X,Y,W,H", help="the target in the video's first frame"
    )
    parser.add_argument("--nano-dir", type=Path, help="folder of the ONNX files of OpenCV's TrackerNano")
    parser.add_argument(
        "--endurance", type=int, default=0, metavar="N", help="also follow a target for N frames"
    )
    parser.add_argument("--threads", type=int, help="of PyTorch and of OpenCV (default: one a core)")
    parser.add_argument("--out", type=Path, help="folder for frame.csv, machine.json and the plots")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Bad input is a ValueError."""
    import cv2
    import torch

    from dmv_fast.evaluation import speed, speed_report

    sections = _sections(args.only)
    if args.frames < 2:
        raise ValueError(f"frames is {args.frames}; it must be at least 2")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"threads is {args.threads}; it must be at least 1")
        torch.set_num_threads(args.threads)
        cv2.setNumThreads(args.threads)
    base = speed.Setting(weights=args.weights, k=args.k, device=args.device, dtype=args.dtype)
    bench = speed.Bench(_clip(args), base, args.frames, nano_dir=args.nano_dir)
    network = bench.frame_step(base).network
    facts = speed_report.machine(network.device)
    facts |= {
        "clip": bench.clip.name,
        "dtype": str(network.dtype),
        "timed": "image in to box out, not decoding",
    }
    print("  ".join(f"{key}: {value}" for key, value in facts.items()))
    began = time.perf_counter()
    for section in sections:
        getattr(bench, section)()
    if args.endurance:
        bench.endurance(args.endurance)
    if args.out is not None:
        _write(args.out, bench, facts | {"seconds": round(time.perf_counter() - began)})
    return 0


def _sections(only: str | None) -> list[str]:
    sections = list(SECTIONS) if only is None else [name for name in only.split(",") if name]
    for name in sections:
        if name not in SECTIONS:
            raise ValueError(f"only is {only!r}; {name!r} is none of {', '.join(SECTIONS)}")
    return sections


def _clip(args: argparse.Namespace):
    from dmv_fast.evaluation import speed
    from dmv_fast.vision.video import open_source

    if args.video is None:
        return speed.synthetic_clip()
    if args.box is None:
        raise ValueError("box is missing; with --video, say where the target is in the first frame: x,y,w,h")
    frames = []
    with open_source(args.video) as source:
        for frame in source:
            frames.append(frame)
            if len(frames) == 100:  # what is decoded stays in memory
                break
    return speed.Clip(frames, args.box, Path(args.video).name)


def _write(out: Path, bench, facts: dict[str, object]) -> None:
    from dmv_fast.evaluation import speed_report

    out.mkdir(parents=True, exist_ok=True)
    speed_report.write_csv(bench.rows, out / "frame.csv")
    speed_report.write_machine(facts, out / "machine.json")
    try:
        speed_report.plot(bench.rows, out)
    except ImportError:
        print("no plots: they need matplotlib (pip install 'dmv-fast[eval]')")
    print(f"written to {out}")
