"""Readers of tracking benchmarks: a folder on disk -> sequences of frames and boxes.

Boxes are xywh in pixels, as the annotation file gives them (OTB counts from 1: a constant shift in and out
cancels, so nothing is corrected here). A frame whose target is absent or unknown has a row of NaN; so has a
box without width or height, which nobody can overlap.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")


Keep = Callable[[str], bool]
"""Whether the sequence of that name is wanted; the others are not read."""


class DatasetError(ValueError):
    """A data set that cannot be read; the message names the file, the line, and what was expected."""


@dataclass(frozen=True, eq=False)
class Sequence:
    """One target in one video. Frames are read only when they are asked for."""

    name: str
    frames: tuple[Path, ...] | Path
    """Image files in order, or one video file."""
    boxes: np.ndarray
    """(n, 4) float64 xywh, a row a frame; NaN = absent or unknown."""
    resolution: tuple[int, int] | None = None
    """(width, height) where the data set states it; `frame_size` reads the first frame otherwise."""

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def start(self) -> int:
        """The first frame with a box: where a tracker is started."""
        return int(np.argmin(np.isnan(self.boxes[:, 0])))

    def images(self, first: int = 0) -> Iterator[np.ndarray]:
        """Frames `first`, `first` + 1, ... as HWC uint8 BGR; DatasetError at one that cannot be read."""
        if isinstance(self.frames, Path):
            yield from _video_frames(self.frames, first, len(self))
            return
        for path in self.frames[first:]:
            yield read_image(path)

    def frame_size(self) -> tuple[int, int]:
        """(width, height) in pixels of the frames."""
        if self.resolution is not None:
            return self.resolution
        height, width = next(self.images()).shape[:2]
        return width, height


def read_image(path: Path) -> np.ndarray:
    """An image file as HWC uint8 BGR; DatasetError where it is none."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DatasetError(f"{path}: no such image, or not one that OpenCV can read")
    return image


def _video_frames(path: Path, first: int, count: int) -> Iterator[np.ndarray]:
    video = cv2.VideoCapture(str(path))
    try:
        if not video.isOpened():
            raise DatasetError(f"{path}: no such video, or not one that OpenCV can read")
        for index in range(count):
            ok, image = (video.grab(), None) if index < first else video.read()
            if not ok:
                raise DatasetError(f"{path}: ends after {index} frames; its boxes are for {count}")
            if image is not None:
                yield image
    finally:
        video.release()


