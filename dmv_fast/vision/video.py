"""Video in and out: frames are streamed, one at a time, and a written file is complete or not there."""

from __future__ import annotations

import glob
import math
import os
import re
import warnings
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np

from dmv_fast.files import check_target, partial_path
from dmv_fast.vision.draw import fit

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_OPEN_TIMEOUT_MS = 10_000  # for an address that does not answer; OpenCV itself waits 30 s
_MOST_FPS = 1000  # streams without a clock report nonsense such as 90000
_MOST_PIXELS = 8190  # a side; MPEG-4 has 13 bits for it
_DOUBT = "damaged, truncated or of an unknown codec?"


class VideoError(ValueError):
    """A source that cannot be read, or a video that cannot be written."""


class VideoSource:
    """An iterator over the frames of one source, each HWC uint8 BGR; a context manager that closes it.

    name: for messages. fps: frames a second, None if unknown (images). length: frames in the whole source as
    its header says, None if unknown (cameras, streams). start: number of the first frame that comes out.
    size: (width, height) of that frame; the images of a folder may differ in size.
    """

    def __init__(
        self,
        name: str,
        frames: Generator[np.ndarray, None, None],
        *,
        fps: float | None,
        length: int | None,
        start: int = 0,
    ) -> None:
        self.name, self.fps, self.length, self.start = name, fps, length, start
        self._frames = frames
        # One frame is read ahead: an unreadable source is found when it is opened, not amid the work.
        self._first: np.ndarray | None = next(frames, None)
        if self._first is None:
            if start:
                end = "it ends before that" if length is None else f"it has {length} frames"
                raise VideoError(f"{name}: cannot start at frame {start}: {end}")
            raise VideoError(f"{name}: not one frame can be read ({_DOUBT})")
        self.size = (self._first.shape[1], self._first.shape[0])

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        if self._first is not None:
            frame, self._first = self._first, None
            return frame
        return next(self._frames)

    def close(self) -> None:
        """Release the file or the device; no frame comes after it."""
        self._first = None
        self._frames.close()

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(source: str | os.PathLike[str], *, start: int = 0) -> VideoSource:
    """Open a video file, an image, a folder or glob of images, a camera number or an address (rtsp, http).

    start: number of the first frame that comes out; the ones before it are decoded, not sought, so that the
    number is exact in every container.

    Images come in natural order (2.jpg before 10.jpg). A video that ends well before the length in its header
    yields the frames it has and then warns (RuntimeWarning). Raises VideoError (a ValueError) for what cannot
    be read and for a `start` outside the source, OSError for a file that may not be read.
    """
    text = os.fspath(source)
    if start < 0:
        raise VideoError(f"start must be 0 or more, not {start}")
    _check_name(text)
    path = Path(text)
    if path.is_dir():
        return _open_images(text, path.iterdir(), start)
    if path.is_file():
        path.open("rb").close()  # says "permission denied" where OpenCV only fails
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return _open_images(text, [path], start)
        return _open_capture(text, cv2.VideoCapture(_for_ffmpeg(path), cv2.CAP_FFMPEG), start)
    if "://" in text:
        timeout = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _OPEN_TIMEOUT_MS]
        return _open_capture(text, cv2.VideoCapture(text, cv2.CAP_FFMPEG, timeout), start, live=True)
    if text.isascii() and text.isdigit():
        return _open_capture(f"camera {text}", cv2.VideoCapture(int(text)), start, live=True)
    if path.exists():  # a device such as /dev/video0
        return _open_capture(text, cv2.VideoCapture(text), start, live=True)
    if glob.has_magic(text):
        return _open_images(text, map(Path, glob.glob(text)), start)
    raise VideoError(f"{text!r}: no such file, folder or camera")


def _for_ffmpeg(path: Path) -> str:
    """Absolute: FFmpeg takes what stands before a colon for a protocol, the 12 of 12:30.mp4 for instance."""
    return os.path.abspath(path)


