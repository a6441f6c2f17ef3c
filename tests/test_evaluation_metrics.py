"""Scores against numbers worked out by hand, and against the got10k toolkit where it is installed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dmv_fast.evaluation import datasets
from dmv_fast.evaluation.metrics import centre_error, mean_score, overlap, score_sequence
from dmv_fast.evaluation.results import format_boxes, score_predictions

NAN = [np.nan] * 4


def boxes(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


# ---- by hand ----


def test_four_frames_by_hand() -> None:
    truth = boxes(*[[0, 0, 10, 10]] * 4)
    # not used (the first frame was given) | exact | half beside: IoU 50/150 | far off: 100 px
    predicted = boxes([50, 50, 1, 1], [0, 0, 10, 10], [5, 0, 10, 10], [100, 0, 10, 10])
    score = score_sequence(predicted, truth)
    # IoU 1, 1, 1/3, 0; of the thresholds 0, 0.05 .. 1 they exceed 20, 20, 7 (0 .. 0.30) and 0
    assert score.auc == pytest.approx((20 + 20 + 7 + 0) / (21 * 4))
    assert score.success[10] == 2 / 4
    assert score.precision == 3 / 4  # errors 0, 0, 5, 100 px
    # normalised errors 0, 0, 0.5, 10: the third counts at the last of 51 thresholds only
    assert score.normalised_precision == pytest.approx((51 + 51 + 1 + 0) / (51 * 4))
    assert score.normalised_precision_at_20 == 2 / 4
    assert score.ao == pytest.approx((1 + 1 / 3 + 0) / 3)  # the first frame is left out
    assert (score.success_rate(0.5), score.success_rate(0.75)) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert score.frames == 4


def test_thresholds_overlap_is_strict_and_distance_is_not() -> None:
    truth = boxes([0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10])
    predicted = boxes([0, 0, 10, 10], [0, 0, 10, 5], [20, 0, 10, 10])  # IoU 1/2; 20 px off
    score = score_sequence(predicted, truth)
    assert score.success_rate(0.5) == 0
    assert score.precision == 1


def test_a_perfect_tracker_reaches_20_of_21() -> None:
    truth = boxes([0, 0, 10, 10], [3, 3, 8, 9])
    score = score_sequence(truth, truth)
    assert score.auc == pytest.approx(20 / 21)
    assert (score.precision, score.normalised_precision, score.ao, score.success_rate(0.75)) == (1, 1, 1, 1)


def test_frames_without_a_box_do_not_count() -> None:
    truth = boxes(NAN, [0, 0, 10, 10], NAN, [0, 0, 10, 10], [0, 0, 10, 10])
    predicted = boxes(NAN, [9, 9, 9, 9], [500, 500, 1, 1], [0, 0, 10, 10], [5, 0, 10, 10])
    score = score_sequence(predicted, truth)
    assert score.frames == 3
    assert score.auc == pytest.approx((20 + 20 + 7) / (21 * 3))
    assert score.ao == pytest.approx((1 + 1 / 3) / 2)


def test_a_prediction_of_nan_is_a_miss() -> None:
    truth = boxes([0, 0, 10, 10], [0, 0, 10, 10])
    score = score_sequence(boxes([0, 0, 10, 10], NAN), truth, bound=(100, 100))
    assert (score.auc, score.precision, score.ao) == (pytest.approx(20 / 42), 0.5, 0.0)


def test_one_annotated_frame_measures_nothing() -> None:
    truth = boxes([0, 0, 10, 10], NAN)
    score = score_sequence(boxes([0, 0, 10, 10], [1, 1, 5, 5]), truth)
    assert np.isnan([score.auc, score.precision, score.ao, score.success_rate(0.5)]).all()
    good = score_sequence(truth[[0, 0]], truth[[0, 0]])
    assert mean_score([score, good]).auc == good.auc
    assert np.isnan(mean_score([score]).auc)


def test_mean_is_over_sequences_for_curves_and_over_frames_for_ao() -> None:
    hit, miss = [0, 0, 10, 10], [50, 50, 10, 10]
    short = score_sequence(boxes(hit, hit), boxes(hit, hit))
    long = score_sequence(boxes(hit, miss, miss, miss), boxes(hit, hit, hit, hit))
    both = mean_score([short, long])
    assert both.auc == pytest.approx((20 / 21 + 20 / 84) / 2)
    assert both.precision == pytest.approx((1 + 1 / 4) / 2)
    assert both.ao == pytest.approx(1 / 4)  # one frame of four, not (1 + 0) / 2


def test_cut_to_the_frame_as_the_toolkit_does() -> None:
    truth, predicted = boxes([90, 0, 20, 10]), boxes([90, 0, 10, 10])
    assert overlap(predicted, truth)[0] == pytest.approx(0.5)
    assert overlap(predicted, truth, bound=(100, 100))[0] == pytest.approx(1)
    # over the left border the toolkit moves the box inside, whole
    assert overlap(boxes([-5, 0, 10, 10]), boxes([0, 0, 10, 10]), bound=(100, 100))[0] == pytest.approx(1)


def test_normalised_error_of_a_target_under_a_pixel() -> None:
    error = centre_error(boxes([1, 0, 0.5, 10]), boxes([0, 0, 0.5, 10]), normalised=True)
    assert error[0] == pytest.approx(1)  # divided by 1 px, not by half a pixel


def test_boxes_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"boxes have shape \(2, 4\), truth \(3, 4\)"):
        score_sequence(np.ones((2, 4)), np.ones((3, 4)))


# ---- against the toolkit ----


def made_boxes(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Truth and predictions of every quality, half of them whole, to meet thresholds exactly."""
    rng = np.random.default_rng(seed)
    truth = np.concatenate([rng.uniform(0, 250, (count, 2)), rng.uniform(5, 90, (count, 2))], axis=1)
    predicted = truth + rng.normal(size=(count, 4)) * rng.choice([0, 2, 10, 60], (count, 1))
    predicted[:, 2:] = np.maximum(predicted[:, 2:], 0)
    whole = rng.random(count) < 0.5
    truth[whole], predicted[whole] = truth[whole].round(), predicted[whole].round()
    predicted[rng.random(count) < 0.05] = 0
    return predicted.round(3), truth.round(3)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def agree(ours: dict[str, float], theirs: dict[str, float]) -> None:
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name


