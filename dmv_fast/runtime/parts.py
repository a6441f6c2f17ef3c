"""A float32 number as two of bfloat16, v = v_0 + v_1 within 2^-17 |v|: what large products are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def bfloat16_parts(x: Tensor) -> Tensor:
    """float32 (...) -> (2, ...) bfloat16; the second is what the first, rounded, leaves."""
    x = x.detach().float()
    first = x.bfloat16()
    return torch.stack([first, (x - first.float()).bfloat16()])
