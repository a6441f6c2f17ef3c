"""From a checkpoint to what runs a frame."""

from __future__ import annotations

import functools
import numbers
import os
import threading

import torch

from dmv_fast.model.pick import PickConfig
from dmv_fast.ops.backends import check_backend
from dmv_fast.ops.retrieve import MAX_K
from dmv_fast.runtime import hardware
from dmv_fast.runtime.convolution import amx_runs, int16_runs
from dmv_fast.runtime.frame import FrameStep
from dmv_fast.runtime.network import FastNetwork, Network, PlainNetwork
from dmv_fast.runtime.precision import Precision, precision_of
from dmv_fast.runtime.surroundings import our_defaults
from dmv_fast.weights import find, load_model

_lock = threading.Lock()


def load_network(weights: str, device: torch.device, dtype: str, backend: str) -> Network:
    """The network of a checkpoint; one copy for all trackers of a process.

    float32 with the backend "reference" is the plain PyTorch network, everything else the folded one; the
    readers that it does not know (see `DMVConfig.reader`, `score_use`) are plain, in float32, in any case.
    dtype: FastDMVTracker's. Raises ValueError where it is unknown or does not run on the device.
    """
    precision = precision_of(dtype, device)
    slow_half = device.type == "cpu" and not hardware.on_gpu(device) and precision.dtype == torch.float16
    if slow_half and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise ValueError("dtype 'float16' does not run on this processor; take 'float32', or 'auto'")
    if precision.products != "own":
        needed = {"bfloat16x3": ("AMX", amx_runs), "int16": ("AVX512_VNNI", int16_runs)}
        instructions, runs = needed[precision.products]
        if device.type != "cpu" or not runs():
            raise ValueError(
                f"dtype {precision.products!r} does not run on {device}: it needs a CPU with {instructions}"
                " (which DMV_FAST_CPU_ISA may rule out) and the C++ extension; take 'float32', or 'auto'"
            )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    path = os.path.abspath(find(weights))  # a relative name is another file in another folder
    file, isa = os.stat(path), os.environ.get("DMV_FAST_CPU_ISA")
    version = file.st_mtime_ns, file.st_size, file.st_ino
    with _lock:
        return _load(path, version, isa, device, precision, backend)


@functools.lru_cache(maxsize=8)
def _load(
    weights: str, _version: tuple[int, ...], _isa: str | None, device: torch.device, precision: Precision,
    backend: str,
) -> Network:  # fmt: skip
    # _version: a checkpoint that training has replaced is another network; _isa: weights and keys lie as the
    # instruction set that DMV_FAST_CPU_ISA names wants them
    model = load_model(weights, device=device)
    votes = model.config.reader in ("vote", "vote+mean") and model.config.score_use == "renormalised"
    if not votes or (precision == Precision(torch.float32) and backend == "reference"):
        return PlainNetwork(model, backend=backend)
    network = FastNetwork(model, **precision._asdict(), device=device, backend=backend)
    if device.type == "cuda":  # complete, also for another thread's stream
        torch.cuda.current_stream(device).synchronize()
    return network


def make_frame_step(
    network: Network, *, k: int, capacity: int, pick: PickConfig, targets: int = 1
) -> FrameStep:
    """The FrameStep that is fastest for a network where it is. Arguments: FrameStep's."""
    if hardware.on_gpu(network.device) and isinstance(network, FastNetwork):
        from dmv_fast.runtime.cuda import CudaFrameStep

        return CudaFrameStep(network, k=k, capacity=capacity, pick=pick, targets=targets)
    return FrameStep(network, k=k, capacity=capacity, pick=pick, targets=targets)


def frame_step_for(
    weights: str, k: int | None, device: str, dtype: str, backend: str, *,
    capacity: int, pick: PickConfig, targets: int = 1,
) -> FrameStep:  # fmt: skip
    """FastDMVTracker's arguments, checked, as what runs a frame; the network is shared."""
    if k is not None and not (isinstance(k, numbers.Integral) and 1 <= k <= MAX_K):
        raise ValueError(f"k is {k!r}; it must be 1 to {MAX_K}, a whole number")
    where = resolve_device(device)
    if backend != "auto":
        check_backend(backend, where.type)
    with our_defaults(where):
        network = load_network(str(weights), where, dtype, backend)
        k = network.model.config.candidates if k is None else int(k)
        return make_frame_step(network, k=k, capacity=capacity, pick=pick, targets=targets)


def resolve_device(name: str) -> torch.device:
    """The device of "auto", "cpu", "cuda", "cuda:1" ... where it is there; else ValueError."""
    if name == "auto":
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {name!r}; try auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}; PyTorch sees no CUDA GPU here (see `dmv-fast doctor`)")
    return device
