"""`dmv-fast eval` from one end to the other, over each benchmark as its archive unpacks."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from dmv_fast import cli
from dmv_fast.evaluation import datasets

COUNT = 5
RNG = np.random.default_rng(0)
BACK = cv2.GaussianBlur(RNG.integers(0, 255, (120, 160, 3), np.uint8), (0, 0), 2)
PATCH = RNG.integers(0, 255, (24, 24, 3), np.uint8)
BOXES = "".join(f"{30 + t},40,24,24\n" for t in range(COUNT))


def images() -> list[np.ndarray]:
    made = []
    for t in range(COUNT):
        image = BACK.copy()
        image[40:64, 30 + t : 54 + t] = PATCH
        made.append(image)
    return made


def frames(folder: Path, pattern: str, first: int = 1) -> None:
    folder.mkdir(parents=True)
    for number, image in enumerate(images(), start=first):
        cv2.imwrite(str(folder / (pattern % number)), image)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def lay_out(dataset: str, root: Path) -> str:
    """One sequence of `dataset` below root -> its name."""
    if dataset == "otb":
        frames(root / "Dog" / "img", "%04d.jpg")
        text(root / "Dog" / "groundtruth_rect.txt", BOXES)
        return "Dog"
    if dataset == "pairs":
        root.mkdir()
        writer = cv2.VideoWriter(str(root / "a.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (160, 120))
        for image in images():
            writer.write(image)
        writer.release()
        text(root / "a.txt", BOXES)
        return "a"
    if dataset == "got10k":
        name = "GOT-10k_Val_000001"
        frames(root / "val" / name, "%08d.jpg")
        text(root / "val" / "list.txt", name + "\n")
        text(root / "val" / name / "groundtruth.txt", BOXES)
        text(root / "val" / name / "cover.label", "8\n8\n0\n8\n8\n")
        text(root / "val" / name / "meta_info.ini", "[METAINFO]\nresolution: (160, 120)\n")
        return name
    if dataset == "lasot":
        frames(root / "dog" / "dog-1" / "img", "%08d.jpg")
        text(root / "dog" / "dog-1" / "groundtruth.txt", BOXES)
        text(root / "dog" / "dog-1" / "out_of_view.txt", "0,0,1,0,0")
        return "dog-1"
    if dataset == "trackingnet":
        frames(root / "TEST" / "frames" / "x_0", "%d.jpg", 0)
        text(root / "TEST" / "anno" / "x_0.txt", BOXES)
        return "x_0"
    frames(root / "data_seq" / "UAV123" / "bike1", "%06d.jpg")
    text(root / "anno" / "UAV123" / "bike1.txt", BOXES)
    return "bike1"


@pytest.mark.parametrize("dataset", sorted(datasets.READERS))
def test_eval_runs_over_each_layout(tmp_path: Path, capsys, dataset: str) -> None:
    name = lay_out(dataset, tmp_path / "data")
    assert datasets.detect(tmp_path / "data") == dataset
    out = tmp_path / "out"
    words = ["eval", dataset, "--root", str(tmp_path / "data"), "--tracker", "opencv:mil", "--out", str(out)]
    assert cli.main(words) == 0
    assert name in capsys.readouterr().out
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["sequence"] for row in rows] == [name, "mean"]
    hidden = dataset in ("got10k", "lasot")
    assert int(rows[0]["frames"]) == COUNT and int(rows[0]["annotated"]) == COUNT - hidden
    mean = {name: float(value) for name, value in rows[-1].items() if name != "sequence"}
    assert mean["auc"] > 0.5 and mean["precision_20px"] == 1 and mean["fps"] > 0  # so slow a square
    assert all(0 <= mean[name] <= 1 for name in ("norm_precision", "ao", "sr_0.50", "sr_0.75"))
    assert json.loads((out / "results.json").read_text())["rows"][-1]["auc"] == mean["auc"]
    assert len((out / "predictions" / f"{name}.txt").read_text().splitlines()) == COUNT