# ---- annotation files ----


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without the empty ones at its end."""
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace").rstrip().splitlines()
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or error}") from None


def read_rows(path: Path) -> np.ndarray:
    """The numbers of a box file as they stand -> (n, 4) float64: x, y, w, h a line, commas or spaces between.

    Raises DatasetError naming file and line where a line is not four numbers (NaN is one, infinity is not).
    """
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            row = [float(field) for field in re.split(r"[,;\s]+", line.strip())]
        except ValueError:
            row = []
        if len(row) != 4 or np.isinf(row).any():
            found = line.strip()
            raise DatasetError(f"{path}, line {number}: expected four numbers x,y,w,h, found {found!r}")
        rows.append(row)
    if not rows:
        raise DatasetError(f"{path}: empty; expected a line x,y,w,h a frame")
    return np.array(rows, dtype=np.float64)


def read_boxes(path: Path) -> np.ndarray:
    """An annotation file -> (n, 4) float64; rows without a whole box of positive size are NaN."""
    boxes = read_rows(path)
    with np.errstate(invalid="ignore"):
        boxes[~(boxes[:, 2:] > 0).all(axis=1)] = np.nan
    boxes[np.isnan(boxes).any(axis=1)] = np.nan
    if np.isnan(boxes).all():
        raise DatasetError(f"{path}: no frame has a box")
    return boxes


def _read_flags(path: Path, count: int) -> np.ndarray:
    """`count` numbers, one a line or separated by commas (absence.label, full_occlusion.txt) -> (count,)."""
    values: list[float] = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            values += [float(field) for field in re.split(r"[,\s]+", line.strip())]
        except ValueError:
            raise DatasetError(f"{path}, line {number}: expected numbers, found {line.strip()!r}") from None
    if len(values) != count:
        raise DatasetError(f"{path}: {len(values)} flags for {count} boxes")
    return np.array(values)


def _natural(path: Path) -> list[str | int]:
    """Sort key that puts 9.jpg before 10.jpg."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder of frames")
    # macOS leaves a ._0001.jpg beside each file that it copies to another's disk
    found = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != "."]
    if not found:
        raise DatasetError(f"{folder}: holds no frames ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(found, key=_natural)


def _sequence(
    name: str,
    frames: list[Path],
    boxes: np.ndarray,
    annotation: Path,
    resolution: tuple[int, int] | None = None,
) -> Sequence:
    """Frames and boxes of equal count; one box for many frames is a test set that keeps the others back."""
    if len(boxes) == 1 and len(frames) > 1:
        boxes = np.concatenate([boxes, np.full((len(frames) - 1, 4), np.nan)])
    if len(boxes) != len(frames):
        raise DatasetError(f"{annotation}: {len(boxes)} boxes for {len(frames)} frames in {frames[0].parent}")
    return Sequence(name, tuple(frames), boxes, resolution)


# ---- layouts ----

# Sequences of OTB-100 whose annotation covers only these frames of the folder (the benchmark's own list).
OTB_RANGES = {
    "david": (299, 770), "football1": (0, 74), "freeman3": (0, 460), "freeman4": (0, 283), "diving": (0, 215),
}  # fmt: skip

# First frame, counted from 1, of the UAV123 sequences cut out of a longer one (the benchmark's own list).
UAV123_STARTS = {
    "bird1_2": 775, "bird1_3": 1573, "car1_2": 751, "car1_3": 1627, "car6_2": 487, "car6_3": 1807,
    "car6_4": 2953, "car6_5": 3925, "car8_2": 1357, "car16_2": 415, "group1_2": 1333, "group1_3": 2515,
    "group1_4": 3925, "group2_2": 907, "group2_3": 1771, "group3_2": 1567, "group3_3": 2827,
    "group3_4": 4369, "person2_2": 1189, "person4_2": 1501, "person5_2": 877, "person7_2": 1249,
    "person8_2": 1075, "person12_2": 601, "person14_2": 847, "person14_3": 1813, "person17_2": 1501,
    "person19_2": 1243, "person19_3": 2791, "truck4_2": 577, "uav1_2": 1555, "uav1_3": 2473,
}  # fmt: skip


def _all(name: str) -> bool:
    return True


def read_otb(root: Path, keep: Keep = _all) -> list[Sequence]:
    """OTB-style folders at any depth: NAME/img/*.jpg and NAME/groundtruth_rect.txt, or one a target."""
    found = []
    for place, children, files in os.walk(root, followlinks=True):
        children.sort()
        annotations = sorted(f for f in files if re.fullmatch(r"groundtruth_rect.*\.txt", f))
        if annotations:
            children.clear()
            found.append((Path(place), annotations))
    names = Counter(folder.name for folder, _ in found)
    sequences = []
    for folder, annotations in found:
        name = folder.name if names[folder.name] == 1 else folder.relative_to(root).as_posix()
        sequences += _read_otb_folder(folder, [folder / file for file in annotations], name, keep)
    return sequences


def _read_otb_folder(folder: Path, annotations: list[Path], name: str, keep: Keep) -> list[Sequence]:
    if len(annotations) > 1:  # Human4 comes with an empty file beside the real one
        annotations = [path for path in annotations if path.read_text(errors="replace").strip()]
    sequences = []
    for number, path in enumerate(annotations, start=1):
        target = f"{name}.{number}" if len(annotations) > 1 else name
        if not keep(target):
            continue
        frames = used = _images(folder / "img")
        boxes = read_boxes(path)
        if len(boxes) != len(frames) and folder.name.lower() in OTB_RANGES:
            used = frames[slice(*OTB_RANGES[folder.name.lower()])]
        sequences.append(_sequence(target, used, boxes, path))
    return sequences


def read_pairs(root: Path, keep: Keep = _all) -> list[Sequence]:
    """Videos with box files beside them: NAME.mp4 and NAME.txt, or NAME.1.txt, NAME.2.txt one a target."""
    sequences = []
    for video in sorted(p for p in root.glob("[!.]*") if p.suffix.lower() in VIDEO_SUFFIXES):
        pattern = re.compile(re.escape(video.stem) + r"(\.\d+)?\.txt")
        annotations = [path for path in root.glob("*.txt") if pattern.fullmatch(path.name)]
        for path in sorted((path for path in annotations if keep(path.stem)), key=_natural):
            sequences.append(Sequence(path.stem, video, read_boxes(path)))
    return sequences


def read_got10k(root: Path, keep: Keep = _all) -> list[Sequence]:
    """GOT-10k: list.txt, NAME/%08d.jpg, NAME/groundtruth.txt, cover.label or absence.label, meta_info.ini.

    root is one subset, or a folder that holds one subset only. A frame is absent where the visible share
    (cover.label) is 0, which is how the got10k toolkit decides; without that file, absence.label decides.
    """
    if not (root / "list.txt").is_file():
        subsets = [name for name in ("train", "val", "test") if (root / name / "list.txt").is_file()]
        if len(subsets) != 1:
            found = f"holds the subsets {', '.join(subsets)}: name one" if subsets else "has no list.txt"
            raise DatasetError(f"{root}: {found}")
        root = root / subsets[0]
    folders = listed_folders(root / "list.txt", root)
    return [read_got10k_sequence(folder) for folder in folders if keep(folder.name)]


def listed_folders(listing: Path, root: Path) -> list[Path]:
    """The folders of `root` that a file names, one a line; DatasetError at a name that has none."""
    folders = []
    for number, line in enumerate(read_lines(listing), start=1):
        folder = root / line.strip()
        if not line.strip() or not folder.is_dir():
            raise DatasetError(f"{listing}, line {number}: no folder {line.strip()!r}")
        folders.append(folder)
    return folders


def read_got10k_sequence(folder: Path) -> Sequence:
    """One folder of GOT-10k."""
    annotation = folder / "groundtruth.txt"
    boxes = _hide_absent_got10k(read_boxes(annotation), folder)
    return _sequence(folder.name, _images(folder), boxes, annotation, _got10k_resolution(folder))


def _hide_absent_got10k(boxes: np.ndarray, folder: Path) -> np.ndarray:
    cover, absence = folder / "cover.label", folder / "absence.label"
    if cover.is_file():
        boxes[_read_flags(cover, len(boxes)) <= 0] = np.nan
    elif absence.is_file():
        boxes[_read_flags(absence, len(boxes)) != 0] = np.nan
    return boxes


def _got10k_resolution(folder: Path) -> tuple[int, int] | None:
    path = folder / "meta_info.ini"
    text = "\n".join(read_lines(path)) if path.is_file() else ""
    match = re.search(r"resolution:\s*\(\s*(\d+),\s*(\d+)\s*\)", text)
    return (int(match[1]), int(match[2])) if match else None


def read_lasot(root: Path, keep: Keep = _all) -> list[Sequence]:
    """LaSOT: CLASS/CLASS-1/img/*.jpg, groundtruth.txt, full_occlusion.txt, out_of_view.txt.

    A frame is absent where either flag is set, as in LaSOT's own toolkit.
    """
    return [read_lasot_sequence(folder) for folder in lasot_folders(root) if keep(folder.name)]


def lasot_folders(root: Path) -> list[Path]:
    """The folders of sequences below `root` or its classes, in order."""
    found = [path.parent for depth in ("*", "*/*") for path in root.glob(f"{depth}/groundtruth.txt")]
    return sorted(found, key=_natural)


def read_lasot_sequence(folder: Path) -> Sequence:
    """One folder of LaSOT."""
    annotation = folder / "groundtruth.txt"
    boxes = read_boxes(annotation)
    for flags in (folder / "full_occlusion.txt", folder / "out_of_view.txt"):
        if flags.is_file():
            boxes[_read_flags(flags, len(boxes)) != 0] = np.nan
    return _sequence(folder.name, _images(folder / "img"), boxes, annotation)


def read_trackingnet(root: Path, keep: Keep = _all) -> list[Sequence]:
    """TrackingNet: frames/NAME/%d.jpg and anno/NAME.txt, in root or in TEST, TRAIN_0, ... below it."""
    folders = (root / "anno", *sorted(root.glob("*/anno")))
    found = [path for folder in folders for path in sorted(folder.glob("[!.]*.txt")) if keep(path.stem)]
    return [read_trackingnet_sequence(path) for path in found]


def read_trackingnet_sequence(annotation: Path) -> Sequence:
    """One anno/NAME.txt of TrackingNet and its frames/NAME."""
    frames = _images(annotation.parent.parent / "frames" / annotation.stem)
    return _sequence(annotation.stem, frames, read_boxes(annotation), annotation)


def read_uav123(root: Path, keep: Keep = _all) -> list[Sequence]:
    """UAV123: anno/UAV123/NAME.txt and data_seq/UAV123/FOLDER/%06d.jpg; several names may share a folder.

    UAV20L (anno/UAV20L, frames of the same folders) is read where anno/UAV123 is not there.
    """
    annotations = root / "anno" / "UAV123"
    long_videos = not annotations.is_dir()
    if long_videos:
        annotations = root / "anno" / "UAV20L"
    sequences = []
    for path in sorted((p for p in annotations.glob("[!.]*.txt") if keep(p.stem)), key=_natural):
        boxes = read_boxes(path)
        folder = root / "data_seq" / "UAV123" / path.stem
        if not folder.is_dir():
            folder = folder.with_name(re.sub(r"_\d+$", "", path.stem))
        first = 1 if long_videos else UAV123_STARTS.get(path.stem, 1)
        frames = _images(folder)[first - 1 : first - 1 + len(boxes)]
        if not frames:
            raise DatasetError(f"{folder}: has no frame {first}, where {path.stem} starts")
        sequences.append(_sequence(path.stem, frames, boxes, path))
    return sequences


READERS: dict[str, Callable[..., list[Sequence]]] = {
    "otb": read_otb,
    "pairs": read_pairs,
    "got10k": read_got10k,
    "lasot": read_lasot,
    "trackingnet": read_trackingnet,
    "uav123": read_uav123,
}


def detect(root: Path) -> str:
    """Which of the layouts `root` has, by the files that only it has."""
    marks = {
        "got10k": ("list.txt", "*/list.txt"),
        "uav123": ("anno/UAV123/*.txt", "anno/UAV20L/*.txt"),
        "trackingnet": ("anno/*.txt", "*/anno/*.txt"),
        "lasot": ("*/groundtruth.txt", "*/*/groundtruth.txt"),
        "pairs": tuple("*" + end for suffix in VIDEO_SUFFIXES for end in (suffix, suffix.upper())),
    }
    for name, patterns in marks.items():
        if any(next(root.glob(pattern), None) is not None for pattern in patterns):
            return name
    return "otb"


def load(dataset: str, root: Path | str, names: Iterable[str] | None = None) -> list[Sequence]:
    """Sequences of the data set under `root`, in its order. dataset: a name of READERS, or "auto".

    names: only these, as for `select`; what is wrong with another one does not matter then.
    Raises DatasetError where the folder, or anything in it, is not as that layout has it.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(f"root is {str(root)!r}; no such folder")
    if dataset == "auto":
        dataset = detect(root)
    if dataset not in READERS:
        raise DatasetError(f"dataset is {dataset!r}; known: {', '.join(READERS)}, auto")
    wanted = None if names is None else _listed(names)
    if wanted:
        sequences = READERS[dataset](root, wanted.__contains__)
        if {sequence.name for sequence in sequences} == wanted:
            return sequences
    sequences = READERS[dataset](root)
    if not sequences:
        layout = (READERS[dataset].__doc__ or "").splitlines()[0]
        raise DatasetError(f"{root}: no sequence found. Expected {layout}")
    return sequences if wanted is None else select(sequences, wanted)


def _listed(names: Iterable[str]) -> set[str]:
    wanted: set[str] = set()
    for name in names:
        listed = read_lines(Path(name[1:])) if name.startswith("@") else [name]
        wanted.update(line.strip() for line in listed if line.strip())
    return wanted


def select(sequences: list[Sequence], names: Iterable[str]) -> list[Sequence]:
    """The sequences of these names, in the data set's order; "@FILE" stands for the names in a file."""
    wanted = _listed(names)
    chosen = [sequence for sequence in sequences if sequence.name in wanted]
    missing = sorted(wanted - {sequence.name for sequence in chosen})
    if missing:
        known = ", ".join([sequence.name for sequence in sequences[:8]] + ["..."] * (len(sequences) > 8))
        raise DatasetError(f"sequences: no {', '.join(missing)} here; there is {known}")
    return chosen
