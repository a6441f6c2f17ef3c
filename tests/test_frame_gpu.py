"""The frame on an NVIDIA GPU: graphs, buffers, streams and threads; elsewhere these tests skip.

The same code runs on a CPU, kernels interpreted and graphs run again, in test_triton_frame.py.
"""

from __future__ import annotations

import copy
import gc
import threading
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from lively import lively

from dmv_fast import FastDMVTracker
from dmv_fast.evaluation.speed import synthetic_clip
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.model.pick import PickConfig
from dmv_fast.multi import MultiTracker
from dmv_fast.ops import available_backends
from dmv_fast.runtime import cuda, hardware
from dmv_fast.runtime.frame import FrameStep
from dmv_fast.runtime.load import load_network, make_frame_step
from dmv_fast.runtime.network import FastNetwork, PlainNetwork
from dmv_fast.tracker import TrackerConfig
from dmv_fast.vision.crop import search_window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
CLIP = synthetic_clip(12, (640, 400))
IMAGES = CLIP.frames
BOXES = [CLIP.box, (100, 90, 40, 90), (500, 300, 60, 60), (20, 330, 50, 50)]
ALWAYS = TrackerConfig(capacity=4, policy=MemoryPolicy(interval=1, threshold=0.0), found_score=0.0)
FRAMES = 2000


def fast_step(
    model: DMV, *, dtype=torch.float16, backend: str = "auto", targets: int = 1, k: int = 4, capacity: int = 3
) -> FrameStep:
    network = FastNetwork(copy.deepcopy(model).to(GPU), dtype=dtype, device=GPU, backend=backend)
    return make_frame_step(network, k=k, capacity=capacity, pick=PickConfig(), targets=targets)


def plain_step(model: DMV, *, targets: int = 1, k: int = 4, capacity: int = 3) -> FrameStep:
    network = PlainNetwork(model, backend="reference")
    return FrameStep(network, k=k, capacity=capacity, pick=PickConfig(), targets=targets)


def at(boxes) -> tuple[list, np.ndarray]:
    windows = [search_window(box) for box in boxes]
    return windows, np.array([w.to_crop(b)[2:] for w, b in zip(windows, boxes, strict=True)])


