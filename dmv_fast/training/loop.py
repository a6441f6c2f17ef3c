"""The training loop (paper section 3.4): time-boxed, resumable to the step, one process or many.

`dmv-fast train RECIPE.yaml --data DIR --out DIR`, or `torchrun --nproc-per-node G -m dmv_fast train ...`
"""

from __future__ import annotations

import copy
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dmv_fast.files import replaced_when_complete
from dmv_fast.model.backbone import blocks_of
from dmv_fast.model.dmv import DMV
from dmv_fast.runtime.hardware import cores
from dmv_fast.runtime.load import resolve_device
from dmv_fast.training.cache import FeatureCache
from dmv_fast.training.data import SampleStream, recipe_stream
from dmv_fast.training.log import Log
from dmv_fast.training.recipe import Recipe, load_recipe
from dmv_fast.training.teach import Teaching, take_over
from dmv_fast.training.unroll import Outcome, Unroll, stem_layers
from dmv_fast.training.validation import on_samples, on_videos
from dmv_fast.weights import load_model, load_pretrained, save_model

_WARM_UP = 200
_CHECKPOINT = "checkpoint.pt"
_BOUND = ("model", "freeze_stem", "optimiser", "backbone_rate", "stem_rate")
_PATIENCE = timedelta(hours=2)  # of one process for another: the first fills the feature cache alone


