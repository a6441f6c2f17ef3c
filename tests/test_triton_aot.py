"""The Triton kernels compiled ahead of time for every chip, without a GPU: what the code is like."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter nothing is compiled", allow_module_level=True)

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "triton_static.py"
spec = importlib.util.spec_from_file_location("triton_static", SCRIPT)
static = importlib.util.module_from_spec(spec)
spec.loader.exec_module(static)

MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
CEILING = 16.0  # what a score may cost at D = 256 where the matrix unit is fastest for its issue rate (9.0)

every_chip = pytest.mark.parametrize("arch", sorted(MATRIX))


def tiles_for(arch: int, m: int, n: int, d: int, k: int):
    return static.choose_tiles(arch, 2, 1, m, n, d, k, static.PROCESSORS[arch])


def assert_fits(arch: int, compiled) -> None:
    assert compiled.stack == 0 and compiled.local_accesses == 0, f"spills: {compiled}"
    assert compiled.shared <= static.SHARED_LIMIT[arch], f"too much shared memory: {compiled}"


@every_chip
def test_scan(arch):
    compiled = static.scan_static(arch, tiles_for(arch, 1024, 32768, 256, 4), 256)
    assert_fits(arch, compiled)
    assert compiled.matrix == MATRIX[arch]
    assert compiled.instructions_per_score <= CEILING


@pytest.mark.parametrize(
    ("arch", "m", "n", "d", "k"),
    [
        (90, 256, 8192, 256, 4),
        (90, 1024, 32768, 512, 32),
        (80, 1024, 32768, 512, 32),
        (86, 1024, 32768, 512, 32),
        (80, 1024, 32768, 64, 4),
    ],
)
def test_scan_at_other_sizes(arch, m, n, d, k):
    compiled = static.scan_static(arch, tiles_for(arch, m, n, d, k), d)
    assert_fits(arch, compiled)
    assert compiled.matrix == MATRIX[arch]


def touched_in_flight(ptx: str) -> list[str]:
    """What names a register of a wgmma's sum between that wgmma and the wait for all there are."""
    products = re.findall(r"wgmma\.mma_async\S* \{([^}]*)\}", ptx)
    sums = {register.strip() for product in products for register in product.split(",")}
    in_flight, found = False, []
    for line in map(str.strip, ptx.splitlines()):
        if "wgmma.mma_async" in line:
            in_flight = True
        elif "wgmma.wait_group" in line:
            in_flight &= not line.endswith(" 0;")
        elif in_flight and not line.startswith("//") and sums & set(re.findall(r"%[rf]\w*\d+", line)):
            found.append(line)
    return found


@pytest.mark.parametrize(("m", "n"), [(256, 8192), (1024, 32768)])
def test_no_sum_is_touched_while_a_product_is_under_way(m, n):
    """The scan clears its sums in the loop that multiplies: only the compiler's order makes that safe."""
    tiles = tiles_for(90, m, n, 256, 4)
    constants = static.scan_constants(256, tiles, True)
    compiled = static.compile_for(static.scan_kernel, 90, constants, tiles.warps, tiles.stages, "bf16")
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async" in ptx and touched_in_flight(ptx) == []


def test_a_sum_that_is_touched_is_seen():
    product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2}, %rd1, %rd2, 1, 1, 1;"
    touch, wait = "mov.b32 %r2, 0f00000000;", "wgmma.wait_group.sync.aligned {};"
    assert touched_in_flight("\n".join([product, wait.format(1), touch, wait.format(0), touch])) == [touch]


@every_chip
def test_select_and_gather(arch):
    tiles = tiles_for(arch, 1024, 32768, 256, 4)
    assert_fits(arch, static.select_static(arch, tiles, 256, 4, 32768))
    assert_fits(arch, static.gather_static(arch, 4, 256))


@pytest.mark.parametrize(("arch", "k"), [(90, 32), (100, 8)])
def test_select_many(arch, k):
    assert_fits(arch, static.select_static(arch, tiles_for(arch, 1024, 32768, 256, k), 256, k, 32768))


def test_float16_and_float32_compile_too():
    tiles = static.choose_tiles(80, 4, 1, 256, 8192, 128, 4, 108)
    constants = static.scan_constants(128, tiles, False)
    compiled = static.compile_for(static.scan_kernel, 80, constants, tiles.warps, tiles.stages, "fp32")
    assert static.measure(compiled).matrix == ""
    assert static.scan_static(80, tiles_for(80, 256, 8192, 128, 4), 128, "fp16").matrix == "HMMA"


def test_instructions_are_counted_round_the_hot_loop():
    """A loop with a fold that is skipped, a waiting loop inside, and another loop that does not count."""
    lines = [
        ("", "MOV", ""),  # 0x00
        ("", "HMMA", ""),  # 0x10, a loop without exp2
        ("@P0", "BRA", " 0x10"),  # 0x20
        ("", "IADD3", ""),  # 0x30, the hot loop
        ("", "SYNCS", ""),  # 0x40, waits
        ("@!P2", "BRA", " 0x40"),  # 0x50
        ("", "HMMA", ""),  # 0x60
        ("@P1", "BRA", " 0xa0"),  # 0x70, past the fold
        ("", "MUFU.EX2", ""),  # 0x80
        ("", "STG", ""),  # 0x90
        ("", "ISETP", ""),  # 0xa0
        ("@P0", "BRA", " 0x30"),  # 0xb0
        ("", "EXIT", ""),  # 0xc0
    ]
    code = [static.Instruction(16 * i, *line) for i, line in enumerate(lines)]
    assert static.loop_length(code) == (7, 9)
