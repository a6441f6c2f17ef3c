"""The page around plots and tables: one file, no network, readable without its script."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_UNKNOWN = "–"


def read_json(path: Path) -> dict:
    """A file with one JSON object; ValueError naming it where it is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


class Column(NamedTuple):
    """A column of a table; numbers are sorted as numbers and stand to the right."""

    key: str
    head: str
    digits: int | None = None
    """Behind the point; None: text."""
    explained: str = ""
    bar: bool = False
    """Draw the value, 0 to 1, as a bar behind it."""


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """The whole HTML document. title, subtitle: plain text; sections: HTML."""
    own = files("dmv_fast.report")
    style, script = ((own / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A heading and what belongs under it; nothing where there is nothing."""
    content = "".join(parts)
    return f"<section><h2>{escape(heading)}</h2>{content}</section>" if content else ""


def note(words: str) -> str:
    """A paragraph of plain text."""
    return f'<p class="note">{escape(words)}</p>'


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """Large figures: (name, value, what it is)."""
    items = (
        f'<div title="{escape(told)}"><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>'
        for name, value, told in figures
    )
    return f'<dl class="tiles">{"".join(items)}</dl>'


def table(
    caption: str, columns: Sequence[Column], rows: Iterable[Mapping], last: Mapping | None = None
) -> str:
    """A table whose heads sort it, by mouse or keyboard. last: a row that stays at the end."""
    heads = "".join(_head(column) for column in columns)
    body = "".join(_row(columns, row) for row in rows)
    foot = f"<tfoot>{_row(columns, last)}</tfoot>" if last else ""
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="' + escape(caption) + '">'
        f'<table class="sortable"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody>{foot}</table></div>"
    )


def facts(heading: str, values: Mapping[str, object]) -> str:
    """Names and values that fold away; values within values as a.b."""
    items = "".join(
        f"<div><dt>{escape(name).replace('.', '.<wbr>')}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in _flat(values)
    )
    return f"<details open><summary>{escape(heading)}</summary><dl class=facts>{items}</dl></details>"


def bars(rows: Iterable[tuple[str, float]]) -> str:
    """A list of names with bars for values between 0 and 1."""
    items = (
        f'<li><span>{escape(name)}</span><i><b style="width:{100 * value:.1f}%"></b></i>'
        f"<output>{value:.3f}</output></li>"
        for name, value in rows
    )
    return f'<ol class="bars">{"".join(items)}</ol>'


def cell(value: str | float | None, digits: int | None) -> str:
    """A value as the table shows it; a dash for what was not measured."""
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return _UNKNOWN
    return str(value) if digits is None else f"{float(value):,.{digits}f}"


def _head(column: Column) -> str:
    told = f' title="{escape(column.explained)}"' if column.explained else ""
    kind = "" if column.digits is None else " class=number"
    return f'<th scope="col" aria-sort="none"{kind}{told}><button>{escape(column.head)}</button></th>'


def _row(columns: Sequence[Column], row: Mapping) -> str:
    cells = []
    for i, column in enumerate(columns):
        value = row.get(column.key)
        shown = escape(cell(value, column.digits))
        tag, scope = ("th", ' scope="row"') if i == 0 else ("td", "")
        kind = ""
        if column.digits is not None:
            key = bar = ""
            if value is not None and shown != _UNKNOWN:
                key = f' data-value="{float(value)!r}"'
                bar = f' style="--share:{float(value):.3f}"' if column.bar else ""
            kind = f' class="number{" bar" if bar else ""}"{key}{bar}'
        cells.append(f"<{tag}{scope}{kind}>{shown}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield prefix + name, f"{value:.6g}"
        elif isinstance(value, list):
            yield prefix + name, ", ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in value)
        elif value not in (None, ""):
            yield prefix + name, value
