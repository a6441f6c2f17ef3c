"""pytracking, and what descends from it: STARK, OSTrack, SeqTrack, MixFormer.

Two files in the host's tree make it known there (docs/adapters.md): one that imports `get_tracker_class`, one
that imports `parameters`. Nothing of the host is imported here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from dmv_fast.tracker import FastDMVTracker, TrackerConfig

Box = list[float]


class Parameters(SimpleNamespace):
    """What the hosts read of a tracker's parameters and write to them, with FastDMVTracker's arguments."""

    def get(self, name: str, *default: Any) -> Any:
        """As pytracking's TrackerParams: AttributeError where there is neither value nor default."""
        return getattr(self, name, *default)

    def has(self, name: str) -> bool:
        """Whether there is such a parameter."""
        return hasattr(self, name)


def parameters(weights: str = "dmv18") -> Parameters:
    """Parameters for these weights; STARK and its descendants call it with the parameter file's name.

    Set `k`, `device`, `dtype`, `backend` and `config` on what it returns, as FastDMVTracker takes them, and
    `color = "bgr"` for the hosts' `run_video` and `run_webcam`: those hand frames over as OpenCV read them,
    while their datasets come as RGB.
    """
    return Parameters(
        weights=weights, k=None, device="auto", dtype="auto", backend="auto", config=TrackerConfig(),
        color="rgb", debug=0, visualization=False, save_all_boxes=False,
        object_presence_score_threshold=TrackerConfig().found_score,
    )  # fmt: skip


class DMV:
    """The hosts' BaseTracker, duck-typed: one target, or several by their numbers.

    Where `info["init_bbox"]` is a dict {number: box}, so are the boxes and scores that come out. Boxes are
    floats; the hosts' own result files truncate them to whole pixels.
    """

    multiobj_mode = "default"  # several targets are our own business; the host need not copy trackers

    def __init__(self, params: Parameters, dataset_name: str | None = None):
        """dataset_name: what STARK's descendants add; not used."""
        if params.color not in ("rgb", "bgr"):
            raise ValueError(f"params.color is {params.color!r}; it must be 'rgb' or 'bgr'")
        self.params = params
        self.visdom: Any = None  # the host sets it
        self._unstarted = FastDMVTracker(
            params.weights, params.k, params.device, params.dtype, params.backend, params.config
        )
        self._targets: OrderedDict[Any, FastDMVTracker] = OrderedDict()
        self._several = False

    def initialize(self, image: np.ndarray, info: Mapping[str, Any]) -> dict[str, Any]:
        """Start over on the first frame.

        Args:
            image: (H, W, 3) uint8 RGB, unless `params.color` says otherwise.
            info: its `init_bbox` is x, y, w, h, or a dict of such boxes.
        """
        given = info["init_bbox"]
        several = isinstance(given, Mapping)
        started, answers = self._start(self._bgr(image), given if several else {None: given})
        self._targets, self._several = started, several
        return self._output(answers)

    def track(self, image: np.ndarray, info: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The next frame; targets that enter in it are in `info["init_bbox"]`, a dict.

        Returns:
            target_bbox [x, y, w, h] and object_presence_score (0 to 1), or an OrderedDict of each.
        """
        if not self._targets and not self._several:
            raise RuntimeError("track before initialize: call initialize(image, info) on the first frame")
        image, answers = self._bgr(image), OrderedDict()
        entering = (info.get("init_bbox") or {}) if self._several and info else {}
        started, first = self._start(image, entering)  # before any target moves on: it may be refused
        for number, target in self._targets.items():
            result = target.track(image)
            answers[number] = (list(result.box), result.score)
        self._targets.update(started)
        answers.update(first)
        return self._output(answers)

    def visdom_draw_tracking(self, image: np.ndarray, box: Any, segmentation: Any = None) -> None:
        """What pytracking calls to show a frame."""
        boxes = box.values() if isinstance(box, Mapping) else [box]
        self.visdom.register((image, *boxes), "Tracking", 1, "Tracking")

    def _start(
        self, image: np.ndarray, boxes: Mapping[Any, Any]
    ) -> tuple[OrderedDict[Any, FastDMVTracker], OrderedDict[Any, tuple[Box, float]]]:
        """Trackers of these boxes, and their first answers; nothing of ours changes."""
        started, answers = OrderedDict(), OrderedDict()
        for number, box in boxes.items():
            started[number] = self._unstarted.clone()
            started[number].init(image, box)
            answers[number] = ([float(v) for v in box], 1.0)
        return started, answers

    def _output(self, answers: Mapping[Any, tuple[Box, float]]) -> dict[str, Any]:
        boxes = OrderedDict((number, box) for number, (box, _) in answers.items())
        scores = OrderedDict((number, score) for number, (_, score) in answers.items())
        if not self._several:
            boxes, scores = boxes[None], scores[None]
        return {"target_bbox": boxes, "object_presence_score": scores}

    def _bgr(self, image: np.ndarray) -> np.ndarray:
        if not isinstance(image, np.ndarray):
            return image  # refused by the tracker, by its type
        if self.params.color == "bgr" or image.ndim < 3 or image.shape[2] < 3:
            return image
        return np.ascontiguousarray(image[:, :, 2::-1])


def get_tracker_class() -> type[DMV]:
    """What the hosts look for in a tracker's module."""
    return DMV
