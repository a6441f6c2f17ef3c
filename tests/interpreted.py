"""Triton's kernels under its interpreter: a file of tests runs itself again, in a process of its own.

Triton reads TRITON_INTERPRET as a kernel is defined: a process has all of them interpreted, or none.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_again(path: str) -> None:
    """All tests of a file, interpreted; skips with their reasons where all of them do."""
    one_thread = {"OMP_NUM_THREADS": "1"}  # ties of random networks fall one way, whatever the machine
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", **one_thread}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", path]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip("; ".join(line for line in run.stdout.splitlines() if line.startswith("SKIPPED")))
    assert run.returncode == 0, run.stdout + run.stderr


def skip_without_loops() -> None:
    """Skips the whole file where the interpreter is broken."""
    triton = pytest.importorskip("triton")
    versions = [tuple(int(part) for part in m.__version__.split(".")[:2]) for m in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 cannot run loops with NumPy 2.4", allow_module_level=True)
