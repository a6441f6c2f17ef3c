"""A tracker in a program that has settings of its own: PyTorch's defaults, copies, folders, streams."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dmv_fast import FastDMVTracker
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.model.pick import PickConfig
from dmv_fast.multi import MultiTracker
from dmv_fast.tracker import TrackerConfig
from dmv_fast.weights import save_model

BOX = (60, 50, 40, 30)
CONFIG = TrackerConfig(found_score=0.0)
KINDS = {"fast": "auto", "plain": "reference"}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "another device": lambda: torch.device("meta"),
    "gradients": torch.enable_grad,
}


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    scene = cv2.resize(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8), (220, 120))
    return [np.ascontiguousarray(scene[:, 3 * i : 3 * i + 160]) for i in range(4)]


def boxes(weights: str, frames: list[np.ndarray], backend: str) -> list:
    tracker = FastDMVTracker(weights, device="cpu", dtype="float32", backend=backend, config=CONFIG)
    tracker.init(frames[0], BOX)
    return [tracker.track(frame) for frame in frames[1:]]


@pytest.mark.parametrize("backend", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_programs_own_settings_change_nothing(tmp_path, weights, frames, setting, backend):
    expected = boxes(weights, frames, backend)
    fresh = shutil.copy(weights, tmp_path / "fresh.safetensors")  # built anew, under that setting
    with setting():
        before = torch.get_default_dtype()
        assert boxes(str(fresh), frames, backend) == expected
        assert torch.get_default_dtype() == before
    assert boxes(str(fresh), frames, backend) == expected


def test_a_relative_name_is_a_file_of_the_folder_one_is_in(tmp_path, weights, frames, monkeypatch):
    torch.manual_seed(1)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    shutil.copy(weights, tmp_path / "a" / "w.safetensors")
    save_model(DMV(DMVConfig()), tmp_path / "b" / "w.safetensors")
    for folder in ("a", "b"):
        os.utime(tmp_path / folder / "w.safetensors", (1, 1))
    found = []
    for folder in ("a", "b"):
        monkeypatch.chdir(tmp_path / folder)
        found.append(boxes("w.safetensors", frames, "auto"))
    assert found[0] == boxes(weights, frames, "auto") != found[1]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: one.clone()])
def test_a_copy_has_a_memory_of_its_own(weights, frames, copied):
    single = FastDMVTracker(weights, device="cpu", dtype="float32", config=CONFIG)
    single.init(frames[0], BOX)
    several = MultiTracker(weights, device="cpu", dtype="float32", config=CONFIG, capacity=2)
    several.add(frames[0], BOX)
    expected = single.clone().track(frames[1])
    other, others = copied(single), copied(several)
    other.init(frames[0][::-1], (5, 5, 20, 20))
    others.add(frames[0], (5, 5, 20, 20))
    others.remove(0)
    assert single.track(frames[1]) == several.track(frames[1])[0] == expected
    with pytest.raises(TypeError, match="make one in each process"):
        pickle.dumps(several)


@pytest.mark.parametrize("settings", [
    {"search_home": 0}, {"search_home": 2.5}, {"search_width": 0}, {"capacity": 0}, {"search_patience": -1},
    {"found_score": "0.3"}, {"found_score": -0.1}, {"refound_score": math.nan}, {"search_width": math.inf},
    {"capacity": True}, {"search_width": 10**400},
])  # fmt: skip
def test_settings_that_would_fail_in_mid_video_are_named_at_once(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        TrackerConfig(**settings)


@pytest.mark.parametrize(("kind", "settings"), [
    (MemoryPolicy, {"interval": 0}), (MemoryPolicy, {"interval": 2.5}), (MemoryPolicy, {"threshold": -1}),
    (PickConfig, {"size_penalty": -0.1}), (PickConfig, {"window": 1.5}), (PickConfig, {"smoothing": "all"}),
])  # fmt: skip
def test_the_parts_of_a_config_are_checked_too(kind, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*; it must be a"):
        kind(**settings)


@pytest.mark.parametrize("settings", [{"policy": 30}, {"pick": {"window": 0.1}}])
def test_a_part_of_a_config_of_another_kind_is_named(settings):
    with pytest.raises(TypeError, match=f"{next(iter(settings))} is .*; it must be a"):
        TrackerConfig(**settings)


@pytest.mark.parametrize(("given", "error"), [
    ({"k": 4.0}, ValueError), ({"k": "4"}, ValueError), ({"config": {}}, TypeError),
    ({"device": "meta"}, ValueError), ({"device": None}, ValueError),
])  # fmt: skip
def test_arguments_of_the_wrong_kind_are_named(weights, given, error):
    with pytest.raises(error, match=next(iter(given))):
        FastDMVTracker(weights, **{"device": "cpu", **given})


@pytest.mark.parametrize("box", [(0, 0, 2000, 2000), (-1e300, 0, 2e300, 10), (0, 0, 10**400, 4)])
def test_a_box_of_many_frames_size_is_refused(weights, frames, box):
    tracker = FastDMVTracker(weights, device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="box is"):
        tracker.init(frames[0], box)


SAY = "import sys; from dmv_fast.cli import main; sys.exit(main(['doctor']))"


@pytest.mark.skipif(os.name != "posix", reason="a shell's redirections")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "< /dev/null > /dev/null"])
def test_closed_streams_are_no_fault(tmp_path: Path, closed):
    done = subprocess.run(["sh", "-c", f'exec "{sys.executable}" -c "{SAY}" {closed}'], cwd=tmp_path)
    assert done.returncode == 0
