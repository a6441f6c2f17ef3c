"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with data and weights that are no part of the project; skips where it is not to be had."""
    asked = os.environ.get("DMV_FAST_SHARED")
    folder = Path(asked) if asked else ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data in {folder} (DMV_FAST_SHARED names the folder with data/ and weights/)")
    return folder
