"""How long a frame takes: against K, memory, network and targets, stage by stage, and beside other trackers.

A frame is timed from the uint8 image on the host to the box on the host; decoding is not in it. Settings that
are compared are timed in turns, frame by frame, so that a busy machine slows all of them. The box stays where
it was first put and the memory is filled beforehand and then left alone, so every frame is the same work.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import cv2
import numpy as np
import torch

from dmv_fast.evaluation.trackers import OPENCV_TRACKERS, Box, OpenCVFactory, Tracker
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.model.pick import PickConfig
from dmv_fast.multi import MultiTracker
from dmv_fast.runtime.convolution import int16_runs
from dmv_fast.runtime.frame import FrameStep
from dmv_fast.runtime.load import frame_step_for
from dmv_fast.runtime.network import FastNetwork
from dmv_fast.runtime.precision import without_auto
from dmv_fast.tracker import FastDMVTracker, TrackerConfig
from dmv_fast.vision.crop import search_window
from dmv_fast.weights import save_model

Result = TypeVar("Result")

CANDIDATES = (1, 2, 4, 8, 16, 32)
PAPER_FPS = dict(zip(CANDIDATES, (87, 82, 79, 72, 61, 44), strict=True))  # DMV18 on a TITAN X, table 4
MEMORY_FRAMES = (1, 8, 32, 64)
TARGETS = (1, 4, 16)
_NOT_FOUND = 2.0  # no score reaches it: the box stays
_WARM_UP = 3


@dataclass(frozen=True)
class Clip:
    """Frames (H, W, 3) uint8 BGR, decoded, and the target's box xywh in the first."""

    frames: list[np.ndarray]
    box: Box
    name: str


@dataclass(frozen=True)
class Setting:
    """What is timed; None in `weights` is an untrained network of that backbone and grid."""

    weights: str | None = None
    backbone: str = "resnet18"
    grid: int = 16
    k: int = 4
    memory: int = 32
    targets: int = 1
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"


class Taken(NamedTuple):
    """What one frame took, in milliseconds: on the clock, and of all processor cores together."""

    clock: float
    processor: float


@dataclass
class Row:
    """One line of the results: what each frame (of all targets) took."""

    section: str
    name: str
    setting: Setting | None
    """None: not our tracker."""
    taken: list[Taken]

    @property
    def ours(self) -> Setting:
        """The setting of a row that our tracker has."""
        assert self.setting is not None, "a row of another tracker"
        return self.setting

    def percentile(self, q: float) -> float:
        """The clock time that q percent of the frames do not exceed, ms."""
        return float(np.percentile([t.clock for t in self.taken], q))

    @property
    def processor(self) -> float:
        """Median processor time, ms: what the clock would say of one thread on an idle machine."""
        return float(np.median([t.processor for t in self.taken]))

    @property
    def paper_fps(self) -> int | None:
        """What the paper reports of this K on a TITAN X; None in other sections."""
        return PAPER_FPS[self.ours.k] if self.section == "k" else None

    @property
    def fps(self) -> float:
        """Frames a second, from the median."""
        return 1000 / self.percentile(50)


def synthetic_clip(count: int = 30, size: tuple[int, int] = (1280, 720)) -> Clip:
    """A textured patch that drifts over a blurred background; the same every time."""
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), np.uint8), size)
    patch = cv2.resize(rng.integers(0, 255, (12, 16, 3), np.uint8), (80, 60))
    x, y, w, h = size[0] // 3, size[1] // 3, 80, 60
    frames = []
    for i in range(count):
        frame = scene.copy()
        frame[y + i : y + i + h, x + 2 * i : x + 2 * i + w] = patch
        frames.append(frame)
    return Clip(frames, (x, y, w, h), f"synthetic {size[0]} x {size[1]}")


def _status_mb(field: str) -> float | None:
    """A line of /proc/self/status, MiB; None without such a file or, in gVisor, such a line."""
    status = Path("/proc/self/status")
    line = re.search(rf"^{field}:\s*(\d+)", status.read_text() if status.exists() else "", re.M)
    return int(line[1]) / 1024 if line else None


def peak_memory_mb() -> float:
    """The most this process has had resident so far, MiB."""
    # ru_maxrss would be the parent's, where that had more before it started this process
    if (peak := _status_mb("VmHWM")) is not None:
        return peak
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20


