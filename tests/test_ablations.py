"""benchmarks/ablations: each ablation changes what it says, runs resume, tables follow their figures."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.ablations import __main__ as command  # noqa: E402
from benchmarks.ablations import background, readers, report, settings, track  # noqa: E402
from benchmarks.ablations.networks import HalfPlain, WithoutBackground, inside_box  # noqa: E402
from dmv_fast.evaluation import datasets  # noqa: E402
from dmv_fast.model.dmv import DMV, DMVConfig  # noqa: E402
from dmv_fast.ops.screened import unpack_keys  # noqa: E402
from dmv_fast.runtime.load import load_network  # noqa: E402
from dmv_fast.tracker import TrackerConfig  # noqa: E402
from dmv_fast.weights import load_model, save_model  # noqa: E402

CPU = torch.device("cpu")
BOX = (40.0, 30.0, 24.0, 24.0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained network."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    save_model(DMV(DMVConfig()), path)
    return str(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of noise with a moving square, 13 and 7 frames."""
    folder = tmp_path_factory.mktemp("dev")
    for step, count in enumerate((13, 7), start=1):
        rng = np.random.default_rng(step)
        background, patch = (rng.integers(0, 255, (*s, 3), dtype=np.uint8) for s in ((96, 128), (24, 24)))
        images = folder / f"video{step}" / "img"
        images.mkdir(parents=True)
        lines = []
        for frame in range(count):
            image, x, y = background.copy(), 40 + step * frame, 30 + frame
            image[y : y + 24, x : x + 24] = patch
            cv2.imwrite(str(images / f"{frame + 1:04d}.jpg"), image)
            lines.append(f"{x},{y},24,24\n")
        (images.parent / "groundtruth_rect.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def sequences(root: Path) -> list[datasets.Sequence]:
    return datasets.load("otb", root)


def setting(weights: str, name: str = "base", **fields: object) -> settings.TrackerSetting:
    return settings.TrackerSetting(name, weights, "float32", **fields)


def writes_always(capacity: int = 4, interval: int = 2) -> TrackerConfig:
    policy = dataclasses.replace(TrackerConfig().policy, interval=interval, threshold=0.0)
    return dataclasses.replace(TrackerConfig(), capacity=capacity, policy=policy, found_score=0.0)


def remembered(one: settings.TrackerSetting, sequence: datasets.Sequence) -> list[int]:
    tracker = one.tracker()
    images = list(sequence.images())
    tracker.init(images[0], BOX)
    for image in images[1:]:
        tracker.track(image)
    return [frame for frame in tracker.frame_step.memory.slots[0].frames if frame is not None]


def test_every_setting_is_named_once_and_differs_from_the_base(weights):
    names = [one.name for one in settings.settings_of(weights, "float32")]
    assert len(set(names)) == len(names) and names[0] == "base"
    base, *rest = settings.settings_of(weights, "float32")
    same = {one.name for one in rest if one.digest == base.digest}
    assert same == {"k-4", "capacity-32-interval-30"}


def test_memory_off_never_writes_and_the_interval_is_kept(weights, sequences):
    long = sequences[0]
    assert remembered(setting(weights, config=writes_always()), long) == [0, 8, 10, 12]
    off = next(one for one in settings.settings_of(weights, "float32") if one.name == "memory-off")
    config = dataclasses.replace(writes_always(), capacity=off.config.capacity)
    assert remembered(dataclasses.replace(off, config=config), long) == [0]


def test_capacity_that_cannot_fill_is_one_run(weights, sequences):
    """13 frames at an interval of 2 write 6 times at most: with the first, 7 places are enough."""
    large, enough, small = (setting(weights, config=writes_always(c)).on(sequences[0]) for c in (32, 7, 6))
    assert large == enough and large.digest == enough.digest
    assert small.digest != enough.digest
    assert remembered(setting(weights, config=writes_always(32)), sequences[0]) == [0, 2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("wipe", ["values", "all"])
def test_background_is_zero_in_the_memory_and_the_target_is_not(weights, sequences, wipe):
    tracker = setting(weights, wipe=wipe).tracker()
    kept = setting(weights).tracker()
    image = next(sequences[0].images())
    tracker.init(image, BOX)
    kept.init(image, BOX)
    memory, whole = tracker.frame_step.memory, kept.frame_step.memory
    rows = memory.locations
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[6:11, 6:11] = True  # a target of 64 pixels in the middle: cells of 16, centred on 96 .. 160
    inside = inside.flatten()
    assert torch.equal(memory.values[0, :rows][inside], whole.values[0, :rows][inside])
    assert memory.values[0, :rows][~inside].eq(0).all() and whole.values[0, :rows][~inside].abs().sum() > 0
    laid_out = memory.keys.shape[-1] > tracker.frame_step.network.model.config.key_dim
    keys, whole_keys = (
        (unpack_keys(m.keys[:, :rows]) if laid_out else m.keys[:, :rows])[0] for m in (memory, whole)
    )
    assert torch.equal(keys[inside], whole_keys[inside])
    assert keys[~inside].eq(0).all().item() == (wipe == "all")


def test_inside_is_the_cells_that_the_box_touches():
    model = DMV(DMVConfig())
    inside = inside_box(model, torch.tensor([[100.0, 100, 10, 30], [-50, -50, 20, 20]])).view(2, 16, 16)
    rows, columns = inside[0].nonzero().T
    assert sorted(set(rows.tolist())) == [6, 7, 8] and sorted(set(columns.tolist())) == [6, 7]
    assert not inside[1].any()


def test_unknown_wipe_is_refused(weights):
    network = load_network(weights, CPU, "float32", "auto")
    with pytest.raises(ValueError, match="wipe"):
        WithoutBackground(network, "keys")


@pytest.mark.parametrize("variant", list(readers.VARIANTS))
def test_half_plain_says_what_the_model_says(variant):
    torch.manual_seed(1)
    model = DMV(dataclasses.replace(DMVConfig(), **readers.VARIANTS[variant])).eval().requires_grad_(False)
    network = HalfPlain(model)
    network.dtype = torch.float32
    features = torch.randn(1, 256, 16, 16)
    told = model.exact_maps(torch.tensor([[96.0, 96, 64, 64]]))
    keys, values = network.remember(features.permute(0, 2, 3, 1), *told)
    got = network.predict(features.permute(0, 2, 3, 1), keys, values, 4, 256)
    expected = model(features, *model.remember(features, *told))
    assert torch.allclose(got.logits, expected.logits, atol=1e-4)


def test_track_runs_each_pair_once_and_resumes(weights, sequences, tmp_path, monkeypatch):
    chosen = [
        setting(weights, "base", k=4),
        setting(weights, "again", k=4),
        setting(weights, "k-1", k=1, short=False),
        setting(weights, "wiped", k=4, wipe="all"),
    ]
    done = []
    run = track._work
    monkeypatch.setattr(track, "_work", lambda pair, tick: (done.append(pair), run(pair, tick)))
    data = {"dev": sequences[:1], "held-out": sequences[1:]}
    rows = track.track_all(chosen, data, tmp_path, jobs=1)
    assert len(rows) == 7 and len(done) == 5  # "again" is "base", "k-1" is not for held-out
    assert [row["setting"] for row in rows if row["dataset"] == "held-out"] == ["base", "again", "wiped"]
    assert track.track_all(chosen, data, tmp_path, jobs=1) == rows and len(done) == 5
    (tmp_path / chosen[2].on(sequences[0]).digest / "runs" / "video1.json").unlink()
    track.track_all(chosen, data, tmp_path, jobs=1)
    assert len(done) == 6 and done[-1].setting.name == "k-1"


def features_of(folder: Path, rows: int, seed: int) -> readers.Features:
    rng = np.random.default_rng(seed)
    features = readers.Features(folder, (rows, 4, 256, 16, 16), {"made": seed})
    for row in range(rows):
        box = np.array([[96, 96, 64, 64]], np.float32) + rng.normal(0, 8, (4, 4)).astype(np.float32)
        box[3] = np.nan
        features.put(row, torch.from_numpy(rng.normal(size=(4, 256, 16, 16)).astype(np.float32)), box)
    return features


@pytest.mark.parametrize("variant, reader", [("mlp", "mlp"), ("vote-mean", "vote+mean")])
def test_a_reader_is_trained_on_the_frozen_backbone(weights, tmp_path, variant, reader):
    train_on, held_out = features_of(tmp_path / "a", 8, 0), features_of(tmp_path / "b", 3, 1)

    def train() -> Path:
        return readers.train(
            weights, tmp_path, train_on=train_on, held_out=held_out, variant=variant, seed=5, steps=2
        )

    folder = train()
    model, start = load_model(folder / "model.safetensors"), load_model(weights)
    assert model.config == dataclasses.replace(start.config, reader=reader)
    for name, tensor in start.backbone.state_dict().items():
        last = name.startswith(("neck3.6", "neck4.6"))
        assert torch.equal(model.backbone.state_dict()[name], tensor) != last, name
    with open(folder / "held_out.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == 3
    for row in rows:  # four frames, the target gone in the last
        assert row["iou"] == pytest.approx((row["iou_1"] + row["iou_2"]) / 2, abs=1e-4)
        assert math.isnan(row["iou_3"])
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert train() == folder and (folder / "model.safetensors").stat().st_mtime_ns == written


def test_last_layers_go_on_where_before_last_ends(weights):
    backbone = load_model(weights).backbone
    layer3 = torch.randn(2, 256, 32, 32)
    with torch.no_grad():
        half_way = readers.before_last(backbone, layer3)
        short = readers.last_layers(backbone)  # makes the two layers fresh, in both
        assert torch.allclose(short.tail(half_way), backbone.tail(layer3), atol=1e-5)


def test_readers_of_a_seed_see_the_same_batches(tmp_path):
    features = features_of(tmp_path / "a", 8, 0)
    recipe = dataclasses.replace(readers.RECIPE, steps=4, seed=3)
    first, second = (list(readers.batches(features, recipe)) for _ in range(2))
    assert [frames.shape[1] for frames, _ in first] == [2, 2, 3, 3]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])
    assert not torch.equal(first[0][0], first[1][0])


def test_features_of_another_checkpoint_are_refused(tmp_path):
    features_of(tmp_path / "a", 2, 0)
    with pytest.raises(ValueError, match="another --runs"):
        readers.Features(tmp_path / "a", (2, 4, 256, 16, 16), {"made": 9})


def test_score_maps_with_and_without_background(weights, sequences):
    network = load_network(weights, CPU, "float32", "auto")
    (look,) = background.look_at(network, sequences[:1], 4)  # of 13 frames, the tenth
    assert look.frame == 10 and [row["mode"] for row in look.rows] == list(background.MODES)
    assert not np.allclose(look.maps["kept"], look.maps["all"])
    assert background.picture([look]).shape == (24 + 256, 4 * 256, 3)


def test_paired_difference_is_paired():
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 1, 14)
    found = report.paired_difference(base + 0.01, base)
    assert (found.mean, found.low, found.high) == pytest.approx((0.01, 0.01, 0.01)) and found.clear
    those = base + rng.normal(0, 0.2, 14)
    noisy = report.paired_difference(those, base)
    assert noisy.low < noisy.mean < noisy.high
    # Student's interval of the mean is near the bootstrap's.
    width = 2 * 2.16 * np.std(those - base, ddof=1) / 14**0.5
    assert noisy.high - noisy.low == pytest.approx(width, rel=0.2)


