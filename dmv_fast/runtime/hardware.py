"""What a network runs on, where the code differs by it."""

from __future__ import annotations

import os

import torch

from dmv_fast.ops import available_backends


def on_gpu(device: torch.device) -> bool:
    """Whether a frame is laid out for an NVIDIA GPU (tests say so of the CPU, to run the same code there)."""
    return device.type == "cuda"


def triton_runs(device: torch.device) -> bool:
    """Whether the Triton kernels of a frame run there; without them it is plain PyTorch."""
    return on_gpu(device) and available_backends("cuda")["triton"] is None


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
