"""Training samples: the right boxes on the right pixels, the same every time, the held-out part apart."""

from __future__ import annotations

import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from dmv_fast.training import catalog as catalogs
from dmv_fast.training import clutter, data, follow, scenes
from dmv_fast.training import geometry as geo
from dmv_fast.training.augment import develop, random_look
from dmv_fast.training.catalog import is_held_out, load_catalog, scene_of
from dmv_fast.training.clips import make_clip
from dmv_fast.training.data import MIX, SEEN, Sample, SampleStream, contact_sheet
from dmv_fast.training.synth import Layer, Picture, Scene, draw
from dmv_fast.vision.crop import CROP_SIZE, cut, search_window

WIDTH, HEIGHT = 320, 240


def fine_ellipse(box: np.ndarray) -> np.ndarray:
    """Coverage (H, W) float32 in 0..1 of the ellipse in a box, by drawing it eight times as fine."""
    y, x = ((np.arange(n * 8) + 0.5) / 8 for n in (HEIGHT, WIDTH))
    centre, radius = geo.centre(box), box[2:] / 2
    inside = ((x[None] - centre[0]) / radius[0]) ** 2 + ((y[:, None] - centre[1]) / radius[1]) ** 2 <= 1
    return cv2.resize(inside.astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)


def polygon(box: np.ndarray) -> list[float]:
    return clutter.ellipse(box).ravel().tolist()