class Frames(Dataset):
    """Training sample number i of a run, cut to the N frames of its step: (frames, boxes (N, 4)).

    Everything about sample i follows from (seed, i), so a resumed run sees what the other would have seen.
    """

    def __init__(self, source: SampleStream | FeatureCache, recipe: Recipe):
        self.source, self.recipe = source, recipe

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        count = self.recipe.frames_at(index // self.recipe.batch)
        if isinstance(self.source, FeatureCache):
            rng = np.random.default_rng((self.recipe.seed, 1, index))
            later = 1 + rng.choice(max(self.recipe.frames) - 1, count - 1, replace=False)
            frames = np.concatenate([[0], np.sort(later)])
            return self.source.take(int(rng.integers(len(self.source))), frames)
        sample = self.source.sample(index, count)
        boxes = np.where(sample.present[:, None], sample.boxes, np.nan)
        return torch.from_numpy(sample.crops), torch.from_numpy(boxes)


def train(
    recipe_path: Path, *, data: Path, out: Path, minutes: float | None = None, resume: bool = False,
    device: str = "auto", workers: int | None = None, pause_after: float | None = None,
) -> Path:  # fmt: skip
    """Run (or go on with) a recipe; returns the checkpoint `out/model.safetensors`.

    Args:
        minutes: end after this much training time in all, resumed runs counted; a cosine schedule ends
            with whichever of steps and minutes comes first.
        resume: go on from `out/checkpoint.pt` where there is one.
        workers: processes that prepare samples; None: one a core but one, with cached features none.
        pause_after: stop after this many minutes of this call, wherever the run is; the schedule stays.

    Raises:
        ValueError: a bad recipe, data folder, or an output folder that already holds a run.
        KeyboardInterrupt: stopped by SIGINT or SIGTERM; the last whole step is in the checkpoint.
    """
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes is {minutes}; it must be over 0")
    recipe = load_recipe(recipe_path)
    run = TrainingRun(recipe, recipe_path, Path(data), Path(out), _device(device), minutes)
    if (run.out / _CHECKPOINT).is_file():
        if not resume:
            raise ValueError(
                f"{out}: already holds a run; add --resume to go on with it or choose another --out"
            )
        run.load()
    return run.execute(workers, pause_after)


class TrainingRun:
    """Everything that a training run owns and a checkpoint holds."""

    def __init__(
        self, recipe: Recipe, recipe_path: Path, data: Path, out: Path, device: torch.device,
        minutes: float | None,
    ):  # fmt: skip
        self.recipe, self.data, self.out, self.device, self.minutes = recipe, data, out, device, minutes
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cudnn.benchmark = True
        self.rank, self.world = _join_group(device)
        if recipe.batch % self.world:
            raise ValueError(f"recipe: batch is {recipe.batch}; it must divide over {self.world} processes")
        self.out.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            for left in self.out.glob(".*.part"):  # by a run that was killed while it wrote: 200 MB each
                left.unlink()
        _seed(recipe.seed)
        model = DMV(recipe.model)
        if recipe.pretrained is not None:
            load_pretrained(model, _beside(recipe.pretrained, recipe_path, data))
        if recipe.start_from is not None:
            _start_from(model, recipe.start_from)
        teacher = None
        if recipe.teacher is not None:
            teacher = load_model(recipe.teacher)
            take_over(model, teacher)
        if recipe.freeze_stem:
            for part in stem_layers(model):
                part.requires_grad_(False)
        # torch's annotations leave memory_format out
        self.model: DMV = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.unroll = Unroll(self.model, recipe)
        self.teaching = None if teacher is None else Teaching(self.unroll, teacher.to(device))
        self.optimiser = _optimiser(recipe, self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        self.step, self.seconds = 0, 0.0

    # ---- state -------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write `checkpoint.pt` (for resuming; private to the run) and `model.safetensors` (the average)."""
        if self.rank:
            return
        state = {
            "model": self.model.state_dict(), "ema": self.ema.state_dict(), "step": self.step,
            "optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict(),
            "seconds": self.seconds, "recipe": self._bound(),
        }  # fmt: skip
        path = self.out / _CHECKPOINT
        try:
            with replaced_when_complete(path) as partial:
                torch.save(state, partial)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"{path}: cannot be written, is the disk full? ({error})") from error
        save_model(self.ema, self.out / "model.safetensors")

    def load(self) -> None:
        """Go on from `checkpoint.pt`."""
        state = torch.load(self.out / _CHECKPOINT, map_location=self.device, weights_only=True)
        for name, value in self._bound().items():
            was = state.get("recipe", {}).get(name, value)  # older checkpoints do not tell
            if was != value:
                raise ValueError(f"recipe: {name} is {value}; the run in {self.out} has {was}")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]

    def _bound(self) -> dict[str, str]:
        """What cannot change amid a run: the saved state fits nothing else."""
        return {name: str(getattr(self.recipe, name)) for name in _BOUND}

    # ---- the loop ----------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end of the run."""
        timed = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(self.step / self.recipe.steps, timed)

    def execute(self, workers: int | None = None, pause_after: float | None = None) -> Path:
        self._check_held_out()
        recipe, source = self.recipe, self._source(workers)
        forward = self._forward_module(self.unroll)
        teaching = None if self.teaching is None else self._forward_module(self.teaching)
        log = Log(self.out) if self.rank == 0 else None
        bar = tqdm(
            total=recipe.steps, initial=self.step, desc="train", disable=self.rank != 0, mininterval=5.0
        )
        batches = self._batches(source, workers)
        began, already, first, saves = time.monotonic(), self.seconds, self.step, 0
        saved = began
        stopped = False
        try:
            with _stop_signals() as asked:
                while self.progress < 1 and not stopped:
                    is_taught = self.step < recipe.teacher_steps
                    module = teaching if is_taught and teaching is not None else forward
                    outcome, norm = self._one_step(module, *_next(batches))
                    now = time.monotonic()
                    self.seconds = already + now - began
                    paused = pause_after is not None and now - began > 60 * pause_after
                    stopped = self._agree(paused or bool(asked))
                    bar.update()
                    if log is not None and self.step % 20 == 0:
                        bar.set_postfix_str(log.step(self.step, outcome, norm, self._rate(1.0)))
                    if now - saved > 60 * recipe.checkpoint_minutes and not stopped:
                        saves += 1
                        self._checkpoint(log, videos=saves % recipe.clips_every == 0)
                        saved = time.monotonic()
        finally:
            bar.close()
            if self.step > first:
                self.save()
        if asked:
            raise KeyboardInterrupt
        if log is not None and self.progress >= 1 and self.step > first:
            self._measure(log, videos=True)
        return self.out / "model.safetensors"

    def _agree(self, stop: bool) -> bool:
        """All processes go by the first one's clock and signals: one that stopped alone hangs the rest."""
        if self.world == 1:
            return stop
        told = torch.tensor([self.seconds, float(stop)], dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        self.seconds, stop = told[0].item(), told[1].item() > 0
        return stop

    def _checkpoint(self, log: Log | None, *, videos: bool) -> None:
        self.save()
        if log is not None:
            self._measure(log, videos=videos)

    def _check_held_out(self) -> None:
        """Now, not at the first checkpoint: a small folder may have nothing that is held out."""
        if self.recipe.validate_samples:
            try:
                recipe_stream(self.recipe, self.data, held_out=True)
            except ValueError as error:
                raise ValueError(f"{error}; add files, or set validate_samples: 0 in the recipe") from None

    def _measure(self, log: Log, *, videos: bool) -> None:
        if self.recipe.validate_samples:
            log.samples(self.step, self.validate())
        if videos and self.recipe.validate_clips:
            weights = self.out / "model.safetensors"
            log.videos(self.step, on_videos(weights, self.data, self.recipe.validate_clips, self.device))

    def validate(self) -> dict[str, float]:
        """The averaged weights on held-out samples."""
        return on_samples(self.ema, self.recipe, recipe_stream(self.recipe, self.data, held_out=True))

    def _source(self, workers: int | None) -> SampleStream | FeatureCache:
        recipe = self.recipe
        stream = recipe_stream(recipe, self.data)
        if not recipe.cached_samples:
            return stream
        if self.rank == 0:
            self._cache().fill(
                self.model.eval(), stream, precision=self._precision(),
                workers=cores() - 1 if workers is None else workers,
            )  # fmt: skip
        if self.world > 1:
            dist.barrier()
        return self._cache()

    def _cache(self) -> FeatureCache:
        recipe = self.recipe
        origin = f"mix {recipe.mix}" if recipe.sources is None else f"sources {recipe.sources}"
        return FeatureCache(
            self.out / "cache", recipe.cached_samples, max(recipe.frames),
            blocks_of(self.model.backbone.layer3)[-1].conv1.in_channels,
            tag=f"{recipe.model.backbone} seed {recipe.seed} skip {recipe.max_skip} {origin}",
        )  # fmt: skip

    def _forward_module(self, module: torch.nn.Module) -> torch.nn.Module:
        module.train()
        if self.world == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        # A lone candidate hears nobody, a teacher tells the backbone alone: the rest gets no gradient.
        unused = 1 in self.recipe.candidates or module is self.teaching
        return DistributedDataParallel(module, device_ids=ids, find_unused_parameters=unused)

    def _batches(
        self, source: SampleStream | FeatureCache, workers: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from the current step on; process r of W takes samples r, r + W, ... of a step's."""
        recipe, share = self.recipe, self.recipe.batch // self.world
        if workers is None:
            workers = 0 if isinstance(source, FeatureCache) else max(1, cores() // self.world - 1)
        order = [
            [step * recipe.batch + i * self.world + self.rank for i in range(share)]
            for step in range(self.step, recipe.steps + 1)
        ]
        loader = DataLoader(
            Frames(source, recipe), batch_sampler=order, num_workers=workers, worker_init_fn=_start_worker,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        return iter(loader)

    def _one_step(self, forward: torch.nn.Module, frames: Tensor, boxes: Tensor) -> tuple[Outcome, float]:
        recipe = self.recipe
        k = random.Random(recipe.seed * 1_000_003 + self.step).choice(recipe.candidates)
        generator = torch.Generator().manual_seed(
            recipe.seed * 1_000_003 + self.step * self.world + self.rank
        )
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(group["relative_rate"])
        frames = frames.to(self.device, non_blocking=True)
        boxes = boxes.to(self.device, non_blocking=True)
        precision = self._precision()
        with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
            outcome = forward(frames, boxes, k, generator)
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(outcome.loss).backward()
        self.scaler.unscale_(self.optimiser)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm))
        if math.isfinite(norm):  # one broken batch must not end a run
            self.scaler.step(self.optimiser)
        self.scaler.update()
        self.step += 1
        _average(self.ema, self.model, min(recipe.ema, self.step / (self.step + 10)))
        return outcome, norm

    def _rate(self, relative: float) -> float:
        recipe = self.recipe
        if recipe.schedule == "decay":
            return relative * recipe.learning_rate * 0.95 ** (self.step // 6400)
        warm = min(1.0, (self.step + 1) / _WARM_UP)
        return relative * recipe.learning_rate * warm * (1 + math.cos(math.pi * min(self.progress, 1.0))) / 2

    def _precision(self) -> torch.dtype:
        return getattr(torch, self.recipe.precision)


def _average(ema: DMV, model: DMV, decay: float) -> None:
    averaged: list[Tensor] = [p for p in ema.parameters() if p.is_floating_point()]
    current = [p.detach() for p in model.parameters() if p.is_floating_point()]
    torch._foreach_lerp_(averaged, current, 1 - decay)
    for mine, theirs in zip(ema.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


def _optimiser(recipe: Recipe, model: DMV) -> torch.optim.Optimizer:
    stem_rate = recipe.backbone_rate if recipe.stem_rate is None else recipe.stem_rate
    stem = {id(p) for layer in stem_layers(model) for p in layer.parameters()}
    backbone = {id(p) for p in model.backbone.parameters()} - stem
    groups: dict[float, list[Tensor]] = {1.0: [], recipe.backbone_rate: [], stem_rate: []}
    for p in model.parameters():
        if p.requires_grad:
            rate = stem_rate if id(p) in stem else recipe.backbone_rate if id(p) in backbone else 1.0
            groups[rate].append(p)
    chosen = [{"params": params, "relative_rate": rate} for rate, params in groups.items() if params]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    fused = next(model.parameters()).device.type == "cuda" or None
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(chosen, rate, momentum=0.9, weight_decay=decay, fused=fused)
    return torch.optim.AdamW(chosen, rate, weight_decay=decay, fused=fused)


def _beside(name: str, recipe_path: Path, data: Path) -> Path:
    """A file named in a recipe: as it stands, beside the recipe, in the data folder or `weights` near it."""
    places = [
        Path(name),
        recipe_path.parent / name,
        data / name,
        *(p / "weights" / name for p in data.parents[:2]),
    ]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(
        f"recipe {recipe_path}: pretrained {name!r} not found; looked at {[str(p) for p in places]}"
    )


def _start_from(model: DMV, name: str) -> None:
    start = load_model(name)
    ours = model.config  # K, the grid and a mean beside the vote have no weights of their own
    theirs = replace(start.config, candidates=ours.candidates, grid=ours.grid)
    if {theirs.reader, ours.reader} == {"vote", "vote+mean"}:
        theirs = replace(theirs, reader=ours.reader)
    if theirs != ours:
        raise ValueError(f"recipe: model is {model.config}; start_from {name} is {start.config}")
    model.load_state_dict(start.state_dict())


def _device(name: str) -> torch.device:
    if name not in ("auto", "cuda"):
        return resolve_device(name)
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda'; PyTorch sees no CUDA GPU here (see `dmv-fast doctor`)")
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def _start_worker(_number: int) -> None:
    """A process that makes samples: one thread, and Ctrl-C is for the first process to act on."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _next(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The next batch; of bad data in a worker process, the error's own words without its traceback."""
    try:
        return next(batches)
    except (ValueError, OSError, RuntimeError) as error:
        last = str(error).strip().splitlines()[-1]
        if "Original Traceback" not in str(error):
            raise
        raise type(error)(last.split(": ", 1)[-1]) from error


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Within it SIGINT and SIGTERM are only noted, so that a step ends whole and can be gone on from."""
    asked: list[int] = []
    before: dict[signal.Signals, Callable | int | None] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda caught, _frame: asked.append(caught))
    except ValueError:  # not in the main thread: whoever runs us there has signals of their own
        pass
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _join_group(device: torch.device) -> tuple[int, int]:
    """(rank, processes) under torchrun, (0, 1) otherwise."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    return dist.get_rank(), dist.get_world_size()


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
