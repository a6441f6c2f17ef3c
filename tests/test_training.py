"""The training loop: what a recipe means, that a resumed run is the same run, that the network can learn."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from dmv_fast import load_model
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.training.loop import Frames, train
from dmv_fast.training.recipe import Recipe, load_recipe
from dmv_fast.training.unroll import Unroll
from dmv_fast.weights import CheckpointError

TINY = """
frames: [2, 3]
frames_every: 2
batch: 2
steps: {steps}
optimiser: adamw
schedule: decay
candidates: [1, 4]
write_truth: 0.3
write_wrong: 0.2
precision: float32
freeze_stem: true
validate_samples: 2
checkpoint_minutes: 100
mix: {{photo: 1.0}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A training folder with a few made photographs of one square each."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(24):  # enough for the held-out share to get some
        image = cv2.resize(rng.integers(0, 120, (12, 16, 3), np.uint8), (320, 240))
        x, y = (int(v) for v in rng.integers(60, 130, 2))
        image[y : y + 50, x : x + 60] = rng.integers(150, 255, 3)
        cv2.imwrite(str(root / "images" / f"{i}.jpg"), image)
        box = {"bbox": [x, y, 60, 50], "label": str(i)}
        row = {"image": f"images/{i}.jpg", "dataset": "made", "width": 320, "height": 240, "objects": [box]}
        lines.append(json.dumps(row))
    (root / "annotations.jsonl").write_text("\n".join(lines) + "\n")
    return root


def write_recipe(path, text: str):
    path.write_text(text)
    return path


def weights_of(path):
    return load_model(path).state_dict()


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(data, tmp_path):
    whole = write_recipe(tmp_path / "whole.yaml", TINY.format(steps=3))
    half = write_recipe(tmp_path / "half.yaml", TINY.format(steps=2))
    straight = train(whole, data=data, out=tmp_path / "a", device="cpu", workers=0)
    train(half, data=data, out=tmp_path / "b", device="cpu", workers=0)
    with pytest.raises(ValueError, match="--resume"):
        train(whole, data=data, out=tmp_path / "b", device="cpu", workers=0)
    resumed = train(whole, data=data, out=tmp_path / "b", resume=True, device="cpu", workers=0)
    one, other = weights_of(straight), weights_of(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    start = DMV(DMVConfig()).state_dict()
    assert not torch.equal(one["head.centre.0.weight"], start["head.centre.0.weight"])
    rows = list(csv.DictReader(open(tmp_path / "b" / "log.csv")))
    assert [r["kind"] for r in rows] == ["val", "val"] and np.isfinite(float(rows[0]["loss"]))


@pytest.mark.slow
def test_cached_features_train_and_the_frozen_stem_stays(data, tmp_path):
    text = TINY.format(steps=1) + "cached_samples: 3\n"
    out = tmp_path / "run"
    model = load_model(train(write_recipe(tmp_path / "c.yaml", text), data=data, out=out, device="cpu"))
    start = seeded_start().state_dict()
    after = model.state_dict()
    assert torch.allclose(
        after["backbone.layer1.0.conv1.weight"], start["backbone.layer1.0.conv1.weight"], atol=1e-3
    )
    assert torch.equal(
        after["backbone.layer2.0.bn1.running_mean"], start["backbone.layer2.0.bn1.running_mean"]
    )
    assert not torch.equal(after["backbone.neck3.1.running_mean"], start["backbone.neck3.1.running_mean"])
    assert (out / "cache" / "features.f16").stat().st_size == 3 * 3 * 256 * 32 * 32 * 2


@pytest.mark.slow
def test_two_processes_train_one_network(data, tmp_path):
    """Under torchrun the gradients of both halves of a batch make the step of the whole batch."""
    text = TINY.format(steps=1).replace("candidates: [1, 4]", "candidates: [4]").replace("write", "#write")
    recipe = write_recipe(tmp_path / "r.yaml", text)
    options = ["train", str(recipe), "--data", str(data), "--device", "cpu", "--workers", "0", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dmv_fast",
    ]
    subprocess.run([*command, *options, str(tmp_path / "two")], check=True, env=environment, timeout=300)
    train(recipe, data=data, out=tmp_path / "one", device="cpu", workers=0)
    two, one = (
        weights_of(tmp_path / "two" / "model.safetensors"),
        weights_of(tmp_path / "one" / "model.safetensors"),
    )
    # Batch norm sees half a batch in each process, so the steps agree in direction, not to the bit.
    name = "head.centre.2.weight"
    start = seeded_start().state_dict()[name]
    steps = [(weights[name] - start).flatten() for weights in (two, one)]
    assert torch.nn.functional.cosine_similarity(*steps, dim=0) > 0.8


def seeded_start() -> DMV:
    torch.manual_seed(0)
    return DMV(DMVConfig())


def test_frames_rise_and_start_with_the_exemplar(data):
    from dmv_fast.training.data import SampleStream

    recipe = Recipe(frames=(2, 3), frames_every=1, batch=2, mix={"photo": 1.0})
    stream = SampleStream(data, seed=0, frames=3, mix=recipe.mix)
    frames = Frames(stream, recipe)
    assert [len(frames[i][0]) for i in range(6)] == [2, 2, 3, 3, 3, 3]
    for i in range(3):
        assert (frames[i][0][0].numpy() == stream[i].crops[0]).all()
        for one, again in zip(frames[i], frames[i], strict=True):
            assert np.array_equal(one.numpy(), again.numpy(), equal_nan=True)


@pytest.mark.slow
def test_overfits_one_clip():
    """A textured square on a moving background: after some steps the boxes lie on it, IoU over 0.8."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    square = cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), (60, 60), interpolation=cv2.INTER_NEAREST)
    crops = np.empty((4, 256, 256, 3), np.uint8)
    boxes = np.array([[98, 98, 60, 60], [120, 80, 60, 60], [70, 110, 60, 60], [140, 140, 60, 60]], np.float32)
    for crop, (x, y, w, h) in zip(crops, boxes.astype(int), strict=True):
        crop[:] = cv2.resize(rng.integers(0, 255, (20, 20, 3), np.uint8), (256, 256))
        crop[y : y + h, x : x + w] = square
    recipe = Recipe(freeze_stem=True)
    model = DMV(DMVConfig())
    unroll = Unroll(model, recipe).train()
    with torch.no_grad():  # the frozen stem need not be run again and again
        from dmv_fast.vision.crop import normalise

        layer3 = model.backbone.stem(normalise(torch.from_numpy(crops)))[None]
    target = torch.from_numpy(boxes)[None]
    optimiser = torch.optim.AdamW([p for n, p in model.named_parameters() if "layer4" not in n], 1e-3)
    for _ in range(100):
        outcome = unroll(layer3, target, 4, torch.Generator())
        optimiser.zero_grad()
        outcome.loss.backward()
        optimiser.step()
        if outcome.iou > 0.85 and outcome.score_present > 0.6:
            break
    assert outcome.iou > 0.8
    assert outcome.score_present > 0.5


@pytest.mark.parametrize(("text", "says"), [
    ("batchh: 3", "batchh"), ("model: {backbone: vgg, width: 3}", "width"), ("frames: [1]", "frames"),
    ("optimiser: lion", "optimiser"), ("- a\n- b", "mapping"), ("a: [", "YAML"),
    ("cached_samples: 5", "freeze_stem"),
])  # fmt: skip
def test_bad_recipes_are_named(tmp_path, text, says):
    path = write_recipe(tmp_path / "bad.yaml", text)
    with pytest.raises(ValueError, match=says) as error:
        load_recipe(path)
    assert "bad.yaml" in str(error.value)


def test_missing_recipe_and_pretrained(data, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    path = write_recipe(tmp_path / "p.yaml", TINY.format(steps=1) + "pretrained: nowhere.safetensors\n")
    with pytest.raises((ValueError, CheckpointError), match=r"nowhere\.safetensors"):
        train(path, data=data, out=tmp_path / "x", device="cpu")


def test_shipped_recipes_are_readable(request):
    for path in (request.config.rootpath / "recipes").glob("*.yaml"):
        load_recipe(path)


def test_the_paper_recipe_is_the_papers(request):
    recipe = load_recipe(request.config.rootpath / "recipes" / "paper.yaml")
    assert (recipe.steps, recipe.batch, recipe.learning_rate, recipe.weight_decay) == (32_000, 16, 1e-3, 5e-4)
    assert [recipe.frames_at(s) for s in (0, 6399, 6400, 12800, 19200, 31999)] == [2, 2, 3, 4, 5, 5]
    assert recipe.max_skip == 100 and recipe.optimiser == "sgd" and not recipe.freeze_stem
