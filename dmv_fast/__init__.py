"""DMV, tracked fast: part-level dense memory and voting-based retrieval for visual object tracking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["FastDMVTracker", "TrackResult", "load_model"]

if TYPE_CHECKING:
    from dmv_fast.tracker import FastDMVTracker, TrackResult
    from dmv_fast.weights import load_model


def __getattr__(name: str) -> Any:
    # Lazy: `dmv-fast --help` need not wait for PyTorch.
    if name in ("FastDMVTracker", "TrackResult"):
        from dmv_fast import tracker

        return getattr(tracker, name)
    if name == "load_model":
        from dmv_fast.weights import load_model

        return load_model
    if name == "__version__":
        from importlib import metadata

        return metadata.version("dmv-fast")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:  # what is loaded lazily is completed by an editor or a notebook all the same
    return sorted({*globals(), *__all__, "__version__"})
