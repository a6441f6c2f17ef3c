"""The page of a folder of benchmark results: frame.csv of `dmv-fast bench`, retrieve.csv and their like."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from dmv_fast.report.page import Column, facts, page, read_json, section, table
from dmv_fast.report.plots import Axis, Line, line_plot, stacked_bars

Row = dict[str, str]
_QUANTILES = (("p50_ms", "median"), ("p95_ms", "95th percentile"), ("p99_ms", "99th percentile"))


def benchmark_page(folder: Path) -> str:
    """The page as HTML; ValueError where a file is not a table."""
    tables = {path.name: _read(path) for path in sorted(folder.glob("*.csv"))}
    plots = [*_frame_plots(tables.get("frame.csv", [])), *_retrieval_plots(tables.get("retrieve.csv", []))]
    machines = {path.name: read_json(path) for path in sorted(folder.glob("*.json"))}
    drawn = "".join(plot for plot in plots if plot)
    return page(
        f"{folder.resolve().name}: speed, measured",
        ", ".join(f"{name}: {len(rows)} rows" for name, rows in tables.items()),
        [
            section("Plots", f'<div class="plots">{drawn}</div>' if drawn else ""),
            *(section(name, _table(name, rows)) for name, rows in tables.items()),
            section("Machine and versions", *(facts(*item) for item in machines.items())),
        ],
    )


def _read(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path}: not a table with a line of names and rows as long as it")
    return rows


def _table(name: str, rows: list[Row]) -> str:
    keys = [key for key in rows[0] if any(row[key] for row in rows)]
    columns = [Column(key, key.replace("_", " "), _digits([row[key] for row in rows])) for key in keys]
    return table(f"{name}: a click on a head sorts it.", columns, rows)


def _digits(values: Sequence[str]) -> int | None:
    """How many digits behind the point a column has; None for text."""
    values = [value for value in values if value]
    if not all(_is_number(value) for value in values):
        return None
    return min(3, max(len(value.partition(".")[2]) for value in values))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# ---- a frame ----


def _frame_plots(rows: list[Row]) -> list[str]:
    """Latency against K and T, and where a frame's time goes."""
    return [
        _latency(rows, "k", "k", "Latency of a frame against K", "candidates K"),
        _latency(rows, "memory", "memory", "Latency of a frame against memory", "frames remembered T"),
        _latency(rows, "targets", "targets", "Latency of a frame against targets", "targets"),
        _stages([row for row in rows if row.get("section") == "stages"]),
    ]


def _latency(rows: list[Row], part: str, key: str, title: str, label: str) -> str:
    rows = [row for row in rows if row.get("section") == part and row.get(key)]
    groups: dict[str, list[Row]] = {}
    for row in rows:  # a section may hold several series: "4 targets, alone" beside "4 targets, together"
        groups.setdefault(_series(row, key), []).append(row)
    lines = [
        Line(f"{name} {told}".strip(), [(float(row[key]), float(row[column])) for row in group])
        for name, group in groups.items()
        for column, told in _QUANTILES[: 3 if len(groups) == 1 else 1]
    ]
    if sum(len(line.points) for line in lines) < 2:
        return ""
    ticks = sorted({float(row[key]) for row in rows})
    return line_plot(title, lines, Axis(label, ticks[0], ticks[-1], ticks, log=True), Axis("ms", 0))


def _series(row: Row, key: str) -> str:
    """A row's name without its number: what it has in common with the other points of its curve."""
    words = row["name"].replace("=", " ").split()
    return " ".join(word for word in words if word != row[key] and word.upper() not in ("K", "T"))


def _stages(rows: list[Row]) -> str:
    bars: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        stage, _, setting = row["name"].partition(" ")
        bars.setdefault(setting, []).append((stage, float(row["p50_ms"])))
    return stacked_bars("Where a frame's time goes", list(bars.items()), "ms, medians")


# ---- the retrieval ----


def _retrieval_plots(rows: list[Row]) -> list[str]:
    """Each size's medians against K, a curve a contender."""
    sizes = dict.fromkeys((row.get("m"), row.get("n"), row.get("d")) for row in rows)
    plots = []
    for size in sizes:
        chosen = [row for row in rows if (row.get("m"), row.get("n"), row.get("d")) == size]
        names = dict.fromkeys(row["what"] for row in chosen)
        lines = [
            Line(name, [(float(row["k"]), float(row["median_ms"])) for row in chosen if row["what"] == name])
            for name in names
        ]
        ticks = sorted({x for line in lines for x, _ in line.points})
        times = [y for line in lines for _, y in line.points]
        title = "Retrieval, M {}, N {}, D {}".format(*size)
        across = Axis("candidates K", ticks[0], ticks[-1], ticks, log=True)
        plots.append(line_plot(title, lines, across, _decades("ms", times)))
    return plots


def _decades(label: str, values: Sequence[float]) -> Axis:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    ticks = [10.0**power for power in range(low, high + 1)]
    return Axis(label, ticks[0], ticks[-1], ticks, log=True)
