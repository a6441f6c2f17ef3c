"""Runs settings over sequences, each pair once: what is on disk is never run again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.ablations.settings import TrackerSetting
from dmv_fast.evaluation.datasets import Sequence
from dmv_fast.evaluation.metrics import score_sequence
from dmv_fast.evaluation.results import Run, load_run, save_run
from dmv_fast.evaluation.runner import track_sequence
from dmv_fast.evaluation.workers import Failure, hand_out

COLUMNS = ("dataset", "sequence", "setting", "frames", "auc", "precision_20px", "ao", "found", "median_ms")


class Pair(NamedTuple):
    """One tracker on one sequence, and the folder for what it leaves."""

    setting: TrackerSetting
    sequence: Sequence
    folder: Path


def track_all(
    settings: list[TrackerSetting], data: dict[str, list[Sequence]], work: Path, *, jobs: int
) -> list[dict[str, object]]:
    """Run what is missing in `work`; a row (COLUMNS) for each setting and sequence.

    data: sequences by the name of their set; settings with `short` False run on "dev" alone.
    Trackers of one checkpoint take turns on each sequence, so that their times are comparable.
    """
    wanted = {
        (name, sequence.name, setting.name): _pair(setting, sequence, work)
        for name, sequences in data.items()
        for sequence in sequences
        for setting in settings
        if setting.short or name == "dev"
    }
    distinct = {(pair.folder, pair.sequence.name): pair for pair in wanted.values()}
    missing = [pair for pair in distinct.values() if _load(pair) is None]
    missing.sort(key=lambda pair: (pair.setting.weights, -len(pair.sequence), pair.sequence.name))
    with tqdm(total=sum(len(pair.sequence) for pair in missing), unit="frame", desc="track") as bar:
        _run(missing, jobs, bar.update)
    return [_row(*names, pair) for names, pair in wanted.items()]


def _pair(setting: TrackerSetting, sequence: Sequence, work: Path) -> Pair:
    setting = setting.on(sequence)
    return Pair(setting, sequence, work / setting.digest)


def _load(pair: Pair) -> Run | None:
    return load_run(pair.folder, pair.sequence, pair.setting.record())


def _row(dataset: str, sequence: str, setting: str, pair: Pair) -> dict[str, object]:
    run = _load(pair)
    assert run is not None, f"{setting} on {sequence} was not run"
    score = score_sequence(run.boxes, pair.sequence.boxes, pair.sequence.frame_size())
    figures = (score.auc, score.precision, score.ao, float(run.found.mean()))
    median = 1e3 * float(np.nanmedian(run.seconds[pair.sequence.start + 1 :]))
    values = (dataset, sequence, setting, len(pair.sequence), *(f"{x:.4f}" for x in figures), f"{median:.2f}")
    return dict(zip(COLUMNS, values, strict=True))


def _run(pairs: list[Pair], jobs: int, tick: Callable[[int], object]) -> None:
    """Run and save each pair; jobs > 1: processes with a thread each. tick: told how many frames are done."""
    if jobs == 1:
        for pair in pairs:
            _work(pair, lambda: tick(1))
        return
    for _, result in hand_out(_work, pairs, jobs=jobs, on_frames=tick):
        if isinstance(result, Failure):
            raise result.error


def _work(pair: Pair, tick: Callable[[], None]) -> None:
    """One pair, in whichever process; several never write the same folder's same sequence."""
    run = track_sequence(pair.setting.tracker(), pair.sequence, tick)
    save_run(pair.folder, pair.sequence, run, pair.setting.record())
