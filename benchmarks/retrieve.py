"""Times dmv_fast.ops.retrieve beside what else could do its work, all in one run and taking turns.

    python benchmarks/retrieve.py              all sizes and K, results into benchmarks/results/
    python benchmarks/retrieve.py --quick      256 x 8192 alone, K = 4 and 32, nothing written
    python benchmarks/retrieve.py --sizes 256x4096 -k 8      these alone, written only with --output FOLDER
    python benchmarks/retrieve.py --memory     peak memory of one call instead of times

What is compared, all on the same bfloat16 numbers (FAISS and KeOps on their float32 copies):
    product         the bfloat16 matrix product alone, into a buffer that is there already: no selection
    plain           softmax over [0, q.k1 .. q.kN] and topk, as one writes it in PyTorch
    product+topk    the product and topk of it, without the softmax
    compiled        `plain` under torch.compile
    faiss, keops    knn and argKmin, where installed; no softmax
On a GPU "triton" and "cuda" are the two backends, and a time is a CUDA graph's of many calls over their
number: once on the same inputs (L2 warm), once on inputs in turns that do not fit into L2 together.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dmv_fast import ops
from dmv_fast.ops.backends import fastest_backend

SIZES = ((256, 8192), (256, 256), (1024, 32768))
KS = (1, 2, 4, 8, 16, 32)
GPU_SIZES, GPU_KS = ((256, 8192), (1024, 32768), (256, 256)), (4, 32, 1, 8, 2, 16)  # what matters most first
DEPTH = 256
BURST_S = 0.03
PAUSE_S = 0.02
SLOWEST_S = 0.5  # what takes longer than this is timed once
GRAPH_CALLS = 32  # calls of one CUDA graph
COLD_BYTES = 256 << 20  # of all the inputs that a cold graph reads
RESULTS = Path(__file__).parent / "results"
COLUMNS = ("m", "n", "d", "k", "what", "cache", "calls", "median_ms", "min_ms", "over_product", "tflops")


def plain(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    logits = (query @ keys.mT).float()
    scores = torch.softmax(torch.cat([logits.new_zeros(len(query), 1), logits], dim=1), dim=1)
    return scores.topk(k)


@functools.cache
def compiled_plain() -> Callable[..., object]:
    return torch.compile(plain, dynamic=False)  # else the second size would get code for any size


def faiss_knn(query: Tensor, keys: Tensor, k: int) -> Callable[[], object]:
    import faiss

    if query.is_cuda:
        raise RuntimeError("faiss-cpu only")
    faiss.omp_set_num_threads(torch.get_num_threads())
    wide_query, wide_keys = query.float().numpy(), keys.float().numpy()
    return lambda: faiss.knn(wide_query, wide_keys, k, metric=faiss.METRIC_INNER_PRODUCT)


def keops_argkmin(query: Tensor, keys: Tensor, k: int) -> Callable[[], object]:
    from pykeops.torch import LazyTensor

    if query.device.type == "cpu" and len(query) * len(keys) > 1 << 22:
        raise TimeoutError("its CPU product takes many seconds a call at this size")
    left, right = LazyTensor(query.float()[:, None, :]), LazyTensor(keys.float()[None, :, :])
    call = lambda: (-(left | right)).argKmin(k, dim=1)  # noqa: E731
    call()  # compiles
    return call


def contenders(query: Tensor, keys: Tensor, k: int, peers: bool) -> dict[str, Callable[[], object]]:
    """name -> a call without arguments; a peer that is not there says so and stays out."""
    product = torch.empty(len(query), len(keys), dtype=query.dtype, device=query.device)
    calls = {
        "ours": lambda: ops.retrieve(query[None], keys[None], k),
        "product": lambda: torch.mm(query, keys.mT, out=product),
        "plain": lambda: plain(query, keys, k),
        "product+topk": lambda: (query @ keys.mT).topk(k),
    }
    if query.is_cuda:
        for name in ("triton", "cuda"):
            if ops.available_backends("cuda")[name] is None:
                calls[name] = functools.partial(ops.retrieve, query[None], keys[None], k, backend=name)
    if not peers:
        return calls
    makers = {
        "compiled": lambda: lambda: compiled_plain()(query, keys, k),
        "faiss": lambda: faiss_knn(query, keys, k),
        "keops": lambda: keops_argkmin(query, keys, k),
    }
    for name, make in makers.items():
        try:
            calls[name] = make()
            calls[name]()  # compiles, where that is left to the first call
        except Exception as error:  # a peer's troubles are its own; the others are still compared
            calls.pop(name, None)
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:90]
            print(f"  {name}: left out ({reason})", flush=True)
    return calls


def seconds_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def seconds_on_gpu(replay: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / GRAPH_CALLS


def graph(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """GRAPH_CALLS calls, in turns, as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        for i in range(GRAPH_CALLS):
            calls[i % len(calls)]()
    return captured.replay


