"""Running trackers over sequences: results on disk, resuming, several processes, `dmv-fast eval`."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from dmv_fast import cli
from dmv_fast.evaluation import datasets
from dmv_fast.evaluation.results import Results, score_predictions
from dmv_fast.evaluation.runner import evaluate, track_sequence
from dmv_fast.evaluation.trackers import DMVFactory, OpenCVFactory, Step

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = {"slow": 20, "fast": 8, "late": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of a textured square on noise; that of `late` is not annotated in its first two frames."""
    folder = tmp_path_factory.mktemp("data")
    for step, (name, count) in enumerate(LENGTHS.items(), start=1):
        rng = np.random.default_rng(step)
        patch, background = (
            rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in ((24, 24), (120, 160))
        )
        background = cv2.GaussianBlur(background, (0, 0), 2)
        rows = []
        (folder / name / "img").mkdir(parents=True)
        for frame in range(count):
            image, x, y = background.copy(), 20 + step * frame, 30 + frame
            image[y : y + 24, x : x + 24] = patch
            cv2.imwrite(str(folder / name / "img" / f"{frame + 1:04d}.jpg"), image)
            rows.append("nan,nan,nan,nan" if name == "late" and frame < 2 else f"{x},{y},24,24")
        (folder / name / "groundtruth_rect.txt").write_text("\n".join(rows))
    return folder


@pytest.fixture
def sequences(root: Path) -> list[datasets.Sequence]:
    return datasets.load("otb", root)


