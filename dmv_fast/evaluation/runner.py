"""One-pass evaluation of a tracker over sequences."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dmv_fast.evaluation.datasets import DatasetError, Sequence
from dmv_fast.evaluation.results import (
    Results,
    Run,
    load_run,
    save_run,
    summarise_runs,
)
from dmv_fast.evaluation.trackers import Tracker
from dmv_fast.evaluation.workers import Failure, Tick, WorkerDied, hand_out


def evaluate(
    tracker_factory: Callable[[], Tracker],
    sequences: Iterable[Sequence],
    *,
    out: Path | str | None = None,
    jobs: int = 1,
    ray: str | None = None,
    gpu: bool = False,
    resume: bool = True,
    progress: bool = False,
) -> Results:
    """Run a tracker once over every sequence, from its first annotated box on, and score it.

    Args:
        tracker_factory: makes the tracker, one a process. Its `label` and `settings()`, where it has them,
            name the results and tell which of the sequences saved in `out` are done.
        out: where each sequence's predictions, times and scores go as it ends, then results.csv and .json.
        jobs: processes over sequences, each with one thread; 1 = this process. They are spawned, so the
            factory must pickle, and a script must guard its start with `if __name__ == "__main__"`.
        ray, gpu: a Ray cluster in place of processes, as for `workers.hand_out`.
        resume: take what `out` already has of the same settings, instead of running it again.
        progress: a bar, and a line a sequence, on stderr.

    Raises:
        ValueError: bad arguments; DatasetError (a ValueError): a frame that cannot be read.
        RuntimeError: the tracker failed; names the sequence. Either is raised when the other sequences are
            done; they stay in `out`.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; it must be at least 1")
    sequences = list(sequences)
    _check_names(sequences)
    out = None if out is None else Path(out)
    label: str = getattr(tracker_factory, "label", "") or getattr(tracker_factory, "__name__", "tracker")
    settings = tracker_factory.settings() if hasattr(tracker_factory, "settings") else {"tracker": label}
    runs = {} if out is None or not resume else _saved(out, sequences, settings)
    pending = [sequence for sequence in sequences if sequence.name not in runs]
    failed: dict[str, Exception] = {}
    if progress and runs:
        print(
            f"{len(runs)} of {len(sequences)} sequences are in {out} already, of the same settings",
            file=sys.stderr,
        )
    total, disable = sum(len(s) - s.start for s in pending), None if progress else True
    with tqdm(total=total, unit="frame", disable=disable, leave=False) as bar:
        for sequence, run in _run_all(_Pass(tracker_factory), pending, jobs, ray, gpu, bar):
            if isinstance(run, Failure):
                failed[sequence.name] = run.error
                continue
            runs[sequence.name] = run
            if out is not None:
                save_run(out, sequence, run, settings)
            if progress:
                _report(sequence, summarise_runs(label, settings, [sequence], runs))
    if failed:
        raise _as_one(failed)
    results = summarise_runs(label, settings, sequences, runs)
    if out is not None:
        results.write(out)
    return results


def _saved(out: Path, sequences: list[Sequence], settings: dict[str, object]) -> dict[str, Run]:
    """What `out` already has, by the names of the sequences."""
    saved = {sequence.name: load_run(out, sequence, settings) for sequence in sequences}
    return {name: run for name, run in saved.items() if run is not None}


def _as_one(failed: dict[str, Exception]) -> Exception:
    (name, error), *others = failed.items()
    if not others and not isinstance(error, WorkerDied):  # all other errors name their sequence
        return error
    kind = DatasetError if all(isinstance(e, DatasetError) for e in failed.values()) else RuntimeError
    reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
    return kind(f"{len(failed)} sequences failed: {reasons}" if others else reasons)


def _check_names(sequences: list[Sequence]) -> None:
    if not sequences:
        raise ValueError("sequences is empty; there is nothing to evaluate")
    name, count = Counter(sequence.name for sequence in sequences).most_common(1)[0]
    if count > 1:
        raise ValueError(f"sequences has {count} named {name}; names must differ, since files take them")


def _report(sequence: Sequence, results: Results) -> None:
    row = results.rows()[0]
    figures = f"AUC {row['auc']:.3f}  AO {row['ao']:.3f}  {row['fps']:.1f} FPS"
    tqdm.write(f"{sequence.name}: {len(sequence)} frames  {figures}", file=sys.stderr)


def track_sequence(tracker: Tracker, sequence: Sequence, on_frame: Tick = lambda: None) -> Run:
    """One pass of a tracker over a sequence -> Run. on_frame: called after each frame; may raise to stop."""
    n, start = len(sequence), sequence.start
    boxes, seconds, scores = np.full((n, 4), np.nan), np.full(n, np.nan), np.full(n, np.nan)
    found = np.zeros(n, dtype=bool)
    began = time.perf_counter()
    for index, image in enumerate(sequence.images(start), start=start):
        called = time.perf_counter()
        if index == start:
            box = tuple(sequence.boxes[start].tolist())
            tracker.init(image, box)
            score, here = 1.0, True
        else:
            result = tracker.track(image)
            box, score, here = result.box, result.score, result.found
        seconds[index] = time.perf_counter() - called
        if np.isinf(box).any():
            raise ValueError(f"frame {index} got the box {tuple(box)}")
        boxes[index], scores[index], found[index] = [float(f"{v:.4f}") for v in box], score, here
        on_frame()
    return Run(boxes, seconds, scores, found, time.perf_counter() - began)


@dataclass
class _Pass:
    """The work on one sequence. The tracker is made at the first, in whichever process that is."""

    factory: Callable[[], Tracker]
    tracker: Tracker | None = None

    def __call__(self, sequence: Sequence, tick: Tick) -> Run:
        if self.tracker is None:
            self.tracker = self.factory()
        try:
            return track_sequence(self.tracker, sequence, tick)
        except DatasetError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"the tracker failed on {sequence.name}: {what}") from error


def _run_all(
    one_pass: _Pass, pending: list[Sequence], jobs: int, ray: str | None, gpu: bool, bar: tqdm
) -> Iterator[tuple[Sequence, Run | Failure]]:
    """Each pending sequence with its run, as they end."""
    if ray is not None or min(jobs, len(pending)) > 1:
        longest_first = sorted(pending, key=len, reverse=True)
        yield from hand_out(one_pass, longest_first, jobs=jobs, ray=ray, gpu=gpu, on_frames=bar.update)
        return
    if pending:
        one_pass.tracker = one_pass.factory()  # what is wrong with it is no sequence's failure
    for sequence in pending:
        try:
            run = one_pass(sequence, bar.update)
        except Exception as error:
            yield sequence, Failure(error)
        else:
            yield sequence, run
