"""The CUDA kernels as nvcc compiles them for every architecture, without a GPU, and the launcher's plans."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import cuda_static  # noqa: E402

needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


@pytest.fixture(scope="module")
def rows():
    for tool in ("nvcc", "cuobjdump"):
        if cuda_static.find_tool(tool) is None:
            pytest.skip(f"no {tool}")
    return cuda_static.measure_all()


@needs_gxx
def test_everything_stays_in_registers(rows):
    assert {row.arch for row in rows} == set(cuda_static.known_arches()) >= {"80", "86", "89", "90a"}
    for row in rows:
        assert row.stack_bytes == row.spill_bytes == row.local_accesses == 0, row
        assert row.registers <= 255, row


@needs_gxx
def test_instructions_a_score(rows):
    """At D = 256 and its tensor cores' peak, which mma.sync stays under, sm_90 has 16 issue slots a score."""
    for row in rows:
        half = row.kernel in ("split bfloat16", "split float16")
        assert (row.tensor_instructions > 0) == half, row
        if half:
            assert row.instructions_per_score_d256 <= (16.5 if row.arch != "120" else 18.5), row


SIZES = [
    (batches, queries, keys, depth, k)
    for batches, queries, keys in [
        (1, 256, 8192), (1, 1024, 32768), (3, 576, 18432), (1, 1, 32768), (64, 33, 1), (1, 7, 0),
    ]
    for depth, k in [(1, 1), (64, 32), (256, 4), (256, 32), (512, 32)]
]


@needs_gxx
@pytest.mark.parametrize("arch", cuda_static.ARCHES)
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_plans_fit_the_chip_and_cover_the_keys(arch, element_bytes):
    _, per_block, _ = cuda_static.ARCHES[arch]
    plans = cuda_static.plans([(arch, element_bytes, *size) for size in SIZES])
    for (_, queries, keys, _, _), plan in zip(SIZES, plans, strict=True):
        assert plan.shared_bytes <= per_block and 2 <= plan.stages <= 4
        assert 1 <= plan.warps <= (4 if element_bytes == 2 else 2)
        assert 0 <= plan.row_tiles * plan.warps * 32 - queries < 32 * plan.row_tiles + 32
        assert plan.splits <= 127 and plan.split_keys % (128 if element_bytes == 2 else 64) == 0
        assert plan.splits == -(-keys // plan.split_keys)


@needs_gxx
def test_the_trackers_sizes_fill_a_hopper():
    calls = [("90a", 2, 1, 256, 8192, 256, 4), ("90a", 2, 1, 1024, 32768, 256, 4)]
    small, large = cuda_static.plans(calls)
    assert small.row_tiles * small.splits == 128  # of 132 multiprocessors
    assert large.row_tiles * large.splits == 256  # two a multiprocessor
    assert 2 * (large.shared_bytes + 1024) <= 233472
