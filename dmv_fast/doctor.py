"""What `dmv-fast doctor` says: versions, devices, the extension, the backends and the weights."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

_MODULES = ("torch", "triton", "numpy", "cv2", "safetensors")
_ISA = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16",
    "sve",
)  # fmt: skip
_BUILD_RECORD = Path(__file__).with_name("_build.json")


def report() -> str:
    """The whole report, one fact a line. Never raises: a part that fails is reported with its reason."""
    parts = {
        "versions": _versions,
        "processor": _processor,
        "cuda devices": _cuda_devices,
        "extension": _extension,
        "backends on cpu": lambda: _backends("cpu"),
        "backends on cuda": lambda: _backends("cuda"),
        "dtype auto": _auto,
        "weights": _weights,
    }
    lines = []
    for title, part in parts.items():
        facts = _guarded(part)
        lines += [f"{title if i == 0 else '':<17} {fact}" for i, fact in enumerate(facts)]
    return "\n".join(lines)


def build_record() -> dict[str, str]:
    """What the build said of each part: "torch" -> its version, "cpu" and "cuda" -> built, or why not.

    Empty where dmv_fast is used without having been installed.
    """
    return json.loads(_BUILD_RECORD.read_text()) if _BUILD_RECORD.exists() else {}


def _guarded(part: Callable[[], list[str]]) -> list[str]:
    try:
        return part()
    except Exception as error:  # a broken torch or driver is what the report is for
        return [f"failed: {type(error).__name__}: {' '.join(str(error).split())}"]


def _versions() -> list[str]:
    return [
        f"dmv_fast {metadata.version('dmv-fast')} in {Path(__file__).parent}",
        f"Python {platform.python_version()}, {platform.platform()}",
        *(f"{name} {_version(name)}" for name in _MODULES),
    ]


def _version(module: str) -> str:
    try:
        return importlib.import_module(module).__version__
    except ImportError as error:
        return f"does not import: {' '.join(str(error).split())}"


def _processor() -> list[str]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = set(re.findall(r"\w+", " ".join(re.findall(r"^(?:flags|Features)\s*:(.*)", text, re.M)[:1])))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = [
        f"{name[1] if name else platform.processor() or platform.machine()}, {cores} cores to use",
        f"instructions: {' '.join(isa for isa in _ISA if isa in flags) or 'no vector set known here'}",
    ]

    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return [*facts, f"torch uses {torch.get_num_threads()} threads and its {capability} kernels"]


def _cuda_devices() -> list[str]:
    import torch

    if torch.version.cuda is None:
        return ["none: this torch is a build without CUDA"]
    if not torch.cuda.is_available():
        return [f"none: torch is built for CUDA {torch.version.cuda} but finds no usable device or driver"]
    facts = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = card.total_memory / 2**30
        facts.append(f"{index}: {card.name}, sm_{card.major}{card.minor}, {memory:.0f} GiB")
    return [*facts, f"torch is built for CUDA {torch.version.cuda}"]


def _extension() -> list[str]:
    import torch  # noqa: F401  the module needs its libraries loaded

    record = build_record()
    try:
        module = importlib.import_module("dmv_fast._C")
        state = f"dmv_fast._C is loaded from {module.__file__}"
    except ImportError as error:
        state = f"dmv_fast._C is not loaded: {' '.join(str(error).split())}"
    names = {"cpu": "C++ part", "cuda": "CUDA part", "torch": "built against torch"}
    facts = [f"{name}: {record[key]}" for key, name in names.items() if key in record]
    facts = facts or ["its build left no record: install dmv_fast to have it built"]
    return [state, *_instructions(), *facts]


def _instructions() -> list[str]:
    """Which of its CPU kernels run, where it is loaded: fewer than the processor's if a variable says so."""
    import torch

    if not hasattr(torch.ops.dmv_fast, "cpu_isas"):
        return []
    usable, asked = torch.ops.dmv_fast.cpu_isas().split(), os.environ.get("DMV_FAST_CPU_ISA")
    why = f", as DMV_FAST_CPU_ISA asks (without it {usable[0]})" if asked else ""
    return [f"its CPU kernels use {asked or usable[0]}{why}"]


def _backends(device_type: str) -> list[str]:
    from dmv_fast.ops import available_backends

    states = available_backends(device_type).items()
    return [f"{name}: {why or _tried(name, device_type)}" for name, why in states]


def _tried(backend: str, device_type: str) -> str:
    """What loads may still hold nothing for the card, or need a newer driver: a small call tells."""
    import torch

    from dmv_fast.ops import retrieve

    if device_type == "cuda" and not torch.cuda.is_available():
        return "usable"
    try:
        ones = torch.ones(1, 1, 16, device=device_type)
        retrieve(ones, ones, 1, backend=backend)[0].cpu()
    except Exception as error:
        return f"there, but fails: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    return "usable"


def _auto() -> list[str]:
    import torch

    from dmv_fast.runtime.precision import fast_precision

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [f"{device}: {fast_precision(torch.device(device))}" for device in devices]


def _weights() -> list[str]:
    from dmv_fast.weights import cache_folder, known

    absent = f"not here; it belongs in {cache_folder()}"
    return [f"{name}: {path or absent}" for name, path in known().items()] or ["none"]


if __name__ == "__main__":
    print(report())
