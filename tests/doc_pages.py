"""What the tests of README and docs share: the pages' blocks and commands, and a desk to run them on."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
from photographs import write_photographs

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = "dmv-fast|python|make|pip|torchrun|vot|rerun|pytest"
BOX = (60, 50, 40, 36)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page: Path) -> list[str]:
    """The lines of shell blocks, indented ones too, and commands in tables and running text."""
    text = page.read_text(encoding="utf-8")
    found = [line for block in blocks(page, "sh") for line in block.splitlines()]
    found += re.findall(rf"^    ((?:{PROGRAMS}) .*)", text, re.M)
    found += re.findall(rf"`((?:{PROGRAMS}) [^`\n]+)`", text)
    joined = "\n".join(found).replace("\\\n", " ")
    lines = (re.split(r"  +#", line)[0].strip() for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def moving_square(frames: int) -> list[np.ndarray]:
    """A textured square that moves two pixels a frame over another texture."""
    rng = np.random.default_rng(0)
    ground = cv2.resize(rng.integers(0, 120, (24, 32, 3), np.uint8), (320, 240))
    target = cv2.resize(rng.integers(100, 255, (6, 6, 3), np.uint8), BOX[2:], interpolation=cv2.INTER_CUBIC)
    clip = []
    for i in range(frames):
        frame, x = ground.copy(), BOX[0] + 2 * i
        frame[BOX[1] : BOX[1] + BOX[3], x : x + BOX[2]] = target
        clip.append(frame)
    return clip


def lay_desk(folder: Path) -> None:
    """A working directory in which the names that the pages use are there."""
    clip = moving_square(8)
    writer = cv2.VideoWriter(str(folder / "video.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25, (320, 240))
    for frame in clip:
        writer.write(frame)
    writer.release()
    (folder / "clip.mp4").symlink_to(folder / "video.mp4")
    sequence = folder / "DATASETS" / "OTB" / "Square"
    write_frames(sequence / "img", "{:04d}.jpg", clip)
    (sequence / "groundtruth_rect.txt").write_text(boxes_of(len(clip)))
    for name in ("DEV", "DIR"):
        (folder / name).symlink_to(folder / "DATASETS" / "OTB")
    table = "video,x,y,w,h\nvideo.mp4,60,50,40,36\n"
    for name in ("videos.csv", "list.csv"):
        (folder / name).write_text(table)


def lay_training_data(root: Path) -> None:
    """DATA of docs/training.md: made photographs, and two videos of each training set."""
    write_photographs(root)
    clip = moving_square(6)
    for i in (1, 2):
        videos = {
            root / f"got10k/train/GOT-10k_Train_{i:06d}": ("", "groundtruth.txt"),
            root / f"lasot/kite/kite-{i}": ("img", "groundtruth.txt"),
        }
        for folder, (images, truth) in videos.items():
            write_frames(folder / images, "{:08d}.jpg", clip)
            (folder / truth).write_text(boxes_of(len(clip)))
        write_frames(root / f"trackingnet/TRAIN_0/frames/v{i}", "{}.jpg", clip, first=0)
        anno = root / "trackingnet/TRAIN_0/anno"
        anno.mkdir(exist_ok=True)
        (anno / f"v{i}.txt").write_text(boxes_of(len(clip)))
        (root / f"lasot/kite/kite-{i}/full_occlusion.txt").write_text(",".join("0" * len(clip)))
        (root / f"lasot/kite/kite-{i}/out_of_view.txt").write_text(",".join("0" * len(clip)))
        (root / f"got10k/train/GOT-10k_Train_{i:06d}/absence.label").write_text("0\n" * len(clip))
        (root / f"got10k/train/GOT-10k_Train_{i:06d}/cover.label").write_text("8\n" * len(clip))
    (root / "got10k/train/list.txt").write_text("GOT-10k_Train_000001\nGOT-10k_Train_000002\n")
    (root / "lasot/testing_set.txt").write_text("bird-1\n")


def write_frames(folder: Path, pattern: str, clip: list[np.ndarray], first: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(clip, first):
        cv2.imwrite(str(folder / pattern.format(i)), frame)


def boxes_of(count: int) -> str:
    """The square's, a line a frame."""
    return "".join(f"{BOX[0] + 2 * i},{BOX[1]},{BOX[2]},{BOX[3]}\n" for i in range(count))
