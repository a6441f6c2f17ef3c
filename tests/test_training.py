"""The training loop: what a recipe means, that a resumed run is the same run, that the network can learn."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from photographs import write_photographs

from dmv_fast import load_model
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.runtime.load import load_network
from dmv_fast.training import loop, validation
from dmv_fast.training.data import SampleStream
from dmv_fast.training.log import Log
from dmv_fast.training.loop import Frames, TrainingRun, train
from dmv_fast.training.recipe import Recipe, load_recipe
from dmv_fast.training.unroll import FrameOutcome, Unroll, over_time
from dmv_fast.weights import CheckpointError, save_model

ROOT = Path(__file__).resolve().parent.parent

TINY = """
model: {{key_dim: 64, value_dim: 32, vote_dim: 16, heads: 2}}
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
    write_photographs(root)
    return root


def write_recipe(path, text: str):
    path.write_text(text)
    return path


def weights_of(path):
    return load_model(path).state_dict()


def runs_of(recipe_path, data, out, **options):
    return train(recipe_path, data=data, out=out, device="cpu", workers=0, **options)


def same_weights(one, other) -> bool:
    one, other = weights_of(one), weights_of(other)
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [0, 3])
def test_a_resumed_run_is_the_same_run(data, tmp_path, monkeypatch, cached):
    """Bit for bit: with samples made on the way and stopped by SIGTERM in the midst of a step; with cached
    features and paused."""
    recipe = write_recipe(tmp_path / "r.yaml", TINY.format(steps=2) + f"cached_samples: {cached}\n")
    straight, out = runs_of(recipe, data, tmp_path / "a"), tmp_path / "b"
    if cached:
        runs_of(recipe, data, out, pause_after=0.0)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Unroll, "forward", terminated(Unroll.forward))
            runs_of(recipe, data, out)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 1
    with pytest.raises(ValueError, match="--resume"):
        runs_of(recipe, data, out)
    assert not same_weights(straight, out / "model.safetensors")
    assert same_weights(straight, runs_of(recipe, data, out, resume=True))
    start = seeded_start().state_dict()["head.centre.0.weight"]
    assert not torch.equal(weights_of(straight)["head.centre.0.weight"], start)
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [r["kind"] for r in rows] == ["val"] and np.isfinite(float(rows[0]["loss"]))


