"""What the Triton kernels compile to, chip by chip, without a GPU.

    python -m benchmarks.triton_static [--arch 80 90 ...] [--out benchmarks/results/triton_static.csv]

Registers, stack, shared memory, and instructions a score, counted in the machine code round the loop that
holds the matrix instructions, a whole tile with its fold: issue slots, not time. With a matrix unit of F
multiply-adds a clock and 128 lanes issued a clock, a score leaves 128 D / F slots: at D = 256 16 on 9.0 (F
= 2048), 8 on 10.0, 32 on 8.0, 64 or more on the rest. Rows of other Triton versions in the file are kept.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from dmv_fast.kernels.gather import gather_constants, gather_kernel, gather_warps
from dmv_fast.kernels.scan import scan_constants, scan_kernel
from dmv_fast.kernels.select import select_constants, select_kernel, select_warps
from dmv_fast.kernels.tiles import Tiles, choose_tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that a block may have.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
SIZES = ((256, 8192), (1024, 32768))  # M, N
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*?);")


class Static(NamedTuple):
    """One compiled kernel."""

    registers: int
    stack: int  # bytes
    local_accesses: int  # loads and stores of spilled registers
    shared: int  # bytes
    matrix: str  # the matrix instruction, "" without
    instructions_per_score: float | None


class Instruction(NamedTuple):
    address: int
    guard: str
    name: str
    operands: str


def compile_for(kernel, arch: int, constants: dict[str, Any], warps: int, stages: int, element: str = "bf16"):
    """Compile ahead of time as the launcher would for aligned inputs."""
    types = {"valid_ptr": "*i32", "indices_ptr": "*i32"}
    types |= dict.fromkeys(("group_max_ptr", "tile_max_ptr", "tile_sum_ptr", "scores_ptr"), "*fp32")
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, f"*{element}") if name.endswith("_ptr") else "i32"
        if name.endswith(("_ptr", "_stride")):
            aligned[(position,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )


def disassemble(compiled) -> tuple[str, list[Instruction]]:
    """(resource usage, machine code) as the tools in Triton's wheel print them."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            command = [cuobjdump, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = dump("--dump-resource-usage"), dump("-sass")
    found = (INSTRUCTION.match(line) for line in sass.splitlines())
    return usage, [Instruction(int(m[1], 16), m[2] or "", m[3], m[4]) for m in found if m]


def measure(compiled, scores: int = 0, steps: int = 1, threads: int = 0) -> Static:
    """scores: of a tile, 0 for a kernel without one; steps: slices of D to a tile."""
    usage, code = disassemble(compiled)
    cost = None
    if scores:
        shortest, longest = loop_length(code)
        cost = round((shortest * (steps - 1) + longest) * threads / scores, 2)
    return Static(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        local_accesses=sum(i.name.startswith(("LDL", "STL")) for i in code),
        shared=compiled.metadata.shared,
        matrix=next((i.name.split(".")[0] for i in code if i.name.startswith(MATRIX)), ""),
        instructions_per_score=cost,
    )


def loop_length(code: list[Instruction]) -> tuple[int, int]:
    """Instructions once round the hot loop, by the shortest and by the longest way.

    The hot loop is the strongly connected part of the control flow with both matrix instructions and exp2
    in it; its shortest way round is a slice of D alone, its longest a slice and the fold of the tile.
    """
    blocks, successors = control_flow(code)
    predecessors: dict[int, list[int]] = {b: [] for b in blocks}
    for block, nexts in successors.items():
        for after in nexts:
            predecessors[after].append(block)
    found = []
    for head in blocks:
        if not any(code[i].name.startswith(MATRIX) for i in blocks[head]):
            continue
        loop = reachable(head, successors) & reachable(head, predecessors)
        if any(code[i].name.startswith("MUFU.EX2") for b in loop for i in blocks[b]):
            found.append(way_round(head, loop, blocks, successors))
    return min(found)


def control_flow(code: list[Instruction]) -> tuple[dict[int, range], dict[int, list[int]]]:
    """Basic blocks by their first instruction, and where each goes next."""
    position = {instruction.address: i for i, instruction in enumerate(code)}
    jumps, leaders = {}, {0}
    for i, instruction in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", instruction.operands)
        if instruction.name.startswith("BRA") and target and int(target[1], 16) in position:
            jumps[i] = position[int(target[1], 16)]
            leaders |= {jumps[i], i + 1}
        elif instruction.name.startswith(("EXIT", "RET")):
            leaders.add(i + 1)
    starts = sorted(leader for leader in leaders if leader < len(code))
    blocks = {a: range(a, b) for a, b in zip(starts, starts[1:] + [len(code)], strict=True)}
    successors = {}
    for start, block in blocks.items():
        last = code[block[-1]]
        leaves = last.name.startswith(("BRA", "EXIT", "RET"))
        stays = not leaves or last.guard or re.match(r"\s+!?U?P\d", last.operands)
        onwards = [block[-1] + 1] if stays and block[-1] + 1 in blocks else []
        successors[start] = onwards + ([jumps[block[-1]]] if block[-1] in jumps else [])
    return blocks, successors


