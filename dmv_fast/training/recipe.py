"""What a training run is: one YAML file, read into one frozen dataclass."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from dmv_fast.model.dmv import DMVConfig
from dmv_fast.ops.backends import BACKENDS
from dmv_fast.ops.retrieve import MAX_K
from dmv_fast.training.readers import LISTERS

MIX = {"paste": 0.45, "photo": 0.22, "clip": 0.28, "region": 0.05}
"""Kinds of samples made from photographs with outlines and from clips, and their usual shares."""


@dataclass(frozen=True)
class Source:
    """Where a share of the samples comes from."""

    kind: str
    """A training set of real videos (got10k, lasot, trackingnet), or what is made from the data folder's own
    photographs and clips (paste, photo, clip, region)."""
    root: str | None = None
    """Folder of the set, in the data folder where it is not absolute; $NAME and ~ are expanded. Default: the
    kind's name."""
    weight: float = 1.0

    def __post_init__(self) -> None:
        known = (*LISTERS, *MIX)
        if self.kind not in known:
            raise ValueError(f"sources: kind is {self.kind!r}; known: {', '.join(known)}")
        if self.kind in MIX and self.root is not None:
            raise ValueError(f"sources: {self.kind} has a root; it is made from the data folder itself")
        if not self.weight > 0:
            raise ValueError(f"sources: weight of {self.kind} is {self.weight!r}; it must be over 0")

    def folder(self, data: Path) -> Path:
        """The set's folder."""
        return data / Path(os.path.expandvars(self.root or self.kind)).expanduser()