@pytest.fixture(scope="module")
def discs(tmp_path_factory) -> Path:
    """Black photographs with one white disc each, and one all black."""
    root = tmp_path_factory.mktemp("discs")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6):
        size = rng.uniform(30, 80, 2)
        box = np.concatenate([rng.uniform(60, (WIDTH - 140, HEIGHT - 140)), size])
        grey = np.round(fine_ellipse(box) * 255).astype(np.uint8)
        cv2.imwrite(str(root / f"images/disc{i}.png"), cv2.merge([grey] * 3))
        entry = {"bbox": box.tolist(), "label": "disc", "polygons": [polygon(box)]}
        lines.append(record(f"images/disc{i}.png", [entry]))
    cv2.imwrite(str(root / "images/black.png"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    lines.append(record("images/black.png", []))
    (root / "annotations.jsonl").write_text("\n".join(lines))
    return root


def record(image: str, objects: list[dict]) -> str:
    return json.dumps(
        {"image": image, "dataset": "made", "width": WIDTH, "height": HEIGHT, "objects": objects}
    )


CLIP_FRAMES, UNKNOWN = 40, range(10, 18)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A small folder of every kind: textured photographs with and without objects, two clips."""
    root = tmp_path_factory.mktemp("tree")
    (root / "images").mkdir()
    (root / "clips").mkdir()
    rng = np.random.default_rng(1)
    lines = []
    for i in range(40):
        image = cv2.resize(rng.integers(0, 255, (24, 32, 3), np.uint8), (WIDTH, HEIGHT))
        objects = []
        if i % 4:
            box = np.array([*rng.uniform(40, 120, 2), *rng.uniform(35, 70, 2)])
            image[fine_ellipse(box) > 0.5] = rng.integers(0, 255, 3)
            image = cv2.add(image, rng.integers(0, 40, image.shape, np.uint8))
            outline = [polygon(box)] if i % 4 > 1 else []
            objects = [{"bbox": box.tolist(), "label": str(i % 3), "polygons": outline}]
        cv2.imwrite(str(root / f"images/p{i}.jpg"), image)
        lines.append(record(f"images/p{i}.jpg", objects))
    (root / "annotations.jsonl").write_text("\n".join(lines))
    for i in range(6):
        write_clip(root / "clips", f"clip{i}", rng)
    return root


def write_clip(folder: Path, name: str, rng: np.random.Generator) -> None:
    """A textured square that moves two pixels a frame; its box is not known in the frames UNKNOWN."""
    patch = rng.integers(0, 255, (24, 24, 3), np.uint8)
    writer = cv2.VideoWriter(str(folder / f"{name}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (160, 120))
    rows = []
    for t in range(CLIP_FRAMES):
        frame = np.full((120, 160, 3), 90, np.uint8)
        frame[40:64, 10 + 2 * t : 34 + 2 * t] = patch
        writer.write(frame)
        rows.append("nan,nan,nan,nan" if t in UNKNOWN else f"{10 + 2 * t},40,24,24")
    writer.release()
    (folder / f"{name}.1.txt").write_text("\n".join(rows))


def same(a: Sample, b: Sample) -> bool:
    return all(
        np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
        for x, y in ((a.crops, b.crops), (a.boxes, b.boxes), (a.present, b.present))
    )


# --- what a sample is ---


@pytest.mark.parametrize("kind", sorted(MIX))
def test_sample_shapes_and_absence(tree, kind):
    stream = SampleStream(tree, seed=3, frames=5, mix={kind: 1.0})
    absent = 0
    for index in range(12):
        sample = stream[index]
        assert sample.crops.shape == (5, CROP_SIZE, CROP_SIZE, 3) and sample.crops.dtype == np.uint8
        assert sample.boxes.shape == (5, 4) and sample.boxes.dtype == np.float32
        assert sample.present.shape == (5,) and sample.present.dtype == bool
        assert np.array_equal(np.isfinite(sample.boxes).all(1), sample.present)
        assert np.isfinite(sample.boxes).any(1).sum() == sample.present.sum()
        present = sample.boxes[sample.present]
        low, high = np.maximum(present[:, :2], 0), np.minimum(present[:, :2] + present[:, 2:], CROP_SIZE)
        inside = (high - low).clip(0).prod(1) / present[:, 2:].prod(1)
        assert (inside > 0.8 * SEEN).all()  # the share is of the outline, the box is a little larger
        absent += 5 - sample.present.sum()
    assert absent > 0


def test_exemplar_is_the_search_window_of_its_box(tree):
    for kind in MIX:
        stream = SampleStream(tree, seed=4, frames=1, mix={kind: 1.0})
        for index in range(6):
            sample = stream[index]
            x, y, w, h = sample.boxes[0]
            assert sample.present[0]
            # integer windows: half a frame pixel, enlarged up to 256 / side
            assert (x + w / 2, y + h / 2) == pytest.approx((128, 128), abs=128 / 20)
            p = (w + h) / 2
            assert 2 * math.sqrt((w + p) * (h + p)) == pytest.approx(256, rel=0.05)


def test_deterministic_by_seed_and_index(tree):
    one, other = (SampleStream(tree, seed=5, frames=3) for _ in range(2))
    forward = [one[i] for i in range(8)]
    backward = [other[i] for i in reversed(range(8))][::-1]
    copied = pickle.loads(pickle.dumps(one))
    for i in range(8):
        assert same(forward[i], backward[i])
    assert same(copied[3], forward[3])
    assert not same(forward[0], forward[1])
    assert not same(SampleStream(tree, seed=6, frames=3)[0], forward[0])
    assert len(pickle.dumps(one)) < 2000


def test_long_samples_of_short_tracks(tree):
    sample = SampleStream(tree, seed=0, frames=48, mix={"clip": 1.0}, max_skip=100)[0]
    assert sample.crops.shape[0] == 48


# --- boxes follow the pixels ---


def edges(profile: np.ndarray) -> tuple[float, float]:
    """Where a profile crosses half its height, first and last, to a fraction of a pixel."""
    half = profile.max() / 2
    first, last = np.flatnonzero(profile > half)[[0, -1]]
    low = first + 0.5 - (profile[first] - half) / (profile[first] - profile[first - 1])
    high = last + 0.5 + (profile[last] - half) / (profile[last] - profile[last + 1])
    return low, high


def measured_box(crop: np.ndarray, near: np.ndarray) -> np.ndarray:
    """The bright thing's box in a dark crop, looked for within a few pixels of `near`."""
    low = np.maximum(near[:2] - 5, 0).astype(int)
    high = np.ceil(near[:2] + near[2:] + 5).astype(int)
    part = crop[low[1] : high[1], low[0] : high[0], 0].astype(np.float64)
    (x0, x1), (y0, y1) = edges(part.max(0)), edges(part.max(1))
    return np.array([x0 + low[0], y0 + low[1], x1 - x0, y1 - y0])


@pytest.mark.parametrize("rippled", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["photo", "paste"])
def test_boxes_follow_the_pixels(discs, monkeypatch, kind, rippled):
    for name in ("OCCLUDED", "DISTRACTED"):
        monkeypatch.setattr(scenes, name, dict.fromkeys(MIX, 0.0))
    monkeypatch.setattr(scenes, "RIPPLED", dict.fromkeys(MIX, rippled))
    monkeypatch.setattr(scenes, "STREAKED", 0.0)
    monkeypatch.setattr(scenes, "_other_photo", lambda rng, catalog, target: catalog.plain[0])
    monkeypatch.setattr(catalogs, "is_held_out", lambda name: False)
    catalog = load_catalog(discs)
    rng = np.random.default_rng(7)
    offsets = []
    while len(offsets) < 120:
        made = scenes.make_scenes(rng, catalog, kind, 4, 100)
        for scene in made[0] if made else ():
            if not scene.in_view:
                continue
            window = follow.tracked_window(rng, scene.box)
            shot = draw(scene, window)
            side = shot.crop.shape[0]
            box = window.to_crop(scene.box, side)
            if shot.share < 0.97 or (box[:2] < 3).any() or (box[:2] + box[2:] > side - 3).any():
                continue
            found = measured_box(shot.crop, box)
            offsets.append(np.concatenate([found[:2] - box[:2], found[:2] + found[2:] - box[:2] - box[2:]]))
    offsets = np.array(offsets)
    # cut-outs are drawn in a little at the edge, which shows where one is much enlarged
    assert np.abs(offsets).max() < (0.5 if kind == "photo" else 0.8)
    assert np.abs(np.quantile(offsets, [0.02, 0.98], axis=0)).max() < 0.5
    # no half-pixel shift: the middle of the two edges agrees much better still
    assert np.abs((offsets[:, :2] + offsets[:, 2:]).mean(0) / 2).max() < 0.05


def test_look_keeps_the_box():
    """Blur, light, noise and compression move nothing, at any drawn resolution."""
    rng = np.random.default_rng(8)
    box = np.array([100.0, 80.0, 60.0, 44.0])
    image = cv2.merge([np.round(fine_ellipse(box) * 220).astype(np.uint8)] * 3)
    for n in range(24):
        scale = rng.uniform(0.35, 1.3)
        layer = Layer(Picture(image, [clutter.ellipse(box)]), geo.stretch(scale, scale))
        scene = Scene(layer, (WIDTH * scale, HEIGHT * scale))
        window = search_window(scene.box)
        look = random_look(np.random.default_rng(n), np.array([0]))
        if look.noise > 0 or look.shade is not None:  # they move the threshold, not the picture
            continue
        crop = develop(draw(scene, window), look, 0, rng)
        found, wanted = measured_box(crop, window.to_crop(scene.box)), window.to_crop(scene.box)
        assert geo.centre(found) == pytest.approx(geo.centre(wanted), abs=0.5)


def test_flip_mirrors_crops_and_boxes(tree, monkeypatch):
    samples = []
    for flip in (False, True):

        def look(rng, times, flip=flip):
            return replace(random_look(rng, times), flip=flip)

        monkeypatch.setattr(data, "random_look", look)
        samples.append(SampleStream(tree, seed=1, frames=4, mix={"photo": 1.0})[2])
    plain, mirrored = samples
    assert np.array_equal(mirrored.crops, plain.crops[:, :, ::-1])
    x, y, w, h = plain.boxes.T
    assert np.array_equal(mirrored.boxes, np.stack([CROP_SIZE - x - w, y, w, h], 1), equal_nan=True)


def test_made_crop_equals_the_tracker_s_crop():
    """A photograph that stands still is drawn as the tracker would cut it, frame border included."""
    rng = np.random.default_rng(9)
    image = cv2.GaussianBlur(rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8), (0, 0), 2)
    for box in ([150, 100, 30, 40], [4, 8, 30, 24], [120, 90, 100, 90]):
        box = np.array(box, dtype=np.float64)
        scene = Scene(Layer(Picture(image, [geo.corners(box)]), np.eye(3)), (WIDTH, HEIGHT))
        window = search_window(box)
        crop = draw(scene, window).crop
        if window.side < CROP_SIZE:
            crop = cv2.resize(crop, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_LINEAR)
        difference = np.abs(crop.astype(int) - cut(image, window).astype(int))
        assert difference.mean() < (0.01 if window.side < CROP_SIZE else 1.5)


def test_shrinking_does_not_alias():
    """Stripes finer than the crop's pixels come out grey, not as coarser stripes."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[:, ::2] = 255
    layer = Layer(Picture(image, [geo.corners(np.array([100.0, 60.0, 100, 100]))]), geo.stretch(0.31, 0.31))
    scene = Scene(layer, (WIDTH * 0.31, HEIGHT * 0.31))
    shot = draw(scene, search_window(scene.box))
    # averaging 2.8 pixels leaves a fifth of the contrast, taking every third pixel would leave all
    assert shot.crop[~shot.outside].std() < 30


def test_ripple_forward_inverts_its_offset():
    rng = np.random.default_rng(10)
    for ripple in geo.ripple_path(rng, np.array([0, 90, 200, 900]), 60.0, 0.05):
        points = rng.uniform(0, 60, (50, 2))
        moved = ripple.forward(points)
        assert moved + ripple.offset(moved) == pytest.approx(points, abs=0.1)


def test_covered_targets_count_as_absent():
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    box = np.array([100.0, 80.0, 40.0, 40.0])
    parts = [geo.corners(np.array([0.0, 0, 40, 40]))]
    cover = Picture(np.full((40, 40, 4), 255, np.uint8), parts)
    for dx, share in ((40, 1.0), (20, 0.5), (0, 0.0)):
        base = Layer(Picture(image, [geo.corners(box)]), np.eye(3))
        scene = Scene(base, (WIDTH, HEIGHT), [Layer(cover, geo.shift(100 + dx, 80))])
        assert draw(scene, search_window(box)).share == pytest.approx(share, abs=0.06)
    away = search_window(box + (200, 0, 0, 0))
    assert draw(Scene(base, (WIDTH, HEIGHT)), away).share == 0


# --- what is drawn from ---


def test_held_out_part_is_disjoint_and_stable(tree):
    train, held = load_catalog(tree), load_catalog(tree, held_out=True)
    names = [{p.path.stem for p in c.photos} | {k.path.stem for k in c.clips} for c in (train, held)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 46
    assert names[1] == {n for n in names[0] | names[1] if is_held_out(n)}
    share = np.mean([is_held_out(f"photo{i}") for i in range(5000)])
    assert 0.06 < share < 0.10
    assert not any(is_held_out(f"raccoon_raccoon-{i}") for i in range(300))


def test_scenes_are_held_out_whole():
    for a, b in (
        ("coco128_000000006818", "tiny_coco_000000006818"),
        ("CamVid_0016E5_04440", "CamVid_0016E5_08000"),
        ("MOT_MOT16-11_a", "MOT_MOT16-11_c"),
        ("MOT_PETS09-S2L1", "MOT_PETS09-S2L1_c"),
        ("YTVOS_3e91f10205_2", "YTVOS_3e91f10205_1"),
    ):
        assert scene_of(a) == scene_of(b) and is_held_out(a) == is_held_out(b)
    assert scene_of("DAVIS_dog") != scene_of("DAVIS_dogs-jump")


def test_unknown_boxes_are_never_sampled(tree, monkeypatch):
    seen = []
    original = scenes.read_clip_frame
    monkeypatch.setattr(scenes, "read_clip_frame", lambda clip, n: seen.append(n) or original(clip, n))
    stream = SampleStream(tree, seed=2, frames=6, max_skip=5, mix={"clip": 1.0})
    for index in range(15):
        start = len(seen)
        stream[index]
        numbers = np.array(seen[start : start + 6])
        steps = np.diff(numbers)
        assert (steps >= 0).all() or (steps <= 0).all()
    assert not set(seen) & set(UNKNOWN)
    assert set(seen) > {0, 5, 20, 39}


def test_degenerate_boxes_are_left_out(tmp_path):
    (tmp_path / "images").mkdir()
    boxes = {
        "fine": [50, 50, 40, 30],
        "small": [50, 50, 40, 11],
        "thin": [10, 50, 200, 30],
        "all": [0, 0, 300, 230],
    }
    objects = [{"bbox": box, "label": name} for name, box in boxes.items()]
    (tmp_path / "annotations.jsonl").write_text(record("images/a.png", objects))
    assert not is_held_out("a")
    assert [o.label for o in load_catalog(tmp_path).objects] == ["fine"]


def test_polygons_span_their_box():
    """Whichever way a set counts its pixels, and in several parts."""
    parts = ((10, 20, 40, 20, 40, 40), (10, 40, 20, 60, 12, 60))
    thing = catalogs.PhotoObject(0, (10.0, 20.0, 31.0, 41.0), "a", parts)
    assert geo.bounds(np.concatenate(clutter.outline_of(thing))) == pytest.approx(thing.box)
    bare = catalogs.PhotoObject(0, (10.0, 20.0, 31.0, 41.0), "a", ())
    assert geo.bounds(np.concatenate(clutter.outline_of(bare))) == pytest.approx(bare.box)


def test_missing_kinds_are_left_out(discs):
    stream = SampleStream(discs, seed=0, frames=2)
    assert set(stream.mix) == {"paste", "photo", "region"}
    assert stream[0].present[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "frames: 0"),
        ({"max_skip": 0}, "max_skip: 0"),
        ({"mix": {"vidoe": 1.0}}, "vidoe"),
        ({"mix": {"clip": 1.0}}, "holds no material"),
    ],
)
def test_bad_arguments(discs, change, message):
    with pytest.raises(ValueError, match=message):
        SampleStream(discs, **{"seed": 0, "frames": 2, **change})


def test_no_training_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither annotations.jsonl nor clips"):
        SampleStream(tmp_path, seed=0, frames=2)


def test_smooth_paths_start_at_rest_and_drift_on():
    rng = np.random.default_rng(11)
    dense = geo.smooth_path(rng, np.arange(2000), 50)
    assert (dense[0] == 0).all()
    assert np.abs(np.diff(dense, axis=0)).max() < 0.15
    near, far = np.abs(dense[5]).mean(), np.abs(dense[1000:]).mean()
    assert near < 0.25 < 0.4 < far < 1.5


# --- what is made of it ---


def test_contact_sheet_marks_presence():
    crops = np.zeros((2, CROP_SIZE, CROP_SIZE, 3), np.uint8)
    boxes = np.array([[100, 90, 60, 70], [np.nan] * 4], np.float32)
    sheet = contact_sheet([Sample(crops, boxes, np.array([True, False]))] * 2)
    assert sheet.shape == (2 * (CROP_SIZE + 2), 2 * (CROP_SIZE + 2), 3)
    assert sheet[1 + 125, 1 + 100, 1] > 100 and sheet[1 + 125, 1 + 80].max() == 0
    assert tuple(sheet[1 + 100, CROP_SIZE + 2 + 2]) == (0, 0, 255)


def test_made_clip_leaves_and_returns(tree):
    clip = make_clip(tree, seed=1, frames=60, leaves=True, held_out=False)
    first, second = list(clip), list(clip)
    boxes = np.array([box for _, box in first])
    assert len(clip) == 60 and np.isfinite(boxes[0]).all()
    assert np.isnan(boxes[:, 0]).sum() >= 10
    height, width = first[0][0].shape[:2]
    known = boxes[np.isfinite(boxes[:, 0])]
    assert (known[:, :2] >= 0).all() and (known[:, :2] + known[:, 2:] <= (width, height)).all()
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


def test_made_clip_comes_back_elsewhere_on_the_side_where_it_left(tree):
    jumps = []
    for seed in range(4):
        scenes = make_clip(tree, seed=seed, frames=60, leaves=True, held_out=False).scenes
        out = [np.array([*-s.centre, *(s.centre - s.size)]) for s in scenes if not s.in_view]
        assert len({int(beyond.argmax()) for beyond in out}) == 1
        steps = np.diff([scene.centre for scene in scenes], axis=0)
        jumps.append(np.abs(steps).max() / np.sqrt(np.prod(scenes[0].box[2:])))
    assert max(jumps) > 0.5


def test_held_out_samples_of_the_shared_data():
    shared = Path(os.environ.get("DMV_FAST_SHARED", Path(__file__).parents[2] / "shared"))
    if not (shared / "data/train/annotations.jsonl").is_file():
        pytest.skip(f"no shared training data in {shared} (set DMV_FAST_SHARED)")
    for kind in MIX:
        stream = SampleStream(shared / "data/train", seed=0, frames=3, mix={kind: 1.0}, held_out=True)
        assert set(stream.mix) == {kind}
        assert all(stream[index].present[0] for index in range(3))
