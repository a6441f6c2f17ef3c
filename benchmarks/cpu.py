"""Every benchmark of a machine without a GPU, results into benchmarks/results/MACHINE/ (`make bench`).

    python benchmarks/cpu.py                        a quarter of an hour on two cores, nothing else running
    python benchmarks/cpu.py --nano-dir ONNX        OpenCV's TrackerNano among the peers

Each part runs in a process of its own and leaves its files as it ends; one that fails does not stop the rest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from retrieve import RESULTS, folder_of, machine

from dmv_fast.runtime.convolution import int16_runs
from dmv_fast.runtime.precision import without_auto

HERE = Path(__file__).parent


def parts(folder: Path, nano_dir: Path | None) -> dict[str, list[str]]:
    """name -> what Python is called with."""
    bench = ["-m", "dmv_fast", "bench", "--device", "cpu", "--output", str(folder)]
    nano = ["--nano-dir", str(nano_dir)] if nano_dir else []
    other = "float32" if without_auto("auto", torch.device("cpu")) == "int16" else "int16"
    again = ["--dtype", other, "--only", "k,memory,network,targets", "--output", str(folder / other)]
    return {
        "frame": [*bench, *nano],
        **({other: [*bench, *again]} if int16_runs() else {}),
        "endurance": [*bench, "--endurance"],
        "retrieve": [
            str(HERE / "retrieve.py"), "--device", "cpu", "--rounds", "4", "--output", str(folder.parent)
        ],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nano-dir", type=Path, help="folder of the ONNX files of OpenCV's TrackerNano")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the machine's folder is made")
    args = parser.parse_args()
    folder = args.output.resolve() / folder_of(machine("cpu"))
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"the load is {load:.1f}: something else is running, and the times will tell of that too")
    failed, began = [], time.perf_counter()
    for name, command in parts(folder, args.nano_dir).items():
        start = time.perf_counter()
        if subprocess.run([sys.executable, *command], cwd=HERE.parent).returncode:
            failed.append(name)
        print(f"---- {name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(f"all: {time.perf_counter() - began:.0f} s, in {folder}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
