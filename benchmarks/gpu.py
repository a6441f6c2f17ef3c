"""Everything that needs an NVIDIA GPU, in one go of at most 9 minutes, without network: `make gpu`.

    python3 benchmarks/gpu.py                  all steps, the most precious first
    python3 benchmarks/gpu.py --only tests     some steps (their names are in the table at the end)
    python3 benchmarks/gpu.py --device cpu     the same commands on a CPU, as far as they go there, cut short

It uses the Python it runs in, with the packages that are there, and builds dmv_fast into it. Every step has a
time box and a log of its own; one that fails stops no other. Tables, plots and logs go to
benchmarks/results/<gpu>/; where $OUT names a folder, summary.txt and results.tar.gz are kept there, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 530
LEAST_S = 5  # a step is not begun with less time left


@dataclass
class Step:
    """A command and how long it may take; `state` and `took` are what came of it."""

    name: str
    limit: int
    command: list[str]
    together: str = ""
    """Neighbours of the same name here run at the same time."""
    environment: dict[str, str] = field(default_factory=dict)
    state: str = "not run"
    took: float = 0.0
    last: str = ""
    """The last line that it printed."""


def steps(device: str, results: Path) -> list[Step]:
    """In the order in which they matter."""
    quick = device == "cpu"
    python = [sys.executable]
    # One process a core spares most of the wait for Triton's compiler.
    spread = ["-n", "1" if quick else "4"] if importlib.util.find_spec("xdist") else []
    # Each test's line as it ends, and where one hangs: a step that is cut off has said what it found.
    pytest = [*python, "-m", "pytest", "-v", "-rf", "--durations=15", "-o", "faulthandler_timeout=100"]
    pytest += ["-p", "no:cacheprovider", *spread]
    # --debug: a failure says where it was.
    bench = [*python, "-m", "dmv_fast", "bench", "--debug", "--device", device, "--output", str(results)]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    sanitize = [*python, "benchmarks/sanitize.py", "--device", device]
    watch = [sanitizer, "--error-exitcode", "9", "--tool"]
    # What libraries try and do without is no fault of the kernels.
    only = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sections = "k,path,targets,memory,network,stages"  # the others' trackers run on the CPU
    checks = [
        Step(
            f"sanitizer {tool}", 170,
            sanitize if quick else [*watch, tool, *only[tool], *sanitize],
            "tests", uncached,
        )
        for tool in ("memcheck", "racecheck")
    ]  # fmt: skip
    return [
        Step("build", 150, [*python, "benchmarks/gpu.py", "--build", "--device", device]),
        Step("doctor", 60, [*python, "-m", "dmv_fast.doctor"], "tests"),
        Step(
            "tests of the kernels", 170, [*pytest, "tests/test_triton_gpu.py", "tests/test_cuda_gpu.py"],
            "tests",
        ),
        Step("tests of the frame", 170, [*pytest, "tests/test_frame_gpu.py"], "tests"),
        Step(
            "tests of the operators", 170,
            [*pytest, "tests/test_retrieve.py", "tests/test_gather.py", "-k", "cuda or triton"], "tests",
        ),
        *checks,
        Step(
            "retrieval", 130,
            [
                *python, "benchmarks/retrieve.py", "--device", device, "--rounds", "2" if quick else "4",
                "--output", str(results.parent), *(["--quick"] if quick else []),
            ],
        ),
        Step(
            "frame", 120,
            [*bench, "--frames", "2" if quick else "200", "--only", "stages" if quick else sections],
        ),
        Step("endurance", 50, [*bench, "--endurance", "20" if quick else "10000"]),
        Step(
            "frame stages", 70,
            [
                *python, "benchmarks/frame_stages.py", "--device", device,
                "--output", str(results / "stages.csv"), *(["--quick"] if quick else []),
            ],
        ),
        *([] if quick else [Step("peak", 50, [*bench, "--only", "peak"])]),
    ]  # fmt: skip


def build(device: str) -> int:
    """dmv_fast into this Python; where pip cannot, the extension in place and the kernels linked."""
    environment = dict(os.environ)
    if device != "cpu":
        environment["TORCH_CUDA_ARCH_LIST"] = architecture()  # an image's own names every card there is
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-v"]
    if subprocess.run([*pip, "-e", "."], cwd=ROOT, env=environment).returncode == 0:
        return left_out(device)
    print("pip could not install it: built in place instead", flush=True)
    link_kernels()
    in_place = [sys.executable, "setup.py", "egg_info", "build_ext", "--inplace"]
    return subprocess.run(in_place, cwd=ROOT, env=environment).returncode or left_out(device)


def link_kernels() -> None:
    """What an installation does: kernels/ as dmv_fast.kernels."""
    link = ROOT / "dmv_fast" / "kernels"
    if not link.exists():
        link.symlink_to("../kernels")


def left_out(device: str) -> int:
    """1 where the CUDA part should be there and is not: its tests would skip, which looks like passing."""
    state = json.loads((ROOT / "dmv_fast" / "_build.json").read_text()).get("cuda", "no record")
    print(f"CUDA part: {state}", flush=True)
    return int(device != "cpu" and state != "built")


def architecture() -> str:
    """Of the first GPU as nvcc wants it: compiling for it alone takes a sixth of the time."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if major == 9 else ''}"


