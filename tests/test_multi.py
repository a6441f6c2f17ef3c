"""MultiTracker: each of its targets is followed as by a tracker of its own."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from dmv_fast import FastDMVTracker
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.multi import MultiTracker
from dmv_fast.tracker import TrackerConfig

BOXES = [(60, 50, 40, 30), (10, 20, 30, 50), (90, 60, 50, 40)]
CONFIG = TrackerConfig(capacity=3, policy=MemoryPolicy(interval=2, threshold=0.0), found_score=0.0)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    scene = cv2.resize(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8), (220, 120))
    return [np.ascontiguousarray(scene[:, 3 * i : 3 * i + 160]) for i in range(6)]


def make(weights: str, capacity: int = 3) -> MultiTracker:
    return MultiTracker(weights, device="cpu", dtype="float32", config=CONFIG, capacity=capacity)


def test_same_boxes_as_trackers_of_their_own(weights, frames):
    many = make(weights)
    numbers = [many.add(frames[0], box) for box in BOXES]
    singles = [FastDMVTracker(weights, device="cpu", dtype="float32", config=CONFIG) for _ in BOXES]
    for single, box in zip(singles, BOXES, strict=True):
        single.init(frames[0], box)
    for i, frame in enumerate(frames[1:]):
        if i == 2:  # the last place moves into the gap, its memory with it
            many.remove(numbers.pop(0))
            singles.pop(0)
        results = many.track(frame)
        assert sorted(results) == numbers and len(many) == len(numbers)
        for number, single in zip(numbers, singles, strict=True):
            expected = single.track(frame)
            assert np.allclose(results[number].box, expected.box, atol=0.05)
            assert results[number].memory_written == expected.memory_written


def test_room_and_numbers(weights, frames):
    many = make(weights, capacity=1)
    assert many.track(frames[0]) == {}
    first = many.add(frames[0], BOXES[0])
    with pytest.raises(ValueError, match="places are taken"):
        many.add(frames[0], BOXES[1])
    many.remove(first)
    with pytest.raises(KeyError, match="no target"):
        many.remove(first)
    assert many.add(frames[0], BOXES[1]) != first
    with pytest.raises(ValueError, match="capacity"):
        make(weights, capacity=0)
