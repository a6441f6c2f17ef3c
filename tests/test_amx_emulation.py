"""The AMX kernels' own source on a processor without AMX (amx_emulation/): all tests that want AMX, in a copy
of the package whose module has the tiles in AVX-512."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmv_fast.ops import available_backends

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
HEADER = TESTS / "amx_emulation" / "amx_emulation.h"
# Those that want AMX, or do otherwise where it is.
WANT_AMX = (
    "test_convolution_amx.py", "test_cpu_isa.py", "test_multi.py", "test_retrieve.py",
    "test_retrieve_screened.py", "test_runtime.py", "test_vote_split.py",
)  # fmt: skip
BY_AMX = ("convolve_cpu", "retrieve_screened_cpu", "vote_cpu", "vote_split_cpu")


def why_not() -> str | None:
    """Why the emulation cannot be run here, or need not be."""
    if available_backends("cpu")["cpu"] is not None:
        return "dmv_fast._C is not built here"
    isas = torch.ops.dmv_fast.cpu_isas().split()
    if "amx" in isas:
        return "AMX itself is here"
    if "avx512_bf16" not in isas:
        return "the emulation wants a processor with AVX512_BF16"
    return None if shutil.which("g++") else "the emulation wants g++"


pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that builds and imports as the checkout does, with a module of its own."""
    folder = tmp_path_factory.mktemp("emulated")
    made = shutil.ignore_patterns("_C.*", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "dmv_fast", folder / "dmv_fast", ignore=made, copy_function=os.symlink)
    for name in ("csrc", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "dmv_fast" / "kernels").symlink_to(ROOT / "kernels")
    run(
        folder, "setup.py", "build_ext", "--inplace",
        CFLAGS=f"-include {shlex.quote(str(HEADER))}", DMV_FAST_SKIP_EXT="cuda", DMV_FAST_FORCE_EXT="1",
    )  # fmt: skip
    return folder


def run(folder: Path, *arguments: str, **variables: str) -> str:
    """Python in that folder, whose package comes before the installed one -> what it printed; no failure."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "MAX_JOBS": "2", **variables}
    environment.pop("DMV_FAST_CPU_ISA", None)  # may name another
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done.stdout


def test_everything_that_wants_amx(checkout):
    load = "import torch; from dmv_fast.ops import available_backends; available_backends('cpu')"
    asked = ("cpu_isas", *(f"{name}_runs" for name in BY_AMX))
    answers = ", ".join(f"torch.ops.dmv_fast.{name}()" for name in asked)
    said = run(checkout, "-c", f"{load}; print({answers})")
    assert said.split() == ["amx", *torch.ops.dmv_fast.cpu_isas().split(), *["True"] * len(BY_AMX)]
    files = [str(TESTS / name) for name in WANT_AMX]
    said = run(checkout, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", *files)
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) > 100, said
    assert not re.search("no AMX|no amx|needs AMX|VNNI", said), said
