"""A long run: does memory stay flat, and do frames stay fast? (`dmv-fast bench --endurance`)"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dmv_fast.evaluation.speed import Clip, resident_mb
from dmv_fast.evaluation.trackers import Tracker
from dmv_fast.files import write_text

BLOCK = 1000
"""Frames a line of the table; the first block is the warm-up."""


class Block(NamedTuple):
    """A line of the table."""

    frames: int
    """Tracked so far."""
    resident_mb: float
    """Of this process at the end of the block, MiB."""
    device_mb: float
    """The most that PyTorch has reserved on the GPU so far, MiB; 0 without one."""
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Endurance:
    """What a long run showed."""

    blocks: list[Block]
    p50_ms: float
    """Of all frames after the first block."""
    p99_ms: float

    @property
    def grown_mb(self) -> float:
        """The most that was resident at the end of a later block, less what was after the first, MiB."""
        return max(b.resident_mb for b in self.blocks) - self.blocks[0].resident_mb

    @property
    def device_grown_mb(self) -> float:
        """The same of the GPU."""
        return self.blocks[-1].device_mb - self.blocks[0].device_mb

    def line(self) -> str:
        """All of it in one line."""
        first, last = self.blocks[0], self.blocks[-1]
        device = f", device {self.device_grown_mb:+.1f} MB" if last.device_mb else ""
        return (
            f"endurance  {last.frames} frames: resident {first.resident_mb:.1f} MB after the first "
            f"{first.frames}, {self.grown_mb:+.1f} MB from there{device}; p50 {self.p50_ms:.2f} ms, "
            f"p99 {self.p99_ms:.2f} ms ({self.p99_ms / self.p50_ms:.2f} x)"
        )

    def write(self, path: Path) -> None:
        """The blocks as CSV."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(Block._fields)
        for block in self.blocks:
            writer.writerow([block.frames, *(f"{v:.2f}" for v in block[1:])])
        write_text(path, stream.getvalue())


def endure(
    tracker: Tracker, clip: Clip, frames: int, say: Callable[[str], None] = lambda line: None
) -> Endurance:
    """Track a started target for `frames` frames, forwards and backwards through the clip without a break."""
    times = np.empty(frames)
    blocks: list[Block] = []
    for i in range(frames):
        image = clip.frames[_to_and_fro(i + 1, len(clip.frames))]
        began = time.perf_counter()
        tracker.track(image)
        times[i] = (time.perf_counter() - began) * 1e3
        if (i + 1) % BLOCK == 0 or i + 1 == frames:
            these = times[len(blocks) * BLOCK : i + 1]
            p50, p99 = np.percentile(these, (50, 99))
            device = torch.cuda.max_memory_reserved() / 2**20 if torch.cuda.is_initialized() else 0.0
            resident = resident_mb(anonymous=True)
            blocks.append(Block(i + 1, resident, device, float(p50), float(p99)))
            say(f"endurance  {i + 1:6d} frames  p50 {p50:6.2f} ms  p99 {p99:6.2f} ms  {resident:.1f} MB")
    after = times[BLOCK:] if frames > BLOCK else times
    p50, p99 = np.percentile(after, (50, 99))
    return Endurance(blocks, float(p50), float(p99))


def _to_and_fro(i: int, count: int) -> int:
    """0 1 2 .. count - 1, count - 2 .. 1, 0, 1 .."""
    i %= 2 * (count - 1)
    return min(i, 2 * (count - 1) - i)
