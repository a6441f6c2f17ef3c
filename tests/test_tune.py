"""The settings' table: what is answered from memory is what the network says, and the counts are right."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dmv_fast import FastDMVTracker
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.model.pick import PickConfig
from dmv_fast.tracker import TrackerConfig, TrackResult
from dmv_fast.weights import save_model

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks/tune.py"


@pytest.fixture(scope="module")
def tune():
    spec = importlib.util.spec_from_file_location("tune", SCRIPT)
    module = sys.modules["tune"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tune"]


def test_variations_reach_the_configs_they_name(tune):
    config = tune.vary(found_score=0.1, window=0.3, interval=7)
    assert (config.found_score, config.pick.window, config.policy.interval) == (0.1, 0.3, 7)
    assert config.pick.smoothing == TrackerConfig().pick.smoothing
    with pytest.raises(ValueError, match="no_such"):
        tune.vary(no_such=1)
    assert len(set(map(str, tune.VARIATIONS.values()))) == len(tune.VARIATIONS)


def test_a_replay_says_what_the_network_says(tune, tmp_path):
    torch.manual_seed(0)
    weights = str(tmp_path / "untrained.safetensors")
    save_model(DMV(DMVConfig()), weights)
    scene = cv2.resize(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8), (220, 120))
    frames = [np.ascontiguousarray(scene[:, 3 * i : 3 * i + 160]) for i in range(7)]
    often = TrackerConfig(found_score=0.0, policy=MemoryPolicy(interval=2, threshold=0.0))
    configs = [
        often,
        replace(often, pick=PickConfig(window=0.4, smoothing=1.0)),
        replace(often, policy=MemoryPolicy(interval=3, threshold=0.0)),
        often,
    ]

    def run(tracker: FastDMVTracker) -> list[TrackResult]:
        tracker.init(frames[0], (60, 50, 40, 30))
        return [tracker.track(frame) for frame in frames[1:]]

    def make(config: TrackerConfig) -> FastDMVTracker:
        return FastDMVTracker(weights, device="cpu", dtype="float32", config=config)

    tracker = make(often)
    replayed = tracker.frame_step = tune.Replayed(tracker.frame_step, frames)
    looks = []
    for config in configs:
        tracker.config, replayed.pick = config, config.pick
        for found, expected in zip(run(tracker), run(make(config)), strict=True):
            assert found.box == pytest.approx(expected.box, abs=1e-3)  # chosen plainly, and by one operator
            assert found.score == pytest.approx(expected.score, abs=1e-5)
            assert found[2:] == expected[2:]
        looks.append(replayed.looks)
    assert looks[-1] == looks[-2], "what was asked before is not computed again"


class Scripted:
    """A tracker that says what it is told."""

    def __init__(self, results):
        self._results = iter(results)

    def init(self, image, box):
        pass

    def track(self, image):
        return next(self._results)


def test_departures_returns_and_ghosts_are_counted(tune):
    box, nowhere = (10.0, 10.0, 20.0, 20.0), (50.0, 50.0, 5.0, 5.0)
    seen = [True] * 20 + [False] * 20 + [True] * 20 + [False] * 16 + [True] * 20
    truth = np.array([box if here else (np.nan,) * 4 for here in seen])

    def outcome(found, boxes):
        results = [TrackResult(b, 0.5, f, False) for b, f in zip(boxes[1:], found[1:], strict=True)]
        trial = tune.Trial("made", "leave", [np.zeros((1, 1, 3), np.uint8)] * len(seen), truth)
        return tune.follow(Scripted(results), trial)

    best = outcome(seen, [box] * len(seen))
    assert (best.gone, best.back) == ((2, 2), (2, 2))
    assert (best.false_lost, best.ghosts) == ((0, 59), (0, 36))
    assert tune.f_score([best]) == pytest.approx(1.0)
    stubborn = outcome([True] * len(seen), [box] * len(seen))
    assert (stubborn.gone, stubborn.back, stubborn.ghosts) == ((0, 2), (2, 2), (36, 36))
    late = [*seen[:20], *[True] * 16, *[False] * 4, *seen[40:]]
    assert outcome(late, [box] * len(seen)).gone == (1, 2)
    elsewhere = outcome(seen, [box] * 40 + [nowhere] * 56)
    assert elsewhere.back == (0, 2)