def start(step: FrameStep, boxes, image=IMAGES[0]) -> None:
    for place, box in enumerate(boxes):
        step.start(place, image, search_window(box), box)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of boxes (..., 4) xywh, pair by pair."""
    ends = a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:]
    inside = (np.minimum(*ends) - np.maximum(a[..., :2], b[..., :2])).clip(0).prod(-1)
    return inside / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inside)


def assert_alike(found: np.ndarray, expected: np.ndarray) -> None:
    """Answers (n, 5) of two precisions."""
    assert np.isfinite(found).all()
    assert (iou(found[:, :4], expected[:, :4]) > 0.8).all(), (found, expected)
    assert np.abs(found[:, 4] - expected[:, 4]).max() < 0.1, (found, expected)


@pytest.fixture(scope="module")
def shipped():
    return load_network("dmv18", CPU, "float32", "reference").model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_frame_is_the_reference_s(shipped, dtype):
    """The shipped network against the plain one in float32 on the CPU, its memory filling up."""
    steps = [plain_step(shipped), fast_step(shipped, dtype=dtype)]
    for step in steps:
        start(step, BOXES[:1])
    for i, image in enumerate(IMAGES[1:6], start=1):
        windows, sizes = at([(CLIP.box[0] + 2 * i, CLIP.box[1] + i, *CLIP.box[2:])])
        expected, found = (step.step(image, windows, sizes) for step in steps)
        assert_alike(found, expected)
        assert all(step.write(0, i) for step in steps)
    frames = [step.memory.slots[0].frames for step in steps]
    assert frames[0] == frames[1]


def test_real_frames(shipped, shared_dir):
    """On every sequence at hand: tracked from its first box, compared where the reference looked."""
    sequences = sorted((shared_dir / "data" / "dev").glob("*/*/groundtruth_rect.txt"))
    if not sequences:
        pytest.skip(f"no sequences in {shared_dir}")
    overlaps, scores = [], []
    for truth in sequences:
        files = sorted((truth.parent / "img").glob("*.jpg"))[:12:3]
        box = tuple(np.loadtxt(truth, delimiter=",", max_rows=1))
        images = [cv2.imread(str(file)) for file in files]
        steps = [plain_step(shipped), fast_step(shipped)]
        for step in steps:
            start(step, [box], images[0])
        for image in images[1:]:
            windows, sizes = at([box])
            expected, found = (step.step(image, windows, sizes)[0] for step in steps)
            overlaps.append(iou(found[:4], expected[:4]))
            scores.append(abs(found[4] - expected[4]))
            box = tuple(windows[0].to_frame(expected[:4]))
    assert np.mean(overlaps) > 0.97 and np.median(scores) < 0.02, (overlaps, scores)


@pytest.mark.parametrize(
    "config, options, box",
    [
        (DMVConfig(), {"k": 1}, BOXES[0]),
        (DMVConfig(), {"k": 32}, BOXES[0]),
        (DMVConfig(grid=32), {}, BOXES[0]),
        (DMVConfig(backbone="resnet50"), {}, BOXES[0]),
        (DMVConfig(similarity="dot"), {"dtype": torch.bfloat16}, BOXES[0]),
        (DMVConfig(), {"backend": "reference"}, BOXES[0]),
        (DMVConfig(), {"backend": "cuda"}, BOXES[0]),
        (DMVConfig(), {}, (-300, -200, 900, 700)),
        (DMVConfig(), {}, (600, 380, 90, 90)),
        (DMVConfig(), {}, (5, 5, 6, 6)),
    ],
    ids=["K=1", "K=32", "grid 32", "dmv50", "dot", "reference", "cuda", "window over 1024", "corner", "tiny"],
)
def test_every_kind_of_frame(config, options, box):
    """Random weights, their scores close together: what the head says of each box, not which is chosen."""
    missing = available_backends("cuda")[options.get("backend", "reference")]
    if missing is not None:
        pytest.skip(missing)  # the cuda backend where it was not built
    fast = fast_step(lively(config), **options)
    start(fast, [box])
    plain = plain_step(lively(config), k=fast.k)
    start(plain, [box])
    for i, image in enumerate(IMAGES[1:5], start=1):
        steps = plain, fast
        for step in steps:
            assert np.isfinite(step.step(image, *at([box]))).all()
        (_, scores, deltas), (_, fast_scores, fast_deltas) = (step.seen for step in steps)
        assert (fast_scores.cpu() - scores).abs().mean() < 0.05
        assert (fast_deltas.cpu() - deltas).abs().mean() < 0.1 * deltas.abs().mean() + 0.02
        assert [step.write(0, i) for step in steps] == [True, True]


@pytest.mark.parametrize("places", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_replay_is_the_eager_frame_bit_for_bit(dtype, places):
    step = fast_step(lively(DMVConfig()), dtype=dtype, targets=4)
    start(step, BOXES)
    for i, image in enumerate(IMAGES[1:4], start=1):
        first = step.step(image, *at(BOXES[:places]))
        assert np.array_equal(step.step(image, *at(BOXES[:places])), first)
        parts = ("_answer", "_maps", "_scores", "_deltas")
        replayed = [getattr(step, part).clone() for part in parts]
        with torch.inference_mode():
            for part in parts:
                getattr(step, part)[:places] = torch.nan
            step._look(places)
        for part, expected in zip(parts, replayed, strict=True):
            assert torch.equal(getattr(step, part)[:places], expected[:places]), part
        assert all(step.write(place, i) for place in range(places))


def test_what_is_written_is_what_was_seen():
    """Every slot of a ring that wraps around holds its frame, of its target."""
    step = fast_step(lively(DMVConfig()), targets=2)
    start(step, BOXES[:2])
    memory, locations = step.memory, step.memory.locations
    kept = [{0: memory.keys[place, :locations].clone()} for place in range(2)]
    for i in range(1, 8):
        step.step(IMAGES[i], *at(BOXES[:2]))
        for place in (1, 0) if i % 2 else (0,):
            with torch.inference_mode():
                keys, values = step.network.remember(*(part[place : place + 1] for part in step.seen))
            assert step.write(place, i)
            kept[place][i] = keys[0]
            slot = memory.slots[place].frames.index(i)
            rows = slice(slot * locations, (slot + 1) * locations)
            torch.testing.assert_close(memory.values[place, rows], values[0], atol=1e-2, rtol=1e-2)
    for place in range(2):
        slots = memory.slots[place]
        assert memory.valid[place].item() == slots.valid == 3 * locations
        for slot, frame in enumerate(slots.frames):
            rows = slice(slot * locations, (slot + 1) * locations)
            torch.testing.assert_close(memory.keys[place, rows], kept[place][frame], atol=2e-3, rtol=1e-2)


def make(kind=FastDMVTracker, **options):
    return kind("dmv18", device=str(GPU), config=ALWAYS, **options)


def track_all(tracker: FastDMVTracker, box) -> list:
    tracker.init(IMAGES[0], box)
    return [tracker.track(image) for image in IMAGES[1:]]


def same_boxes(a, b) -> bool:
    boxes, scores = (np.array([[getattr(r, name) for r in x] for x in (a, b)]) for name in ("box", "score"))
    return bool(iou(*boxes).mean() > 0.9 and np.ptp(scores, 0).mean() < 0.05)


@pytest.mark.parametrize("count", [2, 4])
def test_many_targets_are_as_each_alone(count):
    """At the same windows: what one call sees, against what a step of each target's own sees."""
    model = load_network("dmv18", GPU, "float16", "auto").model
    many = fast_step(model, targets=count)
    start(many, BOXES[:count])
    singles = [fast_step(model) for _ in range(count)]
    for single, box in zip(singles, BOXES, strict=False):
        start(single, [box])
    for i, image in enumerate(IMAGES[1:6], start=1):
        assert np.isfinite(many.step(image, *at(BOXES[:count]))).all()
        for place, single in enumerate(singles):
            single.step(image, *at(BOXES[place : place + 1]))
            for found, expected in zip(many.seen, single.seen, strict=True):
                error = (found[place].float() - expected[0].float()).abs().mean()
                assert error < 0.02 * expected.float().abs().mean() + 0.005
            assert many.write(place, i) == single.write(0, i)


