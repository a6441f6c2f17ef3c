"""The caller's own PyTorch settings, kept from what we compute: default dtype and device, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def our_defaults(device: torch.device) -> Iterator[None]:
    """Tensors are made as in a fresh PyTorch, float32 on the CPU where nothing else is said; no autocast.

    The default dtype is the whole process's: for what is built once, not for every frame.
    """
    dtype = torch.get_default_dtype()
    with torch.device("cpu"), torch.autocast(device.type, enabled=False):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """Without gradients, and without the caller's autocast."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield
