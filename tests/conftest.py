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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A DMV18 with random weights: enough for everything but accuracy."""
    import torch  # here: most tests of the command line do without

    from dmv_fast.model.dmv import DMV, DMVConfig
    from dmv_fast.weights import save_model

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_model(DMV(DMVConfig()), path)
    return path


@pytest.fixture(scope="session")
def weights(checkpoint) -> str:
    """The same as the trackers take it."""
    return str(checkpoint)