def test_targets_come_and_go():
    many, boxes = make(MultiTracker, capacity=5), [*BOXES, (250, 60, 70, 70)]
    numbers = [many.add(IMAGES[0], box) for box in boxes]
    assert len(many.track(IMAGES[1])) == 5
    many.remove(numbers.pop(1))
    for image in IMAGES[2:5]:
        results = many.track(image)
        assert sorted(results) == numbers
        assert all(np.isfinite(result.box).all() and np.isfinite(result.score) for result in results.values())
    numbers.append(many.add(IMAGES[4], boxes[1]))
    assert sorted(many.track(IMAGES[5])) == sorted(numbers)


def test_clone_and_deepcopy_go_on_alike():
    tracker = make()
    tracker.init(IMAGES[0], BOXES[0])
    for image in IMAGES[1:5]:
        tracker.track(image)
    others = [tracker.clone(), copy.deepcopy(tracker)]
    expected = [tracker.track(image) for image in IMAGES[5:]]
    for other in others:
        assert same_boxes([other.track(image) for image in IMAGES[5:]], expected)


def test_the_same_frames_give_the_same_bits():
    tracker = make()
    assert track_all(tracker, BOXES[0]) == track_all(tracker, BOXES[0])


@pytest.mark.parametrize("own_stream", [False, True])
def test_trackers_in_threads(own_stream):
    """Each started, and so recorded, in a thread of its own while the others track."""
    expected = [track_all(make(), box) for box in BOXES]
    found: dict[int, list] = {}

    def run(i: int) -> None:
        stream = torch.cuda.Stream(GPU) if own_stream else torch.cuda.current_stream(GPU)
        with torch.cuda.stream(stream):
            for _ in range(3):
                found[i] = track_all(make(), BOXES[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(BOXES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3], "a thread died"
    for i, results in found.items():
        assert same_boxes(results, expected[i]), i


def test_another_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = track_all(make(), BOXES[0])
    there = FastDMVTracker("dmv18", device="cuda:1", config=ALWAYS)
    assert same_boxes(track_all(there, BOXES[0]), expected)


def test_nothing_waits_but_the_answer():
    step = fast_step(lively(DMVConfig()), targets=2)
    start(step, BOXES[:2])
    step.step(IMAGES[1], *at(BOXES[:2]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.step(IMAGES[2], *at(BOXES[:2]))
        step.write(1, 1)
        step.write(0, 1)
        step.write(1, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.memory.valid.tolist() == [512, 768]


def test_memory_stays_flat():
    """Boxes free to move, a write at every 7th frame; after the first frames nothing is allocated."""
    gc.collect()  # networks of other tests, which hold themselves: they are not to go in the midst of this
    tracker = make()
    tracker.config = replace(ALWAYS, policy=MemoryPolicy(interval=7, threshold=0.0))
    tracker.init(IMAGES[0], BOXES[0])
    held = []
    for i in range(FRAMES):
        tracker.track(IMAGES[i % len(IMAGES)])
        if i in (100, FRAMES - 1):
            torch.cuda.synchronize(GPU)
            held.append((torch.cuda.memory_allocated(GPU), torch.cuda.memory_reserved(GPU)))
    assert held[0] == held[1]


def test_a_tracker_that_is_gone_leaves_nothing():
    """30 trackers one after the other: graphs and buffers go with them."""
    held = []
    for i in range(30):
        make().init(IMAGES[0], BOXES[0])
        if i in (5, 29):
            torch.cuda.synchronize(GPU)
            held.append(torch.cuda.memory_allocated(GPU))
    assert held[1] <= held[0] + (1 << 20)


def test_without_triton(shipped, monkeypatch):
    monkeypatch.setattr(hardware, "triton_runs", lambda device: False)
    plain, fast = plain_step(shipped), fast_step(shipped, backend="reference")
    assert isinstance(fast, cuda.CudaFrameStep) and not fast._fused
    for step in (plain, fast):
        start(step, BOXES[:1])
    for i, image in enumerate(IMAGES[1:4], start=1):
        windows, sizes = at([(CLIP.box[0] + 2 * i, CLIP.box[1] + i, *CLIP.box[2:])])
        expected, found = (step.step(image, windows, sizes) for step in (plain, fast))
        assert_alike(found, expected)
        assert plain.write(0, i) and fast.write(0, i)


def test_the_user_s_settings_stay():
    before = torch.backends.cudnn.benchmark, torch.is_inference_mode_enabled(), torch.cuda.current_stream(GPU)
    track_all(make(), BOXES[0])
    after = torch.backends.cudnn.benchmark, torch.is_inference_mode_enabled(), torch.cuda.current_stream(GPU)
    assert after == before
