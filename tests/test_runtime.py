"""The fast frame against the reference: folds, features, boxes, the memory, several targets at once."""

from __future__ import annotations

import copy
import dataclasses

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmv_fast import FastDMVTracker
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.model.pick import PickConfig
from dmv_fast.ops.screened import pack_keys, unpack_keys
from dmv_fast.runtime import precision
from dmv_fast.runtime.convolution import Convolution
from dmv_fast.runtime.fold import fold_vote
from dmv_fast.runtime.frame import FrameStep
from dmv_fast.runtime.network import FastNetwork, PlainNetwork
from dmv_fast.runtime.pixels import max_pool
from dmv_fast.runtime.vote import fused_vote, vote_plain
from dmv_fast.vision.crop import normalise, search_window
from dmv_fast.weights import load_model, save_model

CPU = torch.device("cpu")
BOXES = [(60.0, 50.0, 40.0, 30.0), (100.0, 90.0, 22.0, 20.0), (20.0, 20.0, 30.0, 60.0)]


def lively(config: DMVConfig, seed: int = 0) -> DMV:
    """A network in which nothing that is folded is trivial: norms, biases and the vote are all at random."""
    torch.manual_seed(seed)
    model = DMV(config).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "norm.weight")) or (".bn" in name and name.endswith("weight")):
            tensor.uniform_(0.7, 1.3)
        elif name.endswith(("bias", "running_mean")):
            tensor.add_(0.1 * torch.randn_like(tensor))
    model.read.voting.to_q.weight.mul_(3)
    for branch in (model.head.centre, model.head.box):
        branch[-1].weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def model() -> DMV:
    return lively(DMVConfig())


def frames(count: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(0, 255, (30, 50, 3), np.uint8), (260, 160))
    return [np.ascontiguousarray(scene[:, 3 * i : 3 * i + 200]) for i in range(count)]


def crops(seed: int = 1) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(cv2.resize(rng.integers(0, 255, (20, 20, 3), np.uint8), (256, 256)))[None]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def random_memory(model: DMV, rows: int = 704) -> tuple[Tensor, Tensor]:
    """Keys and values that are far apart: which are the best K is then no matter of rounding."""
    torch.manual_seed(0)
    keys = F.normalize(torch.randn(1, rows, model.config.key_dim), dim=-1)
    return keys, torch.randn(1, rows, model.config.value_dim)


