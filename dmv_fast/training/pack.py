"""A small copy of a training folder, to carry to another machine: `python -m dmv_fast.training.pack SRC DST`.

Photographs become WebP with a limited long side, their boxes and outlines scaled with them, and only a share
of those without objects is kept. Clips are copied; a large one is written anew, smaller, if that saves space.
The copy is a training folder like any other; its held-out part is that of the source, less what was left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm


def pack(
    source: Path, target: Path, *, long_side: int = 288, quality: int = 55, backgrounds: float = 0.2,
    clip_side: int = 480,
) -> int:  # fmt: skip
    """Write the copy; returns its bytes. `target` must not be there yet.

    long_side, clip_side: pixels of photographs and clips. quality: of WebP, 1 to 100. backgrounds: share of
    the photographs without objects that is kept, 0 to 1.
    Raises ValueError for a bad argument or folder, OSError for a photograph that cannot be read.
    """
    if target.exists():
        raise ValueError(f"{target}: is there already; choose another folder or remove it")
    if not (source / "annotations.jsonl").is_file() and not (source / "clips").is_dir():
        raise ValueError(f"{source}: holds neither annotations.jsonl nor clips/; it is no training folder")
    if min(long_side, clip_side) < 64:
        raise ValueError(f"long side is {min(long_side, clip_side)}; it must be 64 or more")
    if not 1 <= quality <= 100 or not 0 <= backgrounds <= 1:
        given = f"{quality} and {backgrounds}"
        raise ValueError(f"quality and backgrounds are {given}; they must be 1 to 100 and 0 to 1")
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if (source / "annotations.jsonl").is_file():
        _photos(source, part, long_side, quality, backgrounds)
    if (source / "clips").is_dir():
        _clips(source / "clips", part / "clips", clip_side)
    if (source / "licences.json").is_file():
        shutil.copy(source / "licences.json", part)
    os.replace(part, target)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def _photos(source: Path, target: Path, long_side: int, quality: int, backgrounds: float) -> None:
    records = [json.loads(line) for line in (source / "annotations.jsonl").open()]
    chosen = np.random.default_rng(0).random(len(records)) < backgrounds
    kept = [r for r, keep in zip(records, chosen, strict=True) if r["objects"] or keep]
    with (target / "annotations.jsonl").open("w") as lines:
        for record in tqdm(kept, desc="photographs", mininterval=2.0):
            path = source / record["image"]
            image = cv2.imread(str(path), cv2.IMREAD_COLOR)
            if image is None:
                raise OSError(f"cannot read the photograph {path}")
            scale = min(1.0, long_side / max(image.shape[:2]))
            size = round(image.shape[1] * scale), round(image.shape[0] * scale)
            if scale < 1:
                image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            name = Path(record["image"]).with_suffix(".webp")
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            data = cv2.imencode(".webp", image, (cv2.IMWRITE_WEBP_QUALITY, quality))[1]
            (target / name).write_bytes(data.tobytes())
            fx, fy = size[0] / record["width"], size[1] / record["height"]
            scaled = {**record, "image": name.as_posix(), "width": size[0], "height": size[1]}
            scaled["objects"] = [_scaled(thing, fx, fy) for thing in record["objects"]]
            lines.write(json.dumps(scaled, separators=(",", ":")) + "\n")


def _scaled(thing: dict, fx: float, fy: float) -> dict:
    """An object's box and polygons, x times fx and y times fy, to a tenth of a pixel."""

    def points(flat: list[float]) -> list[float]:
        return [round(v * (fy if i % 2 else fx), 1) for i, v in enumerate(flat)]

    scaled = {**thing, "bbox": points(thing["bbox"])}
    if thing.get("polygons"):
        scaled["polygons"] = [points(polygon) for polygon in thing["polygons"]]
    return scaled


def _clips(source: Path, target: Path, long_side: int) -> None:
    target.mkdir()
    for path in tqdm(sorted(source.glob("*.mp4")), desc="clips", mininterval=2.0):
        scale = _shrink(path, target / path.name, long_side)
        for track in sorted(source.glob(f"{path.stem}.*.txt")):
            if scale == 1.0:
                shutil.copy(track, target)
            else:
                boxes = np.loadtxt(track, delimiter=",", ndmin=2) * scale
                np.savetxt(target / track.name, boxes, fmt="%.2f", delimiter=",")


def _shrink(path: Path, target: Path, long_side: int) -> float:
    """Write a clip anew where it is larger and that saves space, else copy it -> the scale of the result."""
    video = cv2.VideoCapture(str(path))
    size = np.array([video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT)])
    scale = min(1.0, long_side / max(size.max(), 1.0))
    small = tuple(int(v) for v in (size * scale / 2).round() * 2)
    if scale < 1:
        code = cv2.VideoWriter.fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(target), code, video.get(cv2.CAP_PROP_FPS) or 25.0, small)
        while (frame := video.read()[1]) is not None:
            writer.write(cv2.resize(frame, small, interpolation=cv2.INTER_AREA))
        writer.release()
    video.release()
    if scale < 1 and target.is_file() and 0 < target.stat().st_size < path.stat().st_size:
        return small[0] / float(size[0])
    shutil.copy(path, target)
    return 1.0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dmv_fast.training.pack", description=pack.__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--long-side", type=int, default=288, help="pixels of a photograph (288)")
    parser.add_argument("--quality", type=int, default=55, help="of WebP, 1 to 100 (55)")
    parser.add_argument(
        "--backgrounds", type=float, default=0.2, help="share of the photographs without objects (0.2)"
    )
    parser.add_argument("--clip-side", type=int, default=480, help="pixels of a clip (480)")
    args = parser.parse_args()
    try:
        size = pack(**vars(args))
    except (ValueError, OSError) as error:
        print(f"pack: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.target}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
