"""What the machine code of the CUDA kernels says without a GPU: registers, memory, instructions a score.

    python benchmarks/cuda_static.py

compiles ``csrc/retrieve_*.cuh`` with nvcc for every architecture and writes ``results/cuda_static.csv``.
Instructions a score are what a thread issues for a whole tile of keys in the middle of the stream from which
nothing enters a list, divided by the logits it has of that tile: the shortest way round the tile loop that
still copies, multiplies and adds exponentials, found in the control flow. A tile with candidates costs more.
"""

from __future__ import annotations

import csv
import heapq
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent.parent / "csrc"
RESULTS = Path(__file__).resolve().parent / "results" / "cuda_static.csv"

# arch -> (multiprocessors of a typical chip, shared memory that a block may have, that a multiprocessor has)
ARCHES = {
    "80": (108, 166912, 167936),
    "86": (84, 101376, 102400),
    "89": (128, 101376, 102400),
    "90a": (132, 232448, 233472),
    "100": (148, 232448, 233472),
    "120": (170, 101376, 102400),
}
ELEMENTS = {"float32": "float", "bfloat16": "BFloat16", "float16": "Float16"}  # dtype -> its type in C++
DEPTHS = (128, 256, 512)
JUMPS = {"BRA", "CALL"}  # before sm_90 ptxas leaves loops by a CALL from which nobody returns


@dataclass
class Row:
    """One kernel on one architecture. Shared memory is planned for 256 x 8192 with D = 256, K = 4."""

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    local_accesses: int
    instructions: int
    tensor_instructions: int
    shared_bytes: int | None = None
    instructions_per_score_d128: float | None = None
    instructions_per_score_d256: float | None = None
    instructions_per_score_d512: float | None = None


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, or Triton's copy of it."""
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    places = [*(f"{home}/bin" for home in homes), None, "/usr/local/cuda/bin"]
    try:
        import triton

        places.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    except ImportError:
        pass
    return next((found for place in places if (found := shutil.which(name, path=place))), None)


def output_of(*command: str | Path, text: str = "") -> str:
    done = subprocess.run(list(map(str, command)), input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def known_arches() -> list[str]:
    listed = output_of(find_tool("nvcc"), "--list-gpu-arch").split()
    return [arch for arch in ARCHES if f"compute_{arch.rstrip('a')}" in listed]


def compile_kernels(arch: str, folder: Path) -> tuple[Path, str]:
    """The kernels without their launcher: the cubin, and what ptxas says."""
    source, cubin = folder / f"kernels_{arch}.cu", folder / f"kernels_{arch}.cubin"
    instances = (f"template __global__ void retrieve_split<{name}>(Call);" for name in ELEMENTS.values())
    lines = ['#include "retrieve_merge.cuh"', "namespace dmv_fast::gpu {", *instances, "}"]
    source.write_text("\n".join(lines) + "\n")
    flags = ["-cubin", "-O3", "-std=c++20", "-Xptxas", "-v", f"-I{CSRC}"]
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    return cubin, output_of(find_tool("nvcc"), *flags, *target, source, "-o", cubin)


def kernel_name(mangled: str) -> str:
    if "merge_splits" in mangled:
        return "merge"
    halves = (dtype for dtype in ("bfloat16", "float16") if ELEMENTS[dtype] in mangled)
    return "split " + next(halves, "float32")


def resources(report: str) -> dict[str, tuple[int, int, int]]:
    """kernel -> registers, stack bytes, spilled bytes, from ``ptxas -v``."""
    spills = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        stack, stores, loads = map(int, re.search(spills, part).groups())
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found[kernel_name(part.split("'")[0])] = (registers, stack, stores + loads)
    return found


class Instruction(NamedTuple):
    address: int
    guarded: bool
    text: str

    @property
    def kind(self) -> str:
        return self.text.split()[0].split(".")[0]

    @property
    def target(self) -> int:
        return int(re.search(r"\b0x[0-9a-f]+", self.text)[0], 16)

    @property
    def barrier(self) -> str:
        """The convergence barrier of a BSSY or BSYNC."""
        return re.search(r"\bB\d+", self.text)[0]


def disassemble(cubin: Path) -> dict[str, list[Instruction]]:
    line = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+ )?\s*([^;]+?)\s*;")
    code = {}
    for part in output_of(find_tool("cuobjdump"), "-sass", cubin).split("Function : ")[1:]:
        name = kernel_name(part.split("\n")[0])
        code[name] = [Instruction(int(a, 16), bool(guard), text) for a, guard, text in line.findall(part)]
    return code


