"""The network of section 3: shapes, what it must be invariant to, and what the memory keeps."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dmv_fast.model.backbone import Backbone, BasicBlock, BottleneckBlock
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.model.memory import FrameSlots, MemoryPolicy, ValueEncoder
from dmv_fast.model.pick import PickConfig, cosine_window, pick
from dmv_fast.model.retrieval import SoftmaxRead
from dmv_fast.model.voting import CandidateMlp, VotingNet
from dmv_fast.runtime.load import load_network
from dmv_fast.runtime.network import FastNetwork, PlainNetwork
from dmv_fast.vision import boxes
from dmv_fast.weights import load_model, save_model


@pytest.fixture(scope="module")
def model() -> DMV:
    torch.manual_seed(0)
    return DMV(DMVConfig()).eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("grid", [16, 32])
def test_backbone_grid(name, grid):
    features = Backbone(name, grid=grid).eval()(torch.randn(1, 3, 256, 256))
    assert features.shape == (1, 256, grid, grid)


def test_parameter_counts_are_those_of_the_docstrings(model):
    def millions(module):
        return sum(p.numel() for p in module.parameters()) / 1e6

    assert millions(model) == pytest.approx(14.5, abs=0.05)
    assert millions(model.backbone) == pytest.approx(11.6, abs=0.05)
    assert millions(model.value_encoder) == pytest.approx(1.2, abs=0.05)
    assert millions(model.head) == pytest.approx(1.5, abs=0.05)
    assert millions(model.read.voting) == pytest.approx(0.14, abs=0.005)
    assert millions(DMV(DMVConfig(backbone="resnet50"))) == pytest.approx(27.1, abs=0.05)


@pytest.mark.parametrize("block", [BasicBlock, BottleneckBlock])
def test_dilation_replaces_a_stride(block):
    """A stage without its stride, dilated, says the same as the strided one at every second place."""
    torch.manual_seed(0)
    c = 8 * block.expansion
    strided = torch.nn.Sequential(block(16, 8, 2, 1, 1), block(c, 8, 1, 1, 1)).eval()
    dense = torch.nn.Sequential(block(16, 8, 1, 1, 2), block(c, 8, 1, 2, 2)).eval()
    dense.load_state_dict(strided.state_dict())
    x = torch.randn(2, 16, 16, 16)
    assert torch.allclose(strided(x), dense(x)[:, :, ::2, ::2], atol=1e-5)


def test_layer4_starts_as_a_projection_of_layer3():
    backbone = Backbone("resnet18").eval()
    layer3 = torch.rand(1, 256, 32, 32)
    with torch.no_grad():
        expected = torch.relu(backbone.layer4[0].downsample(layer3))
        assert torch.allclose(backbone.layer4(layer3), expected, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 16, 31, 32])
def test_every_k_is_finite(model, k):
    torch.manual_seed(k)
    features = torch.randn(2, 256, 16, 16)
    keys, values = model.remember(features, *model.exact_maps(torch.tensor([[96.0, 96, 64, 64]] * 2)))
    prediction = model(features, keys, values, k=k)
    assert prediction.logits.shape == (2, 5, 16, 16)
    assert prediction.deltas.shape == (2, 5, 4, 16, 16)
    assert prediction.logits.isfinite().all() and prediction.deltas.isfinite().all()


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("grid", [16, 32])
def test_variants_run(similarity, grid):
    model = DMV(DMVConfig(grid=grid, similarity=similarity)).eval()
    features = torch.randn(1, 256, grid, grid) * 0.2
    keys, values = model.remember(features, *model.exact_maps(torch.tensor([[96.0, 96, 64, 64]])))
    assert model(features, keys, values).logits.shape == (1, 5, grid, grid)


def test_read_equals_the_formula_in_float64(model):
    """Eq. 1, the K best, weights renormalised over them: written out once more, without the operators."""
    torch.manual_seed(1)
    model64 = DMV(model.config).double().eval()
    model64.load_state_dict(model.state_dict())
    read = model64.read
    features = torch.randn(1, 256, 16, 16, dtype=torch.float64)
    keys = torch.nn.functional.normalize(torch.randn(1, 700, 256, dtype=torch.float64), dim=-1)
    values = torch.randn(1, 700, 256, dtype=torch.float64)
    q = features.flatten(2).transpose(1, 2)
    logits = torch.nn.functional.normalize(q, dim=-1) @ keys.mT * read.log_temperature.exp()
    logits = torch.cat([torch.zeros(1, 256, 1), logits], -1)
    top, column = logits.topk(4, -1)
    weight = top.softmax(-1)[..., None] * 4
    table = torch.cat([read.null_value.expand(1, 1, -1), values], 1)[0]
    rows = weight * table[column] @ read.voting.value_in.weight.T + read.voting.query_in(q)[:, :, None]
    expected = read.voting(rows)
    got = model.read(features.float(), keys.float(), values.float(), 4)
    assert torch.allclose(got.double(), expected, atol=2e-4)


def test_voting_ignores_the_order_of_candidates():
    torch.manual_seed(0)
    vote = VotingNet(256, 256, 64).eval()
    rows = torch.randn(2, 9, 7, 64)
    shuffled = rows[:, :, torch.randperm(7)]
    assert torch.allclose(vote(rows), vote(shuffled), atol=1e-5)


def test_nobody_hears_himself():
    """With two candidates, each hears only the other: the diagonal is -inf (Fig. 7)."""
    torch.manual_seed(0)
    vote = VotingNet(256, 256, 64).eval()
    rows = torch.randn(1, 1, 2, 64)
    heard = vote._hear_others(rows)[0, 0]
    other = vote.message(vote.to_v(rows[0, 0].flip(0)))
    assert torch.allclose(heard, other, atol=1e-5)


def test_first_frame_value_holds_the_exact_box(model):
    """One-hot score and exact deltas: decoding the map at its one gives the box back (section 3.1)."""
    box = torch.tensor([[83.2, 101.7, 51.9, 77.3]])
    scores, deltas = model.exact_maps(box)
    assert scores.sum() == 1
    decoded = model.decode(deltas)[scores.bool()]
    assert torch.allclose(decoded, box, atol=1e-3)
    assert torch.allclose(model.decode(deltas), box.expand(1, 5, 16, 16, 4), atol=1e-2)  # every anchor knows
    best = boxes.iou(box[:, None, None, None], model.anchors).max()
    assert boxes.iou(box, model.anchors[scores[0].bool()]).item() == pytest.approx(best.item())


def test_no_target_gives_empty_maps(model):
    scores, deltas = model.exact_maps(torch.full((1, 4), float("nan")))
    assert scores.abs().sum() == 0 and deltas.abs().sum() == 0


def test_low_scores_are_not_written():
    torch.manual_seed(0)
    encode = ValueEncoder(16, 8, 2).eval()
    features, deltas = torch.randn(1, 16, 4, 4), torch.randn(1, 2, 4, 4, 4)
    low = encode(features, torch.full((1, 2, 4, 4), 0.49), deltas)
    assert torch.equal(low, encode(features, torch.zeros(1, 2, 4, 4), deltas))
    assert not torch.equal(low, encode(features, torch.full((1, 2, 4, 4), 0.5), deltas))


def test_memory_never_drops_the_first_and_drops_the_oldest_else():
    slots = FrameSlots(4, 2)
    for frame in range(9):
        slot = slots.claim(frame)
        held = sorted(f for f in slots.frames if f is not None)
        assert held == ([0, *range(max(1, frame - 2), frame + 1)] if frame else [0])
        assert slots.frames[0] == 0 and slots.frames[slot] == frame
        assert slots.valid == 2 * min(frame + 1, 4)


def test_memory_of_one_frame_keeps_the_first():
    slots = FrameSlots(1, 2)
    assert slots.claim(0) == 0
    assert slots.claim(30) is None
    assert slots.frames == [0] and slots.valid == 2


def test_memory_clone_and_clear():
    slots = FrameSlots(3, 2)
    slots.claim(0)
    copy = slots.clone()
    slots.claim(30)
    assert (copy.valid, slots.valid) == (2, 4) and copy.frames == [0, None, None]
    slots.clear()
    assert slots.valid == 0 and slots.frames == [None] * 3 and copy.valid == 2


def test_policy_keeps_the_interval_and_refuses_low_scores():
    policy = MemoryPolicy()
    assert not policy.wants(29, 0, 0.99)
    assert policy.wants(30, 0, 0.7)
    assert not policy.wants(45, 0, 0.699)
    assert policy.wants(46, 0, 0.9) and not policy.wants(75, 46, 0.9)


def test_unwritten_memory_is_never_read(model):
    torch.manual_seed(0)
    features = torch.randn(1, 256, 16, 16)
    keys, values = model.remember(features, *model.exact_maps(torch.tensor([[96.0, 96, 64, 64]])))
    bank_keys, bank_values = (torch.full((1, 3 * 256, 256), fill) for fill in (float("nan"), 7.0))
    bank_keys[:, :256], bank_values[:, :256] = keys, values
    got = model(features, bank_keys, bank_values, valid=256)
    expected = model(features, keys, values)
    assert torch.allclose(got.logits, expected.logits, atol=1e-4)


def test_config_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match="candidates"):
        DMVConfig(candidates=33)
    with pytest.raises(ValueError, match="grid"):
        DMV(DMVConfig(grid=20))
    with pytest.raises(ValueError, match="backbone"):
        DMV(DMVConfig(backbone="vgg"))
    with pytest.raises(ValueError, match="similarity"):
        DMV(DMVConfig(similarity="l2"))


def _pick(scores, candidates, config):
    window = cosine_window(1, 16)
    return pick(scores, candidates, torch.tensor([[64.0, 64.0]]), window, config)


def test_pick_terms():
    scores = torch.zeros(1, 1, 16, 16)
    boxes_ = torch.tensor([96.0, 96, 64, 64]).repeat(1, 1, 16, 16, 1)
    scores[..., 8, 8], scores[..., 2, 2], scores[..., 8, 9] = 0.8, 0.9, 0.85
    boxes_[..., 8, 9, :] = torch.tensor([40.0, 110, 200, 30])
    plain = PickConfig(size_penalty=0, window=0, smoothing=1)
    assert _pick(scores, boxes_, plain).score.item() == pytest.approx(0.9)
    windowed = PickConfig(size_penalty=0, window=0.4, smoothing=1)
    assert _pick(scores, boxes_, windowed).score.item() == pytest.approx(0.85)
    penalised = _pick(scores, boxes_, dataclasses.replace(windowed, size_penalty=0.2))
    assert penalised.score.item() == pytest.approx(0.8)
    assert penalised.box[0].tolist() == [96, 96, 64, 64]


def test_smoothing_moves_the_size_part_of_the_way_around_the_same_centre():
    scores = torch.full((1, 1, 16, 16), 0.5)
    boxes_ = torch.tensor([88.0, 80, 80, 96]).repeat(1, 1, 16, 16, 1)
    x, y, w, h = _pick(scores, boxes_, PickConfig(0, 0, 0.5)).box[0].tolist()
    assert (x + w / 2, y + h / 2) == pytest.approx((128, 128))
    assert (w, h) == pytest.approx((64 + 0.25 * 16, 64 + 0.25 * 32))


# ---- what stands in for the vote in the ablations (Table 1) ----------------------------------------------


COMPARED = (*({"reader": name} for name in ("mlp", "softmax", "mean", "vote+mean")), {"score_use": "none"})


@pytest.mark.parametrize("changed", COMPARED, ids=str)
def test_compared_readers_learn_and_never_read_unwritten_memory(changed):
    torch.manual_seed(0)
    model = DMV(DMVConfig(**changed))
    features = torch.randn(2, 256, 16, 16)
    keys, values = model.remember(features, *model.exact_maps(torch.tensor([[96.0, 96, 64, 64]] * 2)))
    bank_keys, bank_values = (torch.full((2, 2 * 256, 256), fill) for fill in (9.0, 7.0))
    bank_keys[:, :256], bank_values[:, :256] = keys.detach(), values.detach()
    expected = model(features, keys, values)
    for valid in (256, torch.full((2,), 256, dtype=torch.int32)):
        got = model(features, bank_keys, bank_values, valid=valid)
        assert torch.allclose(got.logits, expected.logits, atol=1e-4)
    expected.logits.sum().backward()
    learns = model.read.log_temperature.grad is not None
    assert learns == ("score_use" not in changed)  # without its score a candidate says nothing of the match


def test_softmax_read_is_the_mean_by_scores():
    torch.manual_seed(0)
    read = SoftmaxRead(5, "dot")
    features, keys, values = torch.randn(1, 3, 2, 2), torch.randn(1, 7, 3), torch.randn(1, 7, 5)
    q = features.flatten(2).transpose(1, 2)[0]
    weight = torch.cat([torch.ones(4, 1), torch.exp(q @ keys[0].T)], 1)
    weight = weight / weight.sum(1, keepdim=True)  # eq. 1, its first column the null's
    expected = weight @ torch.cat([read.null_value[None], values[0]])
    assert torch.allclose(read(features, keys, values, 4)[0], expected, atol=1e-5)


def test_the_mean_of_the_best_is_the_softmax_of_these():
    torch.manual_seed(0)
    best, whole = SoftmaxRead(5, "dot", best_only=True), SoftmaxRead(5, "dot")
    whole.load_state_dict(best.state_dict())
    features, keys, values = torch.randn(1, 3, 2, 2), torch.randn(1, 7, 3), torch.randn(1, 7, 5)
    assert torch.equal(best(features, keys, values, 8), whole(features, keys, values, 8))
    q = best.query(features)[0]
    columns = torch.cat([torch.zeros(4, 1), q @ keys[0].T], 1)
    scores, indices = columns.topk(3)
    expected = (scores.softmax(-1)[..., None] * torch.cat([best.null_value[None], values[0]])[indices]).sum(1)
    assert torch.allclose(best(features, keys, values, 3)[0], expected, atol=1e-5)


def test_vote_and_mean_are_added():
    torch.manual_seed(0)
    model = DMV(DMVConfig(reader="vote+mean")).eval().requires_grad_(False)
    read, mean = model.read, SoftmaxRead(256, best_only=True)
    vote = DMV(DMVConfig()).eval().requires_grad_(False).read
    vote.load_state_dict(read.state_dict())
    mean.load_state_dict({name: read.state_dict()[name] for name in mean.state_dict()})
    features, keys = torch.randn(2, 256, 4, 4), torch.nn.functional.normalize(torch.randn(2, 40, 256), dim=-1)
    given = features, keys, torch.randn(2, 40, 256), 4
    torch.testing.assert_close(read(*given), vote(*given) + mean(*given), atol=1e-4, rtol=1e-4)


def test_candidates_of_the_mlp_do_not_hear_each_other():
    torch.manual_seed(0)
    rows = torch.randn(1, 5, 4, 64)
    mlp, vote = CandidateMlp(256, 256, 64).eval(), VotingNet(256, 256, 64).eval()

    def alone(net):
        return torch.stack([net(rows[:, :, i : i + 1]) for i in range(4)]).amax(0)

    assert torch.allclose(mlp(rows), alone(mlp), atol=1e-5)
    assert not torch.allclose(vote(rows), alone(vote), atol=1e-2)


def test_the_mlp_has_as_many_parameters_as_the_vote():
    vote, mlp = (sum(p.numel() for p in net(256, 256, 64).parameters()) for net in (VotingNet, CandidateMlp))
    assert mlp == pytest.approx(vote, rel=0.01)


def test_checkpoints_without_the_new_settings_are_votes(tmp_path, model):
    save_model(model, tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["dmv_fast.config"])
    assert config.pop("reader") == "vote" and config.pop("score_use") == "renormalised"
    save_file(tensors, tmp_path / "old.safetensors", metadata={"dmv_fast.config": json.dumps(config)})
    assert load_model(tmp_path / "old.safetensors").config == model.config


def test_the_folded_network_is_for_the_vote_alone(tmp_path, model):
    cpu = torch.device("cpu")
    save_model(model, tmp_path / "vote.safetensors")
    save_model(DMV(DMVConfig(reader="mlp")), tmp_path / "mlp.safetensors")
    kinds = [
        type(load_network(str(tmp_path / f"{name}.safetensors"), cpu, "float32", "auto"))
        for name in ("vote", "mlp")
    ]
    assert kinds == [FastNetwork, PlainNetwork]


def test_unknown_readers_are_refused():
    with pytest.raises(ValueError, match="reader is 'tree'"):
        DMVConfig(reader="tree")
    with pytest.raises(ValueError, match="score_use is 'raw'"):
        DMVConfig(score_use="raw")