def graphs(m: int, n: int, k: int, cold: bool, peers: bool) -> dict[str, Callable[[], object]]:
    """name -> what replays a contender on a GPU; one that cannot be captured says so and stays out."""
    query, keys = pair(m, n, "cuda")
    copies = max(1, min(GRAPH_CALLS, COLD_BYTES // keys.nbytes)) if cold else 1
    sets = [contenders(query.clone(), keys.clone(), k, peers) for _ in range(copies)]
    replays = {}
    for name in sets[0]:
        try:
            replays[name] = graph([calls[name] for calls in sets])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:90]
            print(f"  {name}: left out, not captured ({reason})", flush=True)
    return replays


def measure(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call, in turns of short bursts: what else the machine does meets them all, while none
    is timed right behind another one's freed memory and still spinning threads."""
    clock = seconds_on_cpu if device == "cpu" else seconds_on_gpu
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if times[name] and times[name][-1] > SLOWEST_S:
                continue
            time.sleep(PAUSE_S)
            clock(call)
            end = time.perf_counter() + BURST_S
            while not times[name] or time.perf_counter() < end:
                times[name].append(clock(call))
    return times


def pair(m: int, n: int, device: str) -> tuple[Tensor, Tensor]:
    """Unit vectors, the query times the model's starting temperature."""
    torch.manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(m, DEPTH), dim=1) * 12
    keys = torch.nn.functional.normalize(torch.randn(n, DEPTH), dim=1)
    return query.to(device, torch.bfloat16), keys.to(device, torch.bfloat16)


def rows_of(m: int, n: int, k: int, cache: str, times: dict[str, list[float]]) -> list[dict[str, object]]:
    product = statistics.median(times["product"])
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows.append(
            dict(
                m=m, n=n, d=DEPTH, k=k, what=name, cache=cache, calls=len(seconds),
                median_ms=round(median * 1e3, 4), min_ms=round(min(seconds) * 1e3, 4),
                over_product=round(median / product, 3), tflops=round(2e-12 * m * n * DEPTH / median, 3),
            )
        )  # fmt: skip
    return rows


def show(rows: list[dict[str, object]]) -> None:
    first = rows[0]
    print(f"{first['m']} x {first['n']} x {first['d']}, K = {first['k']}, cache {first['cache']}")
    for row in rows:
        print(
            f"  {row['what']:<13} median {row['median_ms']:>9.3f} ms   min {row['min_ms']:>9.3f} ms"
            f"   {row['over_product']:>7.2f} x product   {row['tflops']:>7.3f} TFLOP/s", flush=True,
        )  # fmt: skip


def machine(device: str) -> dict[str, object]:
    """What the figures depend on."""
    facts: dict[str, object] = {
        "torch": torch.__version__, "python": platform.python_version(), "system": platform.system(),
        "threads": torch.get_num_threads(), "load average": [round(x, 1) for x in os.getloadavg()],
    }  # fmt: skip
    try:
        ask = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        facts["commit"] = subprocess.check_output(ask, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        facts["commit"] = "unknown"
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        facts["backend"] = fastest_backend("cuda")
        return facts
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    isas = torch.ops.dmv_fast.cpu_isas() if ops.available_backends("cpu")["cpu"] is None else "reference"
    facts["device"] = names[0] if names else platform.processor()
    facts["backend"] = os.environ.get("DMV_FAST_CPU_ISA") or isas.split()[0]
    return facts


def folder_of(facts: dict[str, object]) -> str:
    gpu = facts["backend"] in ("triton", "cuda")
    parts = [str(facts["device"])] if gpu else [str(facts["device"]), str(facts["backend"])]
    name = re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower().replace("(r)", " ")).strip("-")
    return name if gpu else f"{name}-{facts['threads']}-threads"


def parse_size(text: str) -> tuple[int, int]:
    """MxN as two numbers above 0; ArgumentTypeError for anything else."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be MxN, queries x keys, such as 256x8192, not {text!r}")
    return int(match[1]), int(match[2])


def draw(rows: list[dict[str, object]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys((row["m"], row["n"], row["cache"]) for row in rows))
    figure, axes = pyplot.subplots(
        1, len(sizes), figsize=(5 * len(sizes), 4.4), squeeze=False, layout="constrained"
    )
    for axis, (m, n, cache) in zip(axes[0], sizes, strict=True):
        here = [row for row in rows if (row["m"], row["n"], row["cache"]) == (m, n, cache)]
        for name in dict.fromkeys(row["what"] for row in here):
            line = sorted((row["k"], row["median_ms"]) for row in here if row["what"] == name)
            axis.plot(*zip(*line, strict=True), marker="o", linewidth=3 if name == "ours" else 1, label=name)
        axis.set(xscale="log", yscale="log", xlabel="K", ylabel="median ms")
        axis.set_title(f"{m} x {n} x {DEPTH}, {cache}")
        ks = sorted({row["k"] for row in here})
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="outside lower center")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


MEMORY_SCRIPT = """
import re, sys, torch
from pathlib import Path
from dmv_fast import ops
def kib(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
m, n, depth, k, threads = map(int, sys.argv[2:])
dtype = getattr(torch, sys.argv[1])
torch.set_num_threads(threads)
small = torch.ones(1, 64, 8, dtype=dtype)
ops.retrieve(small, small, 1)  # loads the library, starts the threads
query, keys = torch.ones(1, m, depth, dtype=dtype), torch.ones(1, n, depth, dtype=dtype)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = kib("VmRSS")
ops.retrieve(query, keys, k)
print(kib("VmHWM") - before)
"""


def peak_memory() -> None:
    """Resident memory of single calls above what was there before, each in a process of its own (Linux)."""
    threads = torch.get_num_threads()
    for dtype in ("bfloat16", "float32", "float16"):
        for m, n, depth, k in ((256, 8192, 256, 4), (1024, 32768, 256, 32), (1024, 32768, 512, 32)):
            numbers = [str(x) for x in (m, n, depth, k, threads)]
            grown = int(subprocess.check_output([sys.executable, "-c", MEMORY_SCRIPT, dtype, *numbers]))
            outputs = m * k * 8 // 1024
            print(
                f"{m} x {n} x {depth}, K = {k}, {dtype}: {grown} KiB, outputs {outputs}, "
                f"the rest {(grown - outputs) // threads} a thread (at most 4096)", flush=True,
            )  # fmt: skip


def save(rows: list[dict[str, object]], facts: dict[str, object], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "retrieve.json").write_text(json.dumps(facts, indent=1) + "\n")
    with open(folder / "retrieve.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--sizes", type=parse_size, nargs="+", metavar="MxN", help="queries x keys, these alone"
    )
    parser.add_argument("-k", type=int, nargs="+", metavar="K", choices=range(1, 33), help="these alone")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each contender, for each size and K")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-peers", action="store_true", help="without compiled, faiss and keops")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--output", type=Path, help="folder of the results (benchmarks/results)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory:
        return peak_memory()

    facts = machine(options.device)
    print(json.dumps(facts))
    rows: list[dict[str, object]] = []
    gpu = options.device == "cuda"
    folder = (options.output or RESULTS) / folder_of(facts)
    chosen = options.sizes or options.k  # a part, with which the whole's results are not overwritten
    written = not options.quick and (options.output is not None or not chosen)
    sizes = options.sizes or (GPU_SIZES if gpu else SIZES)[: 1 if options.quick else None]
    ks = options.k or ((4, 32) if options.quick else GPU_KS if gpu else KS)
    for m, n in sizes:
        for k in ks:
            peers = not options.no_peers and (k == 4 or not gpu)  # compiling for each K would take minutes
            cold = gpu and GRAPH_CALLS * n * DEPTH * 2 >= COLD_BYTES // 2  # smaller sets stay in L2
            for cache in ("warm", "cold") if cold else ("warm",):
                if gpu:
                    calls = graphs(m, n, k, cache == "cold", peers)
                else:
                    calls = contenders(*pair(m, n, options.device), k, peers)
                times = measure(calls, options.rounds, options.device)
                rows += rows_of(m, n, k, cache, times)
                show(rows[-len(times) :])
            if written:  # as it comes, so that what was measured is not lost
                save(rows, facts, folder)
    if not written:
        return None
    draw(rows, folder / "retrieve.png", f"{facts['device']}, {facts['backend']}, {facts['threads']} threads")
    print(f"written to {folder}")
    return None


if __name__ == "__main__":
    main()
