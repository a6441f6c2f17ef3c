"""Memory reads trained side by side on one frozen backbone (paper Table 1), to be tracked with afterwards.

Every variant starts fresh and learns the same: the last 1 x 1 layer of both bottlenecks (so that the
similarity is learned anew), the read, the value encoder and the head. All before that is a checkpoint's and
never changes, so what the last layers read is computed once for each sample and kept on disk. Variants of
one seed see the same samples in the same order.

    OUT/features-train, features-held-out   that, with the boxes
    OUT/NAME-SEED/model.safetensors         a whole checkpoint; NAME: see `name_of`
    OUT/NAME-SEED/held_out.csv              loss and IoU of each held-out sample; written last
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dmv_fast.files import write_text
from dmv_fast.model.backbone import Backbone
from dmv_fast.model.dmv import DMV
from dmv_fast.training.data import SampleStream
from dmv_fast.training.recipe import Recipe
from dmv_fast.training.unroll import Outcome, Unroll, over_time
from dmv_fast.vision.crop import normalise
from dmv_fast.weights import find, load_model, save_model, sha256

VARIANTS = {
    "vote": {},
    "mlp": {"reader": "mlp"},
    "softmax": {"reader": "softmax"},
    "mean": {"reader": "mean"},
    "vote-mean": {"reader": "vote+mean"},
    "wide": {"vote_dim": 256},
    "no-score": {"score_use": "none"},
}
"""What differs from the checkpoint's configuration."""
HELD_OUT = 320  # samples
RECIPE = Recipe(
    steps=500, batch=8, frames=(2, 3), write_truth=0.25, write_wrong=0.1,
    learning_rate=1e-3, weight_decay=0.02, clip_norm=2.0,
)  # fmt: skip
_WARM_UP = 50


# ---- what the last layers read -----------------------------------------------------------------------


class Features:
    """features.f16 (S, N, D, H, W) and boxes.f32 (S, N, 4) in a folder, filled in order and resumable."""

    def __init__(self, folder: Path, shape: tuple[int, ...], made_from: dict[str, object]):
        folder.mkdir(parents=True, exist_ok=True)
        self._note = folder / "made_from.json"
        wanted = {"shape": list(shape), **made_from}
        note = json.loads(self._note.read_text()) if self._note.is_file() else {"of": wanted, "filled": 0}
        if note["of"] != wanted:
            raise ValueError(
                f"{folder}: holds features of {note['of']}, not of {wanted}; remove it or use another --runs"
            )
        self._wanted, self.filled = wanted, note["filled"]
        mode = "r+" if (folder / "features.f16").is_file() else "w+"
        self.features = np.memmap(folder / "features.f16", np.float16, mode, shape=shape)
        self.boxes = np.memmap(folder / "boxes.f32", np.float32, mode, shape=(*shape[:2], 4))

    def __len__(self) -> int:
        return len(self.boxes)

    def put(self, row: int, features: Tensor, boxes: np.ndarray) -> None:
        """The next row: features (N, D, H, W), boxes (N, 4) with NaN where the target is absent."""
        self.features[row], self.boxes[row] = features.float().numpy(), boxes
        self.filled = row + 1
        if self.filled % 100 == 0 or self.filled == len(self):
            self.features.flush()
            self.boxes.flush()
            write_text(self._note, json.dumps({"of": self._wanted, "filled": self.filled}))

    def take(self, rows: np.ndarray, frames: np.ndarray) -> tuple[Tensor, Tensor]:
        """rows (B,), frames (B, n) -> features (B, n, D, H, W) bfloat16, boxes (B, n, 4)."""
        features = np.stack([self.features[row][chosen] for row, chosen in zip(rows, frames, strict=True)])
        boxes = np.stack([self.boxes[row][chosen] for row, chosen in zip(rows, frames, strict=True)])
        return torch.from_numpy(features).bfloat16(), torch.from_numpy(boxes)


