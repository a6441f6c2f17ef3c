"""From a checkpoint to what runs a frame."""

from __future__ import annotations

import functools
import threading

import torch

from dmv_fast.model.pick import PickConfig
from dmv_fast.runtime.frame import FrameStep
from dmv_fast.runtime.network import FastNetwork, Network, PlainNetwork
from dmv_fast.weights import load_model

_lock = threading.Lock()


def load_network(weights: str, device: torch.device, dtype: torch.dtype, backend: str) -> Network:
    """The network of a checkpoint; one copy for all trackers of a process.

    float32 with the backend "reference" is the plain PyTorch network, everything else the folded one.
    """
    with _lock:
        return _load(weights, device, dtype, backend)


@functools.lru_cache(maxsize=8)
def _load(weights: str, device: torch.device, dtype: torch.dtype, backend: str) -> Network:
    model = load_model(weights, device=device)
    if dtype == torch.float32 and backend == "reference":
        return PlainNetwork(model, backend=backend)
    return FastNetwork(model, dtype=dtype, device=device, backend=backend)


def make_frame_step(
    network: Network, *, k: int, capacity: int, pick: PickConfig, targets: int = 1
) -> FrameStep:
    """The FrameStep that is fastest for a network where it is. Arguments: FrameStep's."""
    kind = FrameStep
    if network.device.type == "cuda" and isinstance(network, FastNetwork):
        from dmv_fast.runtime.cuda import CudaFrameStep as kind
    return kind(network, k=k, capacity=capacity, pick=pick, targets=targets)