class ToolkitDataset:
    """What an Experiment* of the toolkit asks of a data set, without the real one on disk."""

    def __init__(self, annotations: dict[str, np.ndarray]):
        self.seq_names = list(annotations)
        self._annotations = annotations

    def __len__(self) -> int:
        return len(self.seq_names)

    def __iter__(self):
        return ((None, self._annotations[name]) for name in self.seq_names)


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return pytest.importorskip(
        "got10k.experiments", reason="the got10k toolkit (extra `eval`) is not installed"
    )


@pytest.mark.parametrize("kind", ["ExperimentOTB", "ExperimentUAV123"])
def test_auc_and_precision_are_the_toolkits(tmp_path: Path, experiments, kind: str) -> None:
    truths, root, predictions = {}, tmp_path / "data", tmp_path / "results" / "mine"
    for seed, count in enumerate((60, 7, 200)):
        predicted, truth = made_boxes(seed, count)
        if kind == "ExperimentUAV123":
            truth[count // 2 : count // 2 + 3] = np.nan
        name = f"seq{seed}"
        truths[name] = truth
        write(predictions / f"{name}.txt", format_boxes(predicted))
        write(
            predictions / "times" / f"{name}_time.txt",
            "".join(f"{0.01 + 0.001 * i:.8f}\n" for i in range(count)),
        )
        write(
            root / name / "groundtruth_rect.txt",
            "\n".join(",".join(map(repr, row.tolist())) for row in truth),
        )
        for number in range(count):
            write(root / name / "img" / f"{number:04d}.jpg", "")
    toolkit = getattr(experiments, kind).__new__(getattr(experiments, kind))
    toolkit.dataset, toolkit.nbins_iou, toolkit.nbins_ce = ToolkitDataset(truths), 21, 51
    toolkit.result_dir, toolkit.report_dir = str(tmp_path / "results"), str(tmp_path / "reports")
    theirs = toolkit.report(["mine"])["mine"]

    results = score_predictions(predictions, sized(datasets.load("otb", root)))
    rows = {row["sequence"]: row for row in results.rows()}
    for name in truths:
        agree(rows[name], otb_figures(theirs["seq_wise"][name]))
    agree(rows["mean"], otb_figures(theirs["overall"]))
    np.testing.assert_allclose(results.score.success, theirs["overall"]["success_curve"], atol=1e-12)
    np.testing.assert_allclose(
        results.score.precision_curve, theirs["overall"]["precision_curve"], atol=1e-12
    )


def sized(sequences: list[datasets.Sequence]) -> list[datasets.Sequence]:
    """The same with a stated frame size: their frames are empty files."""
    return [datasets.Sequence(s.name, s.frames, s.boxes, (320, 240)) for s in sequences]


def otb_figures(theirs: dict[str, float]) -> dict[str, float]:
    return {
        "auc": theirs["success_score"],
        "precision_20px": theirs["precision_score"],
        "fps_mean": theirs["speed_fps"],
    }


def test_ao_and_sr_are_the_toolkits(tmp_path: Path, experiments) -> None:
    root, results_dir = tmp_path / "GOT-10k", tmp_path / "results"
    names = [f"GOT-10k_Val_{number:06d}" for number in range(1, 4)]
    write(root / "val" / "list.txt", "\n".join(names))
    covers = {}
    for seed, (name, count) in enumerate(zip(names, (50, 120, 9), strict=True)):
        predicted, truth = made_boxes(10 + seed, count)
        truth[::7] -= [40, 30, 0, 0]  # some reach over the border
        cover = np.random.default_rng(seed).integers(0, 9, count)
        cover[0], covers[name] = 8, cover
        folder = root / "val" / name
        write(folder / "groundtruth.txt", "\n".join(",".join(f"{v:.4f}" for v in row) for row in truth))
        write(folder / "meta_info.ini", "[METAINFO]\nresolution: (320, 240)\nanno_fps: 10Hz\n")
        for label in ("cover", "absence", "cut_by_image"):
            write(folder / f"{label}.label", "\n".join(map(str, cover if label == "cover" else 0 * cover)))
        for number in range(1, count + 1):
            write(folder / f"{number:08d}.jpg", "")
        write(results_dir / "GOT-10k" / "mine" / name / f"{name}_001.txt", format_boxes(predicted))
        write(results_dir / "GOT-10k" / "mine" / name / f"{name}_time.txt", "0.02\n" * count)
    toolkit = experiments.ExperimentGOT10k(str(root), "val", str(results_dir), str(tmp_path / "reports"))
    theirs = toolkit.report(["mine"])["mine"]

    results = score_predictions(results_dir / "GOT-10k" / "mine", datasets.load("got10k", root))
    rows = {row["sequence"]: row for row in results.rows()}
    for name in names:
        agree(rows[name], {"ao": theirs["seq_wise"][name]["ao"], "sr_0.50": theirs["seq_wise"][name]["sr"]})
    overall = theirs["overall"]
    agree(rows["mean"], {"ao": overall["ao"], "sr_0.50": overall["sr"], "fps": 50.0})
    # SR0.75, which its report leaves out, read off its own success curve (101 thresholds)
    agree(rows["mean"], {"sr_0.75": overall["succ_curve"][75]})


def test_predictions_of_a_real_run_score_the_same(tmp_path: Path, experiments, shared_dir: Path) -> None:
    """The dev sequences with a made tracker: their own boxes, disturbed."""
    if not (shared_dir / "data" / "dev").is_dir():
        pytest.skip(f"no data/dev in {shared_dir}")
    sequences = datasets.load("otb", shared_dir / "data" / "dev")
    rng = np.random.default_rng(0)
    for sequence in sequences:
        drift = np.cumsum(rng.normal(size=(len(sequence), 4)), axis=0)
        drift[:, 2:] *= 0.1
        predicted = np.nan_to_num(sequence.boxes) + drift
        predicted[:, 2:] = np.maximum(predicted[:, 2:], 1)
        write(tmp_path / "results" / "mine" / f"{sequence.name}.txt", format_boxes(predicted))
    toolkit = experiments.ExperimentUAV123.__new__(experiments.ExperimentUAV123)
    toolkit.dataset = ToolkitDataset({s.name: s.boxes for s in sequences})
    toolkit.nbins_iou, toolkit.nbins_ce = 21, 51
    toolkit.result_dir, toolkit.report_dir = str(tmp_path / "results"), str(tmp_path / "reports")
    theirs = toolkit.report(["mine"])["mine"]
    for row in score_predictions(tmp_path / "results" / "mine", sequences).rows():
        figures = theirs["overall"] if row["sequence"] == "mean" else theirs["seq_wise"][row["sequence"]]
        agree(row, {"auc": figures["success_score"], "precision_20px": figures["precision_score"]})
    assert os.environ["MPLBACKEND"] == "Agg"
