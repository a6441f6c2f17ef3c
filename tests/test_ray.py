"""Many videos on a real Ray of this machine: two workers, one of them killed amid its work."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bright_square
import numpy as np
import pytest
from bright_square import BOX, BrightTracker, Killer, expected_tables, make_videos, tables

from dmv_fast import cli
from dmv_fast.commands.annotate import Video, annotate
from dmv_fast.evaluation.datasets import Sequence
from dmv_fast.evaluation.runner import evaluate
from dmv_fast.evaluation.trackers import OpenCVFactory

ray = pytest.importorskip("ray", reason='no Ray here: pip install "dmv-fast[ray]"')

ROOT = Path(__file__).resolve().parent.parent
NAMES = [f"clip{n}" for n in range(5)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Video]:
    return make_videos(tmp_path_factory.mktemp("videos"), NAMES)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray of two workers, as small as it goes."""
    ray.cloudpickle.register_pickle_by_value(bright_square)  # the workers cannot import it
    started = ray.init(
        address="local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False,
        log_to_driver=False,
    )  # fmt: skip
    yield started.address_info["gcs_address"]
    ray.shutdown()


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:1", "no Ray answers at 127.0.0.1:1"), ("here", "HOST:PORT, auto or local")],
)
def test_a_wrong_address_is_one_line(
    videos: list[Video], tmp_path: Path, capsys, address: str, said: str
) -> None:
    """Ray itself would try for minutes. (First here: a Ray that is connected already is used.)"""
    (tmp_path / "list.csv").write_text(f"video,x,y,w,h\n{videos[0].source},1,2,3,4\n")
    words = ["annotate", str(tmp_path / "list.csv"), "--out", str(tmp_path / "out"), "--ray", address]
    assert cli.main([*words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_killed_worker_costs_nothing(videos: list[Video], cluster: str, tmp_path: Path) -> None:
    """Every video's boxes once, and equal to what a process of this machine makes of them."""
    killer = Killer(tmp_path / "marker")
    outcome = annotate(videos, BrightTracker(killer.marker), tmp_path / "out", ray=cluster)
    assert killer.killed, "no worker was killed: this has shown nothing"
    assert sorted(outcome.done) == NAMES and not outcome.failed
    annotate(videos, BrightTracker(), tmp_path / "local")
    assert tables(tmp_path / "out") == tables(tmp_path / "local") == expected_tables(NAMES)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_worker_that_dies_each_time_is_one_failure(
    videos: list[Video], cluster: str, tmp_path: Path
) -> None:
    outcome = annotate(videos[:1], BrightTracker(always=True), tmp_path, ray=cluster)
    assert not outcome.done and "died 3 times" in outcome.failed["clip0"]
    again = annotate(videos[:2], BrightTracker(), tmp_path, ray=cluster)
    assert sorted(again.done) == NAMES[:2] and tables(tmp_path) == expected_tables(NAMES[:2])


def test_the_command_on_a_cluster(videos: list[Video], cluster: str, tmp_path: Path) -> None:
    """As docs/annotate.md has it: the tracker itself, in workers that import the package; one video fails."""
    (tmp_path / "list.csv").write_text(f"video,x,y,w,h\nnone.mp4,1,2,3,4\n{videos[0].source},10,20,10,10\n")
    shell = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "annotate.md").read_text(), re.DOTALL)
    words = shlex.split(next(text for text in shell if "--ray local" in text))
    command = [sys.executable, "-m", *words, "--device", "cpu"]
    command[2] = "dmv_fast"
    command[command.index("local")] = cluster
    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert "1 written" in ended.stdout and "1 failed" in ended.stdout
    assert "failed: none: " in ended.stderr and "no such file" in ended.stderr
    assert [len(text.splitlines()) for text in tables(tmp_path / "boxes").values()] == [9]


def test_evaluation_on_a_cluster_equals_the_local_one(
    videos: list[Video], cluster: str, tmp_path: Path
) -> None:
    sequences = []
    for step, video in enumerate(videos[:2]):
        frames = tuple(sorted(Path(video.source).iterdir()))
        boxes = np.array([[BOX[0] + step * f, BOX[1] + f, *BOX[2:]] for f in range(len(frames))])
        sequences.append(Sequence(video.name, frames, boxes))
    here = evaluate(OpenCVFactory("mil"), sequences)
    there = evaluate(OpenCVFactory("mil"), sequences, out=tmp_path, ray=cluster)
    assert [row["auc"] for row in there.rows()] == [row["auc"] for row in here.rows()]
    assert sorted(path.stem for path in (tmp_path / "predictions").glob("*.txt")) == NAMES[:2]