class Graph:
    """The control flow of a kernel: which instructions may follow which."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        index = {instruction.address: i for i, instruction in enumerate(code)}
        meeting: dict[str, int] = {}  # where the threads of a convergence barrier go on
        self.after: list[list[int]] = []
        for i, instruction in enumerate(code):
            onwards = [i + 1] if i + 1 < len(code) else []
            conditional = instruction.guarded or re.match(r"BRA\S*\s+!?U?P\d", instruction.text)
            if instruction.kind == "BSSY":
                meeting[instruction.barrier] = index[instruction.target]
            elif instruction.kind == "BSYNC":
                onwards = [meeting[instruction.barrier]]
            elif instruction.kind == "EXIT" and not conditional:
                onwards = []
            elif instruction.kind in JUMPS:
                onwards = [index[instruction.target], *(onwards if conditional else [])]
            self.after.append(onwards)
        self.before: list[list[int]] = [[] for _ in code]
        for i, onwards in enumerate(self.after):
            for j in onwards:
                self.before[j].append(i)

    def loops_around(self, name: str) -> list[tuple[int, set[int]]]:
        """(head, body) of the loops that hold all instructions of this name, the innermost first."""
        wanted = {i for i, instruction in enumerate(self.code) if instruction.text.startswith(name)}
        loops: dict[int, set[int]] = {}
        for tail, onwards in enumerate(self.after):
            for head in onwards:
                if head > tail:
                    continue
                body, todo = {head, tail}, [tail]
                while todo:
                    new = [i for i in self.before[todo.pop()] if i not in body]
                    body.update(new)
                    todo += new
                loops[head] = loops.get(head, set()) | body
        around = [(head, body) for head, body in loops.items() if wanted <= body]
        return sorted(around, key=lambda loop: len(loop[1]))

    def shortest_round(self, head: int, body: set[int], free: set[int], needed: tuple[str, ...]) -> int:
        """Instructions from the head back to it, past every name in ``needed``; ``free`` ones cost 0."""

        def step(i: int, seen: int) -> tuple[int, int]:
            return i, seen | sum(self.code[i].text.startswith(name) << n for n, name in enumerate(needed))

        start = step(head, 0)
        cost = {start: int(head not in free)}
        queue = [(cost[start], start)]
        while queue:
            spent, (i, seen) = heapq.heappop(queue)
            for j in self.after[i]:
                if j == head and seen == 2 ** len(needed) - 1:
                    return spent
                state, price = step(j, seen), spent + (j not in free)
                if j != head and j in body and price < cost.get(state, 1 << 30):
                    cost[state] = price
                    heapq.heappush(queue, (price, state))
        raise ValueError("no such way round the loop")


def instructions_per_score(code: list[Instruction], element_bytes: int) -> dict[int, float]:
    """depth -> instructions a score.

    The loops are over tiles of keys, in it over chunks of the depth, and in float32 in that over 8 units.
    """
    graph = Graph(code)
    product, scores = ("HMMA", 128) if element_bytes == 2 else ("LDS.128", 64)
    *units, chunks, tiles = graph.loops_around(product)
    products = sum(8 * graph.shortest_round(*loop, set(), (product,)) for loop in units)
    of_units = set().union(*(body for _, body in units))
    chunk = products + graph.shortest_round(*chunks, of_units, (product, "LDGSTS"))
    tile = graph.shortest_round(*tiles, chunks[1], (product, "MUFU.EX2"))
    return {depth: (tile + chunk * (depth * element_bytes // 128)) / scores for depth in DEPTHS}


PLAN_PROGRAM = """
#include "retrieve_plan.h"
#include <cstdio>
int main() {
  using namespace dmv_fast::gpu;
  long bytes, batches, queries, keys, depth, k;
  Device chip;
  while (std::scanf("%ld %ld %ld %ld %ld %ld %d %d %d", &bytes, &batches, &queries, &keys, &depth, &k,
                    &chip.multiprocessors, &chip.shared_per_block, &chip.shared_per_multiprocessor) == 9) {
    const Plan plan = bytes == 2 ? plan_for<2>(batches, queries, keys, depth, k, chip)
                                 : plan_for<4>(batches, queries, keys, depth, k, chip);
    std::printf("%d %d %d %d %d %d\\n", plan.warps, plan.row_tiles, plan.splits, plan.split_keys, plan.stages,
                plan.shared_bytes);
  }
}
"""


class Plan(NamedTuple):
    """``Plan`` of csrc/retrieve_plan.h."""

    warps: int
    row_tiles: int
    splits: int
    split_keys: int
    stages: int
    shared_bytes: int


def plans(calls: list[tuple[str, int, int, int, int, int, int]]) -> list[Plan]:
    """The launcher's own plans for (arch, element bytes, batches, queries, keys, depth, k)."""
    lines = "\n".join(" ".join(map(str, [*call, *ARCHES[arch]])) for arch, *call in calls)
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "plan.cpp", Path(folder) / "plan"
        source.write_text(PLAN_PROGRAM)
        output_of("g++", "-std=c++20", f"-I{CSRC}", source, "-o", program)
        return [Plan(*map(int, line.split())) for line in output_of(program, text=lines).splitlines()]


def measure(arch: str, folder: Path) -> list[Row]:
    cubin, report = compile_kernels(arch, folder)
    code = disassemble(cubin)
    rows = []
    for kernel, (registers, stack, spilled) in sorted(resources(report).items()):
        kinds = [instruction.kind for instruction in code[kernel]]
        local = kinds.count("LDL") + kinds.count("STL")
        row = Row(kernel, arch, registers, stack, spilled, local, len(kinds), kinds.count("HMMA"))
        if kernel != "merge":
            element_bytes = 4 if kernel == "split float32" else 2
            row.shared_bytes = plans([(arch, element_bytes, 1, 256, 8192, 256, 4)])[0].shared_bytes
            for depth, figure in instructions_per_score(code[kernel], element_bytes).items():
                setattr(row, f"instructions_per_score_d{depth}", round(figure, 2))
        rows.append(row)
    return rows


def measure_all(jobs: int = 2) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        tables = pool.map(lambda arch: measure(arch, Path(folder)), known_arches())
        return [row for table in tables for row in table]


def main() -> None:
    for tool in ("nvcc", "cuobjdump"):
        if find_tool(tool) is None:
            raise SystemExit(f"no {tool} in CUDA_HOME, on the PATH, in /usr/local/cuda or in Triton's wheel")
    rows = measure_all()
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(RESULTS.read_text(), end="")


if __name__ == "__main__":
    main()
