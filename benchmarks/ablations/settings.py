"""Every way in which a checkpoint is tracked with, by name, and the tracker that does it."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.ablations.networks import HalfPlain, WithoutBackground
from dmv_fast.evaluation.datasets import Sequence
from dmv_fast.runtime.load import make_frame_step
from dmv_fast.runtime.precision import fast_dtype
from dmv_fast.tracker import FastDMVTracker, TrackerConfig
from dmv_fast.weights import find, load_model, sha256

COMPARED = "checkpoint-"  # before the name of another checkpoint that is compared
READER = "reader-"  # before that of a reader trained for Table 1
CANDIDATES = (1, 2, 4, 8, 16, 32)
CAPACITIES = (2, 8, 32)
INTERVALS = (1, 10, 30, 50)
THRESHOLDS = (0.0, 0.9)


@dataclass(frozen=True)
class TrackerSetting:
    """One tracker to run over every sequence."""

    name: str
    weights: str
    dtype: str
    """ "float32", "bfloat16" or "float16"; not "auto": all that is compared rounds alike."""
    k: int | None = None
    config: TrackerConfig = field(default_factory=TrackerConfig)
    wipe: str | None = None
    """What of the background is zeroed in the memory: see WithoutBackground."""
    plain: bool = False
    """Run on HalfPlain, where every reader runs."""
    short: bool = True
    """Whether it is worth running on short sequences too."""

    def on(self, sequence: Sequence) -> TrackerSetting:
        """The same with no more capacity than the sequence can fill: many such are one run."""
        frames = len(sequence) - sequence.start - 1
        most = 1 + frames // self.config.policy.interval
        return replace(self, config=replace(self.config, capacity=min(self.config.capacity, most)))

    def record(self) -> dict[str, object]:
        """All that its results depend on."""
        dtype = str(fast_dtype(torch.device("cpu"))).removeprefix("torch.") if self.plain else self.dtype
        return {
            "sha256": _sum(self.weights), "dtype": dtype, "k": self.k, "config": asdict(self.config),
            "wipe": self.wipe, "plain": self.plain,
        }  # fmt: skip

    @property
    def digest(self) -> str:
        """A short name for `record`."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:12]

    def tracker(self) -> FastDMVTracker:
        """On the CPU, so that rows of one table never come from two machines' arithmetic."""
        tracker = FastDMVTracker(self.weights, self.k, "cpu", self.dtype, config=self.config)
        if self.plain or self.wipe:
            frames = tracker.frame_step
            network = _half_plain(self.weights) if self.plain else frames.network
            if self.wipe:
                network = WithoutBackground(network, self.wipe)
            tracker.frame_step = make_frame_step(
                network, k=frames.k, capacity=self.config.capacity, pick=self.config.pick
            )
        return tracker


@functools.lru_cache(maxsize=2)
def _half_plain(weights: str) -> HalfPlain:
    return HalfPlain(load_model(weights, device="cpu"))


@functools.cache
def _sum(weights: str) -> str:
    return sha256(find(weights))


def settings_of(weights: str, dtype: str) -> list[TrackerSetting]:
    """Every setting of one trained checkpoint; "base" first, what all others are compared with."""
    config = TrackerConfig()
    base = TrackerSetting("base", weights, dtype, k=load_model(weights).config.candidates)

    def memory(
        name: str, *, capacity: int = config.capacity, short: bool = True, **policy: float
    ) -> TrackerSetting:
        changed = replace(config, capacity=capacity, policy=replace(config.policy, **policy))
        return replace(base, name=name, config=changed, short=short)

    def picking(name: str, **terms: float) -> TrackerSetting:
        return replace(base, name=name, config=replace(config, pick=replace(config.pick, **terms)))

    return [
        base,
        memory("memory-off", capacity=1),
        *(replace(base, name=f"k-{k}", k=k) for k in CANDIDATES),
        *(
            memory(f"capacity-{most}-interval-{every}", capacity=most, interval=every, short=False)
            for most in CAPACITIES
            for every in INTERVALS
        ),
        replace(base, name="background-values", wipe="values"),
        replace(base, name="background-all", wipe="all"),
        picking("no-size-penalty", size_penalty=0.0),
        picking("no-window", window=0.0),
        picking("no-smoothing", smoothing=1.0),
        picking("bare-pick", size_penalty=0.0, window=0.0, smoothing=1.0),
        *(memory(f"write-{threshold}", threshold=threshold) for threshold in THRESHOLDS),
        replace(base, name="never-lost", config=replace(config, found_score=0.0)),
    ]


def compared_of(named: list[str], dtype: str) -> list[TrackerSetting]:
    """Other whole checkpoints, each NAME=FILE, tracked with as shipped."""
    pairs = [text.partition("=")[::2] for text in named]
    if wrong := [text for text, (_, path) in zip(named, pairs, strict=True) if not path]:
        raise ValueError(f"compare is {wrong[0]!r}; it must be NAME=FILE")
    return [TrackerSetting(f"{COMPARED}{name}", path, dtype) for name, path in pairs]


def readers_of(runs: Path, dtype: str) -> list[TrackerSetting]:
    """A setting a trained reader, VARIANT-SEED, in the folder that `readers.train` filled."""
    done = sorted(path.parent for path in runs.glob("*/held_out.csv"))
    return [
        TrackerSetting(f"{READER}{run.name}", str(run / "model.safetensors"), dtype, plain=True)
        for run in done
    ]