def gpu_name() -> str:
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        name = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown-gpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_group(group: list[Step], logs: Path, left: float) -> None:
    """All steps of a group at once, each until its limit; what they leave running is ended."""
    running = []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}
    if (ROOT / "shared" / "data").is_dir():  # in the tree where it travels to a lent machine
        environment.setdefault("DMV_FAST_SHARED", str(ROOT / "shared"))
    if len(group) > 1:  # a dozen processes of as many threads as there are cores would wait for each other
        environment.setdefault("OMP_NUM_THREADS", "1")
    for step in group:
        print(f"---- {step.name}: {' '.join(step.command)}", flush=True)
        log = open(logs / f"{step.name.replace(' ', '-')}.log", "w")
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment | step.environment, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            step.state, step.last = "FAILED", str(error)
            continue
        running.append((step, process, log))
    began = time.monotonic()
    while running:
        time.sleep(0.1)
        for entry in list(running):
            step, process, log = entry
            step.took = time.monotonic() - began
            late = step.took > min(step.limit, left)
            if process.poll() is None and not late:
                continue
            if late:
                end_session(process)
            code = process.wait()
            step.state = "TIME UP" if late else "passed" if code == 0 else f"FAILED ({code})"
            if not late and code == 5 and "pytest" in step.command:
                step.state = "passed"  # nothing was collected, or all of it skipped
            log.close()
            lines = Path(log.name).read_text(errors="replace").strip().splitlines()
            step.last = lines[-1].strip("= ")[:100] if lines else ""
            print(f"     {step.name}: {step.state}, {step.took:.0f} s; {step.last}", flush=True)
            if step.state != "passed":
                print("\n".join(f"     | {line}" for line in lines[-15:]), flush=True)
            running.remove(entry)


def end_session(process: subprocess.Popen) -> None:
    # At the first, pytest says what failed and Python where it was.
    for sign, patience in ((signal.SIGINT, 8), (signal.SIGTERM, 3), (signal.SIGKILL, 3)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def summary(steps: list[Step], began: float) -> str:
    lines = [f"{step.name:<24} {step.state:<12} {step.took:6.0f} s  {step.last}" for step in steps]
    return "\n".join([*lines, f"{'all':<24} {'':<12} {time.monotonic() - began:6.0f} s"]) + "\n"


def keep(results: Path, text: str) -> None:
    """Where somebody fetches it, after each group: what comes later may be cut off."""
    (results / "summary.txt").write_text(text)
    if not os.environ.get("OUT"):
        return
    out = Path(os.environ["OUT"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.txt").write_text(text)
    part = out / "results.tar.gz.part"
    with tarfile.open(part, "w:gz") as archive:
        archive.add(results, results.name)
    part.replace(out / "results.tar.gz")


def main() -> int:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", help="steps whose name contains one of these, separated by commas")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/<gpu>, on a CPU build/gpu")
    parser.add_argument("--build", action="store_true", help="build alone, here and now")
    options = parser.parse_args()
    if options.build:
        return build(options.device)
    results = options.results or (
        ROOT / "build" / "gpu" if options.device == "cpu" else ROOT / "benchmarks" / "results" / gpu_name()
    )
    logs = results / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    todo = steps(options.device, results)
    if options.only:
        todo = [s for s in todo if any(word in s.name for word in options.only.split(",") if word)]
    groups: list[list[Step]] = []
    for step in todo:
        if groups and step.together and groups[-1][0].together == step.together:
            groups[-1].append(step)
        else:
            groups.append([step])
    for group in groups:
        left = BUDGET_S - (time.monotonic() - began)
        if left >= LEAST_S:
            run_group(group, logs, left)
        if group[0].name == "build" and group[0].state != "passed":
            link_kernels()  # cut off or failed: without them all that follows would take the slow path
        keep(results, summary(todo, began))
    print(f"\n{summary(todo, began)}\nin {results}")
    return 0 if all(step.state == "passed" for step in todo) else 1


if __name__ == "__main__":
    sys.exit(main())
