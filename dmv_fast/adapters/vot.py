"""The VOT toolkit 0.9: VotTracker for `protocol = python`, `main` for `protocol = traxpython` (extra `vot`).

Both speak to the toolkit itself and not through the `vot.py` that integrations copy: its `report` takes other
arguments from one year to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from dmv_fast.tracker import FastDMVTracker

Box = tuple[float, float, float, float]
Status = tuple[Box, dict[str, float]]


class VotTracker:
    """Tracks the objects of a sequence, which may enter at any frame. It lives in a process of its own.

    The arguments are FastDMVTracker's; `arg_k = 4` in trackers.ini arrives as text and is understood.
    """

    multiobject = True  # what the toolkit asks for; one object is a list of one

    def __init__(
        self, weights: str = "dmv18", k: int | str | None = None, device: str = "auto", dtype: str = "auto",
        backend: str = "auto",
    ):  # fmt: skip
        self._unstarted = FastDMVTracker(weights, None if k is None else int(k), device, dtype, backend)
        self._objects: list[FastDMVTracker] = []

    def init(
        self, frame: str | Mapping[str, str], new: Any, properties: Mapping[str, str] | None = None
    ) -> list[Status]:
        """Start over; arguments and answer as for `update`."""
        before, self._objects = self._objects, []
        try:
            return self.update(frame, new, properties)
        except Exception:
            self._objects = before
            raise

    def update(
        self, frame: str | Mapping[str, str], new: Any = (), properties: Mapping[str, str] | None = None
    ) -> list[Status]:
        """The next frame.

        Args:
            frame: the image's path, or paths by channel, of which "color" is read.
            new: (region, properties) of each object that enters; a region is x, y, w, h or a list of points.

        Returns:
            ((x, y, w, h), {"confidence": score}) of each object, in the order in which they entered.

        Raises:
            ValueError: a frame that cannot be read, or a region that is no box.
        """
        image = _read(frame)
        entering = []  # before any object moves on: they may be refused
        for region, _ in [new] if isinstance(new, tuple) and new else new:
            entering.append((self._unstarted.clone(), _box(region)))
            entering[-1][0].init(image, entering[-1][1])
        statuses = []
        for tracker in self._objects:
            result = tracker.track(image)
            statuses.append((result.box, {"confidence": result.score}))
        self._objects += [tracker for tracker, _ in entering]
        return statuses + [(box, {"confidence": 1.0}) for _, box in entering]


def main(**arguments: Any) -> None:
    """Serve the toolkit by TraX over standard input and output until it quits. arguments: VotTracker's."""
    try:
        from trax import Image, Rectangle, Region, Server, TraxStatus
    except ImportError as error:
        raise ImportError('TraX needs the package vot-trax: pip install "dmv-fast[vot]"') from error

    tracker = VotTracker(**arguments)  # before the toolkit is greeted: loading is not tracking time
    with Server([Region.RECTANGLE], [Image.PATH], multiobject=True) as server:
        while True:
            request = server.wait()
            if request.type not in (TraxStatus.INITIALIZE, TraxStatus.FRAME):
                break
            step = tracker.init if request.type == TraxStatus.INITIALIZE else tracker.update
            paths = {channel: image.path() for channel, image in request.image.items()}
            statuses = step(paths, [(region.bounds(), given) for region, given in request.objects or ()])
            server.status([(Rectangle.create(*box), said) for box, said in statuses])


def _read(frame: str | Mapping[str, str]) -> np.ndarray:
    path = frame if isinstance(frame, str) else frame["color"]
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"frame {path}: not an image that OpenCV can read")
    return image


def _box(region: Any) -> Box:
    """x, y, w, h of a rectangle, or around a polygon."""
    if isinstance(region, tuple) and len(region) == 4:
        x, y, w, h = (float(v) for v in region)
        return x, y, w, h
    if isinstance(region, list) and region and all(len(point) == 2 for point in region):
        x, y = np.min(region, axis=0).tolist()
        right, bottom = np.max(region, axis=0).tolist()
        return x, y, right - x, bottom - y
    raise ValueError(
        f"region is {type(region).__name__}; it must be a rectangle or a polygon: "
        "set `convert = rectangle` in trackers.ini"
    )


if __name__ == "__main__":
    main()
