"""Scores against overlaps: the bins, the error, and what `dmv-fast calibration` reads and writes."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from dmv_fast import cli
from dmv_fast.evaluation.calibration import read_results, reliability
from dmv_fast.evaluation.datasets import DatasetError, load


def test_bins_by_hand():
    scores = np.array([0.0, 0.05, 0.95, 0.95, 1.0, 1.0, np.nan, 0.5])
    overlaps = np.array([0.0, 0.6, 0.9, 0.8, 0.7, 0.2, 0.9, np.nan])
    found = reliability(scores, overlaps)
    assert found.count.tolist() == [2, *[0] * 8, 4]
    assert found.good[[0, -1]] == pytest.approx([0.5, 0.75])
    assert found.iou[[0, -1]] == pytest.approx([0.3, 0.65])
    assert found.score[[0, -1]] == pytest.approx([0.025, 0.975])
    assert np.isnan(found.good[1:-1]).all()
    assert found.error == pytest.approx((2 * 0.475 + 4 * 0.225) / 6)


def test_error_is_small_for_honest_scores_and_large_for_boasting():
    rng = np.random.default_rng(0)
    scores = rng.random(20_000)
    overlaps = np.where(rng.random(20_000) < scores, 0.8, 0.2)
    assert reliability(scores, overlaps).error < 0.02
    assert reliability(np.sqrt(scores), overlaps).error > 0.1


def test_what_is_no_score_is_refused():
    with pytest.raises(ValueError, match="0 to 1"):
        reliability(np.array([0.2, 1.2]), np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        reliability(np.zeros(2), np.zeros(3))


@pytest.fixture
def evaluated(tmp_path: Path) -> tuple[Path, Path]:
    """A data set of one sequence and what an evaluation left of it; the target is out of sight in frame 3."""
    root, out = tmp_path / "data", tmp_path / "out"
    (root / "one/img").mkdir(parents=True)
    for i in range(5):
        cv2.imwrite(str(root / f"one/img/{i:04d}.jpg"), np.zeros((40, 40, 3), np.uint8))
    truth = ["10,10,10,10"] * 3 + ["nan,nan,nan,nan", "10,10,10,10"]
    (root / "one/groundtruth_rect.txt").write_text("\n".join(truth))
    for name in ("predictions", "scores"):
        (out / name).mkdir(parents=True)
    boxes = ["10,10,10,10", "10,10,10,10", "30,30,5,5", "0,0,1,1", "10,10,10,5"]
    (out / "predictions/one.txt").write_text("\n".join(boxes))
    (out / "scores/one.txt").write_text("1,1\n0.9,1\n0.1,0\n0.3,0\n0.6,1\n")
    return root, out


def test_judged_are_the_annotated_frames_after_the_first(evaluated):
    root, out = evaluated
    scores, overlaps = read_results(out, load("otb", root))
    assert scores.tolist() == [0.9, 0.1, 0.6]
    assert overlaps == pytest.approx([1.0, 0.0, 0.5])


def test_the_command_prints_and_writes(evaluated, capsys):
    pytest.importorskip("matplotlib")
    root, out = evaluated
    assert cli.main(["calibration", "otb", "--root", str(root), "--results", str(out)]) == 0
    assert "expected calibration error 0.267, 3 frames" in capsys.readouterr().out
    with (out / "reliability.csv").open() as file:
        assert list(csv.reader(file))[-1] == ["0.9-1.0", "1", "0.900", "1.000", "1.000"]
    assert cv2.imread(str(out / "reliability.png")) is not None


def test_files_that_do_not_fit_are_named(evaluated, capsys):
    root, out = evaluated
    (out / "scores/one.txt").write_text("1,1\n")
    with pytest.raises(DatasetError, match=r"scores.one\.txt: 5 boxes and 1 scores; one has 5 frames"):
        read_results(out, load("otb", root))
    (out / "scores/one.txt").write_text("nan,1\n" * 5)
    assert cli.main(["calibration", "otb", "--root", str(root), "--results", str(out)]) == 2
    assert "gives none" in capsys.readouterr().err
    (out / "scores/one.txt").unlink()
    with pytest.raises(DatasetError, match=r"one\.txt"):
        read_results(out, load("otb", root))
    words = ["calibration", "otb", "--root", str(root), "--results", str(out), "--sequences", "none"]
    assert cli.main(words) == 2
    assert "no none here" in capsys.readouterr().err
