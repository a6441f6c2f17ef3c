"""The benchmarks measure what they say: the settings, full memories, boxes that stay, growth that shows."""

from __future__ import annotations

import csv
import json
import mmap
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dmv_fast import cli
from dmv_fast.evaluation import endurance, speed_report
from dmv_fast.evaluation.datasets import Sequence
from dmv_fast.evaluation.endurance import endure
from dmv_fast.evaluation.speed import Bench, Clip, Row, Setting, Taken, synthetic_clip
from dmv_fast.evaluation.trackers import Step
from dmv_fast.model.memory import MemoryPolicy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import fast_vs_reference

SMALL = Setting(memory=2, device="cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return synthetic_clip(6, (320, 240))


@pytest.fixture(scope="module")
def bench(clip) -> Bench:
    return Bench(clip, SMALL, frames=2, say=lambda line: None)


def test_a_timed_tracker_has_a_full_memory_and_stands_still(bench):
    run = bench.run_of(replace(SMALL, memory=3, k=2))
    (tracker,) = run._trackers
    frames = tracker.frame_step
    before, window = frames.memory.keys.clone(), tracker._target.look(tracker.config)[0]
    for i in range(3):
        run(i)
    assert (frames.k, frames.memory.valid.tolist()) == (2, [3 * 256])
    assert tracker._target.box == bench.clip.box
    assert tracker._target.look(tracker.config)[0] == window
    assert torch.equal(frames.memory.keys, before)


def test_several_targets_are_one_call_with_as_many_boxes(bench):
    run = bench.run_of(replace(SMALL, targets=3))
    (tracker,) = run._trackers
    assert len(tracker) == 3
    assert tracker.frame_step.memory.valid.tolist() == [2 * 256] * 3


def test_sections_leave_rows_in_turns_and_without_warm_up(clip):
    bench = Bench(clip, SMALL, frames=2, say=lambda line: None)
    calls = []

    class Told:
        def __init__(self, name):
            self.name = name

        def prepare(self, i): ...

        def __call__(self, i):
            calls.append(self.name)

    taken = bench._in_turns({"a": Told("a"), "b": Told("b")})
    assert calls == ["a", "b"] * 5
    assert [len(times) for times in taken.values()] == [2, 2]
    bench.stages()
    stages = [row.name for row in bench.rows if row.name.endswith("K=4")]
    assert stages == [f"{s} K=4" for s in speed_report._STAGES]


def test_peers_that_are_not_there_are_named(clip):
    said = []
    bench = Bench(clip, SMALL, frames=2, say=said.append)
    bench.peers()
    assert any("without nano" in line and "--nano-dir" in line for line in said)
    assert "dmv" in [row.name for row in bench.rows]


def row(section: str, ms: list[float], setting: Setting | None = SMALL) -> Row:
    return Row(section, "name", setting, [Taken(t, 2 * t) for t in ms])


def test_a_row_s_figures():
    found = row("k", [10.0, 20.0, 30.0, 40.0, 1000.0])
    assert (found.percentile(50), found.processor, found.percentile(0)) == (30.0, 60.0, 10.0)
    assert found.fps == pytest.approx(1000 / 30)
    assert found.paper_fps == 79
    assert row("memory", [1.0]).paper_fps is None


def test_report_has_every_row_and_the_paper_beside_k(tmp_path, clip):
    bench = Bench(clip, SMALL, frames=2, say=lambda line: None)
    bench.rows = [row("k", [10.0], replace(SMALL, k=k)) for k in (1, 4, 32)] + [row("peers", [5.0], None)]
    facts = speed_report.machine(torch.device("cpu")) | {"dtype": "bfloat16", "timed": speed_report.TIMED}
    speed_report.write(bench, facts, tmp_path)
    with open(tmp_path / "frame.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["section"], line["k"], line["paper_fps"]) for line in lines] == [
        ("k", "1", "87"), ("k", "4", "79"), ("k", "32", "44"), ("peers", "", "")
    ]  # fmt: skip
    assert lines[0]["weights"] == "untrained"
    assert "decoding excluded" in json.loads((tmp_path / "machine.json").read_text())["timed"]
    text = (tmp_path / "frame.md").read_text()
    assert "paper, TITAN X" in text and "| name | 10.00 |" in text
    assert not list(tmp_path.glob("*.part*"))


class Leaking:
    """A tracker that keeps every frame, or none."""

    def __init__(self, leaks: bool):
        self._leaks, self._kept, self.seen = leaks, [], []

    def track(self, image: np.ndarray) -> Step:
        self.seen.append(int(image[0, 0, 0]))
        if self._leaks:
            # Not from a heap, where earlier tests may have left room.
            memory = mmap.mmap(-1, 4 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.write(b"1" * len(memory))
            self._kept.append(memory)
        return Step((0, 0, 1, 1), 1.0, True)


@pytest.mark.parametrize(("leaks", "least", "most"), [(True, 100, 200), (False, -50, 50)])
def test_endurance_shows_growth_after_the_first_block(monkeypatch, leaks, least, most):
    monkeypatch.setattr(endurance, "BLOCK", 20)
    frames = [np.full((4, 4, 3), i, np.uint8) for i in range(4)]
    tracker = Leaking(leaks)
    found = endure(tracker, Clip(frames, (0, 0, 1, 1), ""), 60)
    assert tracker.seen[:8] == [1, 2, 3, 2, 1, 0, 1, 2]  # no jump, no break
    assert [block.frames for block in found.blocks] == [20, 40, 60]
    assert least <= found.grown_mb <= most


def test_endurance_remembers_on_the_way(bench):
    tracker = bench.follower(MemoryPolicy(interval=2, threshold=0.0))
    found = endure(tracker, bench.clip, 6)
    assert tracker.frame_step.memory.valid.tolist() == [512]
    assert len(found.blocks) == 1 and found.p50_ms > 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--only", "k,speed"], "'speed' is none of k, memory"),
        (["--frames", "1"], "frames is 1"),
        (["--endurance", "1"], "endurance is 1"),
        (["--threads", "0"], "threads is 0"),
        (["--video", "v.mp4"], "box is missing"),
    ],
)
def test_bad_input_is_one_line(capfd, arguments, reason):
    assert cli.main(["bench", *arguments]) == 2
    error = capfd.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_endurance_command_writes_its_table(tmp_path, capfd):
    out = tmp_path / "new"
    command = ["bench", "--endurance", "3", "--device", "cpu", "--threads", "1", "--output", str(out)]
    assert cli.main(command) == 0
    assert "3 frames: resident" in capfd.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["endurance.csv", "endurance.json", "endurance.txt"]


def test_agreement_leaves_the_given_box_out_and_finds_where_they_part():
    truth = np.array([[0.0, 0, 10, 10]] * 5)
    fast, reference = truth.copy(), truth.copy()
    fast[0] += 100
    fast[3:, 0] += 8  # IoU 2 / 18
    found = fast_vs_reference.agreement(Sequence("s", (), truth), fast, reference)
    assert (found.frames, found.parted_at) == (4, 3)
    assert found.mean_iou == pytest.approx((1 + 1 + 2 / 18 * 2) / 4)
    assert found.reference_auc > found.fast_auc
    same = fast_vs_reference.agreement(Sequence("s", (), truth), truth, truth)
    assert (same.mean_iou, same.lowest_iou, same.parted_at) == (pytest.approx(1), pytest.approx(1), None)
    text = fast_vs_reference.table([found, same])
    assert "1 of 2 sequences" in text
