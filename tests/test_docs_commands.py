"""Every command of README and docs is run, word for word but for its size: few frames, small made data.

Where a command is run by another file's test, or cannot be run by a test, its name here says where or why.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import doc_pages
import pytest
import torch
import yaml
from doc_pages import BOX, PAGES, ROOT

from dmv_fast import cli, weights
from dmv_fast.commands import bench, track
from dmv_fast.evaluation import speed

LINES = sorted({line for page in PAGES for line in doc_pages.commands(page)})
# How a command begins -> whose it is. All others are run here.
ELSEWHERE = {
    r"pip (install|-v)|apt ": "test_packaging.py installs, from wheel and source; test_docs.py knows extras",
    r"python examples/onnx_track.py|dmv-fast export": "test_export.py",
    r"vot ": "test_adapters_vot.py",
    r"python run_tracker.py": "pytracking is not on PyPI; test_adapters_pytracking.py has its loop",
    r"python -m benchmarks.ablations": "test_ablations.py",
    r"python benchmarks/tune.py": "test_tune.py",
    r"python benchmarks/triton_static.py": "test_triton_aot.py",
    r"rerun out.rrd": "it is another program's window; test_rerun.py reads the file",
    r"cat RUN": "test_a_checkpoint_in_pieces",
    r"split ": "test_a_checkpoint_in_pieces",
    r"dmv-fast track .*--view": "test_view.py",
    r"torchrun ": "test_training.py runs two processes of it",
}


def elsewhere(line: str) -> str | None:
    return next((where for pattern, where in ELSEWHERE.items() if re.match(pattern, line)), None)


def smaller(recipe: Path) -> str:
    """A recipe of the repository for one small step; what it is of is left."""
    said = yaml.safe_load(recipe.read_text())
    said |= {"steps": 1, "batch": 2, "frames": [2], "candidates": [4], "validate_samples": 1}
    said |= {"validate_clips": 0, "precision": "float32"}
    said |= {"cached_samples": 2} if "cached_samples" in said else {}
    said.pop("pretrained", None)  # the user's to bring: docs/training.md
    return yaml.safe_dump({k: v for k, v in said.items() if k != "start_from" or v in weights.known()})


def test_the_recipes_of_commands_start_in_a_checkout():
    """What README and docs tell to train from needs no file that an earlier run left."""
    named = {recipe for line in LINES for recipe in re.findall(r"train (recipes/\w+\.yaml)", line)}
    starts = {yaml.safe_load((ROOT / recipe).read_text()).get("start_from") for recipe in named}
    assert named and starts <= {None, *weights.known()}


@pytest.fixture
def desk(tmp_path, monkeypatch, checkpoint) -> Path:
    doc_pages.lay_desk(tmp_path)
    doc_pages.lay_training_data(tmp_path / "DATA")
    (tmp_path / "recipes").mkdir()
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        (tmp_path / "recipes" / recipe.name).write_text(smaller(recipe))
    for name in ("benchmarks", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "SMALL").symlink_to(tmp_path / "DATA")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.fixture
def few(monkeypatch) -> None:
    """`dmv-fast bench` of a small clip, a short memory and the quick ones of its sections."""
    monkeypatch.setattr(speed, "synthetic_clip", lambda: speed_clip(6, (320, 240)))
    monkeypatch.setattr(speed, "Setting", ShortMemory)
    monkeypatch.setattr(speed, "CANDIDATES", (1, 4))
    monkeypatch.setattr(speed, "MEMORY_FRAMES", (1, 2))
    monkeypatch.setattr(speed, "TARGETS", (1, 2))
    monkeypatch.setattr(bench, "ENDURANCE", 8)
    quick = {name: what for name, what in bench.SECTIONS.items() if name not in ("peers", "peak")}
    monkeypatch.setattr(bench, "SECTIONS", quick)


speed_clip = speed.synthetic_clip


@dataclass(frozen=True)
class ShortMemory(speed.Setting):
    memory: int = 2


def run(command: list[str], **options) -> str:
    """A program of its own, which knows nothing of this run's workers; what it printed."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def words_of(line: str) -> list[str]:
    """What follows `dmv-fast`; skips where an option's package is not there."""
    words = shlex.split(line)[1:]
    for extra in ("ray", "rerun"):
        if f"--{extra}" in words:
            pytest.importorskip(extra)
    return words


def dmv_fast(words: list[str], capsys) -> str:
    """The command in this process; what it printed."""
    if "--box" in words:
        words[words.index("--box") + 1] = ",".join(map(str, BOX))
    code = cli.main(words)
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def lines(pattern: str) -> pytest.MarkDecorator:
    """The test runs the commands that match, each by itself."""
    found = [line for line in LINES if elsewhere(line) is None and re.match(pattern, line)]
    assert found, pattern
    return pytest.mark.parametrize("line", found)


