"""What a new user meets: small and imperfect data, full disks, options spelled as by another command."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from photographs import write_photographs

import dmv_fast
from dmv_fast.cli import main
from dmv_fast.evaluation import datasets
from dmv_fast.training import cache, loop
from dmv_fast.training.catalog import load_catalog
from dmv_fast.training.recipe import load_recipe

TINY = """
model: {key_dim: 64, value_dim: 32, vote_dim: 16, heads: 2}
frames: [2]
batch: 1
steps: 1
candidates: [1]
precision: float32
freeze_stem: true
mix: {photo: 1.0}
"""


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "data").mkdir()
    write_photographs(tmp_path / "data")
    return tmp_path / "data"


def recipe_of(folder, more: str = ""):
    path = folder / "recipe.yaml"
    path.write_text(TINY + more)
    return path


def run_of(folder, data, more: str = "") -> loop.TrainingRun:
    recipe = recipe_of(folder, more)
    return loop.TrainingRun(load_recipe(recipe), recipe, data, folder / "run", torch.device("cpu"), None)


# ---- training ------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_held_out(monkeypatch):
    from dmv_fast.training import data

    monkeypatch.setattr("dmv_fast.training.catalog.is_held_out", lambda name: False)
    data._catalog.cache_clear()
    yield
    data._catalog.cache_clear()


def test_nothing_held_out_is_said_before_the_first_step(photos, tmp_path, nothing_held_out):
    with pytest.raises(ValueError, match="kept for validation; .*validate_samples: 0"):
        loop.train(recipe_of(tmp_path), data=photos, out=tmp_path / "run", device="cpu", workers=0)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_without_validation_samples_nothing_need_be_held_out(photos, tmp_path, nothing_held_out):
    recipe = recipe_of(tmp_path, "validate_samples: 0\n")
    assert loop.train(recipe, data=photos, out=tmp_path / "run", device="cpu", workers=0).is_file()


def test_settings_that_would_fail_at_a_checkpoint_are_refused(tmp_path):
    for line in ("validate_samples: -1", "clips_every: 0", "validate_clips: -1"):
        with pytest.raises(ValueError, match=line.split(":")[0]):
            load_recipe(recipe_of(tmp_path, line + "\n"))


@pytest.mark.parametrize(
    ("change", "says"),
    [("optimiser: adamw\n", "optimiser is adamw; the run .* has sgd"), ("stem_rate: 0.5\n", "rate is 0.5")],
)
def test_a_run_does_not_go_on_by_another_recipe(photos, tmp_path, change, says):
    run_of(tmp_path, photos).save()
    with pytest.raises(ValueError, match=says):
        run_of(tmp_path, photos, change).load()
    run_of(tmp_path, photos, "learning_rate: 0.1\n").load()


def test_a_checkpoint_on_a_full_disk_leaves_no_part(photos, tmp_path, monkeypatch):
    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        run_of(tmp_path, photos).save()
    assert not list((tmp_path / "run").glob("*.part*"))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot set bytes aside")
def test_no_room_for_the_feature_cache_is_an_error_and_no_bus_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="features.f16: no room"):
        cache.FeatureCache(tmp_path, 2, 2, 256, tag="t")


def line_of(**change) -> str:
    entry = {"bbox": [20, 20, 40, 40], "label": "x"}
    photo = {"image": "images/a.jpg", "dataset": "d", "width": 160, "height": 120, "objects": [entry]}
    for name, value in change.items():
        where = photo if name in photo else entry
        where[name] = value
        if value is None:
            del where[name]
    return json.dumps(photo) + "\n"


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"image": "im', "line 3: Unterminated"),
        (line_of(width=None), "line 3: has no 'width'"),
        (line_of(label=None), "line 3: has no 'label'"),
        (line_of(bbox=[1, 2, 3]), "line 3: bbox is .* four numbers"),
        (line_of(polygons=[[1, 2, 3, 4, 5, 6, 7]]), "line 3: polygons must be flat lists"),
        (line_of(polygons=[[[1, 2], [3, 4], [5, 6]]]), "line 3: polygons must be flat lists"),
        (line_of(polygons=[1, 2, 3, 4, 5, 6]), "line 3: polygons must be flat lists"),
        ("[]\n", "line 3: list indices"),
    ],
)
@pytest.mark.parametrize("held_out", [False, True])
def test_a_bad_annotation_is_named_by_file_and_line(tmp_path, monkeypatch, bad, says, held_out):
    monkeypatch.setattr("dmv_fast.training.catalog.is_held_out", lambda name: held_out)
    (tmp_path / "annotations.jsonl").write_text(line_of() + "\n" + bad)
    with pytest.raises(ValueError, match=f"annotations.jsonl, {says}"):
        load_catalog(tmp_path, held_out=held_out)


def test_blank_lines_and_a_byte_order_mark_are_no_annotations(tmp_path, monkeypatch):
    monkeypatch.setattr("dmv_fast.training.catalog.is_held_out", lambda name: False)
    (tmp_path / "annotations.jsonl").write_text("\ufeff" + line_of() + "\n\n", encoding="utf-8")
    assert len(load_catalog(tmp_path).objects) == 1


@pytest.mark.parametrize(("text", "tracks"), [("1 2 30 40\n" * 3, 1), ("1,2,30\n" * 3, None), ("", None)])
def test_tracks_are_read_as_the_evaluation_reads_boxes(tmp_path, monkeypatch, text, tracks):
    monkeypatch.setattr("dmv_fast.training.catalog.is_held_out", lambda name: False)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "c.mp4").touch()
    (tmp_path / "clips" / "._c.mp4").touch()
    (tmp_path / "clips" / "c.1.txt").write_text(text)
    if tracks is None:
        with pytest.raises(ValueError, match="c.1.txt"):
            load_catalog(tmp_path)
    else:
        assert [len(clip.tracks) for clip in load_catalog(tmp_path).clips] == [tracks]


def test_an_empty_sum_beside_a_checkpoint_is_named(tmp_path):
    from dmv_fast.weights.places import CheckpointError, check

    for name in ("a.safetensors", "a.safetensors.sha256"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="a.safetensors.sha256 is empty"):
        check(tmp_path / "a.safetensors")


# ---- data sets -----------------------------------------------------------------------------------------


@pytest.fixture
def otb(tmp_path):
    for name in ("A", "B"):
        (tmp_path / "otb" / name / "img").mkdir(parents=True)
        for i in range(3):
            image = np.full((60, 80, 3), 40 * i, np.uint8)
            cv2.imwrite(str(tmp_path / "otb" / name / "img" / f"{i + 1:04d}.jpg"), image)
        (tmp_path / "otb" / name / "groundtruth_rect.txt").write_text("10,10,20,20\n" * 3)
    return tmp_path / "otb"


def test_files_that_macos_leaves_are_no_frames(otb):
    (otb / "A" / "img" / "._0001.jpg").write_bytes(b"Mac OS X")
    assert [len(s) for s in datasets.load("otb", otb)] == [3, 3]


def test_files_that_macos_leaves_are_no_videos(tmp_path):
    for name in ("a", "._a"):
        (tmp_path / f"{name}.mp4").touch()
        (tmp_path / f"{name}.txt").write_text("1,2,3,4\n")
    assert [s.name for s in datasets.load("pairs", tmp_path)] == ["a"]


def test_videos_in_capitals_are_told(tmp_path):
    (tmp_path / "GOPR1.MP4").touch()
    assert datasets.detect(tmp_path) == "pairs"


def test_what_is_wrong_with_another_sequence_does_not_matter(otb, tmp_path):
    shutil.rmtree(otb / "B" / "img")
    assert [s.name for s in datasets.load("otb", otb, ["A"])] == ["A"]
    with pytest.raises(datasets.DatasetError, match="B.img"):
        datasets.load("otb", otb)
    shutil.rmtree(otb / "B")
    with pytest.raises(datasets.DatasetError, match="no C here; there is A"):
        datasets.load("otb", otb, ["C"])
    (tmp_path / "none.txt").write_text("\n")
    assert datasets.load("otb", otb, [f"@{tmp_path / 'none.txt'}"]) == []


# ---- the command line ----------------------------------------------------------------------------------


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dmv-fast {dmv_fast.__version__}\n"
    assert {"FastDMVTracker", "__version__"} <= set(dir(dmv_fast))


@pytest.mark.parametrize("command", ["track", "eval", "annotate", "bench", "export"])
def test_k_is_spelled_alike_everywhere(command, capsys):
    assert main([command, "--help"]) == 0
    once = sys.version_info >= (3, 13)  # from then on argparse names the value once
    assert ("-k, --k K" if once else "-k K, --k K") in capsys.readouterr().out


def test_an_unknown_option_points_to_its_command(capsys):
    assert main(["doctor", "--colour"]) == 2
    assert "unrecognized arguments: --colour (see dmv-fast doctor --help)" in capsys.readouterr().err


def test_a_dash_is_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["track", "v.mp4", "--box", "1,2,3,4", "--boxes", "-"]) == 2
    assert "--boxes is '-'" in capsys.readouterr().err


def test_eval_says_at_once_that_it_cannot_write(otb, tmp_path, capsys, monkeypatch):
    def evaluate(*_, **__):
        raise AssertionError("it began")

    monkeypatch.setattr("dmv_fast.commands.eval.evaluate", evaluate)
    (tmp_path / "file").touch()
    arguments = ["eval", "otb", "--root", str(otb), "--tracker", "opencv:mil", "--out"]
    assert main([*arguments, str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


def test_bench_refuses_a_box_outside_the_video(otb, capsys):
    video = str(otb / "A" / "img")
    assert main(["bench", "--video", video, "--box", "300,5,4,4", "--only", "stages"]) == 2
    assert "outside the 80 x 60 frame" in capsys.readouterr().err


def test_report_does_not_swallow_a_dataset_that_was_asked_for(otb, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["eval", "otb", "--root", str(otb), "--tracker", "opencv:mil", "--out", out]) == 0
    assert main(["report", out, "--dataset", "foo"]) == 2
    assert "dataset is 'foo'" in capsys.readouterr().err
    assert main(["report", out, "--root", str(tmp_path / "nowhere")]) == 2
    assert "nowhere'; no such folder" in capsys.readouterr().err