def prepare(
    checkpoint: str, out: Path, *, data: Path, cache: Path | None, samples: int, held_out: int = HELD_OUT
) -> tuple[Features, Features]:
    """Features to train on and held-out ones; what is there already is taken.

    cache: folder of a finished training run's layer3 features (dmv_fast.training.cache), used instead of
    drawing samples from `data`; it is only read.
    """
    backbone = load_model(checkpoint).backbone
    of = {"backbone": sha256(find(checkpoint))}
    stream = SampleStream(data, seed=1, frames=6)
    unseen = SampleStream(data, seed=2, frames=6, held_out=True)
    if cache is None:
        train = _fill(backbone, _drawn(stream), out / "features-train", samples, of)
    else:
        train = _fill(backbone, _cached(cache), out / "features-train", samples, {**of, "cache": True})
    return train, _fill(backbone, _drawn(unseen), out / "features-held-out", held_out, of)


def _drawn(stream: SampleStream):
    """row -> (crops (N, 256, 256, 3), boxes (N, 4)) of a stream."""

    def take(row: int) -> tuple[np.ndarray, np.ndarray]:
        sample = stream[row]
        return sample.crops, np.where(sample.present[:, None], sample.boxes, np.nan)

    return take


def _cached(folder: Path):
    """row -> (layer3 features (N, C3, 32, 32), boxes (N, 4)) of a feature cache."""
    note = json.loads((folder / "cache.json").read_text())
    shape = tuple(note["wanted"]["shape"])
    features = np.memmap(folder / "features.f16", np.float16, "r", shape=shape)
    boxes = np.memmap(folder / "boxes.f32", np.float32, "r", shape=(*shape[:2], 4))

    def take(row: int) -> tuple[np.ndarray, np.ndarray]:
        if row >= note["filled"]:
            raise ValueError(f"{folder}: holds {note['filled']} samples; ask for fewer with --samples")
        return features[row], boxes[row]

    return take


def _fill(backbone: Backbone, take, folder: Path, samples: int, of: dict[str, object]) -> Features:
    frames = len(take(0)[1])
    with torch.no_grad():
        shape = before_last(backbone, torch.zeros(1, backbone.neck3[0].in_channels, 32, 32)).shape[1:]
    features = Features(folder, (samples, frames, *shape), of)
    missing = range(features.filled, samples)
    for row in tqdm(missing, desc=folder.name, initial=features.filled, total=samples):
        content, boxes = take(row)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features.put(row, before_last(backbone, torch.from_numpy(np.ascontiguousarray(content))), boxes)
    return features


def before_last(backbone: Backbone, content: Tensor) -> Tensor:
    """What the last layers read, (n, D, H, W): of crops (n, 256, 256, 3) uint8 or layer3 (n, C3, 32, 32)."""
    layer3 = backbone.stem(normalise(content)) if content.dtype == torch.uint8 else content.float()
    layer3 = layer3.contiguous(memory_format=torch.channels_last)
    return torch.cat([backbone.neck3[:-1](layer3), backbone.neck4[:-1](backbone.layer4(layer3))], 1)


class _Half(nn.Module):
    """The first or the second half of the channels."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(2, 1)[self.index]


def last_layers(backbone: Backbone) -> Backbone:
    """A backbone whose `tail` begins at `before_last`; its two layers are the given one's, made fresh."""
    short = Backbone.__new__(Backbone)
    nn.Module.__init__(short)
    short.unit_scale = backbone.unit_scale
    short.layer4 = nn.Identity()
    for index, neck in enumerate((backbone.neck3, backbone.neck4)):
        neck[-1].reset_parameters()
        setattr(short, f"neck{3 + index}", nn.Sequential(_Half(index), neck[-1]))
    return short


# ---- training ----------------------------------------------------------------------------------------


def name_of(variant: str, steps: int) -> str:
    """What runs of a variant are called: by their steps as well where these are not the usual ones."""
    return variant if steps == RECIPE.steps else f"{variant}-{steps}"