@pytest.mark.parametrize("stride, dilation, groups", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
@pytest.mark.parametrize("batch", [1, 3])
def test_convolution_is_folded(stride, dilation, groups, batch):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, stride, dilation, dilation, groups, bias=False)
    norm = nn.BatchNorm2d(16).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        tensor.data.normal_()
    norm.running_var.uniform_(0.5, 2)
    x, onto = torch.randn(batch, 12, 12, 8), torch.randn(batch, 12 // stride, 12 // stride, 16)
    with torch.inference_mode():
        expected = norm(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        linear, rectified = (
            Convolution.of(conv, norm, relu=relu, dtype=torch.float32, device=CPU) for relu in (False, True)
        )
        torch.testing.assert_close(linear(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rectified(x), expected.relu(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rectified(x, onto.clone()), (expected + onto).relu(), atol=1e-5, rtol=1e-5)


def test_max_pool_on_bits_is_max_pool():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16, 12).relu().bfloat16()
    found = max_pool(x.permute(0, 2, 3, 1).contiguous())
    assert torch.equal(found, F.max_pool2d(x, 3, 2, 1).permute(0, 2, 3, 1))


@pytest.mark.parametrize("k", [1, 2, 5, 32])
def test_vote_is_folded(model, k):
    torch.manual_seed(0)
    rows = torch.randn(2, 3, k, 64)
    found = vote_plain(rows, fold_vote(model.read))
    torch.testing.assert_close(found, model.read.voting(rows), atol=1e-5, rtol=1e-5)


def make_vote(read, dtype: torch.dtype = torch.bfloat16):
    """rows -> retrieved values, by what fused_vote makes of a memory read."""
    vote = fused_vote(fold_vote(read), dtype, CPU)

    def run(rows: Tensor) -> Tensor:
        room = torch.full((*rows.shape[:2], 300), torch.nan, dtype=dtype)
        vote(rows, room[..., 44:])
        assert room[..., :44].isnan().all()
        return room[..., 44:]

    return run


@pytest.mark.parametrize("k", [1, 2, 4, 11, 17, 32])
def test_fused_vote_rounds_no_worse_than_pytorch(model, k):
    """Against float32, its error is that of the reference run in bfloat16, within a quarter."""
    torch.manual_seed(0)
    vote = make_vote(model.read)
    rows = torch.randn(1, 37, k, 64).bfloat16()  # 37 locations: the last group is never full
    exact = model.read.voting(rows.float())
    honest = (copy.deepcopy(model.read.voting).bfloat16()(rows).float() - exact).abs().max()
    assert (vote(rows).float() - exact).abs().max() <= 1.25 * honest


def test_fused_vote_keeps_locations_apart(model):
    torch.manual_seed(0)
    vote = make_vote(model.read)
    rows = torch.randn(1, 24, 4, 64).bfloat16()
    before = vote(rows)
    rows[0, 5] = torch.randn(4, 64).bfloat16()
    changed = (vote(rows) != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [5]


def test_fused_vote_is_blind_to_order_and_the_same_every_time(model):
    torch.manual_seed(0)
    vote = make_vote(model.read)
    rows = torch.randn(1, 256, 8, 64).bfloat16()
    first = vote(rows)
    assert torch.equal(vote(rows), first)
    torch.testing.assert_close(vote(rows.flip(2)).float(), first.float(), atol=0.03, rtol=0.03)


def test_fused_vote_survives_large_logits(model):
    read = copy.deepcopy(model.read)
    read.voting.to_q.weight.mul_(100)
    torch.manual_seed(0)
    rows = torch.randn(1, 64, 6, 64).bfloat16()
    exact = read.voting(rows.float())
    assert relative(make_vote(read)(rows), exact) < 0.1


@pytest.mark.parametrize(
    "config",
    [
        DMVConfig(), DMVConfig(backbone="resnet50"), DMVConfig(grid=32), DMVConfig(similarity="dot"),
        DMVConfig(reader="vote+mean"),
    ],
    ids=["dmv18", "dmv50", "grid 32", "dot", "vote+mean"],
)  # fmt: skip
def test_float32_equals_the_reference(config):
    model = lively(config)
    plain = PlainNetwork(model, backend="reference")
    fast = FastNetwork(model, dtype=torch.float32, device=CPU, backend="auto")
    check_networks(plain, fast, 1e-4)


@pytest.mark.parametrize(
    "changed, kind",
    [
        ({}, FastNetwork), ({"reader": "vote+mean"}, FastNetwork),
        ({"score_use": "none"}, PlainNetwork), ({"reader": "softmax"}, PlainNetwork),
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_that_the_fast_path_does_not_know_stays_plain(tmp_path, changed, kind):
    """dmv18's weights, read otherwise; boxes are the reference's in any case."""
    shipped, file = load_model("dmv18"), tmp_path / "other.safetensors"
    model = DMV(dataclasses.replace(shipped.config, **changed))
    model.load_state_dict({name: shipped.state_dict()[name] for name in model.state_dict()})
    save_model(model, file)
    fast, plain = (FastDMVTracker(str(file), dtype="float32", backend=b) for b in ("auto", "reference"))
    assert isinstance(fast.frame_step.network, kind)
    first, *others = frames()
    for tracker in (fast, plain):
        tracker.init(first, BOXES[0])
    for image in others:
        found, expected = fast.track(image), plain.track(image)
        assert np.allclose(found.box, expected.box, atol=0.02) and abs(found.score - expected.score) < 1e-3


def test_bfloat16_rounds_no_worse_than_pytorch(model):
    """Against float32, the fast path's error is that of the reference run in bfloat16, within a quarter."""
    fast = FastNetwork(model, dtype=torch.bfloat16, device=CPU, backend="auto")
    check_networks(PlainNetwork(model, backend="reference"), fast, 0.2)
    with_mean = lively(DMVConfig(reader="vote+mean"))
    fast_with_mean = FastNetwork(with_mean, dtype=torch.bfloat16, device=CPU, backend="auto")
    check_networks(PlainNetwork(with_mean, backend="reference"), fast_with_mean, 0.2)
    half = copy.deepcopy(model).bfloat16()
    keys, values = random_memory(model)
    with torch.inference_mode():
        seen = model.backbone(normalise(crops()))
        exact = model(seen, keys, values)
        half_seen = half.backbone(normalise(crops()).bfloat16())
        honest = half(half_seen, keys.bfloat16(), values.bfloat16())
        fast_seen, projected = fast.look(crops()), model.read.voting.value_in(values).bfloat16()
        found = fast.predict(fast_seen, keys.bfloat16(), projected, 4, keys.shape[1])

        def error(x: Tensor, reference: Tensor) -> Tensor:
            return (x.float() - reference).abs().mean()

        features = fast_seen[..., :256].permute(0, 3, 1, 2)
        assert error(features, seen) < 1.25 * error(half_seen, seen)
        assert error(found.logits, exact.logits) < 1.25 * error(honest.logits, exact.logits)
        assert error(found.deltas, exact.deltas) < 1.25 * error(honest.deltas, exact.deltas)


def check_networks(plain: PlainNetwork, fast: FastNetwork, tolerance: float) -> None:
    """The three calls of a Network, one by one, each relative to the largest number of the reference."""
    model = plain.model

    def project(values: Tensor) -> Tensor:
        entering = model.read.voting.value_in(values)
        return fast._vote.store(torch.cat([entering, values], -1) if model.read.mean_beside else entering)

    with torch.inference_mode():
        seen, fast_seen = plain.look(crops()), fast.look(crops())
        assert relative(fast_seen[..., :256], seen) < tolerance
        maps = model.exact_maps(torch.tensor([[96.0, 90.0, 64.0, 70.0]]))
        keys, values = plain.remember(seen, *maps)
        fast_keys, fast_values = fast.remember(fast_seen, *maps)
        laid_out = fast.key_width > model.config.key_dim
        assert relative(unpack_keys(fast_keys) if laid_out else fast_keys, keys) < tolerance
        assert relative(fast_values, project(values)) < tolerance
        keys, values = random_memory(model)
        stored = pack_keys(keys) if laid_out else keys.to(fast.dtype)
        for k in (1, 4):
            expected = plain.predict(seen, keys, values, k, 650)
            found = fast.predict(fast_seen, stored, project(values).to(fast.dtype), k, 650)
            assert typical_error(found.logits, expected.logits) < tolerance
            assert typical_error(found.deltas, expected.deltas) < tolerance


def typical_error(found: Tensor, expected: Tensor) -> float:
    """Blind to the odd location at which rounding makes another key the last candidate."""
    return ((found - expected).abs().mean() / expected.std()).item()


@pytest.mark.parametrize("dtype, pixels", [(torch.float32, 0.01), (torch.bfloat16, 2.0)])
def test_boxes_are_the_reference_s(dtype, pixels):
    """Of the shipped weights: to a random network places look alike, and rounding picks the candidates."""
    images, model = frames(), load_model("dmv18")
    fast = FastNetwork(model, dtype=dtype, device=CPU, backend="auto")
    steps = [
        FrameStep(network, k=4, capacity=3, pick=PickConfig())
        for network in (PlainNetwork(model, backend="reference"), fast)
    ]
    window = search_window(BOXES[0])
    size = window.to_crop(BOXES[0])[None, 2:]
    for step in steps:
        step.start(0, images[0], window, BOXES[0])
    for i, image in enumerate(images[1:], start=1):
        expected, found = (step.step(image, [window], size) for step in steps)
        assert np.abs(found[0, :4] - expected[0, :4]).max() < pixels
        assert abs(found[0, 4] - expected[0, 4]) < (1e-3 if dtype == torch.float32 else 0.1)
        assert [step.write(0, i) for step in steps] == [True, True]
    assert steps[0].memory.slots[0].frames == steps[1].memory.slots[0].frames == [0, 3, 2]


def make_step(model: DMV, dtype: torch.dtype = torch.float32, targets: int = 1) -> FrameStep:
    network = FastNetwork(model, dtype=dtype, device=CPU, backend="auto")
    return FrameStep(network, k=4, capacity=3, pick=PickConfig(), targets=targets)


def run_alone(step: FrameStep, place: int, box, images: list[np.ndarray]) -> list[np.ndarray]:
    window = search_window(box)
    step.start(place, images[0], window, box)
    return [step.step(image, [window], window.to_crop(box)[None, 2:])[0] for image in images[1:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_targets_answer_as_each_alone(model, dtype):
    images = frames(3)
    windows = [search_window(box) for box in BOXES]
    sizes = np.array([w.to_crop(b)[2:] for w, b in zip(windows, BOXES, strict=True)])
    together = make_step(model, dtype, targets=4)
    for place, box in enumerate(BOXES):
        together.start(place, images[0], windows[place], box)
    answers = np.stack([together.step(image, windows, sizes) for image in images[1:]])
    single = make_step(model, dtype)
    for place, box in enumerate(BOXES):
        np.testing.assert_allclose(answers[:, place], run_alone(single, 0, box, images), atol=1e-3)


def test_targets_remember_and_move_on_their_own(model):
    """Unequal memories side by side; the last moved into a place that fell free."""
    images = frames(3)
    step = make_step(model, targets=2)
    windows = [search_window(box) for box in BOXES[:2]]
    sizes = np.array([w.to_crop(b)[2:] for w, b in zip(windows, BOXES, strict=False)])
    for place, box in enumerate(BOXES[:2]):
        step.start(place, images[0], windows[place], box)
    step.step(images[1], windows, sizes)
    assert step.write(1, 1)
    assert step.memory.valid.tolist() == [256, 512]
    expected = step.step(images[2], windows, sizes)[1]
    step.move(1, 0)
    assert step.memory.valid.tolist()[0] == 512
    np.testing.assert_allclose(step.step(images[2], windows[1:], sizes[1:])[0], expected, atol=1e-3)
    step.memory.clear(1)  # what moved is not what it came from
    assert step.memory.slots[0].frames[:2] == [0, 1]


def test_clone_remembers_on_its_own(model):
    images = frames(3)
    step = make_step(model)
    window = search_window(BOXES[0])
    size = window.to_crop(BOXES[0])[None, 2:]
    step.start(0, images[0], window, BOXES[0])
    step.step(images[1], [window], size)
    other = step.clone()
    assert other.network is step.network
    assert other.write(0, 1) and step.memory.valid.item() == 256
    before = step.memory.keys.clone()
    other.start(0, images[2], window, BOXES[0])
    assert torch.equal(step.memory.keys, before)


def test_a_frame_allocates_nothing_that_stays(model):
    """The memory is what was allocated at the start, however many frames are written to it."""
    step = make_step(model, torch.bfloat16)
    images = frames(2)
    window = search_window(BOXES[0])
    step.start(0, images[0], window, BOXES[0])
    memory = step.memory
    storage = memory.keys, memory.values, memory.valid
    places = [part.data_ptr() for part in storage]
    for frame in range(1, 8):
        step.step(images[1], [window], window.to_crop(BOXES[0])[None, 2:])
        step.write(0, frame)
    assert step.memory is memory and memory.keys is storage[0] and memory.values is storage[1]
    assert [part.data_ptr() for part in storage] == places
    assert memory.slots[0].frames == [0, 7, 6]


@pytest.mark.parametrize("slow, chosen", [("bfloat16", torch.float32), ("float32", torch.bfloat16)])
def test_fast_dtype_is_found_by_timing(monkeypatch, slow, chosen):
    clock = [0.0]

    def probe(dtype):
        def convolution(_):
            clock[0] += 2.0 if dtype == getattr(torch, slow) else 1.0

        return convolution, None

    monkeypatch.setattr(precision, "_probe", probe)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])
    precision.fast_dtype.cache_clear()
    assert precision.fast_dtype(CPU) is chosen
    precision.fast_dtype.cache_clear()


def test_fast_dtype_answers_here():
    assert precision.fast_dtype(CPU) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    "amx, int16, products", [(True, True, "bfloat16x3"), (False, True, "int16"), (False, False, "own")]
)
def test_auto_is_float32_by_the_products_that_are_fastest(monkeypatch, amx, int16, products):
    monkeypatch.setattr(precision, "amx_runs", lambda: amx)
    monkeypatch.setattr(precision, "int16_runs", lambda: int16)
    monkeypatch.setattr(precision, "fast_dtype", lambda device: torch.float32)
    assert precision.precision_of("auto", CPU) == (torch.float32, products)
    on_gpu = precision.precision_of("auto", torch.device("cuda"))
    assert on_gpu == (torch.float32, "own"), "neither is asked of a GPU"
