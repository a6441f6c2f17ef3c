"""benchmarks/gpu.py, which must not waste a GPU's time: steps that fail, hang or are not there."""

from __future__ import annotations

import importlib.util
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "benchmarks" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
sys.modules["gpu_run"] = gpu  # where its dataclass looks up its types
spec.loader.exec_module(gpu)


def python(name: str, code: str, limit: int = 60, together: str = ""):
    return gpu.Step(name, limit, [sys.executable, "-c", code], together)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """main() with steps of ours -> exit code."""

    def with_steps(steps) -> int:
        monkeypatch.setattr(gpu, "steps", lambda device, results: steps)
        results = str(tmp_path / "results")
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--results", results])
        monkeypatch.setenv("OUT", str(tmp_path / "out"))
        return gpu.main()

    return with_steps


def test_no_step_stops_another(run, tmp_path):
    steps = [
        python("fails", "print('why'); raise SystemExit(3)"),
        python("hangs", "import time; time.sleep(60)", limit=2, together="a"),
        gpu.Step("missing", 5, ["/no/such/program"], "a"),
        python("works", "print('fine')"),
    ]
    assert run(steps) == 1
    assert [step.state for step in steps] == ["FAILED (3)", "TIME UP", "FAILED", "passed"]
    assert steps[1].took < 20
    assert "why" in (tmp_path / "results" / "logs" / "fails.log").read_text()
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert all(step.name in text and step.state in text for step in steps)
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert "results/logs/works.log" in archive.getnames()
    assert run([python("works", "")]) == 0


def test_what_is_left_of_the_time_is_kept_to(run, monkeypatch):
    monkeypatch.setattr(gpu, "BUDGET_S", 6)
    steps = [python("long", "import time; time.sleep(60)"), python("late", "")]
    began = time.monotonic()
    assert run(steps) == 1
    assert [step.state for step in steps] == ["TIME UP", "not run"]
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_step_names_what_is_there(device, tmp_path):
    steps = gpu.steps(device, tmp_path / "results")
    files = [part for step in steps for part in step.command if part.endswith(".py")]
    assert files and all((ROOT / file).is_file() for file in files)
    assert len({step.name for step in steps}) == len(steps)
    alone = sum(step.limit for step in steps if not step.together)
    groups = {step.together: step.limit for step in steps if step.together}
    assert alone + sum(groups.values()) < 1.4 * gpu.BUDGET_S  # none takes all it may; the last would be cut