def terminated(forward):
    """The forward pass of a process that is asked to end in it."""

    def run(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *arguments)

    return run


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
def test_a_taught_run_takes_the_rest_over(data, tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    settings = f"teacher: {teacher}\nteacher_steps: 2\n"
    recipe = write_recipe(tmp_path / "taught.yaml", TINY.format(steps=2) + settings)
    torch.manual_seed(1)
    save_model(DMV(load_recipe(recipe).model), teacher)
    told, taught = weights_of(teacher), weights_of(runs_of(recipe, data, tmp_path / "run"))
    for name in told:  # the loss of features moves nothing but the backbone
        assert torch.equal(told[name], taught[name]) or name.startswith("backbone."), name
    assert not torch.equal(told["backbone.neck4.6.weight"], taught["backbone.neck4.6.weight"])


@pytest.mark.slow
def test_two_processes_train_one_network(data, tmp_path):
    """Under torchrun, on one cache and by one clock: both halves of a batch make the batch's step."""
    text = TINY.format(steps=1) + "cached_samples: 3\n"
    text = text.replace("candidates: [1, 4]", "candidates: [4]").replace("write", "#write")
    recipe = write_recipe(tmp_path / "r.yaml", text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--data", str(data), "--device", "cpu", "--workers", "0", "--out", str(tmp_path / "two")]
    command = [*torchrun, "-m", "dmv_fast", "train", str(recipe), *options, "--minutes", "60"]
    subprocess.run(command, check=True, env=environment, timeout=300)
    two = weights_of(tmp_path / "two" / "model.safetensors")
    one = weights_of(runs_of(recipe, data, tmp_path / "one"))
    # Batch norm sees half a batch in each process, so the steps agree in direction, not to the bit.
    name = "head.centre.2.weight"
    start = seeded_start().state_dict()[name]
    steps = [(weights[name] - start).flatten() for weights in (two, one)]
    assert torch.nn.functional.cosine_similarity(*steps, dim=0) > 0.8


def test_a_pretrained_stem_keeps_its_statistics():
    """Trained or not: the shipped ImageNet weights have theirs folded in, and new ones would undo them."""
    model = DMV(DMVConfig())
    for recipe, kept in (
        (Recipe(), False), (Recipe(pretrained="x"), True), (Recipe(start_from="x"), True),
        (Recipe(freeze_stem=True), True),
    ):  # fmt: skip
        unroll = Unroll(model, recipe).train()
        norms = [m for m in model.backbone.layer2.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert all(norm.training != kept for norm in norms)
        assert model.backbone.neck3[1].training and model.backbone.layer4[0].bn1.training and unroll.training


def test_each_part_has_its_rate():
    model = DMV(DMVConfig())
    optimiser = loop._optimiser(
        Recipe(optimiser="adamw", backbone_rate=0.5, stem_rate=0.05, learning_rate=1.0), model
    )
    rate = {id(p): group["relative_rate"] for group in optimiser.param_groups for p in group["params"]}
    assert set(rate) == {id(p) for p in model.parameters()}
    parts = (
        (model.head, 1.0), (model.read, 1.0), (model.backbone.neck4, 0.5), (model.backbone.layer4, 0.5),
        (model.backbone.layer3, 0.05), (model.backbone.conv1, 0.05),
    )  # fmt: skip
    for part, expected in parts:
        assert {rate[id(p)] for p in part.parameters()} == {expected}


class Still:
    """A tracker that stays where it was put."""

    def __init__(self, *_arguments, **_settings):
        self.inits = 0

    def init(self, image, box):
        self.box, self.inits = box, self.inits + 1

    def track(self, image):
        return self


def test_held_out_videos_are_measured(data, tmp_path, monkeypatch):
    """Made ones here, for want of clips; the same every time."""
    monkeypatch.setattr("dmv_fast.training.catalog.is_held_out", lambda name: True)
    monkeypatch.setattr(validation, "CLIP_FRAMES", 36)
    monkeypatch.setattr(validation, "FastDMVTracker", Still)
    scores = validation.on_videos(tmp_path / "m.safetensors", data, 3, torch.device("cpu"))
    assert list(scores) == ["made 0", "made 1", "made 2 leaves"]
    assert all(0 < auc < 0.96 for auc in scores.values())
    name, video = next(validation.held_out_videos(data, 1, 0))
    assert validation.video_auc(Still(), video) == scores[name]
    Log(tmp_path).videos(7, scores)
    rows = list(csv.DictReader(open(tmp_path / "clips.csv")))
    assert [row["step"] for row in rows] == ["7"] * 4
    assert float(rows[-1]["auc"]) == pytest.approx(np.mean(list(scores.values())), abs=1e-4)


def test_a_checkpoint_that_training_replaced_is_read_anew(tmp_path):
    path, heads = tmp_path / "model.safetensors", []
    for seed in (0, 1):
        save_model(DMV(DMVConfig(key_dim=64, value_dim=32, vote_dim=16, heads=2)), path)
        os.utime(path, ns=(seed, seed))
        network = load_network(str(path), torch.device("cpu"), "float32", "reference")
        assert load_network(str(path), torch.device("cpu"), "float32", "reference") is network
        heads.append(network.model.head.centre[0].weight)
    assert not torch.equal(*heads)


def seeded_start() -> DMV:
    torch.manual_seed(0)
    return DMV(DMVConfig(key_dim=64, value_dim=32, vote_dim=16, heads=2))


def test_frames_rise_with_the_steps(data):
    recipe = Recipe(frames=(2, 3), frames_every=1, batch=2, mix={"photo": 1.0})
    stream = SampleStream(data, seed=0, frames=3, mix=recipe.mix)
    frames = Frames(stream, recipe)
    assert [len(frames[i][0]) for i in range(6)] == [2, 2, 3, 3, 3, 3]
    assert (frames[4][0].numpy() == stream[4].crops).all()
    for i in range(3):
        for one, again in zip(frames[i], frames[i], strict=True):
            assert np.array_equal(one.numpy(), again.numpy(), equal_nan=True)


@pytest.mark.slow
def test_later_frames_weigh_more_and_an_absent_target_has_no_iou():
    """Section 3.4: 2 t / N. Two samples of four frames; the second one's target is gone in the last."""

    def outcome(loss: float, ious: tuple[float, float]) -> FrameOutcome:
        return FrameOutcome(*[torch.full((2,), loss)] * 3, *[torch.tensor(ious)] * 2)

    boxes = torch.ones(2, 4, 4)
    boxes[1, 3] = torch.nan
    for losses, expected in (((1, 1, 1), 1.0), ((3, 0, 0), 0.5), ((0, 0, 3), 1.5)):
        each = [outcome(float(loss), (0.9, 0.3)) for loss in losses]
        whole = over_time(each, boxes)
        assert whole.loss.item() == pytest.approx(expected)
        assert whole.centre.item() == pytest.approx(sum(losses) / 3)  # shown as they are
        assert whole.iou.item() == pytest.approx((3 * 0.9 + 2 * 0.3) / 5)
        assert (whole.score_present.item(), whole.score_absent.item()) == pytest.approx((0.66, 0.3))


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


def test_drifted_writes_are_wrong_alike_all_through_a_sample(monkeypatch):
    """The memory is told boxes of a wrong size around the right centre; of an absent target, nothing."""
    model, told = seeded_start(), []
    monkeypatch.setattr(model, "remember", lambda *maps: told.append(maps[1:]) or DMV.remember(model, *maps))
    boxes = torch.tensor([[[90.0, 80, 60, 40]] * 4, [[60.0, 100, 50, 70]] * 4])
    boxes[1, 2] = torch.nan
    unroll = Unroll(model, Recipe(write_drifted=1.0))
    layer3 = torch.randn(2, 4, 256, 32, 32)
    unroll(layer3, boxes, 2, torch.Generator().manual_seed(3))

    def written(sample: int, frame: int) -> torch.Tensor:
        scores, deltas = (maps[sample] for maps in told[frame])
        return model.decode(deltas[None])[0].flatten(0, 2)[scores.flatten().argmax()]

    for sample in (0, 1):
        assert torch.allclose(written(sample, 0), boxes[sample, 0], atol=1e-3)
        drifted, truth = written(sample, 1), boxes[sample, 1]
        assert torch.allclose(drifted[:2] + drifted[2:] / 2, truth[:2] + truth[2:] / 2, atol=1e-3)
        assert (drifted[2:] / truth[2:]).log().abs().min() > 0.02
    assert torch.allclose(written(0, 1), written(0, 2), atol=1e-3)
    assert not torch.allclose(written(0, 1)[2:] / boxes[0, 1, 2:], written(1, 1)[2:] / boxes[1, 1, 2:])
    assert told[2][0][1].max() == 0
    told.clear()
    unroll.eval()(layer3, boxes, 2)  # what is measured is what a tracker writes: its predictions
    assert 0 < told[1][0].max() < 1


@pytest.mark.parametrize(("text", "says"), [
    ("batchh: 3", "batchh"), ("model: {backbone: vgg, width: 3}", "width"), ("frames: [1]", "frames"),
    ("optimiser: lion", "optimiser"), ("- a\n- b", "mapping"), ("a: [", "YAML"),
    ("cached_samples: 5", "freeze_stem"), ("learning_rate: 1e-3", "1.0e-3"), ("steps: abc", "steps"),
    ("steps: 0", "steps"), ("batch: 1.5", "batch"), ("candidates: 4", "candidates"),
    ("candidates: [64]", "candidates"), ("candidates: []", "candidates"),
    ("{write_truth: 0.8, write_wrong: 0.3}", "write_truth"), ("write_drifted: -0.1", "_drifted"),
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


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_repository(path):
    """Each loads, its network can be made, and its stages are over before its steps are."""
    recipe = load_recipe(path)
    assert recipe.frames_at(recipe.steps) == recipe.frames[-1]
    with torch.device("meta"):
        DMV(recipe.model)


def test_the_paper_recipe_is_the_papers():
    recipe = load_recipe(ROOT / "recipes" / "paper.yaml")
    assert (recipe.steps, recipe.batch, recipe.learning_rate, recipe.weight_decay) == (32_000, 16, 1e-3, 5e-4)
    assert [recipe.frames_at(s) for s in (0, 6399, 6400, 12800, 19200, 31999)] == [2, 2, 3, 4, 5, 5]
    assert recipe.max_skip == 100 and recipe.optimiser == "sgd" and not recipe.freeze_stem
    assert [source.kind for source in recipe.sources] == ["got10k", "lasot", "trackingnet"]


@pytest.mark.parametrize("changed", ["grid: 32", "reader: vote+mean"])
def test_start_from_goes_on_from_those_weights(data, tmp_path, changed):
    """On either grid, and with a mean beside the vote: these have no weights of their own."""
    start = tmp_path / "start.safetensors"
    save_model(DMV(DMVConfig(key_dim=64, value_dim=32, vote_dim=16, heads=2)), start)
    text = TINY.format(steps=1).replace("heads: 2", f"heads: 2, {changed}") + f"start_from: {start}\n"
    recipe = write_recipe(tmp_path / "s.yaml", text)
    run = TrainingRun(load_recipe(recipe), recipe, data, tmp_path / "x", torch.device("cpu"), None)
    name, value = changed.split(": ")
    assert str(getattr(run.model.config, name)) == value
    for name, tensor in load_model(start).state_dict().items():
        assert torch.equal(run.model.state_dict()[name], tensor), name


def test_start_from_another_network_is_refused(data, tmp_path):
    save_model(DMV(DMVConfig(vote_dim=32)), tmp_path / "other.safetensors")
    text = TINY.format(steps=1) + f"start_from: {tmp_path / 'other.safetensors'}\n"
    with pytest.raises(ValueError, match=r"vote_dim=16.*start_from.*vote_dim=32"):
        train(write_recipe(tmp_path / "s.yaml", text), data=data, out=tmp_path / "x", device="cpu")
