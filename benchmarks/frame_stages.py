"""Where a frame's time goes on a GPU: each stage as a CUDA graph of its own, beside the whole frame's.

    python3 benchmarks/frame_stages.py [--output stages.csv]

`dmv-fast bench` waits for the device after each stage, which costs more than most stages do; here a stage is
replayed on what a frame left in its buffers, so its time is what it takes within the frame's graph. "host" is
a frame as a user has it: image in, box out. The variants show what each choice is worth. On a CPU: calls.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from dmv_fast.evaluation.speed import Clip, synthetic_clip
from dmv_fast.model.pick import PickConfig
from dmv_fast.runtime import convolution, cuda
from dmv_fast.runtime.frame import FrameStep
from dmv_fast.runtime.load import load_network, make_frame_step
from dmv_fast.runtime.network import FastNetwork
from dmv_fast.vision.crop import search_window
from dmv_fast.weights import load_model

FULL = 32  # frames remembered
COLUMNS = ("variant", "dtype", "targets", "k", "what", "us")


def device_us(replay: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of one call on the device, back to back with others."""
    times = []
    for _ in range(repeats):
        if device.type == "cpu":
            began = time.perf_counter()
            replay()
            times.append((time.perf_counter() - began) * 1e6)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / 10)
    return statistics.median(times)


def stages(step: FrameStep, clip: Clip, n: int) -> dict[str, Callable[[], object]]:
    """The stages of a frame of n places, on static inputs; what one leaves the next takes."""
    network, memory = step.network, step.memory
    crops = step.crops(clip.frames[0], [search_window(clip.box)] * n).clone()
    # In the step's own buffer, else choosing a box would copy them there, which no frame does.
    on_gpu = isinstance(step, cuda.CudaFrameStep)
    maps = network.look(crops, step._maps[:n]) if on_gpu else network.look(crops)
    valid = memory.valid[:n]
    keys, values = memory.keys[:n], memory.values[:n]
    found = network.match(maps, keys, step.k, valid)
    rows = network.gather(maps, values, *found)
    network.vote(maps, rows)
    prediction = network.head(maps)
    sizes = torch.full((n, 2), 64.0, device=network.device)
    work = {
        "backbone": lambda: network.look(crops, maps),
        "retrieve": lambda: network.match(maps, keys, step.k, valid),
        "gather": lambda: network.gather(maps, values, *found),
        "vote": lambda: network.vote(maps, rows),
        "head": lambda: network.head(maps),
        "box": lambda: step.choose(maps, prediction, sizes),
    }
    if on_gpu:
        work = {"crop": lambda: step._cut(n), **work, "write": step._remember, "whole": lambda: step._look(n)}
    return work


def launches(work: Callable[[], object]) -> int:
    """Kernels of one call; 0 where the profiler does not work."""
    try:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in profiler.events())
    except Exception as error:
        print(f"  no profiler: {error}", flush=True)
        return 0


def measure(
    rows: list[dict], save: Callable[[], None], clip: Clip, variant: str, network: FastNetwork, targets: int,
    k: int, repeats: int = 20,
) -> None:  # fmt: skip
    device = network.device
    step = make_frame_step(network, k=k, capacity=FULL, pick=PickConfig(), targets=targets)
    window = search_window(clip.box)
    windows, sizes = [window] * targets, np.array([window.to_crop(clip.box)[2:]] * targets)
    told = {"variant": variant, "dtype": str(network.dtype)[6:], "targets": targets, "k": k}

    def add(what: str, us: float) -> None:
        rows.append(told | {"what": what, "us": round(us, 2)})

    began = time.perf_counter()
    step.start(0, clip.frames[0], window, clip.box)
    add("first start", (time.perf_counter() - began) * 1e6)
    for place in range(1, targets):
        step.start(place, clip.frames[0], window, clip.box)
    for i in range(1, FULL if device.type == "cuda" else 3):
        step.step(clip.frames[i % len(clip.frames)], windows, sizes)
        for place in range(targets):
            step.write(place, i)
    times = []
    for i in range(10 * repeats if device.type == "cuda" else 2):
        began = time.perf_counter()
        step.step(clip.frames[i % len(clip.frames)], windows, sizes)
        times.append((time.perf_counter() - began) * 1e6)
    add("host", statistics.median(times))
    add("host 99th percentile", sorted(times)[int(0.99 * len(times))])
    save()  # before the profiler, which may take the process with it
    with torch.inference_mode():
        for name, work in stages(step, clip, targets).items():
            if device.type == "cuda":
                replay = cuda.record(work, device, torch.cuda.graph_pool_handle())
                add(f"{name} launches", launches(work))
                add(name, device_us(replay, device, repeats))
            else:
                add(name, device_us(work, device, 1))
    line = "  ".join(f"{r['what']} {r['us']:.0f}" for r in rows if {k: r[k] for k in told} == told)
    print(f"{variant}, {told['dtype']}, {targets} targets, K = {k}, us: {line}", flush=True)


def variants() -> dict[str, Callable[[], contextlib.AbstractContextManager]]:
    """name -> what it leaves out."""
    never = mock.patch.object(convolution.Convolution, "_cudnn_pays", lambda *_: False)
    unchosen = mock.patch.object(cuda, "cudnn_search", contextlib.nullcontext)
    return {"convolutions unfused": lambda: never, "convolutions not timed": lambda: unchosen}


def main() -> None:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--weights", default="dmv18")
    parser.add_argument("--output", type=Path, help="a CSV file")
    parser.add_argument("--quick", action="store_true", help="one target, K = 4, no variants")
    options = parser.parse_args()
    device = torch.device(options.device, 0 if options.device == "cuda" else None)
    clip, rows, failed = synthetic_clip(), [], []

    def network(dtype: torch.dtype) -> FastNetwork:
        return load_network(options.weights, device, str(dtype).removeprefix("torch."), "auto")

    def save() -> None:
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            with open(options.output, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)

    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    def without_one(name: str) -> None:
        """One of `variants`. cuDNN's choices are kept a thread, ours a network: both new here."""

        def run() -> None:
            with variants()[name]():
                model = load_model(options.weights, device=device)
                fresh = FastNetwork(model, dtype=half, device=device, backend="auto")
                measure(rows, save, clip, name, fresh, 1, 4)

        with ThreadPoolExecutor(1) as thread:
            failure = thread.submit(run).exception()
        save()
        if failure is not None:  # the other variants are still measured
            traceback.print_exception(failure)
            failed.append(name)

    def as_it_is(targets: int, k: int, dtype: torch.dtype) -> None:
        measure(rows, save, clip, "all", network(dtype), targets, k)
        save()

    as_it_is(1, 4, half)
    if options.quick:
        return
    for name in variants():
        without_one(name)
    for targets, k, dtype in ((1, 1, half), (1, 32, half), (1, 4, torch.bfloat16)):
        as_it_is(targets, k, dtype)
    for targets in (4, 16, 64):
        as_it_is(targets, 4, half)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