def resident_mb(*, anonymous: bool = False) -> float:
    """What this process has resident now, MiB; the peak where the system does not say.

    anonymous: without pages of files, which come and go as the system likes.
    """
    for field in ("RssAnon", "VmRSS") if anonymous else ("VmRSS",):
        if (resident := _status_mb(field)) is not None:
            return resident
    return peak_memory_mb()


class Peak(NamedTuple):
    """Memory of a process that does nothing but track, MiB."""

    name: str
    start: float
    """Resident before the network was loaded: Python, PyTorch, OpenCV and the clip."""
    peak: float
    """The most that was resident."""
    device: float
    """The most that PyTorch held on the GPU; 0 without one."""


class Timed(Protocol):
    """What is timed: `prepare` is not, calling it is. Both are told how often they were called before."""

    def prepare(self, i: int) -> None: ...

    def __call__(self, i: int) -> object: ...


class Still:
    """Trackers, one after the other, on a clip's frames over and over; memory full, boxes where they are."""

    def __init__(self, trackers: list[FastDMVTracker] | list[MultiTracker], clip: Clip):
        self._trackers, self._frames = trackers, clip.frames

    def prepare(self, i: int) -> None: ...

    def __call__(self, i: int) -> None:
        for tracker in self._trackers:
            tracker.track(self._frames[i % len(self._frames)])


class Follow:
    """A tracker that follows the target through the clip, and again from the start."""

    def __init__(self, tracker: Tracker, clip: Clip):
        self._tracker, self._clip = tracker, clip

    def prepare(self, i: int) -> None:
        if i % (len(self._clip.frames) - 1) == 0:
            self._tracker.init(self._clip.frames[0], self._clip.box)

    def __call__(self, i: int) -> None:
        self._tracker.track(self._clip.frames[1 + i % (len(self._clip.frames) - 1)])


