"""Success and precision plots of one or several trackers (needs matplotlib, the extra `eval`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from dmv_fast.evaluation.metrics import IOU_THRESHOLDS, PIXEL_THRESHOLDS, Score


def plot_curves(scores: dict[str, Score], out: Path | str) -> list[Path]:
    """Write success.png, success.svg, precision.png and precision.svg into `out`; the files written.

    scores: what each tracker reached, by its name in the legend. Needs no display.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    success = _figure(
        scores, IOU_THRESHOLDS, lambda s: s.success, lambda s: s.auc,
        xlabel="overlap threshold (IoU)", ylabel="success rate", title="Success plot, one pass [AUC]",
    )  # fmt: skip
    precision = _figure(
        scores, PIXEL_THRESHOLDS, lambda s: s.precision_curve, lambda s: s.precision,
        xlabel="centre error threshold (px)", ylabel="precision", title="Precision plot, one pass [at 20 px]",
    )  # fmt: skip
    precision.axes[0].axvline(20, color="0.6", linewidth=0.8, linestyle=":")
    written = []
    for name, figure in (("success", success), ("precision", precision)):
        for suffix, canvas in ((".png", FigureCanvasAgg), (".svg", FigureCanvasSVG)):
            canvas(figure)
            figure.savefig(out / f"{name}{suffix}", dpi=150)
            written.append(out / f"{name}{suffix}")
    return written


def _figure(
    scores: dict[str, Score],
    thresholds: np.ndarray,
    curve: Callable[[Score], np.ndarray],
    figure_of: Callable[[Score], float],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
) -> Figure:
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, score in sorted(scores.items(), key=lambda item: -np.nan_to_num(figure_of(item[1]))):
        axes.plot(thresholds, curve(score), linewidth=2, label=f"{name} [{figure_of(score):.3f}]")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, xlim=(0, thresholds[-1]), ylim=(0, 1))
    axes.grid(True, color="0.9")
    axes.legend()
    return figure