def reachable(start: int, edges: dict[int, list[int]]) -> set[int]:
    seen: set[int] = set()
    pending = [start]
    while pending:
        for after in edges[pending.pop()]:
            if after not in seen:
                seen.add(after)
                pending.append(after)
    return seen


def way_round(
    head: int, loop: set[int], blocks: dict[int, range], successors: dict[int, list[int]]
) -> tuple[int, int]:
    """Shortest and longest way from head back to head; waiting loops inside are passed once."""
    lengths: dict[int, tuple[int, int] | None] = {}

    def visit(block: int) -> tuple[int, int] | None:
        lengths[block] = None  # on the way: a jump back here is a waiting loop
        ways = [(0, 0)] if head in successors[block] else []
        for after in successors[block]:
            if after in loop and after != head:
                way = lengths[after] if after in lengths else visit(after)
                ways += [way] if way else []
        size = len(blocks[block])
        lengths[block] = (size + min(w[0] for w in ways), size + max(w[1] for w in ways)) if ways else None
        return lengths[block]

    way = visit(head)
    if way is None:
        raise ValueError("the hot loop does not close")
    return way


def scan_static(arch: int, tiles: Tiles, d: int, element: str = "bf16") -> Static:
    constants = scan_constants(d, tiles, True)
    compiled = compile_for(scan_kernel, arch, constants, tiles.warps, tiles.stages, element)
    return measure(compiled, tiles.rows * tiles.columns, -(-d // tiles.depth), tiles.warps * 32)


def select_static(arch: int, tiles: Tiles, d: int, k: int, n: int) -> Static:
    count = -(-n // tiles.columns)
    constants = select_constants(d, k, count, tiles, True)
    return measure(compile_for(select_kernel, arch, constants, select_warps(count), 1))


def gather_static(arch: int, k: int, width: int) -> Static:
    return measure(compile_for(gather_kernel, arch, gather_constants(k, width), gather_warps(k, width), 1))


def rows_for(arch: int) -> list[dict[str, Any]]:
    """The table's rows of one chip."""
    rows = []

    def add(kernel: str, shape: str, tiles: Tiles | None, warps: int, static: Static) -> None:
        sizes = f"{tiles.rows}x{tiles.columns}x{tiles.depth}/{tiles.group}" if tiles else ""
        row = {"triton": triton.__version__, "sm": arch, "kernel": kernel, "shape": shape, "tile": sizes}
        rows.append(row | {"warps": warps} | static._asdict())

    def tiles_for(m: int, n: int, d: int, k: int) -> Tiles:
        return choose_tiles(arch, 2, 1, m, n, d, k, PROCESSORS[arch])

    seen: set[tuple[Tiles, int]] = set()
    large = [(*SIZES[-1], d, k) for d in (64, 128, 256, 512) for k in (4, 32)]
    for m, n, d, k in [(*SIZES[0], 256, 4), *large]:
        tiles = tiles_for(m, n, d, k)._replace(splits=0)
        if (tiles, d) not in seen:
            seen.add((tiles, d))
            add("scan", f"M {m} N {n} D {d} K {k}", tiles, tiles.warps, scan_static(arch, tiles, d))
    m, n = SIZES[-1]
    for k in (1, 4, 8, 32):
        tiles = tiles_for(m, n, 256, k)._replace(splits=0)
        warps = select_warps(-(-n // tiles.columns))
        add("select", f"M {m} N {n} D 256 K {k}", tiles, warps, select_static(arch, tiles, 256, k, n))
    add("gather", "K 4 C 256", None, gather_warps(4, 256), gather_static(arch, 4, 256))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "triton_static.csv")
    args = parser.parse_args()
    rows = []
    for arch in args.arch:
        for row in rows_for(arch):
            print(*row.values(), flush=True)
            rows.append(row)
    if args.out.exists():
        with args.out.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["triton"] != triton.__version__ or int(row["sm"]) not in args.arch:
                    rows.append(row)
    rows.sort(key=lambda row: (row["triton"], int(row["sm"])))
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.setrecursionlimit(10000)
    main()