def test_tables_take_their_places(tmp_path):
    page = "before\n<!-- memory -->\nold\n<!-- /memory -->\nafter\n"
    text = report.replace_between(page, "memory", "| new |")
    assert text == "before\n<!-- memory -->\n\n| new |\n\n<!-- /memory -->\nafter\n"
    assert report.replace_between(text, "memory", "| new |") == text
    with pytest.raises(ValueError, match="no markers"):
        report.replace_between(page, "capacity", "")


def test_the_page_has_every_place():
    page = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    places = "claims readers remembered memory candidates capacity background terms checkpoints"
    for name in places.split():
        report.replace_between(page, name, "")


def test_the_page_says_what_the_figures_say(tmp_path, monkeypatch):
    """But for the frame rates, which `make bench` measures anew."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("benchmarks.ablations.plots.write_all", lambda *_: None)
    results = tmp_path / "results" / "ablations"
    shutil.copytree(ROOT / "benchmarks" / "results" / "ablations", results)
    pages = [ROOT / "docs" / "ablations.md", tmp_path / "page.md"]
    shutil.copy(*pages)
    report.write_report(results, pages[1])
    said, found = (report.replace_between(p.read_text(encoding="utf-8"), "candidates", "") for p in pages)
    assert found == said


def test_report_from_figures(tmp_path):
    pytest.importorskip("matplotlib")
    names = [one.name for one in settings.settings_of("dmv18", "float32")]
    reads = [*readers.VARIANTS, readers.name_of("vote", 2000), readers.name_of("softmax", 2000)]
    names += [f"reader-{read}-{s}" for read in reads for s in (0, 1)]
    names += ["checkpoint-g16", "checkpoint-g32"]
    worse = {"memory-off": -0.1, "k-32": 0.0}
    rng = np.random.default_rng(0)
    rows = [
        dict(zip(track.COLUMNS, (d, f"s{i}", name, 9, f"{auc:.4f}", 0, 0, 1, 20.0), strict=True))
        for d in report.SETS
        for i in range(5)
        for name in names
        if d == "dev" or not name.startswith("capacity")
        for auc in [0.5 + 0.05 * i + worse.get(name, rng.normal(0, 0.01))]
    ]
    results = tmp_path / "results" / "ablations"
    results.mkdir(parents=True)
    (results / "sequences.csv").write_text(readers.as_csv(rows))
    figures = ("iou", *(f"iou_{t}" for t in report.REMEMBERED))
    ious = [
        {"variant": v, "seed": s, "sample": i, **{f: rng.uniform() if i else float("nan") for f in figures}}
        for v in reads
        for s in (0, 1)
        for i in range(4)
    ]
    (results / "readers.csv").write_text(readers.as_csv(ious))
    doc = tmp_path / "page.md"
    doc.write_text((ROOT / "docs" / "ablations.md").read_text(encoding="utf-8"))
    assert command.main(["report", "--results", str(results), "--doc", str(doc)]) == 0
    text = doc.read_text()
    mean = np.mean([float(row["auc"]) for row in rows if (row["dataset"], row["setting"]) == ("dev", "base")])
    assert f"| on (32 frames, every 30) | {mean:.3f} |  |" in text
    assert "nan" not in text
    assert text.count("| softmax over all | 2 |") == 1 == text.count("| softmax over all, 2,000 steps | 2 |")
    assert text.count("| vote beats softmax, 2,000 steps |") == 3  # on held-out samples, dev, held-out videos
    verdicts = {line.split("|")[1].strip(): line.split("|")[4].strip() for line in text.splitlines()
                if line.count("|") == 5 and "dev AUC:" in line}  # fmt: skip
    assert verdicts["memory on beats off"] == "yes" and verdicts["K = 32 beats K = 4"] == "open"
    assert "| g32 | " in text
    for name in ("readers", "candidates", "capacity", "differences"):
        assert cv2.imread(str(results / f"{name}.png")) is not None


def test_compared_checkpoints_join_the_figures(weights, root, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_report", lambda args: None)
    kept = dict.fromkeys(track.COLUMNS, "7") | {"setting": "base"}
    (tmp_path / "sequences.csv").write_text(readers.as_csv([kept, kept | {"setting": "checkpoint-old"}]))
    where = ["--dev", str(root), "--runs", str(tmp_path), "--results", str(tmp_path), "--dtype", "float32"]
    assert command.main(["compare", f"a={weights}", f"b={weights}", *where]) == 0
    with open(tmp_path / "sequences.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == kept
    assert [row["setting"] for row in rows[1:]] == 2 * ["checkpoint-a", "checkpoint-b"]
    assert [row["auc"] for row in rows[1::2]] == [row["auc"] for row in rows[2::2]]


def test_a_new_run_keeps_the_figures_of_other_weights(weights, root, tmp_path, monkeypatch):
    """Readers take an hour to train: tracking anew where they are not at hand must not lose their rows."""
    monkeypatch.setattr(command, "_report", lambda args: None)
    monkeypatch.setattr(command, "settings_of", lambda *given: settings.settings_of(*given)[:1])
    before = [
        dict.fromkeys(track.COLUMNS, "7") | {"setting": s} for s in ("base", "reader-vote-0", "checkpoint-a")
    ]
    (tmp_path / "sequences.csv").write_text(readers.as_csv(before))
    (tmp_path / "about.json").write_text('{"readers": {"reader-vote-0": {"steps": 500}}}')
    where = ["--dev", str(root), "--runs", str(tmp_path), "--results", str(tmp_path), "--dtype", "float32"]
    assert command.main(["track", "--weights", str(weights), *where]) == 0
    with open(tmp_path / "sequences.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[-2:] == before[1:]
    assert {row["setting"] for row in rows[:-2]} == {"base"} and before[0] not in rows
    assert json.loads((tmp_path / "about.json").read_text())["readers"] == {"reader-vote-0": {"steps": 500}}


def test_each_machine_s_speed_has_its_column(tmp_path):
    for machine, fps in (("fast", 90), ("slow", 30)):
        (tmp_path / machine).mkdir()
        text = f"section,k,fps\nk,1,{fps}\nmemory,4,{fps / 2}\nk,4,{fps / 3}\n"
        (tmp_path / machine / "frame.csv").write_text(text)
    assert report.bench_fps(tmp_path) == {"fast": {1: 90, 4: 30}, "slow": {1: 30, 4: 10}}


def test_longer_trained_reads_are_compared_with_the_vote_trained_as_long():
    assert readers.name_of("no-score", readers.RECIPE.steps) == "no-score"
    assert report.title_of(readers.name_of("no-score", 2000)).endswith("words), 2,000 steps")
    assert report.rival_of("softmax") == report.rival_of("no-score") == "vote"
    assert report.rival_of("softmax-2000") == report.rival_of("vote-2000") == "vote-2000"
    one, other = {0: np.array([0.5, np.nan])}, {0: np.array([0.2, np.nan])}
    runs = {"vote": one, "softmax": other, "vote-2000": other, "softmax-2000": one}
    table = report.remembered_table(dict.fromkeys(report.REMEMBERED, runs))
    cells = {line.split(" | ")[0]: line.split(" | ")[1] for line in table.splitlines()[2:]}
    assert cells["| softmax over all"].startswith("-0.300")
    assert cells["| softmax over all, 2,000 steps"].startswith("+0.300")
    assert cells["| vote, renormalised scores (ours), 2,000 steps"] == "0.200"


def test_reads_are_compared_over_the_seeds_that_both_have():
    runs = {"vote": {0: np.array([0.5, 0.6]), 1: np.array([9.0, 9.0])}, "mlp": {0: np.array([0.4, 0.4])}}
    assert report.iou_difference(runs, "vote", "mlp").mean == pytest.approx(0.15)
    assert report.iou_difference(runs, "vote", "softmax") is None


def test_command_says_what_is_wrong(capsys):
    assert command.main(["train", "--data", "nowhere", "--readers", "vote,tree"]) == 2
    assert "tree" in capsys.readouterr().err
    assert command.main(["track", "--dev", "nowhere", "--dtype", "float32"]) == 2
    with pytest.raises(ValueError, match="NAME=FILE"):
        settings.compared_of(["grid32"], "float32")
