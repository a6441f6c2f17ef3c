"""The training loop (paper section 3.4): time-boxed, resumable to the step, one process or many.

`dmv-fast train RECIPE.yaml --data DIR --out DIR`, or `torchrun --nproc-per-node G -m dmv_fast train ...`
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dmv_fast.model.dmv import DMV
from dmv_fast.training.cache import FeatureCache
from dmv_fast.training.data import SampleStream
from dmv_fast.training.recipe import Recipe, load_recipe
from dmv_fast.training.unroll import Outcome, Unroll
from dmv_fast.weights import load_pretrained, save_model

_WARM_UP = 200
_CHECKPOINT = "checkpoint.pt"


class Frames(Dataset):
    """Training sample number i of a run, cut to the N frames of its step: (frames, boxes (N, 4)).

    Everything about sample i follows from (seed, i), so a resumed run sees what the other would have seen.
    """

    def __init__(self, source: SampleStream | FeatureCache, recipe: Recipe):
        self.source, self.recipe = source, recipe

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.recipe.seed, 1, index))
        count = self.recipe.frames_at(index // self.recipe.batch)
        later = 1 + rng.choice(max(self.recipe.frames) - 1, count - 1, replace=False)
        frames = np.concatenate([[0], np.sort(later)])
        if isinstance(self.source, FeatureCache):
            return self.source.take(int(rng.integers(len(self.source))), frames)
        sample = self.source[index]
        boxes = np.where(sample.present[:, None], sample.boxes, np.nan)
        return torch.from_numpy(sample.crops[frames]), torch.from_numpy(boxes[frames])


def train(
    recipe_path: Path, *, data: Path, out: Path, minutes: float | None = None, resume: bool = False,
    device: str = "auto", workers: int | None = None,
) -> Path:  # fmt: skip
    """Run (or go on with) a recipe; returns the checkpoint `out/model.safetensors`.

    Args:
        minutes: end after this much training time in all, resumed runs counted; the learning rate's
            schedule ends with whichever of steps and minutes comes first.
        resume: go on from `out/checkpoint.pt` where there is one.

    Raises:
        ValueError: a bad recipe, data folder, or an output folder that already holds a run.
    """
    recipe = load_recipe(recipe_path)
    run = Run(recipe, recipe_path, Path(data), Path(out), _device(device), minutes)
    if (run.out / _CHECKPOINT).is_file():
        if not resume:
            raise ValueError(
                f"{out}: already holds a run; add --resume to go on with it or choose another --out"
            )
        run.load()
    return run.execute(workers)


class Run:
    """Everything that a training run owns and a checkpoint holds."""

    def __init__(
        self, recipe: Recipe, recipe_path: Path, data: Path, out: Path, device: torch.device,
        minutes: float | None,
    ):  # fmt: skip
        self.recipe, self.data, self.out, self.device, self.minutes = recipe, data, out, device, minutes
        self.rank, self.world = _join_group(device)
        if recipe.batch % self.world:
            raise ValueError(f"recipe: batch is {recipe.batch}; it must divide over {self.world} processes")
        self.out.mkdir(parents=True, exist_ok=True)
        _seed(recipe.seed)
        model = DMV(recipe.model)
        if recipe.pretrained is not None:
            load_pretrained(model, _beside(recipe.pretrained, recipe_path, data))
        if recipe.freeze_stem:
            stem = model.backbone
            for part in (stem.conv1, stem.bn1, stem.layer1, stem.layer2, stem.layer3):
                part.requires_grad_(False)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.unroll = Unroll(self.model, recipe)
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
            "seconds": self.seconds,
        }  # fmt: skip
        part = self.out / (_CHECKPOINT + ".part")
        torch.save(state, part)
        os.replace(part, self.out / _CHECKPOINT)
        save_model(self.ema, self.out / "model.safetensors")

    def load(self) -> None:
        """Go on from `checkpoint.pt`."""
        state = torch.load(self.out / _CHECKPOINT, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]

    # ---- the loop ----------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end of the run."""
        timed = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(self.step / self.recipe.steps, timed)

    def execute(self, workers: int | None = None) -> Path:
        recipe = self.recipe
        source = self._source()
        forward = self._forward_module()
        log = _Log(self.out) if self.rank == 0 else None
        bar = tqdm(
            total=recipe.steps, initial=self.step, desc="train", disable=self.rank != 0, mininterval=5.0
        )
        batches = self._batches(source, workers)
        began, saved = time.monotonic(), time.monotonic()
        already = self.seconds
        try:
            while self.progress < 1:
                outcome, norm = self._one_step(forward, *next(batches))
                self.seconds = already + time.monotonic() - began
                bar.update()
                if log is not None and self.step % 20 == 0:
                    bar.set_postfix_str(log.step(self.step, outcome, norm, self._rate(1.0)))
                if time.monotonic() - saved > 60 * recipe.checkpoint_minutes:
                    self.save()
                    if log is not None:
                        log.validation(self.step, self.validate())
                    saved = time.monotonic()
        finally:
            bar.close()
            self.save()
        if log is not None:
            log.validation(self.step, self.validate())
        return self.out / "model.safetensors"

    def _source(self) -> SampleStream | FeatureCache:
        recipe = self.recipe
        stream = SampleStream(
            self.data, seed=recipe.seed, frames=max(recipe.frames), max_skip=recipe.max_skip, mix=recipe.mix
        )
        if not recipe.cached_samples:
            return stream
        cache = FeatureCache(
            self.out / "cache", recipe.cached_samples, max(recipe.frames),
            self.model.backbone.layer3[-1].conv1.in_channels,
            tag=f"{recipe.model.backbone} seed {recipe.seed} skip {recipe.max_skip} mix {recipe.mix}",
        )  # fmt: skip
        cache.fill(self.model.eval(), stream, precision=self._precision(), progress=self.rank == 0)
        return cache

    def _forward_module(self) -> torch.nn.Module:
        self.unroll.train()
        if self.world == 1:
            return self.unroll
        ids = [self.device.index] if self.device.type == "cuda" else None
        alone = 1 in self.recipe.candidates  # a lone candidate hears nobody: those weights get no gradient
        return DistributedDataParallel(self.unroll, device_ids=ids, find_unused_parameters=alone)

    def _batches(
        self, source: SampleStream | FeatureCache, workers: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from the current step on; process r of W takes samples r, r + W, ... of a step's."""
        recipe, share = self.recipe, self.recipe.batch // self.world
        if workers is None:
            workers = (
                0 if isinstance(source, FeatureCache) else max(1, (os.cpu_count() or 2) // self.world - 1)
            )
        order = [
            [step * recipe.batch + i * self.world + self.rank for i in range(share)]
            for step in range(self.step, recipe.steps + 1)
        ]
        return iter(DataLoader(Frames(source, recipe), batch_sampler=order, num_workers=workers))

    def _one_step(self, forward: torch.nn.Module, frames: Tensor, boxes: Tensor) -> tuple[Outcome, float]:
        recipe = self.recipe
        k = random.Random(recipe.seed * 1_000_003 + self.step).choice(recipe.candidates)
        generator = torch.Generator().manual_seed(
            recipe.seed * 1_000_003 + self.step * self.world + self.rank
        )
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(group["relative_rate"])
        frames, boxes = frames.to(self.device), boxes.to(self.device)
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

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out samples, the averaged weights, predictions written back: what the tracker will meet."""
        recipe = replace(self.recipe, write_truth=0.0, write_wrong=0.0)
        stream = SampleStream(
            self.data, seed=recipe.seed + 1, frames=max(recipe.frames), max_skip=recipe.max_skip,
            mix=recipe.mix, held_out=True,
        )  # fmt: skip
        unroll = Unroll(self.ema, recipe).eval()
        sums: dict[str, list[float]] = {}
        for index in range(0, recipe.validate_samples, 8):
            samples = [stream[i] for i in range(index, min(index + 8, recipe.validate_samples))]
            crops = torch.from_numpy(np.stack([s.crops for s in samples])).to(self.device)
            boxes = np.stack([np.where(s.present[:, None], s.boxes, np.nan) for s in samples])
            with torch.autocast(
                self.device.type, self._precision(), enabled=self._precision() != torch.float32
            ):
                outcome = unroll(
                    crops, torch.from_numpy(boxes).to(self.device), recipe.model.candidates, None
                )
            for name, value in outcome._asdict().items():
                sums.setdefault(name, []).append(float(value))
        return {name: float(np.nanmean(values)) for name, values in sums.items()}


class _Log:
    """Scalars to TensorBoard (where it is installed) and to a CSV file."""

    def __init__(self, out: Path):
        self._csv = out / "log.csv"
        if not self._csv.is_file():
            self._csv.write_text("kind,step," + ",".join((*Outcome._fields, "grad_norm", "rate")) + "\n")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"))
        except ImportError:
            self._board = None

    def step(self, step: int, outcome: Outcome, norm: float, rate: float) -> str:
        values = {name: float(value) for name, value in outcome._asdict().items()}
        self._write("train", step, {**values, "grad_norm": norm, "rate": rate})
        return f"loss {values['loss']:.3f} iou {values['iou']:.3f}"

    def validation(self, step: int, values: dict[str, float]) -> None:
        self._write("val", step, values)
        tqdm.write(f"step {step}: held out: loss {values['loss']:.3f}, IoU {values['iou']:.3f}, "
                   f"score {values['score_present']:.2f} present, "
                   f"{values['score_absent']:.2f} absent")  # fmt: skip

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        names = (*Outcome._fields, "grad_norm", "rate")
        with open(self._csv, "a") as file:
            file.write(f"{kind},{step}," + ",".join(f"{values.get(n, math.nan):.6g}" for n in names) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self._board.add_scalar(f"{kind}/{name}", value, step)


def _average(ema: DMV, model: DMV, decay: float) -> None:
    averaged = [p for p in ema.parameters() if p.is_floating_point()]
    current = [p.detach() for p in model.parameters() if p.is_floating_point()]
    torch._foreach_lerp_(averaged, current, 1 - decay)
    for mine, theirs in zip(ema.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


def _optimiser(recipe: Recipe, model: DMV) -> torch.optim.Optimizer:
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    rest = [p for name, p in model.named_parameters() if not name.startswith("backbone.") and p.requires_grad]
    groups = [
        {"params": rest, "relative_rate": 1.0},
        {"params": backbone, "relative_rate": recipe.backbone_rate},
    ]
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(groups, recipe.learning_rate, momentum=0.9, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(groups, recipe.learning_rate, weight_decay=recipe.weight_decay)


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


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def _join_group(device: torch.device) -> tuple[int, int]:
    """(rank, processes) under torchrun, (0, 1) otherwise."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dmv-fast train`."""
    parser.add_argument("recipe", type=Path, help="YAML file (see recipes/)")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with annotations.jsonl, images/, clips/"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument(
        "--minutes", type=float, help="stop after this much training time, resumed runs counted"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, help="processes that prepare samples")


def run(args: argparse.Namespace) -> int:
    """`dmv-fast train`."""
    model = train(
        args.recipe, data=args.data, out=args.out, minutes=args.minutes, resume=args.resume,
        device=args.device, workers=args.workers,
    )  # fmt: skip
    print(f"wrote {model}")
    return 0
