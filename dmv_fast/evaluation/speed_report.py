"""What `speed` measured, as files: tables (CSV, Markdown), machine.json and plots."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from dmv_fast.evaluation.speed import PAPER_FPS, Bench, Peak, Row, Setting
from dmv_fast.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    "paper_fps",
)


TIMED = "image in to box out, the device waited for; decoding excluded"


def write(bench: Bench, facts: dict[str, object], out: Path) -> None:
    """frame.csv, peak.csv, frame.md, machine.json and the plots of what was measured so far into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_machine(facts, out / "machine.json")
    if bench.peaks:
        lines = [",".join(Peak._fields)]
        lines += [",".join([peak.name, *(f"{v:.0f}" for v in peak[1:])]) for peak in bench.peaks]
        write_text(out / "peak.csv", "\n".join(lines) + "\n")
    if not bench.rows:
        return
    write_csv(bench.rows, out / "frame.csv")
    write_text(out / "frame.md", markdown(bench, facts))
    try:
        plot(bench.rows, out)
    except ImportError:
        print("no plots: they need matplotlib (pip install 'dmv-fast[eval]')")


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """One line a row: times in ms a frame of all targets, FPS from the median, then the setting."""
    stream = io.StringIO()
    setting_columns = [field.name for field in dataclasses.fields(Setting)]
    writer = csv.DictWriter(stream, [*_COLUMNS, *setting_columns], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        times = {f"p{q}_ms": f"{row.percentile(q):.3f}" for q in (50, 95, 99)}
        record: dict[str, object] = {"section": row.section, "name": row.name, **times}
        record |= {"best_ms": f"{row.percentile(0):.3f}", "processor_ms": f"{row.processor:.3f}"}
        record |= {"fps": f"{row.fps:.2f}", "frames": len(row.taken), "paper_fps": row.paper_fps or ""}
        if row.setting is not None:
            record |= dataclasses.asdict(row.setting) | {"weights": _name_of(row.setting)}
        writer.writerow(record)
    write_text(path, stream.getvalue())


def markdown(bench: Bench, facts: dict[str, object]) -> str:
    """The rows as tables for people, a section each."""
    lines = [
        f"Frames on {facts.get('gpu') or facts['processor']}, {facts['torch threads']} threads, "
        f"{facts['dtype']}, commit {facts['commit']}, load {facts['load']}. Milliseconds a frame: "
        f"{facts['timed']}; processor: of all cores together. The settings of a section took turns, frame by "
        "frame. The networks are untrained where the table says so: their speed is no matter of weights."
    ]
    for section in dict.fromkeys(row.section for row in bench.rows):
        rows = [row for row in bench.rows if row.section == section]
        paper = ["paper, TITAN X"] if section == "k" else []
        lines += _head([section, "p50", "p95", "p99", "best", "processor", "FPS", *paper])
        for row in rows:
            name = f"{row.name}, {_name_of(row.ours)}" if section == "network" else row.name
            times = [f"{row.percentile(q):.2f}" for q in (50, 95, 99, 0)] + [f"{row.processor:.2f}"]
            lines.append(_line([name, *times, f"{row.fps:.1f}", *([str(row.paper_fps)] if paper else [])]))
    if bench.peaks:
        lines += _head(["peak MB, a process each", "before the network", "peak", "GPU"])
        lines += [_line([peak.name, *(f"{mb:.0f}" for mb in peak[1:])]) for peak in bench.peaks]
    return "\n".join(lines) + "\n"


def _head(cells: list[str]) -> list[str]:
    return ["", _line(cells), _line(["---"] * len(cells))]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _name_of(setting: Setting) -> str:
    return Path(setting.weights).stem if setting.weights else "untrained"


def machine(device: torch.device) -> dict[str, object]:
    """Where it was measured: processor, GPU, versions, commit, threads, load at this moment."""
    facts: dict[str, object] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "dmv_fast": _installed(),
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu memory GB": round(properties.total_memory / 2**30)}
        facts["cuda"] = torch.version.cuda
    return facts


def write_machine(facts: dict[str, object], path: Path) -> None:
    """facts as JSON."""
    write_text(path, json.dumps(facts, indent=1) + "\n")


def plot(rows: list[Row], out: Path) -> list[Path]:
    """candidates.png, memory.png and stages.png of what is there. Needs matplotlib (the extra `eval`)."""
    written = []
    for name, draw in (("candidates", _plot_candidates), ("memory", _plot_memory), ("stages", _plot_stages)):
        section = {"candidates": "k"}.get(name, name)
        chosen = [row for row in rows if row.section == section]
        if chosen:
            written.append(draw(chosen, out / f"{name}.png"))
    return written


def _figure(title: str, width: float = 6.0, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(1, columns, squeeze=False)[0].tolist()


def _label(axes: Axes, xlabel: str, ylabel: str = "") -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(True, color="0.9")


def _save(figure: Figure, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)
    return path


def _plot_percentiles(axes: Axes, x: list[int], rows: list[Row]) -> None:
    for label, q in (("median", 50), ("95th percentile", 95), ("99th percentile", 99)):
        axes.plot(x, [row.percentile(q) for row in rows], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(v) for v in x])
    axes.set_ylim(0)


def _plot_candidates(rows: list[Row], path: Path) -> Path:
    """Left the latency, the paper's on a TITAN X beside it; right how much of K = 1's rate is left."""
    figure, (left, right) = _figure("A frame against the candidates K", 10, 2)
    k = [row.ours.k for row in rows]
    paper = [float(PAPER_FPS[of]) for of in k]
    _plot_percentiles(left, k, rows)
    left.plot(k, [1000 / fps for fps in paper], "k--", marker="s", label="paper, TITAN X")
    _label(left, "K", "ms a frame")
    left.legend()
    for name, style, fps in (("here", "C0", [row.fps for row in rows]), ("paper, TITAN X", "k--", paper)):
        label = f"{name}: {fps[0]:.0f} to {fps[-1]:.0f} FPS"
        right.plot(k, [f / fps[0] for f in fps], style, marker="o", label=label)
    right.set_xscale("log", base=2)
    right.set_xticks(k, [str(v) for v in k])
    right.set_ylim(0)
    _label(right, "K", "speed relative to K = 1")
    right.legend()
    return _save(figure, path)


def _plot_memory(rows: list[Row], path: Path) -> Path:
    figure, (axes,) = _figure("A frame against the memory")
    _plot_percentiles(axes, [row.ours.memory for row in rows], rows)
    _label(axes, "frames remembered T", "ms a frame")
    axes.legend()
    return _save(figure, path)


def _plot_stages(rows: list[Row], path: Path) -> Path:
    """A bar a K, stage after stage; `write`, every 30th frame at most, is last and hatched."""
    figure, (axes,) = _figure("Where a frame's time goes, each stage waited for", 8)
    labels = sorted({row.name.split()[1] for row in rows}, key=lambda k: int(k[2:]), reverse=True)
    for label in labels:
        start = 0.0
        for i, stage in enumerate(_STAGES):
            time = next(r.percentile(50) for r in rows if r.name == f"{stage} {label}")
            legend = stage if label == labels[0] else None
            hatch = "//" if stage == "write" else None
            axes.barh(label, time, left=start, color=f"C{i}", label=legend, hatch=hatch)
            start += time
    _label(axes, "ms, medians; hatched: only where a frame is remembered, every 30th at most")
    figure.legend(ncols=len(_STAGES), fontsize="small", loc="outside lower center")
    return _save(figure, path)


def _installed() -> str:
    """The installed version; empty where the source tree is used as it lies."""
    try:
        return metadata.version("dmv-fast")
    except metadata.PackageNotFoundError:
        return ""


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
