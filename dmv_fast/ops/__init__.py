"""Fused operations: one contract each, several backends, the PyTorch reference beside it."""

from __future__ import annotations

from dmv_fast.ops.backends import available_backends
from dmv_fast.ops.gather import gather_candidates
from dmv_fast.ops.retrieve import retrieve

__all__ = ["available_backends", "gather_candidates", "retrieve"]
