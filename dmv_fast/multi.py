"""MultiTracker: several targets of one stream, one network call a frame."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import numpy as np

from dmv_fast.checks import check_whole
from dmv_fast.cloning import Cloneable
from dmv_fast.runtime.load import frame_step_for
from dmv_fast.target import Target, TrackerConfig, TrackResult
from dmv_fast.vision.frames import as_bgr, check_box


class MultiTracker(Cloneable):
    """Tracks several objects of one video; each as a FastDMVTracker of its own would, in one call for all.

    Args:
        weights, k, device, dtype, backend, config: as for FastDMVTracker.
        capacity: how many targets there may be at a time; the memory for all is allocated at once
            (32 frames of DMV18: 5 MB a target in half precision, 13 in bfloat16x3, up to 38 in float32;
            8 more where the candidates' mean is added to the vote).
    """

    def __init__(
        self, weights: str = "dmv18", k: int | None = None, device: str = "auto", dtype: str = "auto",
        backend: str = "auto", config: TrackerConfig | None = None, *, capacity: int = 16,
    ):  # fmt: skip
        self._capacity = check_whole("capacity", capacity, 1)
        self.config = TrackerConfig.of(config)
        self.frame_step = frame_step_for(
            weights, k, device, dtype, backend,
            capacity=self.config.capacity, pick=self.config.pick, targets=self._capacity,
        )  # fmt: skip
        self._targets: list[Target] = []  # place -> target; places in use come first
        self._names: list[int] = []  # place -> the number that `add` gave
        self._next_name = 0

    def add(self, image: np.ndarray, bbox: Sequence[float]) -> int:
        """Start on one more target, in the frame that `track` saw last or will not see; returns its number.

        Args:
            image, bbox: as for FastDMVTracker.init.

        Raises:
            TypeError, ValueError: an image or box that cannot be used, or no room; nothing has changed then.
        """
        image = as_bgr(image)
        box = check_box(bbox, image.shape[1], image.shape[0])
        if len(self._targets) == self._capacity:
            raise ValueError(f"add: all {self._capacity} places are taken; raise capacity or remove one")
        if self._targets:
            self._targets[0].check_size(image)
        target = Target(box, image)
        self.frame_step.start(len(self._targets), image, target.look(self.config)[0], box)
        self._targets.append(target)
        self._names.append(self._next_name)
        self._next_name += 1
        return self._names[-1]

    def remove(self, number: int) -> None:
        """Forget a target. KeyError: there is none of that number."""
        if number not in self._names:
            raise KeyError(f"no target {number}; there are {self._names}")
        place, last = self._names.index(number), len(self._names) - 1
        if place != last:
            self.frame_step.move(last, place)
            self._targets[place], self._names[place] = self._targets[last], self._names[last]
        del self._targets[last], self._names[last]

    def track(self, image: np.ndarray) -> dict[int, TrackResult]:
        """Next frame -> what is found of each target, by its number.

        Raises:
            TypeError, ValueError: an image that cannot be used; nothing has changed then.
        """
        image = as_bgr(image)
        if not self._targets:
            return {}
        self._targets[0].check_size(image)
        windows, sizes = zip(*(target.look(self.config) for target in self._targets), strict=True)
        answers = self.frame_step.step(image, windows, np.array(sizes))
        results = {}
        for place, name in enumerate(self._names):
            write = functools.partial(self.frame_step.write, place)
            results[name] = self._targets[place].settle(windows[place], answers[place], self.config, write)
        return results

    def _own_targets(self) -> None:
        self._targets = [copy.copy(target) for target in self._targets]
        self._names = list(self._names)

    def __len__(self) -> int:
        return len(self._targets)
