"""What `speed` measured, as files: frame.csv, machine.json and plots."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np
import torch

from dmv_fast.evaluation.speed import CANDIDATES, PAPER_FPS, Row

_STAGES = ("crop", "backbone", "retrieve", "gather", "vote", "head", "box", "write")
_COLUMNS = (
    "section",
    "name",
    "p50_ms",
    "p95_ms",
    "p99_ms",
    "best_ms",
    "processor_ms",
    "fps",
    "frames",
    "note",
)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """One line a row: times in ms a frame of all targets, FPS from the median, then the setting."""
    with open(path, "w", newline="") as file:
        writer = None
        for row in rows:
            times = {f"p{q}_ms": f"{row.percentile(q):.3f}" for q in (50, 95, 99)}
            record = {"section": row.section, "name": row.name, **times}
            record |= {"best_ms": f"{row.percentile(0):.3f}", "processor_ms": f"{row.processor:.3f}"}
            record |= {"fps": f"{row.fps:.2f}", "frames": len(row.taken), "note": row.note}
            setting = asdict(row.setting) if row.setting else {}
            if setting:
                setting["weights"] = Path(setting["weights"]).stem if setting["weights"] else "untrained"
            if writer is None:
                fields = [*_COLUMNS, "weights", "backbone", "grid", "k", "memory", "targets"]
                writer = csv.DictWriter(file, [*fields, "device", "dtype", "backend"])
                writer.writeheader()
            writer.writerow(record | setting)


def machine(device: torch.device) -> dict[str, object]:
    """Where it was measured: processor, GPU, versions, commit, threads, load at this moment."""
    facts: dict[str, object] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "dmv_fast": metadata.version("dmv-fast"),
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu memory GB": round(properties.total_memory / 2**30)}
        facts |= {"cuda": torch.version.cuda, "gpu peak MB": round(torch.cuda.max_memory_allocated() / 2**20)}
    return facts


def write_machine(facts: dict[str, object], path: Path) -> None:
    """facts as JSON."""
    path.write_text(json.dumps(facts, indent=1) + "\n")


def plot(rows: list[Row], out: Path) -> list[Path]:
    """candidates.png, memory.png and stages.png of what is there. Needs matplotlib (the extra `eval`)."""
    written = []
    for name, draw in (("candidates", _plot_candidates), ("memory", _plot_memory), ("stages", _plot_stages)):
        section = {"candidates": "k"}.get(name, name)
        chosen = [row for row in rows if row.section == section]
        if chosen:
            written.append(draw(chosen, out / f"{name}.png"))
    return written


def _figure(xlabel: str, ylabel: str, title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(True, color="0.9")
    return figure, axes


def _save(figure, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
    return path


def _plot_candidates(rows: list[Row], path: Path) -> Path:
    figure, axes = _figure("candidates K", "speed relative to K = 1", "Frame rate against K")
    for name, fps in (("here", [row.fps for row in rows]), ("paper (TITAN X)", list(PAPER_FPS.values()))):
        axes.plot(
            CANDIDATES,
            [f / fps[0] for f in fps],
            marker="o",
            label=f"{name}: {fps[0]:.0f} to {fps[-1]:.0f} FPS",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(CANDIDATES, [str(k) for k in CANDIDATES])
    axes.set_ylim(0, 1.1)
    axes.legend()
    return _save(figure, path)


def _plot_memory(rows: list[Row], path: Path) -> Path:
    figure, axes = _figure("frames remembered T", "ms a frame", "Latency against memory")
    frames = [row.setting.memory for row in rows]
    for label, q in (("median", 50), ("99th percentile", 99)):
        axes.plot(frames, [row.percentile(q) for row in rows], marker="o", label=label)
    axes.set_ylim(0)
    axes.legend()
    return _save(figure, path)


def _plot_stages(rows: list[Row], path: Path) -> Path:
    """A bar a K, stage after stage; writing, which is every 30th frame at most, stands apart."""
    figure, axes = _figure("ms, medians", "", "Where a frame's time goes")
    labels = sorted({row.name.split()[1] for row in rows}, key=lambda k: int(k[2:]), reverse=True)
    for label in labels:
        start = 0.0
        for i, stage in enumerate(_STAGES):
            time = next(r.percentile(50) for r in rows if r.name == f"{stage} {label}")
            axes.barh(label, time, left=start, color=f"C{i}", label=stage if label == labels[0] else None)
            start += time
    axes.legend(ncols=4, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return _save(figure, path)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the source tree, with a + where files differ from it; empty where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
