"""Real training sets in their folder layouts, and what is done with samples before a network sees them."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from torch.utils.data import DataLoader

from dmv_fast import cli
from dmv_fast.evaluation.datasets import DatasetError
from dmv_fast.training import catalog as catalogs
from dmv_fast.training import loop, readers, scenes
from dmv_fast.training.catalog import load_catalog
from dmv_fast.training.data import SampleStream, recipe_stream
from dmv_fast.training.loop import Frames
from dmv_fast.training.pack import pack
from dmv_fast.training.recipe import Recipe, Source, load_recipe

WIDTH, HEIGHT, COUNT = 160, 120, 24
ABSENT = range(8, 14)
KINDS = ("got10k", "lasot", "trackingnet")


def frames_of(folder: Path, pattern: str, seed: int, first: int) -> np.ndarray:
    """A bright square that moves over dark noise -> its boxes (COUNT, 4)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    back = rng.integers(0, 80, (HEIGHT, WIDTH, 3), np.uint8)
    patch = rng.integers(150, 255, (22, 26, 3), np.uint8)
    boxes = []
    for t in range(COUNT):
        x, y = 30 + 3 * t, 40 + (seed + t) % 20
        image = back.copy()
        image[y : y + 22, x : x + 26] = patch
        cv2.imwrite(str(folder / pattern.format(first + t)), image)
        boxes.append((x, y, 26, 22))
    return np.array(boxes)


def write_boxes(path: Path, boxes: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(",".join(str(v) for v in row) for row in boxes))


