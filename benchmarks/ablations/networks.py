"""What stands in for the tracker's network in an ablation."""

from __future__ import annotations

import torch
from torch import Tensor

from dmv_fast.model.dmv import DMV, Prediction
from dmv_fast.ops.screened import pack_keys, unpack_keys
from dmv_fast.runtime.network import Network
from dmv_fast.runtime.precision import fast_dtype
from dmv_fast.runtime.trunk import Trunk


class WithoutBackground:
    """A network that remembers nothing of what lies outside the target's box (paper Fig. 4).

    The box is the one that the frame's highest score stands for: of the first frame the true one. A location
    is inside where its cell of the grid touches the box. wipe "values": outside, values are zero, but the
    background's keys still match and draw background away from the target's; "all": keys are zero as well,
    so that they match no better than the null column does.
    """

    def __init__(self, network: Network, wipe: str):
        if wipe not in ("values", "all"):
            raise ValueError(f"wipe is {wipe!r}; it must be 'values' or 'all'")
        self._network, self._wipe = network, wipe
        self.model, self.dtype, self.device = network.model, network.dtype, network.device
        self.key_width, self.key_dtype = network.key_width, network.key_dtype
        self.value_width = network.value_width
        self.look, self.predict = network.look, network.predict

    def remember(self, maps: Tensor, scores: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._network.remember(maps, scores, deltas)
        best = scores.flatten(1).argmax(1)
        boxes = self.model.decode(deltas.float()).flatten(1, 3)
        inside = inside_box(self.model, boxes[torch.arange(len(best)), best])[..., None]  # (B, M, 1)
        if self._wipe == "all":
            laid_out = self.key_width > self.model.config.key_dim
            keys = (unpack_keys(keys) if laid_out else keys).masked_fill(~inside, 0.0)
            keys = pack_keys(keys) if laid_out else keys
        return keys, values * inside


def inside_box(model: DMV, box: Tensor) -> Tensor:
    """Which locations' cells touch a box (B, 4) xywh in crop pixels -> (B, M) bool."""
    anchors = model.anchors[0]  # (H, W, 4); every anchor of a location has the same centre
    centre = anchors[..., :2] + anchors[..., 2:] / 2
    reach = (centre[0, 1, 0] - centre[0, 0, 0]) / 2
    corner, size = box[:, None, None, :2], box[:, None, None, 2:]
    low, high = corner - reach, corner + size + reach
    return ((centre > low) & (centre < high)).all(-1).flatten(1)


class HalfPlain:
    """The folded backbone and everything behind it as it stands in dmv_fast.model, under autocast.

    The same path for every reader, so that a comparison of readers compares nothing else.
    """

    def __init__(self, model: DMV):
        self.model, self.device = model, model.anchors.device
        self.dtype = self.key_dtype = fast_dtype(self.device)
        self.key_width, self.value_width = model.config.key_dim, model.config.value_dim
        self._trunk = Trunk(model.backbone, dtype=self.dtype, device=self.device)

    def look(self, crops: Tensor) -> Tensor:
        c = self.model.config
        maps = torch.empty(len(crops), c.grid, c.grid, c.key_dim, dtype=self.dtype, device=self.device)
        self._trunk(crops, maps)
        return maps

    def predict(self, maps: Tensor, keys: Tensor, values: Tensor, k: int, valid: Tensor | int) -> Prediction:
        with self._autocast():
            answer = self.model(maps.permute(0, 3, 1, 2), keys, values, k=k, valid=valid)
        return Prediction(*(part.float() for part in answer))

    def remember(self, maps: Tensor, scores: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            return self.model.remember(maps.permute(0, 3, 1, 2), scores, deltas)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
