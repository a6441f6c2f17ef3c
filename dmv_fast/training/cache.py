"""layer3 features of a fixed set of samples on disk: with a frozen stem they never change.

Training on a CPU becomes practical with them: the stem, a third of a frame's work, is paid once a crop
instead of once a step, and so is making the crop.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dmv_fast.files import NO_ROOM, write_text
from dmv_fast.model.dmv import DMV
from dmv_fast.training.data import SampleStream
from dmv_fast.training.frozen import FrozenStem
from dmv_fast.vision.crop import normalise


class FeatureCache:
    """`features.f16` (S, N, C3, 32, 32) in a memory map and `boxes.f32` (S, N, 4), filled in order.

    An interrupted fill goes on where it stopped; a cache of another recipe is refused.
    """

    def __init__(self, folder: Path, samples: int, frames: int, channels: int, *, tag: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.shape = folder, (samples, frames, channels, 32, 32)
        note = folder / "cache.json"
        wanted = {"shape": list(self.shape), "tag": tag}
        if note.is_file() and json.loads(note.read_text())["wanted"] != wanted:
            raise ValueError(
                f"{folder}: holds the features of another recipe; remove the folder to start anew"
            )
        self._note, self._wanted = note, wanted
        self.filled = json.loads(note.read_text())["filled"] if note.is_file() else 0
        mode: Literal["r+", "w+"] = "r+" if (folder / "features.f16").is_file() else "w+"
        self.features = np.memmap(folder / "features.f16", np.float16, mode, shape=self.shape)
        self.boxes = np.memmap(folder / "boxes.f32", np.float32, mode, shape=(samples, frames, 4))
        if mode == "w+":
            _allot(folder / "features.f16", self.features.nbytes)

    def fill(
        self, model: DMV, stream: SampleStream, *, precision: torch.dtype, workers: int = 1,
        progress: bool = True,
    ) -> None:  # fmt: skip
        """Compute what is missing. One sample of the stream gives one row; `workers` processes make them."""
        missing = range(self.filled, self.shape[0])
        samples = DataLoader(stream, batch_size=None, sampler=missing, num_workers=workers if missing else 0)
        rows = tqdm(
            zip(missing, samples, strict=True), initial=self.filled, total=self.shape[0], desc="features",
            disable=not progress, mininterval=2.0,
        )  # fmt: skip
        device, stem = model.read.null_value.device, FrozenStem(model.backbone, precision)
        for row, sample in rows:
            crops = normalise(torch.from_numpy(sample.crops).to(device))
            self.features[row] = stem(crops).float().cpu().numpy()
            self.boxes[row] = np.where(sample.present[:, None], sample.boxes, np.nan)
            self.filled = row + 1
            if self.filled % 50 == 0 or self.filled == self.shape[0]:
                self._save_note()

    def _save_note(self) -> None:
        self.features.flush()
        self.boxes.flush()
        write_text(self._note, json.dumps({"wanted": self._wanted, "filled": self.filled}))

    def __len__(self) -> int:
        return self.filled

    def take(self, row: int, frames: np.ndarray) -> tuple[Tensor, Tensor]:
        """Chosen frames of one sample: layer3 features (n, C3, 32, 32) bfloat16, boxes (n, 4)."""
        features = torch.from_numpy(self.features[row][frames]).bfloat16()
        return features, torch.from_numpy(self.boxes[row][frames])


def _allot(path: Path, size: int) -> None:
    """Have the disk set the file's bytes aside: a map into a file that has none ends the process (SIGBUS)."""
    if not hasattr(os, "posix_fallocate"):  # macOS, Windows
        return
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in NO_ROOM:
                message = f"{path}: no room for {size / 1e9:.1f} GB of features ({error.strerror})"
                raise OSError(error.errno, message) from None