KINDS = {
    "track": r"dmv-fast track (?!0|.*--view)",
    "camera": r"dmv-fast track 0 --select",
    "eval": r"dmv-fast eval (?!.*--predictions)",
    "scored": r"dmv-fast eval .*--predictions",
    "calibration": r"dmv-fast calibration ",
    "report": r"dmv-fast report ",
    "annotate": r"dmv-fast annotate ",
    "doctor": r"dmv-fast (doctor|eval|track|train)$",
    "bench": r"dmv-fast bench",
    "preview": r"dmv-fast preview ",
    "train": r"dmv-fast train ",
    "detached": r"nohup ",
    "script": r"python benchmarks/fast_vs_reference",
    "retrieval": r"python benchmarks/retrieve",
    "benchmarks": r"pytest benchmarks",
    "python": r"python -[cm] (?!benchmarks)",
    "make": r"make ",
}


def test_every_command_is_somebodys():
    for line in LINES:
        mine = [name for name, pattern in KINDS.items() if re.match(pattern, line)]
        where = elsewhere(line)
        assert bool(where) != bool(mine), f"nobody runs (or two do): {line}"
        for name in re.findall(r"test_\w+\.py", where or ""):
            assert list(ROOT.glob(f"*/{name}")), name
    assert not [pattern for pattern in ELSEWHERE if not any(re.match(pattern, line) for line in LINES)]


@lines(KINDS["track"])
def test_track(line, desk, capsys):
    words = words_of(line)
    dmv_fast(words, capsys)
    made = [Path(word) for word in words[2:] if word.startswith("out.")]
    assert made and all(path.stat().st_size for path in made)


@lines(KINDS["camera"])
def test_a_camera_and_a_person(line, desk, capsys, monkeypatch):
    """A video stands in for the camera, and who draws the box is quick."""
    capture = cv2.VideoCapture
    asked = []

    def camera(source, *options):
        asked.append(source)
        return capture("video.mp4" if source == 0 else source, *options)

    monkeypatch.setattr(cv2, "VideoCapture", camera)
    monkeypatch.setattr(track, "_has_display", lambda: True)
    monkeypatch.setattr(cv2, "selectROI", lambda *_, **__: tuple(map(round, BOX)))
    monkeypatch.setattr(cv2, "destroyWindow", lambda _: None)
    said = dmv_fast(words_of(line), capsys)
    assert asked[0] == 0 and "frames" in said


@lines(KINDS["eval"])
def test_eval(line, desk, capsys, request, checkpoint):
    words = words_of(line)
    if "opencv:csrt" in words and not hasattr(cv2, "TrackerCSRT_create"):
        pytest.skip("this OpenCV has no CSRT: opencv-contrib-python has")
    if "FOLDER_OF_ONNX" in words:
        (desk / "FOLDER_OF_ONNX").symlink_to(request.getfixturevalue("shared_dir") / "peers")
    (desk / "RUN").mkdir()
    (desk / "RUN" / "model.safetensors").symlink_to(checkpoint)
    assert "Square" in dmv_fast(words, capsys)


@lines(KINDS["scored"])
def test_predictions_are_scored(line, desk, capsys):
    dmv_fast("eval otb --root DIR --tracker opencv:mil --out MIL".split(), capsys)
    words = shlex.split(line.replace("[DIR ...]", ""))[1:]
    words[words.index("--predictions") + 1] = "MIL"
    assert "Square" in dmv_fast(words, capsys)


@lines(KINDS["calibration"])
def test_calibration(line, desk, capsys):
    dmv_fast("eval otb --root DEV --out OUT".split(), capsys)
    assert "7 frames" in dmv_fast(shlex.split(line)[1:], capsys)


@lines(KINDS["report"])
def test_report(line, desk, capsys):
    dmv_fast("eval otb --root DATASETS/OTB".split(), capsys)
    dmv_fast(shlex.split(line)[1:], capsys)
    assert "Square" in (desk / "report.html").read_text()


@lines(KINDS["annotate"])
def test_annotate(line, desk, capsys):
    dmv_fast(words_of(line), capsys)
    assert len((desk / "boxes" / "video.csv").read_text().splitlines()) == 9


@lines(KINDS["doctor"])
def test_a_bare_command(line, desk, capsys):
    """`doctor` is whole; of the others the page speaks by their name."""
    words = shlex.split(line)[1:]
    dmv_fast(words if words == ["doctor"] else [*words, "--help"], capsys)


@lines(KINDS["bench"])
def test_bench(line, desk, capsys, few):
    words = shlex.split(line)[1:]
    made = words + ["--frames", "2", "--threads", "1"]
    before = torch.get_num_threads()
    try:
        said = dmv_fast(made, capsys)
    finally:
        torch.set_num_threads(before)
        cv2.setNumThreads(-1)
    assert "p50" in said


@lines(KINDS["preview"])
def test_preview(line, desk, capsys):
    words = shlex.split(line)[1:]
    if "--samples" in words:
        words[words.index("--samples") + 1] = "2"
    else:
        words += ["--samples", "2"]
    assert "2 samples" in dmv_fast(words, capsys)


