"""From a checkpoint to what runs a frame."""

from __future__ import annotations

import functools
import os
import threading

import torch

from dmv_fast.model.pick import PickConfig
from dmv_fast.ops.backends import check_backend
from dmv_fast.ops.retrieve import MAX_K
from dmv_fast.runtime import hardware
from dmv_fast.runtime.convolution import amx_runs
from dmv_fast.runtime.frame import FrameStep
from dmv_fast.runtime.network import FastNetwork, Network, PlainNetwork
from dmv_fast.runtime.precision import Precision, precision_of
from dmv_fast.weights import find, load_model

_lock = threading.Lock()


def load_network(weights: str, device: torch.device, dtype: str, backend: str) -> Network:
    """The network of a checkpoint; one copy for all trackers of a process.

    float32 with the backend "reference" is the plain PyTorch network, everything else the folded one; the
    readers that exist for comparison (`DMVConfig.reader`, `score_use`) are plain, in float32, in any case.
    dtype: FastDMVTracker's. Raises ValueError where it is unknown or does not run on the device.
    """
    precision = precision_of(dtype, device)
    if precision.split and not (device.type == "cpu" and amx_runs()):
        raise ValueError(
            f"dtype 'bfloat16x3' does not run on {device}: it needs a CPU with AMX (which DMV_FAST_CPU_ISA"
            " may rule out) and the C++ extension; take 'float32', or 'auto'"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    written, isa = find(weights).stat().st_mtime_ns, os.environ.get("DMV_FAST_CPU_ISA")
    with _lock:
        return _load(weights, written, isa, device, precision, backend)


@functools.lru_cache(maxsize=8)
def _load(
    weights: str, _written: int, _isa: str | None, device: torch.device, precision: Precision, backend: str
) -> Network:
    # _written: a checkpoint that training has replaced is another network; _isa: weights and keys lie as the
    # instruction set that DMV_FAST_CPU_ISA names wants them
    model = load_model(weights, device=device)
    for_comparison = model.config.reader != "vote" or model.config.score_use != "renormalised"
    if for_comparison or (precision == Precision(torch.float32) and backend == "reference"):
        return PlainNetwork(model, backend=backend)
    network = FastNetwork(model, **precision._asdict(), device=device, backend=backend)
    if device.type == "cuda":  # complete, also for another thread's stream
        torch.cuda.current_stream(device).synchronize()
    return network


def make_frame_step(
    network: Network, *, k: int, capacity: int, pick: PickConfig, targets: int = 1
) -> FrameStep:
    """The FrameStep that is fastest for a network where it is. Arguments: FrameStep's."""
    kind = FrameStep
    if hardware.on_gpu(network.device) and isinstance(network, FastNetwork):
        from dmv_fast.runtime.cuda import CudaFrameStep as kind
    return kind(network, k=k, capacity=capacity, pick=pick, targets=targets)


def frame_step_for(
    weights: str, k: int | None, device: str, dtype: str, backend: str, *,
    capacity: int, pick: PickConfig, targets: int = 1,
) -> FrameStep:  # fmt: skip
    """FastDMVTracker's arguments, checked, as what runs a frame; the network is shared."""
    where = _resolve_device(device)
    if backend != "auto":
        check_backend(backend, where.type)
    network = load_network(str(weights), where, dtype, backend)
    k = network.model.config.candidates if k is None else k
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k is {k}; it must be 1 to {MAX_K}")
    return make_frame_step(network, k=k, capacity=capacity, pick=pick, targets=targets)


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; try auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}; PyTorch sees no CUDA GPU here (see `dmv-fast doctor`)")
    return device