def _check_name(text: str) -> None:
    """VideoError for a name that is no UTF-8: OpenCV ends the whole process when it is given one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise VideoError(f"{text!r}: the name is not UTF-8, OpenCV cannot open it; rename it") from None


def _natural_key(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"([0-9]+)", str(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _open_images(name: str, candidates: Iterable[Path], start: int) -> VideoSource:
    paths = [p for p in candidates if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not paths:
        raise VideoError(f"{name}: there is no image ({' '.join(sorted(IMAGE_SUFFIXES))})")
    paths.sort(key=_natural_key)
    return VideoSource(name, _image_frames(paths[start:]), fps=None, length=len(paths), start=start)


def _image_frames(paths: list[Path]) -> Generator[np.ndarray, None, None]:
    for path in paths:
        _check_name(str(path))
        frame = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if frame is None:
            raise VideoError(f"{path}: cannot be read as an image")
        yield frame
        del frame  # not held while the next one is decoded


def _open_capture(name: str, capture: cv2.VideoCapture, start: int, *, live: bool = False) -> VideoSource:
    if not capture.isOpened():
        raise VideoError(f"{name}: {'does not open' if live else f'cannot be read as a video ({_DOUBT})'}")
    fps = capture.get(cv2.CAP_PROP_FPS)
    count = 0 if live else capture.get(cv2.CAP_PROP_FRAME_COUNT)
    length = int(count) if math.isfinite(count) and count > 0 else None
    frames = _capture_frames(name, capture, length, start)
    return VideoSource(name, frames, fps=fps if 0 < fps <= _MOST_FPS else None, length=length, start=start)


def _capture_frames(
    name: str, capture: cv2.VideoCapture, length: int | None, start: int
) -> Generator[np.ndarray, None, None]:
    seen = 0
    try:
        while seen < start and capture.grab():
            seen += 1
        while seen >= start:
            ok, frame = capture.read()
            if not ok:
                break
            seen += 1
            yield frame
            del frame
    finally:
        capture.release()
    # Headers count a little generously (duration times rate); a file cut short misses far more than that.
    if length is not None and start < seen < length - max(2, length // 50):
        missing = f"{name}: ends after {seen} of {length} frames (truncated?)"
        warnings.warn(missing, RuntimeWarning, stacklevel=2)


def _writable_fps(fps: float) -> float:
    """The nearest rate that MPEG-4 takes: it is a fraction there, whose numerator has 16 bits."""
    return round(max(fps, 0.1), 3 if fps < 65 else 2 if fps < 655 else 1)


class VideoWriter:
    """Writes BGR uint8 frames to an mp4; the file appears under its name when it is complete.

    The first frame sets the picture's size (even numbers, at most 8190 a side: MPEG-4 wants that); frames of
    another size are fitted into it. `close`, or the end of a `with` block, also by Ctrl-C, renames the
    temporary file to `path`; an exception in the block removes it. Without a frame no file is made.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float | None = None) -> None:
        """fps: None for 25."""
        self._path = check_target(path)
        if self._path.suffix.lower() != ".mp4":
            raise VideoError(f"{self._path}: the name of a video to write must end in .mp4")
        self._partial = partial_path(self._path, keep_suffix=True)
        self._fps = _writable_fps(fps or 25.0)
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._count = 0

    def write(self, frame: np.ndarray) -> None:
        """Append one HWC uint8 BGR frame."""
        if self._writer is None:
            self._writer = self._open(frame)
        width, height = self._size
        if frame.shape[1] - width in (0, 1) and frame.shape[0] - height in (0, 1):
            self._writer.write(np.ascontiguousarray(frame[:height, :width]))
        else:
            self._writer.write(fit(frame, self._size))
        self._count += 1

    def _open(self, frame: np.ndarray) -> cv2.VideoWriter:
        scale = min(1.0, _MOST_PIXELS / max(frame.shape[:2]))
        width, height = (max(2, int(side * scale) // 2 * 2) for side in frame.shape[1::-1])
        # MPEG-4 part 2 is the one codec for mp4 that every OpenCV wheel can write.
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        name, size = _for_ffmpeg(self._partial), (width, height)
        writer = cv2.VideoWriter(name, cv2.CAP_FFMPEG, codec, self._fps, size)
        if not writer.isOpened():
            self._partial.unlink(missing_ok=True)
            what = f"{width} x {height} pixels, {self._fps:g} frames a second"
            raise VideoError(f"{self._path}: OpenCV cannot write an mp4 of {what}")
        self._size = size
        return writer

    def close(self) -> None:
        """Finish the file and give it its name. VideoError if it did not come out whole (a full disk)."""
        if self._writer is None:
            return
        self._release()
        # OpenCV reports no write error; the index, written last, tells whether everything before it arrived.
        check = cv2.VideoCapture(_for_ffmpeg(self._partial), cv2.CAP_FFMPEG)
        written = int(check.get(cv2.CAP_PROP_FRAME_COUNT)) if check.isOpened() else 0
        check.release()
        if written != self._count:
            self.discard()
            raise VideoError(f"{self._path}: {written} of {self._count} frames were written (disk full?)")
        try:
            os.replace(self._partial, self._path)
        finally:
            self._partial.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what has been written; a former file of that name stays."""
        self._release()
        self._partial.unlink(missing_ok=True)

    def _release(self) -> None:
        if self._writer is not None:
            self._writer.release()
            self._writer = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.close()
        else:
            self.discard()