@pytest.fixture(scope="module")
def uninterrupted(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    """MIL over all of it in this process, and where its files are."""
    out = tmp_path_factory.mktemp("serial")
    return evaluate(OpenCVFactory("mil"), datasets.load("otb", root), out=out), out


class Still:
    """A factory and its tracker: answers with the first box, counts, and fails in its nth sequence."""

    def __init__(self, fails_at: int | None = None):
        self.inits, self.frames, self.fails_at = 0, 0, fails_at

    def __call__(self) -> Still:
        return self

    def settings(self) -> dict[str, object]:
        return {"tracker": "still"}

    def init(self, image: np.ndarray, bbox: tuple[float, ...]) -> None:
        self.inits += 1
        self.box = bbox

    def track(self, image: np.ndarray) -> Step:
        self.frames += 1
        if self.inits == self.fails_at:
            raise ArithmeticError("out of luck")
        return Step(self.box, 0.5, self.frames % 2 == 0)


def partial_files(out: Path) -> list[Path]:
    return list(out.rglob("*.part*"))


def figures(results: Results) -> list[dict[str, object]]:
    """The rows less their timings."""
    return [{k: v for k, v in row.items() if not k.startswith("fps")} for row in results.rows()]


# ---- one sequence ----


def test_a_pass_starts_at_the_first_annotated_frame(sequences: list[datasets.Sequence]) -> None:
    late = next(s for s in sequences if s.name == "late")
    tracker = Still()
    run = track_sequence(tracker, late)
    assert tracker.inits == 1 and tracker.frames == len(late) - 3
    assert np.isnan(run.boxes[:2]).all() and np.isnan(run.seconds[:2]).all()
    assert (run.boxes[2:] == late.boxes[2]).all()
    assert run.scores[2:4].tolist() == [1.0, 0.5] and run.found[2:5].tolist() == [True, False, True]
    assert (run.seconds[2:] > 0).all() and run.wall >= run.seconds[2:].sum()


def test_opencv_takes_whole_pixels_and_starts_over(sequences: list[datasets.Sequence]) -> None:
    """OpenCV itself refuses boxes of fractions; and a second init must not remember the first."""
    slow = next(s for s in sequences if s.name == "slow")
    tracker = OpenCVFactory("mil")()
    images = list(slow.images())
    tracker.init(images[0], (20.4, 29.6, 24.2, 23.9))
    first = [tracker.track(image) for image in images[1:6]]
    tracker.init(images[0], tuple(slow.boxes[0]))  # the same box in whole pixels
    again = [tracker.track(image) for image in images[1:6]]
    assert [step.box for step in again] == [step.box for step in first]
    assert np.isnan(first[0].score) and first[0].found  # MIL has no score


# ---- files and resuming ----


def test_results_are_written_and_can_be_scored_again(
    tmp_path: Path, sequences: list[datasets.Sequence]
) -> None:
    results = evaluate(Still(), sequences, out=tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["sequence"] for row in rows] == ["fast", "late", "slow", "mean"]
    assert float(rows[-1]["auc"]) == results.score.auc
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["settings"] == {"tracker": "still"}
    assert len(content["rows"][0]["curves"]["success"]) == 21
    assert (tmp_path / "scores" / "slow.txt").read_text().splitlines()[:2] == ["1.000000,1", "0.500000,0"]
    again = score_predictions(tmp_path, sequences)
    assert figures(again) == figures(results)
    assert again.speed.fps == pytest.approx(results.speed.fps, rel=1e-3)
    assert not partial_files(tmp_path)


def test_fps_is_given_both_ways(sequences: list[datasets.Sequence]) -> None:
    class Paced(Still):
        def track(self, image: np.ndarray) -> Step:
            time.sleep(0.02 if self.frames % 2 else 0.002)
            return super().track(image)

    speed = evaluate(Paced(), sequences[:1]).rows()[0]
    assert speed["fps_mean"] > speed["fps"] > speed["fps_read"] > 0


def test_a_failure_keeps_what_was_finished(tmp_path: Path, sequences: list[datasets.Sequence]) -> None:
    with pytest.raises(RuntimeError, match="failed on late: ArithmeticError: out of luck"):
        evaluate(Still(fails_at=2), sequences, out=tmp_path)
    assert sorted(path.stem for path in (tmp_path / "runs").iterdir()) == ["fast", "slow"]
    tracker = Still()
    results = evaluate(tracker, sequences, out=tmp_path)
    assert tracker.inits == 1
    assert figures(results) == figures(evaluate(Still(), sequences))


def test_every_failure_is_listed_at_the_end(sequences: list[datasets.Sequence]) -> None:
    class Unlucky(Still):
        def track(self, image: np.ndarray) -> Step:
            raise ArithmeticError(f"no luck with {self.inits}")

    with pytest.raises(RuntimeError, match="3 sequences failed: fast: .*luck with 1; late: .*2; slow: .*3"):
        evaluate(Unlucky(), sequences)


def test_finished_sequences_are_skipped_only_when_nothing_changed(
    tmp_path: Path, sequences: list[datasets.Sequence]
) -> None:
    class Other(Still):
        def settings(self) -> dict[str, object]:
            return {"tracker": "still", "k": 8}

    def inits(tracker: Still, chosen: list[datasets.Sequence] = sequences, resume: bool = True) -> int:
        evaluate(tracker, chosen, out=tmp_path, resume=resume)
        return tracker.inits

    assert inits(Still()) == 3
    assert inits(Still()) == 0
    assert inits(Still(), resume=False) == 3
    assert inits(Other()) == 3  # other settings
    assert inits(Other()) == 0
    predictions = tmp_path / "predictions" / "slow.txt"
    predictions.write_text("".join(predictions.read_text().splitlines(keepends=True)[:-1]))
    assert inits(Other()) == 1  # a file cut short
    moved = [
        datasets.Sequence(s.name, s.frames, s.boxes + (s.name == "fast"), s.resolution) for s in sequences
    ]
    assert inits(Other(), moved) == 1  # another annotation


def test_a_killed_run_goes_on_where_it_stopped(
    tmp_path: Path, root: Path, uninterrupted: tuple[Results, Path]
) -> None:
    command = [sys.executable, "-m", "dmv_fast", "eval", "otb", "--root", str(root)]
    command += ["--tracker", "opencv:mil", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = tmp_path / "runs" / "fast.json"
    deadline = time.monotonic() + 60
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert first.exists()
    written = first.stat().st_mtime_ns
    results = evaluate(OpenCVFactory("mil"), datasets.load("otb", root), out=tmp_path)
    assert first.stat().st_mtime_ns == written
    assert figures(results) == figures(uninterrupted[0])


def test_two_sequences_of_one_name_and_none_are_refused(sequences: list[datasets.Sequence]) -> None:
    with pytest.raises(ValueError, match="2 named fast"):
        evaluate(Still(), [sequences[0], sequences[0]])
    with pytest.raises(ValueError, match="sequences is empty"):
        evaluate(Still(), [])
    with pytest.raises(ValueError, match="jobs is 0"):
        evaluate(Still(), sequences, jobs=0)


def test_an_infinite_box_is_an_error(sequences: list[datasets.Sequence]) -> None:
    class Wild(Still):
        def track(self, image: np.ndarray) -> Step:
            return Step((0.0, 0.0, float("inf"), 1.0), 0.5, True)

    with pytest.raises(RuntimeError, match="failed on fast: ValueError: frame 1 got the box"):
        evaluate(Wild(), sequences)


# ---- several processes ----


def test_parallel_equals_serial(
    tmp_path: Path, sequences: list[datasets.Sequence], uninterrupted: tuple[Results, Path]
) -> None:
    serial, serial_out = uninterrupted
    before = os.environ.get("OMP_NUM_THREADS")
    parallel = evaluate(OpenCVFactory("mil"), sequences, out=tmp_path, jobs=2)
    assert os.environ.get("OMP_NUM_THREADS") == before
    assert figures(parallel) == figures(serial)
    for name in LENGTHS:
        one, other = (out / "predictions" / f"{name}.txt" for out in (tmp_path, serial_out))
        assert one.read_text() == other.read_text()


def test_a_bad_frame_in_a_worker_is_named(tmp_path: Path, sequences: list[datasets.Sequence]) -> None:
    broken = tmp_path / "0002.jpg"
    broken.write_text("no image")
    frames = (sequences[0].frames[0], broken, *sequences[0].frames[2:])
    bad = datasets.Sequence("bad", frames, sequences[0].boxes)
    with pytest.raises(datasets.DatasetError, match="0002.jpg: no such image"):
        evaluate(OpenCVFactory("mil"), [bad, sequences[1]], jobs=2)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_the_workers(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "dmv_fast", "eval", "otb", "--root", str(root), "--jobs", "2"]
    command += ["--tracker", "opencv:mil", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "runs").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, 0)  # 0: it was done before the signal came
    assert "Traceback" not in errors
    assert not partial_files(tmp_path)


# ---- dmv-fast eval ----


def test_eval_runs_a_peer_and_scores_its_predictions(tmp_path: Path, root: Path, capsys) -> None:
    out = tmp_path / "out"
    words = ["eval", "auto", "--root", str(root), "--sequences", "slow", "fast", "--out", str(out)]
    assert cli.main([*words, "--tracker", "opencv:mil"]) == 0
    printed = capsys.readouterr()
    assert "opencv-mil" in printed.out and "AUC" in printed.out and "mean" in printed.out
    assert "slow: 20 frames" in printed.err
    mean = json.loads((out / "results.json").read_text())["rows"][-1]
    assert mean["auc"] > 0.5  # MIL follows a slow square
    assert cli.main([*words, "--tracker", "opencv:mil"]) == 0
    assert "2 of 2 sequences are in" in capsys.readouterr().err
    scored = ["eval", "otb", "--root", str(root), "--sequences", "slow", "fast", "--predictions", str(out)]
    assert cli.main([*scored, "--out", str(tmp_path / "scored")]) == 0
    again = json.loads((tmp_path / "scored" / "results.json").read_text())["rows"][-1]
    assert again["auc"] == mean["auc"] and again["ao"] == mean["ao"]


def test_predictions_are_never_written_over(tmp_path: Path, root: Path, capsys) -> None:
    for folder in ("a/dmv", "b/dmv"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "slow.txt").write_text("1,2,3,4\n" * LENGTHS["slow"])
    first, second = str(tmp_path / "a" / "dmv"), str(tmp_path / "b" / "dmv")
    words = ["eval", "otb", "--root", str(root), "--sequences", "slow", "--predictions", first]
    assert cli.main([*words, second]) == 2
    assert "names must differ" in capsys.readouterr().err
    assert cli.main([*words, "--out", first]) == 2
    assert "would be lost" in capsys.readouterr().err


def test_plots_are_png_and_svg(tmp_path: Path, sequences: list[datasets.Sequence]) -> None:
    pytest.importorskip("matplotlib")
    from dmv_fast.evaluation.plots import plot_curves

    score = evaluate(Still(), sequences[:1]).score
    written = plot_curves({"still": score, "again": score}, tmp_path)
    assert sorted(path.name for path in written) == [
        "precision.png",
        "precision.svg",
        "success.png",
        "success.svg",
    ]
    assert cv2.imread(str(tmp_path / "success.png")) is not None
    assert "<svg" in (tmp_path / "precision.svg").read_text()


def test_eval_goes_without_matplotlib(
    tmp_path: Path, root: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dmv_fast.evaluation.plots", None)
    (tmp_path / "slow.txt").write_text("1,2,3,4\n" * LENGTHS["slow"])
    words = ["eval", "otb", "--root", str(root), "--sequences", "slow", "--predictions", str(tmp_path)]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "no plots" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.csv").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tracker", "opencv:goturn"], "known: csrt, kcf, mil, nano"),
        (["--tracker", "sort"], "known: dmv, opencv:csrt"),
        (["--tracker", "opencv:nano"], "needs --nano-dir"),
        (["--tracker", "opencv:nano", "--nano-dir", "/"], "holds 0 files *backbone*.onnx"),
        (["--tracker", "opencv:mil", "--jobs", "0"], "jobs is 0"),
        (["--tracker", "opencv:mil", "--sequences", "none"], "no none here"),
        (["--weights", "no-such-weights"], "no-such-weights"),
        (["--predictions", "/no/such/folder"], "no such folder"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path: Path, root: Path, capsys, words: list[str], said: str) -> None:
    assert cli.main(["eval", "otb", "--root", str(root), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_missing_and_short_predictions_are_named(tmp_path: Path, sequences: list[datasets.Sequence]) -> None:
    with pytest.raises(datasets.DatasetError, match="no prediction of fast"):
        score_predictions(tmp_path, sequences)
    (tmp_path / "fast.txt").write_text("1,2,3,4\n")
    with pytest.raises(datasets.DatasetError, match="1 boxes; fast has 8 frames"):
        score_predictions(tmp_path, sequences)


def test_contrib_trackers_say_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "TrackerCSRT", raising=False)
    with pytest.raises(ImportError, match="opencv-contrib-python has it"):
        OpenCVFactory("csrt")


def test_our_tracker_and_its_settings(
    tmp_path: Path, sequences: list[datasets.Sequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from dmv_fast.model.dmv import DMV, DMVConfig
    from dmv_fast.weights import save_model

    torch.manual_seed(0)
    save_model(DMV(DMVConfig()), tmp_path / "a.safetensors")
    factory = DMVFactory(
        str(tmp_path / "a.safetensors"), k=2, device="cpu", dtype="float32", backend="reference"
    )
    short = datasets.Sequence("short", sequences[2].frames[:3], sequences[2].boxes[:3])
    results = evaluate(factory, [short], out=tmp_path / "out")
    assert results.tracker == "a-k2-float32-reference" and results.speed.fps > 0
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert settings["k"] == 2 and settings["config"]["capacity"] == 32
    forgetful = DMVFactory(factory.weights, memory=False)
    assert forgetful.settings()["config"]["capacity"] == 1 and forgetful.label == "a-no-memory"
    # Another processor's or another build's "auto" is other arithmetic: its results are not taken over.
    automatic = DMVFactory(factory.weights, device="cpu")
    told = {automatic.settings()["dtype"]}
    monkeypatch.setattr("dmv_fast.runtime.precision.fast_precision", lambda device: "bfloat16")
    told.add(automatic.settings()["dtype"])
    assert "auto" not in told and "bfloat16" in told
    torch.manual_seed(1)
    save_model(DMV(DMVConfig()), tmp_path / "a.safetensors")
    assert factory.settings()["sha256"] != settings["sha256"]