class Bench:
    """Times settings on a clip; `rows` is what was timed so far.

    Args:
        base: the setting where a section does not say otherwise.
        frames: timed frames a setting.
        nano_dir: where the ONNX files of OpenCV's TrackerNano are.
        say: told each row as it is there.
    """

    def __init__(
        self, clip: Clip, base: Setting, frames: int, *,
        nano_dir: Path | None = None, say: Callable[[str], None] = print,
    ):  # fmt: skip
        self.clip, self.base, self.frames = clip, base, frames
        self._nano_dir, self._say = nano_dir, say
        self.rows: list[Row] = []
        self.peaks: list[Peak] = []
        self._folder = tempfile.TemporaryDirectory(prefix="dmv_fast_bench_")

    def k(self) -> None:
        """Against K."""
        self._compare("k", {f"K={k}": replace(self.base, k=k) for k in CANDIDATES})

    def memory(self) -> None:
        """Against the number of frames remembered."""
        self._compare("memory", {f"T={t}": replace(self.base, memory=t) for t in MEMORY_FRAMES})

    def network(self) -> None:
        """Backbones and grids, untrained: their speed is no matter of weights."""
        settings = {
            f"{name} grid {grid}": replace(self.base, weights=None, backbone=backbone, grid=grid)
            for name, backbone in (("dmv18", "resnet18"), ("dmv50", "resnet50"))
            for grid in (16, 32)
        }
        self._compare("network", settings)

    def path(self) -> None:
        """The fast path against itself in other number formats, and against the plain reference."""
        device = self.frame_step(self.base).network.device
        dtype = without_auto(self.base.dtype, device)
        formats = ["bfloat16", "float32", *(["int16"] if device.type == "cpu" and int16_runs() else [])]
        others = [other for other in formats if other != dtype]
        settings = {
            "fast": self.base,
            **{f"fast {other}": replace(self.base, dtype=other) for other in others},
            "reference": replace(self.base, dtype="float32", backend="reference"),
        }
        self._compare("path", settings)

    def targets(self) -> None:
        """n targets in one call, beside n trackers one after the other."""
        runs, settings = {}, {}
        for n in TARGETS:
            setting = replace(self.base, targets=n)
            singles = [self._full(setting, box) for box in self._boxes(n)]
            for name, run in (
                (f"{n} in one call", Still([self._multi(setting)], self.clip)),
                (f"{n} trackers", Still(singles, self.clip)),
            ):
                runs[name], settings[name] = run, setting
        for name, times in self._in_turns(runs).items():
            self._add("targets", name, settings[name], times)

    def peers(self) -> None:
        """OpenCV's trackers beside ours, each following the target through the clip."""
        runs: dict[str, Timed] = {"dmv": Follow(self._tracker(self.base), self.clip)}
        for kind in OPENCV_TRACKERS:
            try:
                runs[f"opencv {kind}"] = Follow(OpenCVFactory(kind, self._nano_dir)(), self.clip)
            except (ImportError, ValueError) as reason:
                self._say(f"peers      without {kind}: {reason}")
        for name, times in self._in_turns(runs).items():
            self._add("peers", name, self.base if name == "dmv" else None, times)

    def stages(self) -> None:
        """Where a frame's time goes, each stage waited for."""
        for k in (1, 4, 32):
            setting = replace(self.base, k=k)
            for stage, times in stage_times(self.frame_step(setting), self.clip, self.frames).items():
                self._add("stages", f"{stage} K={k}", setting, times)

    def peak(self) -> None:
        """The most memory that tracking takes, each setting in a process of its own."""
        base = replace(self.base, targets=1)
        settings = {
            f"T={base.memory} K={base.k}": base,
            f"T={max(MEMORY_FRAMES)}": replace(base, memory=max(MEMORY_FRAMES)),
            f"{max(TARGETS)} targets": replace(base, targets=max(TARGETS)),
            "reference": replace(base, dtype="float32", backend="reference"),
            "dmv50": replace(base, weights=None, backbone="resnet50"),
            "dmv18 grid 32": replace(base, weights=None, grid=32),
        }
        for name, setting in settings.items():
            setting = replace(setting, weights=self._weights(setting))
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as process:
                peak = process.submit(peak_of, name, setting, torch.get_num_threads()).result()
            self.peaks.append(peak)
            self._say(
                f"{'peak':<10} {name:<16} {peak.peak:8.0f} MB resident, {peak.start:.0f} of them before the "
                f"network  device {peak.device:.0f} MB"
            )

    def follower(self, policy: MemoryPolicy) -> FastDMVTracker:
        """A tracker of the base setting, started on the clip, that remembers by that policy.

        It takes what it finds for its target, whatever the score, so that its work is that of a good day.
        """
        tracker = self._tracker(self.base)
        tracker.config = replace(tracker.config, policy=policy, found_score=0.0, refound_score=0.0)
        tracker.init(self.clip.frames[0], self.clip.box)
        return tracker

    def run_of(self, setting: Setting) -> Still:
        """One tracker, or a MultiTracker where the setting has several targets; memory full."""
        if setting.targets > 1:
            return Still([self._multi(setting)], self.clip)
        return Still([self._full(setting, self.clip.box)], self.clip)

    def frame_step(self, s: Setting) -> FrameStep:
        """What runs a frame of that setting, its memory full."""
        step = frame_step_for(
            self._weights(s), s.k, s.device, s.dtype, s.backend, capacity=s.memory, pick=PickConfig()
        )
        window = search_window(self.clip.box)
        step.start(0, self.clip.frames[0], window, self.clip.box)
        for i in range(1, s.memory):
            step.step(
                self.clip.frames[i % len(self.clip.frames)], [window], window.to_crop(self.clip.box)[None, 2:]
            )
            step.write(0, i)
        return step

    # ---- how -----------------------------------------------------------------------------------------

    def _add(self, section: str, name: str, setting: Setting | None, times: list[Taken]) -> None:
        row = Row(section, name, setting, times)
        self.rows.append(row)
        p50, p95, p99 = (row.percentile(q) for q in (50, 95, 99))
        paper = "" if row.paper_fps is None else f"  paper {row.paper_fps} FPS"
        self._say(
            f"{section:<10} {name:<16} p50 {p50:8.2f}  p95 {p95:8.2f}  p99 {p99:8.2f} ms  "
            f"{row.fps:7.1f} FPS  processor {row.processor:8.2f} ms{paper}"
        )

    def _compare(self, section: str, settings: Mapping[str, Setting]) -> None:
        runs = {name: self.run_of(setting) for name, setting in settings.items()}
        for name, times in self._in_turns(runs).items():
            self._add(section, name, settings[name], times)

    def _in_turns(self, runs: Mapping[str, Timed]) -> dict[str, list[Taken]]:
        times: dict[str, list[Taken]] = {name: [] for name in runs}
        for i in range(_WARM_UP + self.frames):
            for name, run in runs.items():
                run.prepare(i)
                times[name].append(_take(run, i)[1])
        return {name: taken[_WARM_UP:] for name, taken in times.items()}

    def _weights(self, setting: Setting) -> str:
        if setting.weights is not None:
            return setting.weights
        path = Path(self._folder.name) / f"{setting.backbone}_{setting.grid}.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            save_model(DMV(DMVConfig(backbone=setting.backbone, grid=setting.grid)), path)
        return str(path)

    def _tracker(self, s: Setting) -> FastDMVTracker:
        return FastDMVTracker(self._weights(s), s.k, s.device, s.dtype, s.backend, TrackerConfig(s.memory))

    def _full(self, setting: Setting, box: Box) -> FastDMVTracker:
        tracker = self._tracker(setting)
        tracker.init(self.clip.frames[0], box)
        self._fill(tracker, setting.memory)
        return tracker

    def _multi(self, s: Setting) -> MultiTracker:
        config = TrackerConfig(s.memory)
        tracker = MultiTracker(
            self._weights(s), s.k, s.device, s.dtype, s.backend, config, capacity=s.targets
        )
        for box in self._boxes(s.targets):
            tracker.add(self.clip.frames[0], box)
        self._fill(tracker, s.memory)
        return tracker

    def _fill(self, tracker: FastDMVTracker | MultiTracker, frames: int) -> None:
        """Remember every frame until the memory is full, then none; no box moves, no search goes about."""
        places = len(tracker) if isinstance(tracker, MultiTracker) else 1
        never = MemoryPolicy(interval=1, threshold=_NOT_FOUND)
        tracker.config = replace(
            tracker.config, policy=never, found_score=_NOT_FOUND, refound_score=_NOT_FOUND, search_home=1
        )
        for i in range(1, frames):
            tracker.track(self.clip.frames[(i - 1) % len(self.clip.frames)])
            for place in range(places):  # past the tracker, which remembers nothing that it has not found
                tracker.frame_step.write(place, i)

    def _boxes(self, count: int) -> list[Box]:
        height, width = self.clip.frames[0].shape[:2]
        x, y, w, h = self.clip.box
        places = [((x + 37 * i) % max(1, width - w), (y + 23 * i) % max(1, height - h)) for i in range(count)]
        return [(*place, w, h) for place in places]


