"""The ablations as pictures (needs matplotlib, the extra `eval`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.ablations import report
from benchmarks.ablations.settings import CANDIDATES, CAPACITIES, INTERVALS, READER


def write_all(measured: report.Measured, results: Path) -> None:
    """readers.png, candidates.png, capacity.png and differences.png."""
    figures = {
        "candidates": candidates(measured),
        "capacity": capacity(measured),
        "differences": differences(measured),
    }
    if (results / "readers.csv").is_file():
        figures["readers"] = readers(measured, report.reader_runs(results / "readers.csv"))
    for name, figure in figures.items():
        FigureCanvasAgg(figure)
        figure.savefig(results / f"{name}.png", dpi=120)


def candidates(measured: report.Measured) -> Figure:
    """AUC and time against K, with the interval of the difference to K = 4."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    base = measured.values("dev", "k-4").mean()
    difference = [measured.against("dev", f"k-{k}", "k-4") for k in CANDIDATES]
    mean = np.array([base + d.mean for d in difference])
    reach = np.array([[d.mean - d.low, d.high - d.mean] for d in difference]).T
    axes.errorbar(CANDIDATES, mean, reach, marker="o", capsize=3, label="dev (interval: difference to K = 4)")
    paper = [report.PAPER_K[k][0] / 100 for k in CANDIDATES]
    label = "paper, OTB-100, a network for each K"
    axes.plot(CANDIDATES, paper, color="0.6", marker="s", linestyle=":", label=label)
    axes.set(xscale="log", xlabel="candidates K", ylabel="mean AUC", xticks=CANDIDATES)
    axes.set_xticklabels([str(k) for k in CANDIDATES])
    axes.minorticks_off()
    axes.grid(True, color="0.9")
    axes.legend()
    return figure


def capacity(measured: report.Measured) -> Figure:
    """Mean AUC of each capacity and interval as colour and number."""
    grid = np.array(
        [[measured.values("dev", f"capacity-{c}-interval-{i}").mean() for c in CAPACITIES] for i in INTERVALS]
    )
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        dark = value < (grid.min() + grid.max()) / 2
        axes.text(column, row, f"{value:.3f}", ha="center", va="center", color="w" if dark else "k")
    axes.set(xlabel="capacity (frames)", ylabel="interval (frames)", title="dev, mean AUC")
    axes.set_xticks(range(len(CAPACITIES)), [str(c) for c in CAPACITIES])
    axes.set_yticks(range(len(INTERVALS)), [str(i) for i in INTERVALS])
    return figure


def differences(measured: report.Measured) -> Figure:
    """Every single change against the shipped settings, with its interval, on both sets."""
    names = {"memory-off": "memory off", "background-values": "background: values zero",
             "background-all": "background: values and keys zero", **report.TERMS}  # fmt: skip
    names.pop("base")
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for offset, dataset in ((-0.12, "dev"), (0.12, "held-out")):
        shown = [(row, name) for row, name in enumerate(names) if measured.has(dataset, name)]
        if not shown:
            continue
        found = [measured.against(dataset, name) for _, name in shown]
        reach = np.array([[d.mean - d.low, d.high - d.mean] for d in found]).T
        rows = [row + offset for row, _ in shown]
        axes.errorbar([d.mean for d in found], rows, xerr=reach, fmt="o", capsize=3, label=dataset)
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(names)), list(names.values()))
    axes.invert_yaxis()
    axes.set(xlabel="difference in mean AUC, 95 % interval")
    axes.grid(True, axis="x", color="0.9")
    axes.legend()
    return figure


def readers(measured: report.Measured, runs: dict[str, dict[int, np.ndarray]]) -> Figure:
    """Each seed of each read: IoU on held-out samples, AUC on dev."""
    names = list(runs)
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row, name in enumerate(names):
        ious = [np.nanmean(iou) for iou in runs[name].values()]
        settings = [f"{READER}{name}-{seed}" for seed in runs[name]]
        aucs = [measured.values("dev", s).mean() for s in settings if measured.has("dev", s)]
        for axes, values in ((left, ious), (right, aucs)):
            axes.plot(values, [row] * len(values), "o", color=f"C{row}")
            if values:
                axes.plot([np.mean(values)] * 2, [row - 0.25, row + 0.25], color=f"C{row}")
    left.set(xlabel="IoU on held-out samples, a dot a seed")
    right.set(xlabel="dev, mean AUC, a dot a seed")
    for axes in (left, right):
        axes.set_yticks(range(len(names)), [report.title_of(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(True, axis="x", color="0.9")
    right.set_yticklabels([])
    return figure
