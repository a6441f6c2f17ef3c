"""The same crop read from a memory with and without its background (paper Fig. 4): score maps and figures.

No tracker runs: the memory holds the first frame and every 30th after it with their true boxes, the crop is
cut around the true box of five frames before. So both reads see the same but for the wiped memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.ablations.networks import WithoutBackground
from dmv_fast.evaluation.datasets import Sequence
from dmv_fast.runtime.network import Network
from dmv_fast.vision import boxes as box_ops
from dmv_fast.vision.crop import cut, search_window

EVERY = 10  # frames between two that are looked at
REMEMBERED = 30
BEFORE = 5  # the crop is cut where the target was so many frames ago
MODES = ("kept", "values", "all")
COLUMNS = ("sequence", "frame", "mode", "on_target", "off_target", "top_is_target")
_ON, _OFF = 0.5, 0.1  # IoU of a box with the truth from which it is, and under which it is not, the target


@dataclass(frozen=True)
class Look:
    """One crop and its score maps."""

    sequence: str
    frame: int
    crop: np.ndarray
    """(256, 256, 3) uint8 BGR"""
    box: np.ndarray
    """(4,) the truth, in crop pixels"""
    maps: dict[str, np.ndarray]
    """(H, W) by mode: the highest of a location's scores."""
    rows: list[dict[str, object]]
    """COLUMNS, a row a mode."""

    @property
    def lured(self) -> float:
        """How much higher the best score beside the target is without the background ("all")."""
        by_mode = {row["mode"]: row["off_target"] for row in self.rows}
        return by_mode["all"] - by_mode["kept"]


def look_at(network: Network, sequences: list[Sequence], k: int) -> Iterator[Look]:
    """Every tenth frame with a known box of each sequence."""
    networks = {"kept": network, **{wipe: WithoutBackground(network, wipe) for wipe in MODES[1:]}}
    for sequence in tqdm(sequences, desc="score maps"):
        memory: dict[str, list[tuple[Tensor, Tensor]]] = {mode: [] for mode in MODES}
        known = np.isfinite(sequence.boxes).all(1)
        for frame, image in enumerate(sequence.images()):
            since = frame - sequence.start
            if since > 0 and since % EVERY == 0 and known[frame] and known[frame - BEFORE]:
                yield _look(networks, memory, sequence, frame, image, k)
            if since >= 0 and since % REMEMBERED == 0 and known[frame]:
                _remember(networks, memory, image, sequence.boxes[frame])


@torch.inference_mode()
def _remember(networks: dict[str, Network], memory: dict, image: np.ndarray, box: np.ndarray) -> None:
    window = search_window(box)
    maps = networks["kept"].look(torch.from_numpy(cut(image, window)[None]))
    told = networks["kept"].model.exact_maps(torch.tensor(window.to_crop(box)[None], dtype=torch.float32))
    for mode, network in networks.items():
        memory[mode].append(network.remember(maps, *told))


@torch.inference_mode()
def _look(
    networks: dict[str, Network], memory: dict, sequence: Sequence, frame: int, image: np.ndarray, k: int
) -> Look:
    window = search_window(sequence.boxes[frame - BEFORE])
    crop = cut(image, window)
    truth = window.to_crop(sequence.boxes[frame])
    maps = networks["kept"].look(torch.from_numpy(crop[None]))
    rows, pictures = [], {}
    for mode, network in networks.items():
        keys, values = (torch.cat(parts, 1) for parts in zip(*memory[mode], strict=True))
        prediction = network.predict(maps, keys, values, k, keys.shape[1])
        scores = prediction.logits.sigmoid()[0]  # (A, H, W)
        boxes = network.model.decode(prediction.deltas)[0]
        overlap = box_ops.iou(boxes, torch.tensor(truth, dtype=torch.float32))
        pictures[mode] = scores.amax(0).numpy()
        top = overlap.flatten()[scores.flatten().argmax()]
        figures = (_highest(scores, overlap > _ON), _highest(scores, overlap < _OFF), float(top > _ON))
        rows.append(dict(zip(COLUMNS, (sequence.name, frame, mode, *figures), strict=True)))
    return Look(sequence.name, frame, crop, truth, pictures, rows)


def _highest(scores: Tensor, where: Tensor) -> float:
    """0 where there is none."""
    return float(scores[where].max()) if where.any() else 0.0


def picture(looks: list[Look], count: int = 6) -> np.ndarray:
    """A row each, crop and score maps, for the frames that miss the background most, one a sequence."""
    best: dict[str, Look] = {}
    for look in sorted(looks, key=lambda look: look.lured):
        best[look.sequence] = look
    chosen = sorted(best.values(), key=lambda look: -look.lured)[:count]
    return np.vstack([_heading(), *(_row(look) for look in chosen)])


def _heading() -> np.ndarray:
    strip = np.full((24, 256 * (1 + len(MODES)), 3), 255, np.uint8)
    for i, text in enumerate(("search crop", "background kept", "its values zero", "values and keys zero")):
        cv2.putText(strip, text, (256 * i + 6, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return strip


def _row(look: Look) -> np.ndarray:
    x, y, w, h = look.box
    cells = []
    for mode in (None, *MODES):
        cell = look.crop.copy()
        if mode is not None:
            # Location i is centred on pixel i * 256 / H: shift the map half a cell to lie on the crop.
            side = len(look.maps[mode])
            half = 128 / side
            heat = cv2.resize(look.maps[mode], (256, 256), interpolation=cv2.INTER_LINEAR)
            shift = np.float32([[1, 0, -half], [0, 1, -half]])
            heat = cv2.warpAffine(heat, shift, (256, 256), borderMode=cv2.BORDER_REPLICATE)
            colours = cv2.applyColorMap((heat.clip(0, 1) * 255).astype(np.uint8), cv2.COLORMAP_JET)
            cell = cv2.addWeighted(cell, 0.45, colours, 0.55, 0)
        corner, far = (round(x), round(y)), (round(x + w), round(y + h))
        cv2.rectangle(cell, corner, far, (255, 255, 255), 1, cv2.LINE_AA)
        if mode is None:
            text = f"{look.sequence} {look.frame}"
            cv2.putText(cell, text, (5, 250), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
        cells.append(cell)
    return np.hstack(cells)
