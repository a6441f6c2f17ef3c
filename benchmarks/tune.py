"""Chooses the tracker's settings: each variation on the defaults over held-out material, in one table.

    python benchmarks/tune.py --root DATA [--weights dmv18] [--clips 16] [--only NAME ...] [--out FOLDER]
    python benchmarks/tune.py --root DATA --clips 32 --frames 100 --seed 7000 --groups leave --only "home 1"

DATA is a training folder (`dmv_fast.training.catalog`), of which only the held-out part is used: made clips
in which the target leaves and comes back, made clips in which it stays, and the real clips' tracks. The
network runs only on what no earlier variation has made it see, so most cost a fraction of the first. The
second line counts departures and returns on clips that no setting was chosen on.

    leave, stay, real   mean AUC of each group, over the frames whose box is known
    AUC, gain           of all sequences, and less the first row's with a 95 % interval (bootstrap, sequences)
    gone                departures (out of sight for 15 frames or more) with `found` false within 15 frames
    back                returns (in sight for 15 frames or more): true within 15 frames, with an IoU over 0.3
    false lost, ghosts  share of the frames in sight called lost, and of those out of sight called found
    F                   of the made clips: harmonic mean of the IoU over frames called found (out of sight: 0)
                        and over frames in sight (called lost: 0), as VOT scores long-term trackers

Last comes the reliability of the first row's score on the made clips. FOLDER gets the tables and that plot.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from dmv_fast.evaluation.calibration import plot_reliability, reliability
from dmv_fast.evaluation.metrics import overlap, score_sequence
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.model.pick import PickConfig, pick
from dmv_fast.runtime.frame import FrameStep
from dmv_fast.tracker import FastDMVTracker, TrackerConfig
from dmv_fast.training.catalog import load_catalog, read_clip_frame
from dmv_fast.training.clips import MadeClip, make_clip
from dmv_fast.vision.crop import Window

SOON = 15  # frames within which a departure or a return is to be noticed
BACK_IOU = 0.3
SHORTEST = 20  # frames of a real track that is used
GROUPS = ("leave", "stay", "real")
HEAD = ("settings", *GROUPS, "AUC", "gain", "gone", "back", "false lost", "ghosts", "F")


def vary(**changes: object) -> TrackerConfig:
    """The defaults with other settings, those of PickConfig and MemoryPolicy by their names too."""
    base = TrackerConfig()
    kinds = (TrackerConfig, PickConfig, MemoryPolicy)
    own, picked, policy = (
        {name: value for name, value in changes.items() if name in kind.__dataclass_fields__}
        for kind in kinds
    )
    if unknown := set(changes) - set(own) - set(picked) - set(policy):
        raise ValueError(f"{sorted(unknown)[0]} is no setting of {', '.join(k.__name__ for k in kinds)}")
    return replace(base, pick=replace(base.pick, **picked), policy=replace(base.policy, **policy), **own)


VARIATIONS = {
    "defaults": vary(),
    "no search": vary(refound_score=TrackerConfig().found_score, search_home=1),
    "found 0.25": vary(found_score=0.25),
    "found 0.35": vary(found_score=0.35),
    "found 0.4": vary(found_score=0.4),
    "refound 0.4": vary(refound_score=0.4),
    "refound 0.55": vary(refound_score=0.55),
    "refound 0.6": vary(refound_score=0.6),
    "refound 0.65": vary(refound_score=0.65),
    "home 1": vary(search_home=1),
    "home 2": vary(search_home=2),
    "home 4": vary(search_home=4),
    "width 1": vary(search_width=1.0),
    "width 1.5": vary(search_width=1.5),
    "width 2": vary(search_width=2.0),
    "patience 0": vary(search_patience=0),
    "window 0": vary(window=0.0),
    "window 0.05": vary(window=0.05),
    "window 0.2": vary(window=0.2),
    "penalty 0": vary(size_penalty=0.0),
    "penalty 0.06": vary(size_penalty=0.06),
    "smoothing 0.5": vary(smoothing=0.5),
    "smoothing 1": vary(smoothing=1.0),
    "threshold 0.6": vary(threshold=0.6),
    "threshold 0.8": vary(threshold=0.8),
}


@dataclass(frozen=True)
class Trial:
    """One target in one video, frames in memory. boxes (n, 4) xywh; NaN: out of sight, in "real": unknown."""

    name: str
    group: str
    frames: list[np.ndarray]
    boxes: np.ndarray


def trials(root: Path, clips: int, frames: int, seed: int, groups: Collection[str]) -> Iterator[Trial]:
    """Made clips, two that are left to one that is not, and the real tracks; one at a time in memory."""
    for number, made in zip(range(clips), leaving(root, frames, seed), strict=False):
        if "leave" in groups:
            yield draw(f"leave {number}", "leave", made)
        if number % 2 and "stay" in groups:
            staying = make_clip(root, seed=seed + number, frames=frames)
            yield draw(f"stay {number}", "stay", staying)
    for clip in load_catalog(root, held_out=True).clips if "real" in groups else ():
        for number, track in enumerate(clip.tracks):
            known = np.flatnonzero(np.isfinite(track[:, 0]))
            span = range(known[0], known[-1] + 1)
            if len(span) >= SHORTEST:
                images = [read_clip_frame(clip, index) for index in span]
                yield Trial(f"{clip.path.stem} {number}", "real", images, track[span.start : span.stop])


def leaving(root: Path, frames: int, seed: int) -> Iterator[MadeClip]:
    """Clips whose target is out of the frame for long enough, and back for long enough, to judge both."""
    for each in itertools.count(seed):
        made = make_clip(root, seed=each, frames=frames, leaves=True)
        *_, away, back = runs(np.array([scene.in_view for scene in made.scenes]))
        if away[1] - away[0] >= SOON and back[1] - back[0] >= SOON:
            yield made


def draw(name: str, group: str, made: MadeClip) -> Trial:
    images, boxes = zip(*made, strict=True)
    return Trial(name, group, list(images), np.array(boxes))


class Replayed:
    """A FrameStep for one target of one video that answers from what it was asked before.

    What the network says of a frame depends on the window it looks at and on what was remembered by then: a
    chain of (frame, window). The real memory is brought to a chain only where an answer is not known yet.
    """

    def __init__(self, step: FrameStep, frames: list[np.ndarray]):
        self._step, self._frames = step, frames
        self._window_terms = step._window.cpu()
        self._answers: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._held: tuple | None = None
        self.pick = step.pick
        self.looks = 0

    def start(self, target: int, image: np.ndarray, window: Window, box: Sequence[float]) -> None:
        self._first, self._now, self._chain = (window, box), 0, ()

    def step(self, image: np.ndarray, windows: Sequence[Window], sizes: np.ndarray) -> np.ndarray:
        self._now += 1
        (self._window,) = windows
        scores, boxes = self._answer(self._now, self._window, self._chain)
        choice = pick(scores, boxes, torch.tensor(sizes, dtype=torch.float32), self._window_terms, self.pick)
        return torch.cat([choice.box, choice.score[:, None]], 1).double().numpy()

    def write(self, target: int, frame: int) -> bool:
        self._chain += ((self._now, self._window),)
        return True

    def _answer(self, frame: int, window: Window, chain: tuple) -> tuple[Tensor, Tensor]:
        key = frame, window, chain
        if key not in self._answers:
            self._bring_to(chain)
            self._answers[key] = self._look(frame, window)
        return self._answers[key]

    def _look(self, frame: int, window: Window) -> tuple[Tensor, Tensor]:
        self.looks += 1
        self._step.step(self._frames[frame], [window], np.full((1, 2), 64.0))
        _, scores, deltas = self._step.seen
        return scores.cpu().clone(), self._step.network.model.decode(deltas).cpu()

    def _bring_to(self, chain: tuple) -> None:
        if self._held is None or chain[: len(self._held)] != self._held:
            self._step.start(0, self._frames[0], *self._first)
            self._held = ()
        for frame, window in chain[len(self._held) :]:
            self._look(frame, window)
            self._step.write(0, frame)
        self._held = chain


@dataclass(frozen=True)
class TrialResult:
    """One pass over one trial. Pairs are (this many, of so many)."""

    group: str
    auc: float
    gone: tuple[int, int]
    back: tuple[int, int]
    false_lost: tuple[int, int]
    ghosts: tuple[int, int]
    overlap: float
    """Sum over the frames called found of the IoU."""
    scores: np.ndarray
    ious: np.ndarray
    """(n - 1,) of the frames after the first: IoU, 0 out of sight, NaN unknown."""


def follow(tracker: FastDMVTracker, trial: Trial) -> TrialResult:
    """One pass over a trial."""
    tracker.init(trial.frames[0], trial.boxes[0])
    results = [tracker.track(frame) for frame in trial.frames[1:]]
    boxes = np.array([result.box for result in results])
    found = np.array([result.found for result in results])
    truth = trial.boxes[1:]
    seen = np.isfinite(truth[:, 0])
    ious = np.where(seen, overlap(boxes, truth), np.nan if trial.group == "real" else 0.0)
    hits = found & (np.nan_to_num(ious) > BACK_IOU)
    # On a real track a box that is not known says nothing.
    stretches = [] if trial.group == "real" else [s for s in runs(seen) if s[1] - s[0] >= SOON]
    gone = [not found[a : a + SOON].all() for a, _, here in stretches if not here]
    back = [bool(hits[a : a + SOON].any()) for a, _, here in stretches if here and a > 0]
    return TrialResult(
        group=trial.group,
        auc=score_sequence(np.concatenate([trial.boxes[:1], boxes]), trial.boxes).auc,
        gone=(sum(gone), len(gone)),
        back=(sum(back), len(back)),
        false_lost=(int((~found & seen).sum()), int(seen.sum())),
        ghosts=(int((found & ~seen).sum()), int((~seen).sum())),
        overlap=float(np.nansum(ious * found)),
        scores=np.array([result.score for result in results]),
        ious=ious,
    )


def runs(flags: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """Stretches of equal flags: start, end, flag."""
    edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    for start, end in zip(edges, edges[1:], strict=False):
        yield start, end, bool(flags[start])


Table = dict[str, list[TrialResult]]


def measure(
    tracker: FastDMVTracker, variations: dict[str, TrackerConfig], played: Iterable[Trial]
) -> Iterator[Table]:
    """Variation -> an outcome a trial; after each trial once more."""
    step = tracker.frame_step
    table: Table = {name: [] for name in variations}
    for trial in played:
        began = time.perf_counter()
        replayed = tracker.frame_step = Replayed(step, trial.frames)
        for name, config in variations.items():
            tracker.config, replayed.pick = config, config.pick
            table[name].append(follow(tracker, trial))
        seconds = time.perf_counter() - began
        print(
            f"{trial.name}: {len(trial.frames)} frames, {replayed.looks} looks, {seconds:.0f} s",
            file=sys.stderr,
        )
        yield table


def rows(table: Table) -> list[list[str]]:
    """The table as text, its head first."""
    rng = np.random.default_rng(0)
    base = np.array([outcome.auc for outcome in next(iter(table.values()))])
    draws = rng.integers(len(base), size=(4000, len(base)))
    lines = [list(HEAD)]
    for name, outcomes in table.items():
        auc = np.array([outcome.auc for outcome in outcomes])
        gain = auc - base
        low, high = np.quantile(gain[draws].mean(1), [0.025, 0.975])
        made = [outcome for outcome in outcomes if outcome.group != "real"]
        groups = [[o.auc for o in outcomes if o.group == group] for group in GROUPS]
        lines.append(
            [
                name,
                *(f"{np.mean(part):.3f}" if part else "-" for part in groups),
                f"{auc.mean():.3f}",
                f"{gain.mean():+.3f} ({low:+.3f} {high:+.3f})",
                *("{}/{}".format(*total(made, field)) for field in ("gone", "back")),
                *(share(total(made, field)) for field in ("false_lost", "ghosts")),
                f"{f_score(made):.3f}",
            ]
        )
    return lines


def total(outcomes: list[TrialResult], field: str) -> tuple[int, int]:
    """A pair summed over outcomes."""
    some, every = np.array([getattr(outcome, field) for outcome in outcomes] or [(0, 0)]).sum(0)
    return int(some), int(every)


def share(pair: tuple[int, int]) -> str:
    return f"{pair[0] / pair[1]:.3f}" if pair[1] else "-"


def f_score(outcomes: list[TrialResult]) -> float:
    """2 P R / (P + R) of P = overlap / frames called found, R = overlap / frames in sight."""
    missed, seen = total(outcomes, "false_lost")
    ghosts, _ = total(outcomes, "ghosts")
    called = seen - missed + ghosts
    return 2 * sum(outcome.overlap for outcome in outcomes) / max(called + seen, 1)


def save(out: Path, name: str, lines: list[list[str]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / name).open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, metavar="DATA")
    parser.add_argument("--weights", default="dmv18")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clips", type=int, default=16, help="made clips that are left; half that stay")
    parser.add_argument("--frames", type=int, default=75, help="of a made clip")
    parser.add_argument("--seed", type=int, default=1000, help="of the first made clip")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=VARIATIONS)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    chosen = {n: c for n, c in VARIATIONS.items() if not args.only or n == "defaults" or n in args.only}
    table: Table = {}
    tracker = FastDMVTracker(args.weights, device=args.device)
    played = trials(args.root, args.clips, args.frames, args.seed, args.groups)
    for table in measure(tracker, chosen, played):
        if args.out:
            save(args.out, "settings.csv", rows(table))
    lines = rows(table)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    made = [outcome for outcome in next(iter(table.values())) if outcome.group != "real"]
    honest = reliability(np.concatenate([o.scores for o in made]), np.concatenate([o.ious for o in made]))
    print(honest.table())
    if args.out:
        save(args.out, "reliability.csv", honest.rows())
        plot_reliability(honest, args.out / "reliability.png", "held-out made clips")


if __name__ == "__main__":
    main()
