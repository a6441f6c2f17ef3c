"""`dmv-fast track --rerun`: the recording is written by the real rerun-sdk and read back with it."""

from __future__ import annotations

import csv
import importlib.util
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dmv_fast import cli
from dmv_fast.commands import track
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.tracker import FastDMVTracker, TrackerConfig
from dmv_fast.weights import save_model

START, FRAMES, K = 2, 9, 4
EAGER = TrackerConfig(capacity=3, policy=MemoryPolicy(interval=2, threshold=0.0), found_score=0.0)


def test_without_rerun_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    assert cli.main(["track", str(tmp_path), "--box", "1,2,3,4", "--rerun", str(tmp_path / "a.rrd")]) == 2
    said = capsys.readouterr().err
    assert 'pip install "dmv-fast[rerun]"' in said and said.count("\n") == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What one run of the command leaves: a.rrd and a.csv, of a random network that remembers eagerly."""
    if importlib.util.find_spec("rerun") is None:
        pytest.skip("the package rerun-sdk is not installed")
    folder = tmp_path_factory.mktemp("rerun")
    torch.manual_seed(0)
    save_model(DMV(DMVConfig()), folder / "random.safetensors")
    picture = np.random.default_rng(0).integers(0, 255, (20, 26, 3), np.uint8)
    picture = cv2.resize(picture, (208, 160), interpolation=cv2.INTER_CUBIC)
    images = folder / "images"
    images.mkdir()
    for i in range(START + FRAMES):
        cv2.imwrite(str(images / f"{i}.png"), picture[i : i + 120, 2 * i : 2 * i + 160])
    arguments = ["track", str(images), "--box", "60,50,40,30", "--start", str(START), "-k", str(K)]
    arguments += ["--weights", str(folder / "random.safetensors"), "--boxes", str(folder / "a.csv")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastDMVTracker.__init__, "__defaults__", ("dmv18", None, "auto", "auto", "auto", EAGER))
        assert cli.main([*arguments, "--rerun", str(folder / "a.rrd"), "--debug"]) == 0
    return folder


@pytest.fixture(scope="module")
def recorded(folder) -> dict[str, dict[int, dict[str, list]]]:
    """entity -> frame -> component -> values, as Rerun's own reader gives them."""
    reader = pytest.importorskip("rerun.chunk", reason="this rerun-sdk has no reader").RrdReader
    entities: dict = defaultdict(dict)
    for chunk in reader(folder / "a.rrd").stream():
        if chunk.is_static:
            continue
        batch = chunk.to_record_batch()
        names = [name for name in batch.schema.names if name != "log_time"]
        columns = {name: batch.column(name).to_pylist() for name in names}
        for i, frame in enumerate(columns.get("frame", [])):
            row = {name.split(":")[-1]: values[i] for name, values in columns.items()}
            assert frame not in entities[chunk.entity_path], "logged once a frame"
            entities[chunk.entity_path][frame] = row
    return entities


def image_of(row: dict[str, list]) -> np.ndarray:
    return cv2.imdecode(np.array(row["blob"][0], np.uint8), cv2.IMREAD_COLOR)


def test_nothing_else_is_left(folder):
    assert {path.name for path in folder.iterdir()} == {"a.rrd", "a.csv", "images", "random.safetensors"}


def test_every_frame_with_its_picture_and_box(folder, recorded):
    numbers = list(range(START, START + FRAMES))
    for entity in ("image", "box"):
        assert sorted(recorded[f"/video/{entity}"]) == numbers
    with open(folder / "a.csv", newline="") as file:
        for line in csv.DictReader(file):
            number = int(line["frame"])
            row = recorded["/video/box"][number]
            (centre,), (half,) = row["centers"], row["half_sizes"]
            box = [centre[0] - half[0], centre[1] - half[1], 2 * half[0], 2 * half[1]]
            np.testing.assert_allclose(box, [float(line[name]) for name in "xywh"], atol=2e-3)
            score, found = (recorded[f"/curves/{name}"][number]["scalars"][0] for name in ("score", "found"))
            assert (round(score, 4), int(found)) == (float(line["score"]), int(line["found"]))
            image = cv2.imread(str(folder / "images" / f"{number}.png")).astype(int)
            assert np.abs(image_of(recorded["/video/image"][number]) - image).mean() < 8


def test_what_was_seen_inside_each_tracked_frame(recorded):
    tracked = list(range(START + 1, START + FRAMES))
    for entity in ("/video/search", "/search/map", "/search/picture", "/search/picture/chosen"):
        assert sorted(recorded[entity]) == tracked, entity
    for number in tracked:
        chosen = recorded["/candidates"][number]
        assert all(len(chosen[name]) == K for name in ("memory_frame", "x", "y", "score"))
        assert chosen["score"] == sorted(chosen["score"], reverse=True)
        real = [frame >= 0 for frame in chosen["memory_frame"]]
        assert all(START <= frame < number for frame in chosen["memory_frame"] if frame >= 0)
        assert [np.isfinite(x) for x in chosen["x"]] == real
        assert len(recorded["/memory/sheet/votes"][number]["positions"]) == sum(real)
        weights = recorded["/memory/weights"][number]["values"][0]["buffer"]
        values = next(iter(weights.values())) if isinstance(weights, dict) else weights
        assert len(values) == EAGER.capacity
        total = sum(score for score, here in zip(chosen["score"], real, strict=True) if here)
        np.testing.assert_allclose(sum(values), total, rtol=1e-4)


def test_the_memory_is_shown_again_whenever_it_changes_and_always_as_large(recorded):
    sheets = recorded["/memory/sheet"]
    # Remembered were the frames 4, 6, 8 and 10; each is in what the next one was matched with.
    assert sorted(sheets) == [3, 5, 7, 9]
    assert {image_of(row).shape for row in sheets.values()} == {(128, 8 * 128, 3)}
    filled = [int((image_of(sheets[number])[64, 64::128].max(-1) > 20).sum()) for number in sorted(sheets)]
    assert filled == [1, 2, 3, 3]
