"""Line plots and stacked bars as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _HEIGHT = 400.0, 290.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 60.0, 14.0, 12.0, 46.0  # margins around the plotted area
_BAR, _BAR_GAP = 26.0, 12.0
COLOURS = 8  # classes s0 .. s7 of the style sheet


class Line(NamedTuple):
    """One curve."""

    name: str
    points: Sequence[tuple[float, float]]
    """x, y; points that are not finite are left out."""


class Axis(NamedTuple):
    """What an axis says and where it ends."""

    label: str
    low: float | None = None
    high: float | None = None
    ticks: Sequence[float] | None = None
    log: bool = False
    """Equal steps for equal factors; all values above 0."""


def line_plot(title: str, lines: Sequence[Line], x: Axis, y: Axis, *, dots: bool = True) -> str:
    """A <figure>: the curves, each point told on hovering, and a legend where there are several."""
    lines = [Line(name, [p for p in points if all(map(math.isfinite, p))]) for name, points in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    across = _Scale(x, [p[0] for line in lines for p in line.points], _LEFT, _WIDTH - _RIGHT)
    down = _Scale(y, [p[1] for line in lines for p in line.points], _HEIGHT - _BOTTOM, _TOP)
    parts = [*_grid(across, down), *_axis_labels(x.label, y.label)]
    for i, (name, points) in enumerate(lines):
        places = [(across(px), down(py)) for px, py in points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        parts.append(f'<polyline class="line s{i % COLOURS}" points="{path}"/>')
        for (px, py), (value_x, value_y) in zip(places, points, strict=True):
            told = f"{name}: {x.label} {number(value_x)}, {y.label} {number(value_y)}"
            at = f'cx="{px:.1f}" cy="{py:.1f}"'
            spot = f'<circle class="spot" {at} r="7"><title>{escape(told)}</title></circle>'
            dot = f'<circle class="dot s{i % COLOURS}" {at} r="3"/>'
            parts.append(dot + spot if dots else spot)
    return _figure(title, parts, _HEIGHT, [line.name for line in lines])


def stacked_bars(title: str, bars: Sequence[tuple[str, Sequence[tuple[str, float]]]], label: str) -> str:
    """A <figure>: one bar a row, each of parts (name, size), the same parts in every bar."""
    if not bars:
        return ""
    height = len(bars) * (_BAR + _BAR_GAP) + _TOP + _BOTTOM
    longest = max(sum(size for _, size in parts) for _, parts in bars)
    scale = _Scale(Axis(label, 0), [longest], _LEFT, _WIDTH - _RIGHT)
    drawn = []
    for tick in scale.ticks:
        drawn.append(f'<line class="grid" x1="{scale(tick):.1f}" x2="{scale(tick):.1f}" '
                     f'y1="{_TOP}" y2="{height - _BOTTOM}"/>')  # fmt: skip
        drawn.append(_text(scale(tick), height - _BOTTOM + 16, number(tick), "middle"))
    for row, (name, parts) in enumerate(bars):
        top, start = _TOP + _BAR_GAP / 2 + row * (_BAR + _BAR_GAP), 0.0
        drawn.append(_text(_LEFT - 6, top + _BAR / 2 + 4, name, "end"))
        for i, (part, size) in enumerate(parts):
            told = escape(f"{name}, {part}: {number(size)} {label}")
            width = scale(start + size) - scale(start)
            drawn.append(
                f'<rect class="bar s{i % COLOURS}" x="{scale(start):.1f}" y="{top:.1f}" '
                f'width="{width:.1f}" height="{_BAR}"><title>{told}</title></rect>'
            )
            start += size
    drawn.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, height - 8, label, "middle"))
    return _figure(title, drawn, height, [part for part, _ in bars[0][1]])


def strip_chart(values: Sequence[float], marks: Iterable[int], title: str) -> str:
    """A low, wide <svg> of values between 0 and 1, NaN left open, with vertical marks at some of them."""
    width, height, count = 960.0, 70.0, max(len(values) - 1, 1)
    pieces: list[list[str]] = [[]]
    for i, value in enumerate(values):
        if math.isfinite(value):
            pieces[-1].append(f"{i / count * width:.1f},{(1 - value) * (height - 4) + 2:.1f}")
        elif pieces[-1]:
            pieces.append([])
    curves = "".join(f'<polyline class="line s0" points="{" ".join(piece)}"/>' for piece in pieces if piece)
    ticks = "".join(
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>'
        for x in (mark / count * width for mark in marks)
    )
    return (
        f'<svg class="strip" viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none" role="img">'
        f'<title>{escape(title)}</title><line class="grid" x1="0" x2="{width:g}" y1="{height / 2:g}" '
        f'y2="{height / 2:g}"/>{ticks}{curves}</svg>'
    )


def number(value: float) -> str:
    """As a person writes it: three digits, no trailing zeros."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class _Scale:
    """From values to SVG units, with the ticks between."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float):
        low = min(values) if axis.low is None else axis.low
        high = max(values) if axis.high is None else axis.high
        self._log = math.log if axis.log else float
        self.ticks = list(axis.ticks) if axis.ticks else _round_steps(low, high)
        if axis.high is None and not axis.ticks:
            high = self.ticks[-1]
        self._low, self._high = self._log(low), self._log(high)
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (self._log(value) - self._low) / ((self._high - self._low) or 1.0)
        return self._start + share * (self._end - self._start)


def _round_steps(low: float, high: float) -> list[float]:
    """Four to seven round numbers, from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _grid(across: _Scale, down: _Scale) -> list[str]:
    parts = []
    for tick in across.ticks:
        parts.append(_text(across(tick), _HEIGHT - _BOTTOM + 17, number(tick), "middle"))
    for tick in down.ticks:
        y = down(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 7, y + 4, number(tick), "end"))
    return parts


def _axis_labels(x: str, y: str) -> list[str]:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    return [
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x, "middle"),
        f'<text class="tick" text-anchor="middle" transform="translate(13 {middle:.0f}) rotate(-90)">'
        f"{escape(y)}</text>",
    ]


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _figure(title: str, parts: Iterable[str], height: float, names: Sequence[str]) -> str:
    legend = ""
    if len(names) > 1:
        items = (f'<li><i class="s{i % COLOURS}"></i>{escape(name)}</li>' for i, name in enumerate(names))
        legend = f'<ul class="legend">{"".join(items)}</ul>'
    return (
        f'<figure class="plot"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>{legend}</figure>"
    )