def train(
    checkpoint: str, out: Path, *, train_on: Features, held_out: Features, variant: str, seed: int, steps: int
) -> Path:
    """One run, or nothing if it is there already; returns its folder."""
    folder = out / f"{name_of(variant, steps)}-{seed}"
    if (folder / "held_out.csv").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    start = load_model(checkpoint)
    model = DMV(replace(start.config, **VARIANTS[variant]))
    whole = model.backbone
    whole.load_state_dict(start.backbone.state_dict())
    model.backbone = last_layers(whole)
    began = time.monotonic()
    log = _run_steps(model, replace(RECIPE, steps=steps, seed=seed), train_on, folder.name)
    rows = _validate(model, held_out)
    model.backbone = whole
    save_model(model, folder / "model.safetensors")
    write_text(folder / "log.csv", as_csv(log))
    note = {"checkpoint": train_on._wanted, "variant": VARIANTS[variant], "seed": seed, "steps": steps,
            "minutes": round((time.monotonic() - began) / 60, 1)}  # fmt: skip
    write_text(folder / "run.json", json.dumps(note, indent=1) + "\n")
    write_text(folder / "held_out.csv", as_csv(rows))
    return folder


def batches(features: Features, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """The batch of each step, which follows from seed and step alone; N grows in equal stages of the run."""
    most = features.boxes.shape[1] - 1
    for step in range(recipe.steps):
        rng = np.random.default_rng((recipe.seed, step))
        count = recipe.frames[step * len(recipe.frames) // recipe.steps]
        rows = rng.integers(len(features), size=recipe.batch)
        later = [1 + np.sort(rng.choice(most, count - 1, replace=False)) for _ in rows]
        yield features.take(rows, np.stack([np.concatenate([[0], frames]) for frames in later]))


def _run_steps(model: DMV, recipe: Recipe, features: Features, name: str) -> list[dict[str, float]]:
    unroll = Unroll(model, recipe).train()
    optimiser = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    log: list[dict[str, float]] = []
    bar = tqdm(batches(features, recipe), total=recipe.steps, desc=name, mininterval=5.0)
    for step, (frames, boxes) in enumerate(bar):
        warm = min(1.0, (step + 1) / _WARM_UP)
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * warm * (1 + math.cos(math.pi * step / recipe.steps)) / 2
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        with torch.autocast("cpu", torch.bfloat16):
            outcome = unroll(frames, boxes, recipe.model.candidates, generator)
        optimiser.zero_grad(set_to_none=True)
        outcome.loss.backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm))
        if math.isfinite(norm):
            optimiser.step()
        log.append({"step": step, **_numbers(outcome), "norm": norm})
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {log[-1]['loss']:.3f} iou {log[-1]['iou']:.3f}")
    return log


@torch.no_grad()
def _validate(model: DMV, features: Features) -> list[dict[str, float]]:
    """Each held-out sample by itself, all its frames, predictions written back.

    iou_T: of the frame that is read from T remembered ones, NaN where it does not show the target.
    """
    unroll = Unroll(model, RECIPE).eval()
    rows = []
    every = np.arange(features.boxes.shape[1])[None]
    for row in range(len(features)):
        frames, boxes = features.take(np.array([row]), every)
        with torch.autocast("cpu", torch.bfloat16):
            outcomes = unroll.each_frame(frames, boxes, RECIPE.model.candidates)
        shown = boxes[0, 1:].isfinite().all(-1)
        by_frame = {
            f"iou_{t}": float(outcome.iou) if present else math.nan
            for t, (outcome, present) in enumerate(zip(outcomes, shown, strict=True), start=1)
        }
        rows.append({"sample": row, **_numbers(over_time(outcomes, boxes)), **by_frame})
    return rows


def _numbers(outcome: Outcome) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in outcome._asdict().items()}


def as_csv(rows: list[dict[str, object]]) -> str:
    """Rows of the same names as text."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return stream.getvalue()