@dataclass(frozen=True)
class Recipe:
    """Defaults are the paper's section 3.4 where it says; the rest is ours."""

    model: DMVConfig = field(default_factory=DMVConfig)
    pretrained: str | None = None
    """ImageNet weights of conv1 to layer3 (safetensors); relative to the recipe or the data folder."""
    start_from: str | None = None
    """A whole checkpoint to go on from, alike but for K and grid: a shipped name or a .safetensors file."""
    teacher: str | None = None
    """A whole checkpoint, alike but for its backbone: its read, head and value encoder are taken over ..."""
    teacher_steps: int = 0
    """... and so many steps the new backbone learns to say what the teacher's says, then the task."""
    freeze_stem: bool = False
    """Train neither conv1 to layer3 nor their batch norms."""
    cached_samples: int = 0
    """With a frozen stem: draw this many samples once and keep their layer3 features on disk (0: stream)."""

    steps: int = 32_000
    batch: int = 16
    """Samples a step over all devices."""
    frames: tuple[int, ...] = (2, 3, 4, 5)
    """N at each stage of training."""
    frames_every: int = 6400
    """Steps of a stage; the last stage goes on to the end."""
    max_skip: int = 100
    mix: dict[str, float] | None = None
    """Shares of the kinds of made samples; None: the data's own default."""
    sources: tuple[Source, ...] | None = None
    """Instead of `mix`: training sets of real videos, and kinds of made samples beside them."""
    candidates: tuple[int, ...] = (4,)
    """K of a step is drawn from these, so that one checkpoint serves every K."""
    write_truth: float = 0.0
    """Share of the memory writes that hold the true box instead of the prediction ..."""
    write_wrong: float = 0.0
    """... of those that hold a wrong one: the vote must learn to overrule them ..."""
    write_drifted: float = 0.0
    """... and of those whose box has the wrong size, wrong alike all through a sample, as when a tracker has
    believed its own boxes for long."""

    optimiser: str = "sgd"
    """"sgd" (momentum 0.9) or "adamw"."""
    learning_rate: float = 1e-3
    backbone_rate: float = 1.0
    """Learning rate of the backbone relative to the rest ..."""
    stem_rate: float | None = None
    """... and of its pretrained part, conv1 to layer3; None: `backbone_rate`."""
    weight_decay: float = 5e-4
    schedule: str = "decay"
    """"decay": times 0.95 every 6400 steps; "cosine": to zero at the end, after a warm-up of 200 steps."""
    clip_norm: float = 10.0
    box_weight: float = 1.0
    """Lambda of eq. 2."""
    ema: float = 0.999
    precision: str = "bfloat16"
    """Autocast type of the forward pass, or "float32"."""
    backend: str = "auto"
    """Of the fused operations; a memory of a few frames is small, and "reference" nearly as fast."""
    seed: int = 0
    checkpoint_minutes: float = 3.0
    validate_samples: int = 64
    """Held-out samples that each checkpoint is measured on; 0: it is not, and none need be held out."""
    validate_clips: int = 0
    """Held-out videos that the tracker is run over, half of them made, half real, at every `clips_every`th
    checkpoint and at the end: about three seconds each on a CPU core."""
    clips_every: int = 5

    def __post_init__(self) -> None:
        for name, allowed in (
            ("optimiser", ("sgd", "adamw")),
            ("schedule", ("decay", "cosine")),
            ("precision", ("float32", "bfloat16", "float16")),
            ("backend", ("auto", *BACKENDS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"recipe: {name} is {getattr(self, name)!r}; it must be one of {allowed}")
        lowest = {"steps": 1, "batch": 1, "frames_every": 1, "seed": 0, "cached_samples": 0}
        lowest |= {"validate_samples": 0, "validate_clips": 0, "clips_every": 1}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"recipe: {name} is {getattr(self, name)}; it must be {least} or more")
        if not self.candidates or not all(1 <= k <= MAX_K for k in self.candidates):
            raise ValueError(f"recipe: candidates is {self.candidates}; each must be 1 to {MAX_K}")
        if not self.frames or min(self.frames) < 2:
            raise ValueError(f"recipe: frames is {self.frames}; a sample needs at least 2 frames")
        told = (self.write_truth, self.write_wrong, self.write_drifted)
        if min(told) < 0 or sum(told) > 1:
            raise ValueError(
                f"recipe: write_truth, _wrong and _drifted are {told}; they must be 0 or more, 1 in all"
            )
        if self.sources is not None:
            kinds = [source.kind for source in self.sources]
            if not kinds or len(set(kinds)) < len(kinds) or self.mix is not None:
                raise ValueError("recipe: sources must name each kind once, and not stand beside mix")
        if bool(self.teacher) != (self.teacher_steps > 0) or (self.teacher and self.cached_samples):
            raise ValueError("recipe: teacher and teacher_steps go together, and not with cached_samples")
        if self.cached_samples and not self.freeze_stem:
            raise ValueError("recipe: cached_samples needs freeze_stem: features of a moving stem grow stale")

    def frames_at(self, step: int) -> int:
        """N at a step."""
        return self.frames[min(step // self.frames_every, len(self.frames) - 1)]


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe; unknown names are errors."""
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"recipe {path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path}: not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"recipe {path}: it must be a mapping of names to values")
    settings: dict[str, Any] = dict(raw)
    try:
        if "model" in settings:
            settings["model"] = _build(DMVConfig, settings["model"])
        if settings.get("sources") is not None:
            settings["sources"] = [_build(Source, source) for source in settings["sources"]]
        return _build(Recipe, settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"recipe {path}: {error}") from None


def _build(kind: type, settings: dict[str, Any]):
    if not isinstance(settings, dict):
        raise ValueError(f"{settings!r} stands where names with values should")
    unknown = set(settings) - {f.name for f in fields(kind)}
    if unknown:
        raise ValueError(f"unknown setting {sorted(unknown)[0]!r}")
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    hints = get_type_hints(kind)
    for name, value in settings.items():
        if not _fits(value, hints[name]):
            wanted = getattr(hints[name], "__name__", None) or hints[name]
            trap = " (YAML reads 1e-3 as a text: write 1.0e-3)" if isinstance(value, str) else ""
            raise ValueError(f"{name} is {value!r}; it must be of type {wanted}{trap}")
    return kind(**settings)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, as recipes use them."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if kind is tuple:
        return isinstance(value, tuple) and all(_fits(each, inner[0]) for each in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(each, inner[1]) for each in value.values())
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)