def stage_times(step: FrameStep, clip: Clip, frames: int) -> dict[str, list[Taken]]:
    """What each stage of a frame takes, by its name. The device is waited for after each."""
    network, memory = step.network, step.memory
    window, valid = search_window(clip.box), memory.slots[0].valid
    sizes = torch.tensor(window.to_crop(clip.box)[None, 2:], dtype=torch.float32, device=network.device)
    times: dict[str, list[Taken]] = {}

    def timed(name: str, work: Callable[..., Result], *args: object) -> Result:
        def finished() -> Result:
            result = work(*args)
            if network.device.type == "cuda":
                torch.cuda.synchronize(network.device)
            return result

        result, taken = _take(finished)
        times.setdefault(name, []).append(taken)
        return result

    with torch.inference_mode():
        for i in range(_WARM_UP + frames):
            crops = timed("crop", step.crops, clip.frames[i % len(clip.frames)], [window])
            maps = timed("backbone", network.look, crops)
            if isinstance(network, FastNetwork):
                found = timed("retrieve", network.match, maps, memory.keys, step.k, valid)
                candidates = timed("gather", network.gather, maps, memory.values, *found)
                timed("vote", network.vote, maps, candidates)
                prediction = timed("head", network.head, maps)
            else:  # the plain network is not in stages
                bank = memory.keys, memory.values
                prediction = timed("predict", network.predict, maps, *bank, step.k, valid)
            timed("box", lambda p=prediction, m=maps: step.choose(m, p, sizes).cpu())
            timed("write", step.write, 0, 0)
    return {name: taken[_WARM_UP:] for name, taken in times.items()}


def peak_of(name: str, setting: Setting, threads: int) -> Peak:
    """Fill the memory of a setting, track a few frames, and say what this process took."""
    torch.set_num_threads(threads)
    clip = synthetic_clip()
    start = resident_mb()
    bench = Bench(clip, setting, frames=2)
    run = bench.run_of(setting)
    for i in range(_WARM_UP):
        run(i)
    device = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_initialized() else 0.0
    return Peak(name, start, peak_memory_mb(), device)


def _take(work: Callable[..., Result], *args: object) -> tuple[Result, Taken]:
    clock, processor = time.perf_counter(), time.process_time()
    result = work(*args)
    return result, Taken((time.perf_counter() - clock) * 1e3, (time.process_time() - processor) * 1e3)
