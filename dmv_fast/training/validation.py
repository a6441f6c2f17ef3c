"""What a run is measured on while it goes on: held-out samples, and the tracker itself on held-out videos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from dmv_fast.evaluation.metrics import score_sequence
from dmv_fast.model.dmv import DMV
from dmv_fast.tracker import FastDMVTracker
from dmv_fast.training.catalog import Clip, load_catalog, read_clip_frame
from dmv_fast.training.clips import make_clip
from dmv_fast.training.data import SampleStream
from dmv_fast.training.recipe import Recipe
from dmv_fast.training.unroll import Unroll

CLIP_FRAMES = 100
_LEAST_KNOWN = 20  # boxes of a real track: a shorter one says little
_BATCH = 8

Video = Iterator[tuple[np.ndarray, np.ndarray]]


@torch.no_grad()
def on_samples(model: DMV, recipe: Recipe, stream: SampleStream) -> dict[str, float]:
    """Mean of each field of `Outcome` over the stream's first `validate_samples` samples.

    Predictions are written back as they are: what the tracker will meet.
    """
    unroll = Unroll(model, recipe).eval()
    device, precision = model.read.null_value.device, getattr(torch, recipe.precision)
    sums: dict[str, list[float]] = {}
    for index in range(0, recipe.validate_samples, _BATCH):
        samples = [stream[i] for i in range(index, min(index + _BATCH, recipe.validate_samples))]
        crops = torch.from_numpy(np.stack([s.crops for s in samples])).to(device)
        boxes = np.stack([np.where(s.present[:, None], s.boxes, np.nan) for s in samples])
        truth = torch.from_numpy(boxes).to(device)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            outcome = unroll(crops, truth, recipe.model.candidates)
        for name, value in outcome._asdict().items():
            sums.setdefault(name, []).append(float(value))
    return {name: mean_known(values) for name, values in sums.items()}


def mean_known(values: Iterable[float]) -> float:
    """Mean of what is not NaN; NaN where nothing is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def on_videos(weights: Path, data: Path, count: int, device: torch.device, seed: int = 0) -> dict[str, float]:
    """AUC of the tracker on `count` held-out videos of the data folder, by name.

    Every second one is made, and in every second of those the target leaves and returns; the others are
    real, where the folder has such. On a GPU the plain network is run, so that training needs no kernel.
    """
    dtype, backend = ("float32", "reference") if device.type == "cuda" else ("auto", "auto")
    tracker = FastDMVTracker(str(weights), device=str(device), dtype=dtype, backend=backend)
    return {name: video_auc(tracker, video) for name, video in held_out_videos(data, count, seed)}


def held_out_videos(data: Path, count: int, seed: int) -> Iterator[tuple[str, Video]]:
    """`count` videos of up to 100 frames with their names, the same ones every time."""
    catalog = load_catalog(data, held_out=True)
    real = [(clip, [track for track in clip.tracks if _long_enough(track)]) for clip in catalog.clips]
    real = [(clip, tracks) for clip, tracks in real if tracks]
    for i in range(count):
        if catalog.cutouts and (i % 2 == 0 or not real):
            leaves = i % 4 == 2
            made = make_clip(data, seed=seed + i, frames=CLIP_FRAMES, leaves=leaves)
            yield f"made {seed + i}{' leaves' if leaves else ''}", iter(made)
        elif real:
            turn, which = divmod(i // 2 if catalog.cutouts else i, len(real))
            clip, tracks = real[which]
            yield f"{clip.path.stem} {turn % len(tracks)}", _real_video(clip, tracks[turn % len(tracks)])


def _long_enough(track: np.ndarray) -> bool:
    return np.isfinite(track[:, 0]).sum() >= _LEAST_KNOWN


def _real_video(clip: Clip, track: np.ndarray) -> Video:
    first = int(np.flatnonzero(np.isfinite(track[:, 0]))[0])
    for number in range(first, min(len(track), first + CLIP_FRAMES)):
        yield read_clip_frame(clip, number), track[number]


def video_auc(tracker: FastDMVTracker, video: Video) -> float:
    """AUC of one pass over (frame, box) pairs; the first box is given, NaN ones do not count."""
    found: list[tuple[float, ...]] = []
    truth: list[np.ndarray] = []
    for image, box in video:
        if truth:
            found.append(tracker.track(image).box)
        else:
            tracker.init(image, tuple(box.tolist()))
            found.append(tuple(box.tolist()))
        truth.append(box)
    return score_sequence(np.array(found), np.array(truth)).auc
