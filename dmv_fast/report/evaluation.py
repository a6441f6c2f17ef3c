"""The page of a folder that `dmv-fast eval` wrote."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from dmv_fast.evaluation import datasets
from dmv_fast.evaluation.datasets import DatasetError
from dmv_fast.report.filmstrip import KEY, filmstrip
from dmv_fast.report.page import Column, bars, cell, facts, note, page, read_json, section, table, tiles
from dmv_fast.report.plots import Axis, Line, line_plot

_MOST_BARS = 40
_NAMES = {
    "auc": "AUC",
    "precision_20px": "precision at 20 px",
    "norm_precision": "normalised precision",
    "ao": "average overlap",
    "sr_0.50": "success at 0.5",
    "sr_0.75": "success at 0.75",
    "fps": "frames a second",
}
_COLUMNS = (
    Column("sequence", "Sequence"),
    Column("frames", "Frames", 0),
    Column("auc", "AUC", 3, "Mean of the success curve: frames with IoU over 0, 0.05 .. 1", bar=True),
    Column("precision_20px", "P20", 3, "Share of frames with a centre error of 20 pixels or less"),
    Column("norm_precision", "NP", 3, "Mean of the normalised precision curve over 0 .. 0.5"),
    Column("ao", "AO", 3, "Mean IoU, first frame left out"),
    Column("sr_0.50", "SR.50", 3, "Share of frames with IoU over 0.5, first frame left out"),
    Column("sr_0.75", "SR.75", 3, "Share of frames with IoU over 0.75, first frame left out"),
    Column("fps", "FPS", 1, "Frames a second in the tracker; reading and decoding left out"),
)


def evaluation_page(folder: Path, dataset: str | None, root: Path | None, worst: int) -> str:
    """The page as HTML. dataset, root: where the frames are, where dataset.json does not say; worst: strips.

    Raises ValueError for a results.json that is none of ours.
    """
    content = read_json(folder / "results.json")
    try:
        *rows, mean = content["rows"]
        return page(
            f"{content['tracker']}: tracking, measured",
            f"{len(rows)} sequences, {mean['frames']:,} frames, one pass",
            [
                _figures(mean),
                section("Curves", _plots(content, mean)),
                section("Each sequence", _bars(rows)),
                section("Worst sequences", _worst(folder, rows, dataset, root, worst)),
                section("All figures", table("A click on a head sorts the table.", _COLUMNS, rows, mean)),
                section(
                    "Made with",
                    facts("Settings", content["settings"]),
                    facts("Machine and versions", content["environment"]),
                    note(f"Metrics as defined by: {content['definitions']}."),
                ),
            ],
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise ValueError(f"{folder / 'results.json'}: not as `dmv-fast eval` writes it ({error!r})") from None


def _figures(mean: dict) -> str:
    return tiles((_NAMES[c.key], cell(mean[c.key], c.digits), c.explained) for c in _COLUMNS[2:])


def _plots(content: dict, mean: dict) -> str:
    thresholds = content["thresholds"]
    kinds = (
        ("success", "iou", "Success: IoU over a threshold", "IoU threshold"),
        ("precision", "pixels", "Precision: centre error within a distance", "pixels"),
        ("norm_precision", "normalised", "Precision, the distance in target sizes", "target sizes"),
    )
    up = Axis("share of frames", 0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1))
    plots = []
    for key, axis, title, across in kinds:
        values = [math.nan if value is None else value for value in mean["curves"][key]]
        line = Line("mean over sequences", list(zip(thresholds[axis], values, strict=True)))
        x = Axis(across, thresholds[axis][0], thresholds[axis][-1])
        plots.append(line_plot(title, [line], x, up, dots=False))
    return f'<div class="plots">{"".join(plots)}</div>'


def _ranked(rows: list[dict]) -> list[dict]:
    """The sequences that were scored, the worst first."""
    return sorted((row for row in rows if row["auc"] is not None), key=lambda row: row["auc"])


def _bars(rows: list[dict]) -> str:
    ranked = _ranked(rows)
    shown = [(row["sequence"], row["auc"]) for row in ranked[:_MOST_BARS]]
    words = "AUC, lowest first."
    if len(ranked) > len(shown):
        words = f"AUC of the lowest {len(shown)} of {len(ranked)}; the table has all."
    return note(words) + bars(shown) if shown else ""


def _worst(folder: Path, rows: list[dict], dataset: str | None, root: Path | None, count: int) -> str:
    ranked = _ranked(rows)[:count]
    if not ranked:
        return ""
    try:
        sequences = {s.name: s for s in _sequences(folder, dataset, root)}
        strips = [_strip(folder, row, sequences) for row in ranked]
    except DatasetError as error:
        if root is not None or dataset is not None:  # it was asked for
            raise
        return note(f"No frames to show: {error}")
    words = "The line is the IoU over time, the dashed marks are the frames shown below it."
    return note(words) + KEY + "".join(strips)


def _sequences(folder: Path, dataset: str | None, root: Path | None) -> list[datasets.Sequence]:
    if root is None:
        try:
            told = read_json(folder / "dataset.json")
            dataset, root = dataset or told["dataset"], Path(told["root"])
        except (OSError, ValueError, KeyError, TypeError):
            raise DatasetError("the run does not tell where its data set is; give --root") from None
        if not root.is_dir():
            raise DatasetError(f"the data set is not in {root.name!r} any more; give --root")
    return datasets.load(dataset or "auto", root)


def _strip(folder: Path, row: dict, sequences: dict[str, datasets.Sequence]) -> str:
    name = row["sequence"]
    if name not in sequences:
        raise DatasetError(f"the data set has no sequence {name}")
    sequence, path = sequences[name], folder / "predictions" / f"{name}.txt"
    if not path.is_file():
        raise DatasetError(f"the run has no predictions/{name}.txt")
    boxes = datasets.read_rows(path)
    if len(boxes) != len(sequence):
        raise DatasetError(f"{path.name}: {len(boxes)} boxes; {name} has {len(sequence)} frames")
    words = f"AUC {row['auc']:.3f}, {row['frames']} frames"
    if np.isnan(sequence.boxes[:, 0]).any():
        words += f", {row['annotated']} of them annotated"
    return filmstrip(sequence, boxes, words)
