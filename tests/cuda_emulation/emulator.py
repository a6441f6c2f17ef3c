"""Builds and drives runner.cpp: the CUDA retrieval of ``csrc/`` on a CPU, its own source compiled by g++."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from benchmarks.cuda_static import Plan  # noqa: E402

CSRC = HERE.parent.parent / "csrc"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# As nvcc does it, where this processor can: a product and a sum in one rounding.
CPU = Path("/proc/cpuinfo")
FUSES = CPU.exists() and " fma " in CPU.read_text()
FUSED = ["-fexpensive-optimizations", "-mfma", "-ffp-contract=fast"] if FUSES else []
FLAGS = {
    "address": ["-O1", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer", *FUSED],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}


class Device(NamedTuple):
    """What the plan is made for; shared memory in bytes."""

    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int


H200 = Device(132, 232448, 233472)
RTX4090 = Device(128, 101376, 102400)


def one_block_device(query: Tensor, k: int, stages: int = 4) -> Device:
    """A chip with room for one block with that many stages: all keys are one split, tile after tile."""
    size = query.element_size()
    tile_keys, warps_allowed = (128, 4) if size == 2 else (64, 2)
    all_warps = -(-query.shape[1] // 32)
    warps = -(-all_warps // -(-all_warps // warps_allowed))
    chunks = -(-query.shape[2] * size // 128)
    shared = warps * 32 * (chunks * 128 + k * 8) + stages * tile_keys * 128
    return Device(1, shared, shared + 1024)


def build(target: Path, flavour: str, csrc: Path = CSRC) -> Path:
    """Compiles the runner with the kernels of ``csrc``."""
    command = ["g++", "-std=c++20", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"]
    command += [*FLAGS[flavour], f"-I{csrc}", f"-I{HERE}", str(HERE / "runner.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def _command(program: Path) -> list[str]:
    """Without random addresses where that is allowed: some of those keep ThreadSanitizer from starting."""
    fixed = ["setarch", "-R"]
    if not shutil.which("setarch") or subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    return [*fixed, str(program)]


def starts(program: Path) -> bool:
    return subprocess.run(_command(program), stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


class Emulator:
    """A running runner. ``retrieve`` has the signature of ``torch.ops.dmv_fast.retrieve_cuda``."""

    def __init__(self, program: Path) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
        self._process = subprocess.Popen(_command(program), **pipes, env={**os.environ, **options})
        self.device = H200
        self.backwards = False
        self.plan: Plan | None = None
        self.offered = 0  # logits that passed the filter and came before a list, all rows together

    def retrieve(self, query: Tensor, keys: Tensor, k: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """(scores, indices); RuntimeError with the runner's last words where it dies."""
        batch, queries, depth = query.shape
        case = struct.pack(
            "<8q12i",
            *_layout(query), *_layout(keys),
            DTYPES.index(query.dtype), batch, queries, keys.shape[1], depth, k,
            valid is not None, self.backwards, *self.device, 0,
        )  # fmt: skip
        try:
            self._process.stdin.write(case + _elements(query) + _elements(keys))
            self._process.stdin.write(b"" if valid is None else valid.numpy().tobytes())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        size = batch * queries * k
        *plan, self.offered = struct.unpack("<6iq", self._read(32))
        self.plan = Plan(*plan)
        scores = torch.from_numpy(np.frombuffer(self._read(4 * size), np.float32).copy())
        indices = torch.from_numpy(np.frombuffer(self._read(4 * size), np.int32).copy())
        return scores.view(batch, queries, k), indices.view(batch, queries, k)

    def close(self) -> str:
        """Ends the runner; what it said on stderr."""
        return self._process.communicate()[1].decode()

    def _read(self, size: int) -> bytes:
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise RuntimeError(f"the emulated kernel failed: {self.close()[:3000]}")
        return data


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last, those between rows included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _layout(tensor: Tensor) -> tuple[int, int, int, int]:
    assert tensor.shape[2] == 1 or tensor.stride(2) == 1
    return _span(tensor), tensor.stride(0), tensor.stride(1), tensor.data_ptr() % 16


def _elements(tensor: Tensor) -> bytes:
    flat = tensor.as_strided((_span(tensor),), (1,))
    return flat.view(torch.int16 if tensor.element_size() == 2 else torch.int32).numpy().tobytes()
