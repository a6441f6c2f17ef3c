"""Which backends can run on a device, and which one ``auto`` takes."""

from __future__ import annotations

import functools
import importlib
import os
import warnings

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
# On a GPU: triton until both have been measured on one; cuda where there is no Triton.
FASTEST_FIRST = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}


@functools.cache
def _extension_problem() -> str | None:
    """Import ``dmv_fast._C``, which registers the C++ operators; the reason in one line if that fails."""
    try:
        importlib.import_module("dmv_fast._C")
    except ImportError as error:
        return f"the C++ extension dmv_fast._C is not loaded ({str(error).splitlines()[0]})"
    return None


@functools.cache
def _triton_problem() -> str | None:
    try:
        importlib.import_module("triton")
        importlib.import_module("dmv_fast.kernels.retrieve")
        importlib.import_module("dmv_fast.kernels.gather")
    except ImportError as error:
        return f"its kernels do not import ({str(error).splitlines()[0]})"
    return None


def _problem(backend: str, device_type: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "cpu":
        return _extension_problem() if device_type == "cpu" else "it runs on the CPU only"
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        return "it runs on CUDA devices only"
    if backend == "triton":
        return _triton_problem()
    if _extension_problem() is None and not hasattr(torch.ops.dmv_fast, "retrieve_cuda"):
        return "dmv_fast._C was built without its CUDA sources"
    return _extension_problem()


@functools.cache
def available_backends(device_type: str) -> dict[str, str | None]:
    """Backends of the fused operations on a device type ("cpu", "cuda").

    Returns:
        name -> None where it can be used, else the reason in one line.
    """
    return {backend: _problem(backend, device_type) for backend in BACKENDS}


@functools.cache
def cpu_operator_runs(name: str) -> bool:
    """Whether an operator that every processor has, dmv_fast::NAME, is compiled here."""
    return _problem("cpu", "cpu") is None and hasattr(torch.ops.dmv_fast, name)


def cpu_kernel_runs(name: str) -> bool:
    """Whether an operator that only some processors have, dmv_fast::NAME, runs here (NAME_runs says so)."""
    return cpu_operator_runs(name) and getattr(torch.ops.dmv_fast, f"{name}_runs")()


@functools.cache
def fastest_backend(device_type: str) -> str:
    """The backend that ``auto`` means; warns, once, where anything is slower than the device could be."""
    state = available_backends(device_type)
    candidates = FASTEST_FIRST.get(device_type, ("reference",))
    backend = next(name for name in candidates if state[name] is None)
    if backend == "reference":
        reasons = "; ".join(f"{name}: {state[name]}" for name in candidates if state[name])
        reasons = reasons or f"no fused backend for device type {device_type!r}"
        message = f"dmv_fast.ops uses its slow PyTorch reference ({reasons})"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    elif device_type == "cuda" and state["triton"]:
        message = f"gather, vote and crop run in plain PyTorch on the GPU (triton: {state['triton']})"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    return backend


def check_backend(backend: str, device_type: str) -> str:
    """Resolve ``auto``; ValueError for a backend that is unknown or cannot run on the device."""
    if backend == "auto":
        return fastest_backend(device_type)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of auto, {', '.join(BACKENDS)}")
    problem = available_backends(device_type)[backend]
    if problem is not None:
        raise ValueError(f"backend {backend!r} cannot be used on {device_type}: {problem}")
    return backend