@lines(KINDS["train"])
def test_train(line, desk, capsys):
    dmv_fast([*shlex.split(line)[1:], "--device", "cpu", "--workers", "0"], capsys)
    weights.load_model(str(desk / "RUN" / "model.safetensors"))


@lines(KINDS["detached"])
def test_train_detached(line, desk):
    """As it is but for the `&`, so that its end can be waited for."""
    shell = line.removesuffix("&").replace("dmv-fast", f"{sys.executable} -m dmv_fast")
    run(["bash", "-c", shell.replace(" --resume", " --resume --device cpu --workers 0")])
    weights.load_model(str(desk / "RUN" / "model.safetensors"))


@lines(KINDS["script"])
def test_script(line, desk):
    assert run([sys.executable, *shlex.split(line)[1:]])


@lines(KINDS["retrieval"])
def test_retrieval(line, desk, monkeypatch, capsys):
    """Small; of the peers, what takes half a minute to compile is left out or not compiled."""
    pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "dmv-fast[bench]"')
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(sys.modules, "pykeops", None)
    small = "--device cpu --sizes 16x64 32x64 -k 1 4 --rounds 1 --output OUT"
    monkeypatch.setattr(sys, "argv", [*shlex.split(line)[1:], *small.split()])
    runpy.run_path(sys.argv[0], run_name="__main__")
    (table,) = (desk / "OUT").glob("*/retrieve.csv")
    with table.open(newline="") as file:
        measured = {(row["m"], row["n"], row["k"], row["what"]) for row in csv.DictReader(file)}
    for what in ("ours", "product", "plain", "product+topk", "compiled"):
        assert {(m, "64", k, what) for m in ("16", "32") for k in "14"} <= measured
    assert "keops: left out" in capsys.readouterr().out
    assert table.with_suffix(".json").is_file() and table.with_suffix(".png").is_file()


@lines(KINDS["benchmarks"])
def test_benchmarks(line, desk):
    """The quick ones of them, a round each."""
    pytest.importorskip("pytest_benchmark", reason='needs pytest-benchmark: pip install "dmv-fast[bench]"')
    few = "-k test_retrieve -p no:cacheprovider --benchmark-min-rounds 1 --benchmark-max-time 0"
    said = run([sys.executable, "-m", *shlex.split(line), *few.split()], cwd=ROOT)
    assert "2 passed" in said and "Rounds" in said


class Parsed(Exception):
    """Raised in place of what a script does with its arguments."""


SCRIPT_LINES = [line for line in LINES if elsewhere(line) and re.match(r"python (-m )?benchmarks", line)]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # the script, imported by others
@pytest.mark.parametrize("line", SCRIPT_LINES)
def test_a_script_takes_the_arguments(line, monkeypatch):
    """As they are written, up to the work itself, which another file tests with smaller ones."""
    if "triton" in line:
        pytest.importorskip("triton")
    parse = argparse.ArgumentParser.parse_args

    def only_parse(*given):
        raise Parsed(parse(*given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    monkeypatch.setattr(sys, "setrecursionlimit", lambda _: None)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)[1:]
    module = words[0] == "-m"
    monkeypatch.setattr(sys, "argv", words[1:] if module else words)
    start = runpy.run_module if module else runpy.run_path
    with pytest.raises(Parsed):
        start(sys.argv[0], run_name="__main__")


def test_scripts_that_are_named_without_a_command_are_there():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+\.py)`", page)
    assert named and all((ROOT / "benchmarks" / name).is_file() for name in named)


@lines(KINDS["python"])
def test_python_one_liner(line, desk, checkpoint):
    (desk / "SMALL").unlink()
    for name in "AB":
        (desk / f"{name}.safetensors").symlink_to(checkpoint)
    run([sys.executable, *shlex.split(line)[1:]])
    assert "MEAN" not in line or (desk / "MEAN.safetensors").is_file()
    assert "SMALL" not in line or (desk / "SMALL" / "annotations.jsonl").is_file()


@lines(KINDS["make"])
def test_make_knows_the_target(line, desk):
    """What make would do; the scripts behind bench, gpu and demo: test_speed, test_gpu_run, test_cli."""
    said = run(["make", "-n", *shlex.split(line)[1:]], cwd=ROOT)
    scripts = re.findall(r"\b(?:benchmarks|examples)/\w+\.py", said)
    assert said and all((ROOT / script).is_file() for script in scripts)


def test_a_checkpoint_in_pieces(desk):
    (block,) = (b for b in doc_pages.blocks(ROOT / "docs" / "training.md", "sh") if b.startswith("split"))
    (desk / "RUN").mkdir()
    whole = os.urandom(40_000_000)
    (desk / "RUN" / "model.safetensors").write_bytes(whole)
    run(["bash", "-e", "-c", block])
    assert (desk / "model.safetensors").read_bytes() == whole
