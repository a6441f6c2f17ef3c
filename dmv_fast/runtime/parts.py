"""What large products of float32 numbers are made of, where a processor multiplies smaller ones faster."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Products = Literal["own", "bfloat16x3", "int16"]
"""Themselves; two bfloat16 parts of each, within 2^-17; 16-bit whole numbers times a row's scale."""


def bfloat16_parts(x: Tensor) -> Tensor:
    """float32 (...) -> (2, ...) bfloat16; the second is what the first, rounded, leaves."""
    x = x.detach().float()
    first = x.bfloat16()
    return torch.stack([first, (x - first.float()).bfloat16()])