def flags(frames: range, joint: str) -> str:
    return joint.join("1" if t in frames else "0" for t in range(COUNT))


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """A few videos of each training set, as the archives unpack."""
    root = tmp_path_factory.mktemp("sets")
    names = [f"GOT-10k_Train_{i:06d}" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        folder = root / "got10k" / "train" / name
        boxes = frames_of(folder, "{:08d}.jpg", i, 1)
        write_boxes(folder / "groundtruth.txt", boxes)
        (folder / "absence.label").write_text(flags(ABSENT, "\n"))
        cover = "\n".join("0" if t in ABSENT else "8" for t in range(COUNT))
        (folder / "cover.label").write_text(cover)
    (root / "got10k" / "train" / "list.txt").write_text("\n".join(names) + "\n")
    for i in (1, 2, 3):
        folder = root / "lasot" / "kite" / f"kite-{i}"
        write_boxes(folder / "groundtruth.txt", frames_of(folder / "img", "{:08d}.jpg", 10 + i, 1))
        (folder / "full_occlusion.txt").write_text(flags(ABSENT, ","))
        (folder / "out_of_view.txt").write_text(flags(range(0), ","))
    (root / "lasot" / "testing_set.txt").write_text("kite-2\n")
    for i, chunk in enumerate(("TRAIN_0", "TRAIN_0", "TRAIN_11", "TEST")):
        folder = root / "trackingnet" / chunk
        boxes = frames_of(folder / "frames" / f"v{i}_0", "{}.jpg", 20 + i, 0)
        write_boxes(folder / "anno" / f"v{i}_0.txt", boxes)
    return root


def everything(kind: str, root: Path) -> set[str]:
    return {track.name for held_out in (False, True) for track in readers.tracks(kind, root, held_out)}


# ---- the layouts ----


def test_each_set_lists_its_training_videos(sets):
    assert everything("got10k", sets / "got10k") == {f"GOT-10k_Train_{i:06d}" for i in (1, 2, 3)}
    assert everything("got10k", sets / "got10k" / "train") == everything("got10k", sets / "got10k")
    assert everything("lasot", sets / "lasot") == {"kite-1", "kite-3"}  # kite-2 is a test video
    assert everything("trackingnet", sets / "trackingnet") == {"v0_0", "v1_0", "v2_0"}  # TEST is not read
    for kind in KINDS:
        parts = [{t.name for t in readers.tracks(kind, sets / kind, held)} for held in (False, True)]
        assert len(parts[1]) == 1 and not parts[0] & parts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_a_set_show_its_targets(sets, monkeypatch, kind):
    """Boxes lie on the bright square; frames go one way through the video; absent ones are never drawn."""
    read = []
    original = scenes.read_image
    monkeypatch.setattr(scenes, "read_image", lambda path: read.append(path) or original(path))
    stream = SampleStream(sets, seed=0, frames=4, max_skip=6, mix={kind: 1.0}, sets={kind: sets / kind})
    first = 0 if kind == "trackingnet" else 1
    bright = []
    for index in range(10):
        del read[:]
        sample = stream[index]
        assert sample.present[0] and sample.crops.shape == (4, 256, 256, 3)
        steps = np.diff([int(path.stem) for path in read[-4:]])
        gap = 6 + (len(ABSENT) if kind != "trackingnet" else 0)
        assert ((steps >= 0) & (steps <= gap)).all() or ((steps <= 0) & (steps >= -gap)).all()
        if kind != "trackingnet":
            assert not {int(path.stem) - first for path in read} & set(ABSENT)
        for crop, (x, y, w, h), present in zip(sample.crops, sample.boxes, sample.present, strict=True):
            if present:
                x0, y0 = max(int(x + w / 4), 0), max(int(y + h / 4), 0)
                inside = crop[y0 : int(y + 3 * h / 4), x0 : int(x + 3 * w / 4)]
                bright.append(inside.size > 0 and inside.mean() > 1.5 * np.median(crop))
    assert np.mean(bright) > 0.9


def test_unread_sets_say_what_is_missing(tmp_path, sets):
    def said(kind: str) -> str:
        with pytest.raises(DatasetError) as error:
            readers.tracks(kind, tmp_path / kind, False)
        return str(error.value)

    assert "got10k: no such folder" in said("got10k").replace(str(tmp_path) + "/", "")
    for kind in KINDS:
        (tmp_path / kind).mkdir()
    assert "list.txt" in said("got10k")
    assert "testing_set.txt" in said("lasot")
    assert "TRAIN_0" in said("trackingnet")
    (tmp_path / "lasot" / "training_set.txt").write_text("kite-7\n")
    assert "kite-7" in said("lasot")
    (tmp_path / "trackingnet" / "TRAIN_3").mkdir()
    assert "anno" in said("trackingnet")
    (tmp_path / "got10k" / "train").mkdir()
    (tmp_path / "got10k" / "train" / "list.txt").write_text("GOT-10k_Train_000009\n")
    assert "no folder 'GOT-10k_Train_000009'" in said("got10k")


def test_a_broken_annotation_is_named_from_a_worker_process(sets, tmp_path):
    """The one line that is printed names the file, without the worker's traceback."""
    for i in range(3):
        folder = tmp_path / "TRAIN_0"
        frames_of(folder / "frames" / f"b{i}_0", "{}.jpg", i, 0)
        write_boxes(folder / "anno" / f"b{i}_0.txt", np.ones((3, 4)))
    recipe = Recipe(frames=(2,), batch=1, sources=(Source("trackingnet", str(tmp_path)),))
    stream = recipe_stream(recipe, sets)
    batches = iter(DataLoader(Frames(stream, recipe), batch_size=1, num_workers=1, sampler=range(3)))
    with pytest.raises(ValueError, match=r"b\d_0.txt: 3 boxes for 24 frames") as error:
        loop._next(batches)
    assert "Traceback" not in str(error.value)


# ---- recipes ----


def test_sources_of_a_recipe(sets, tmp_path, monkeypatch):
    path = tmp_path / "r.yaml"
    path.write_text(
        "frames: [3]\nsources:\n- {kind: got10k, weight: 3}\n- {kind: lasot, root: $PLACE/lasot, weight: 1}\n"
    )
    monkeypatch.setenv("PLACE", str(sets))
    recipe = load_recipe(path)
    stream = recipe_stream(recipe, sets)  # no annotations.jsonl there: none is needed
    assert stream.mix == {"got10k": 3, "lasot": 1}
    kinds = [stream.kind(i) for i in range(200)]
    assert 0.6 < kinds.count("got10k") / 200 < 0.9
    held = recipe_stream(recipe, sets, held_out=True)
    assert held[0].crops.shape[0] == 3 and held.seed != stream.seed
    monkeypatch.setenv("PLACE", str(tmp_path))
    with pytest.raises(ValueError, match="source lasot: .*lasot: no such folder"):
        recipe_stream(recipe, sets)


@pytest.mark.parametrize(("text", "says"), [
    ("sources: [{kind: got11k}]", "got11k"), ("sources: [{kind: got10k, wait: 1}]", "wait"),
    ("sources: [{kind: lasot}, {kind: lasot}]", "once"), ("sources: []", "once"),
    ("sources: [{kind: paste, root: x}]", "paste has a root"), ("sources: [lasot]", "lasot"),
    ("sources: [{kind: lasot, weight: 0}]", "weight"), ("backend: gpu", "backend"),
    ("sources: [{kind: lasot}]\nmix: {paste: 1}", "mix"),
])  # fmt: skip
def test_bad_sources_are_named(tmp_path, text, says):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        load_recipe(path)
    assert "bad.yaml" in str(error.value)


# ---- preview and pack ----


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Photographs with an outlined object and without one, and a clip."""
    root = tmp_path_factory.mktemp("photos")
    (root / "images").mkdir()
    (root / "clips").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(24):
        image = cv2.resize(rng.integers(0, 120, (12, 16, 3), np.uint8), (640, 480))
        box = [200, 150, 120, 100]
        image[150:250, 200:320] = rng.integers(150, 255, 3)
        image = cv2.add(image, rng.integers(0, 50, image.shape, np.uint8))
        cv2.imwrite(str(root / f"images/{i}.jpg"), image)
        outline = [200, 150, 320, 150, 320, 250, 200, 250]
        objects = [{"bbox": box, "label": "a", "polygons": [outline]}] if i % 3 else []
        row = {"image": f"images/{i}.jpg", "dataset": "made", "width": 640, "height": 480, "objects": objects}
        lines.append(json.dumps(row))
    (root / "annotations.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("c0", "c1"):
        writer = cv2.VideoWriter(
            str(root / f"clips/{name}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (320, 240)
        )
        for t in range(12):
            frame = rng.integers(0, 255, (240, 320, 3), np.uint8)
            frame[100:140, 20 + 4 * t : 70 + 4 * t] = 255
            writer.write(frame)
        writer.release()
        rows = [f"{20 + 4 * t},100,50,40" if t else "nan,nan,nan,nan" for t in range(12)]
        (root / f"clips/{name}.1.txt").write_text("\n".join(rows))
    return root


def test_preview_writes_a_sheet(photos, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("frames: [2, 3]\nmix: {paste: 1, photo: 1}\n")
    out = tmp_path / "new" / "sheet.png"
    words = ["preview", str(recipe), "--data", str(photos), "--out", str(out), "--samples", "4"]
    assert cli.main(words) == 0
    assert cv2.imread(str(out)).shape == (4 * 258, 3 * 258, 3)
    printed = capsys.readouterr().out
    assert "4 samples of 3 frames (paste 0.50, photo 0.50)" in printed and "samples a second" in printed
    before = out.read_bytes()
    assert cli.main(words) == 0 and out.read_bytes() == before  # the same samples every time
    assert cli.main([*words, "--seed", "5"]) == 0 and out.read_bytes() != before
    assert not list(out.parent.glob("*.part*"))


@pytest.mark.parametrize(("more", "says"), [
    (["--samples", "0"], "samples is 0"), (["--kind", "clip"], "kind is 'clip'"),
    (["--out", "x.tiff"], ".png"),
])  # fmt: skip
def test_preview_refuses_what_it_cannot_show(photos, tmp_path, capsys, more, says):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("frames: [2]\nmix: {paste: 1}\n")
    assert cli.main(["preview", str(recipe), "--data", str(photos), *more]) == 2
    assert says in capsys.readouterr().err


def test_a_packed_folder_is_a_smaller_training_folder(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogs, "is_held_out", lambda name: False)
    size = pack(photos, tmp_path / "small", long_side=320, quality=70, backgrounds=0.0, clip_side=160)
    assert size < sum(path.stat().st_size for path in photos.rglob("*") if path.is_file())
    whole, small = load_catalog(photos), load_catalog(tmp_path / "small")
    assert len(whole.objects) == len(small.objects) == 16 and len(whole.plain) == 8 and not small.plain
    for large, little in zip(whole.objects, small.objects, strict=True):
        assert little.box == pytest.approx(np.array(large.box) / 2)
        assert little.polygons[0] == pytest.approx(np.array(large.polygons[0]) / 2)
    assert small.photos[0].path.suffix == ".webp" and small.photos[0].width == 320
    frame = catalogs.read_clip_frame(small.clips[0], 5)
    assert frame.shape == (120, 160, 3)
    assert small.clips[0].tracks[0][5] == pytest.approx([20, 50, 25, 20])
    assert np.isnan(small.clips[0].tracks[0][0]).all()
    stream = SampleStream(tmp_path / "small", seed=0, frames=2)
    assert set(stream.mix) == {"paste", "photo", "clip"} and stream[0].present[0]
    with pytest.raises(ValueError, match="is there already"):
        pack(photos, tmp_path / "small")
    with pytest.raises(ValueError, match="no training folder"):
        pack(tmp_path, tmp_path / "other")
