"""`dmv-fast annotate`: a target in each of many videos, boxes out, by local processes or on a Ray cluster."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmv_fast.commands import DTYPES
from dmv_fast.commands.track import CSV_HEADER, Box, parse_box, write_csv_row
from dmv_fast.files import replaced_when_complete, write_text

if TYPE_CHECKING:
    from dmv_fast.evaluation.trackers import Tracker
    from dmv_fast.evaluation.workers import Tick

RECORD = "annotate.json"
_HEADERS = (["video", "x", "y", "w", "h"], ["video", "box"])


@dataclass(frozen=True)
class Video:
    """One line of the list."""

    name: str
    """Its boxes go to NAME.csv."""
    source: str
    """As `open_source` takes it, absolute."""
    box: Box
    """xywh in its first frame."""
    listed: str
    """The source as the list says it."""


@dataclass(frozen=True)
class Annotated:
    """What came of all videos."""

    done: list[str]
    """Names of the videos whose boxes were written now."""
    before: list[str]
    """Names of those that an earlier run had done."""
    failed: dict[str, str]
    """Name -> the reason."""
    warnings: dict[str, str]
    """Name -> what is doubtful of a video that was done: one that ends early."""


def read_list(path: Path) -> list[Video]:
    """The videos of a CSV file with the header video,x,y,w,h or video,box (X,Y,W,H in quotes).

    A relative path is relative to the file's folder. A video's name is its file's, less the suffix; the
    second line of that name gets NAME-2 and so on, so that several targets of one video may be listed.

    Raises:
        ValueError: naming the line and what is wrong with it. OSError: the file cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from None
    with io.StringIO(text, newline="") as file:
        rows = csv.reader(file, skipinitialspace=True)
        header = [cell.strip() for cell in next(rows, [])]
        if header not in _HEADERS:
            wanted = " or ".join(",".join(words) for words in _HEADERS)
            raise ValueError(f"{path}: the first line is {','.join(header)!r}; it must be {wanted}")
        cells = [(rows.line_num, [cell.strip() for cell in row]) for row in rows if any(map(str.strip, row))]
    videos: list[Video] = []
    counts: Counter[str] = Counter()
    taken: set[str] = set()
    for line, row in cells:
        if len(row) != len(header) or not row[0]:
            raise ValueError(f"{path}, line {line}: {','.join(row)!r} must be {','.join(header)}")
        try:
            box = parse_box(",".join(row[1:]))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{path}, line {line}: the box {error}") from None
        source = row[0] if "://" in row[0] else os.path.abspath(path.parent / row[0])
        name = _free_name(source, counts, taken)
        taken.add(name)
        videos.append(Video(name, source, box, row[0]))
    if not videos:
        raise ValueError(f"{path}: lists no video")
    return videos


def _free_name(source: str, counts: Counter[str], taken: set[str]) -> str:
    path = Path(source)
    stem = (path.name if path.is_dir() else path.stem).replace("*", "_") or "video"
    while True:
        counts[stem] += 1
        name = stem if counts[stem] == 1 else f"{stem}-{counts[stem]}"
        if name not in taken:
            return name


@dataclass(frozen=True)
class AnnotateVideo:
    """The work on one video; it pickles where its factory does."""

    factory: Callable[[], Tracker]

    def __call__(self, video: Video, tick: Tick) -> tuple[np.ndarray, str]:
        """-> rows (frames, 6): x, y, w, h, score, found; and what was warned of, or nothing."""
        from dmv_fast.vision.video import open_source

        tracker, rows = self.factory(), []
        with warnings.catch_warnings(record=True) as caught, open_source(video.source) as frames:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", RuntimeWarning)  # of the reader, or of a slow backend
            for number, frame in enumerate(frames):
                try:
                    rows.append(_follow(tracker, frame, video.box if number == 0 else None))
                except ValueError as error:
                    raise ValueError(f"frame {number}: {error}") from error
                tick()
        return np.array(rows), "; ".join(str(warning.message) for warning in caught)


def _follow(tracker: Tracker, frame: np.ndarray, box: Box | None) -> tuple[float, ...]:
    if box is not None:
        tracker.init(frame, box)
        return *box, 1.0, True
    result = tracker.track(frame)
    return *result.box, result.score, result.found


def annotate(
    videos: Sequence[Video], factory: Callable[[], Tracker], out: Path, *,
    jobs: int = 1, ray: str | None = None, gpu: bool = False, progress: bool = False,
) -> Annotated:  # fmt: skip
    """Follow each video's target and write `out`/NAME.csv, complete or not at all.

    A video whose file is there is done and left alone. What another run left in `out` is checked by its
    record, annotate.json: the tracker's settings and each name's video and box must be the same.

    Args:
        factory: makes the tracker, in each worker; it pickles. Its `settings()` are what is recorded.
        jobs, ray, gpu: as for `workers.hand_out`.
        progress: one bar on stderr.

    Raises:
        ValueError: `out` is of other settings, or of another video; and as `hand_out`. What goes wrong with
            one video is no exception, but in the answer.
    """
    from tqdm import tqdm

    from dmv_fast.evaluation.workers import Failure, hand_out

    out.mkdir(parents=True, exist_ok=True)
    _agree(videos, factory, out)
    before = [video.name for video in videos if _table(out, video).exists()]
    pending = [video for video in videos if not _table(out, video).exists()]
    answer = Annotated([], before, {}, {})
    frames = 0

    def count(more: int) -> None:
        nonlocal frames
        frames += more
        failed = f", {len(answer.failed)} failed" if answer.failed else ""
        bar.set_postfix_str(f"{frames} frames{failed}")

    disable = None if progress else True
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=len(videos), initial=len(before), unit="video", disable=disable, dynamic_ncols=True)
        )
        outcomes = hand_out(AnnotateVideo(factory), pending, jobs=jobs, ray=ray, gpu=gpu, on_frames=count)
        stack.enter_context(closing(outcomes))  # Ctrl-C amid the loop ends the workers, too
        for video, outcome in outcomes:
            if isinstance(outcome, Failure):
                answer.failed[video.name] = f"{outcome.error}" or type(outcome.error).__name__
            else:
                rows, doubt = outcome
                _write(_table(out, video), rows)
                answer.done.append(video.name)
                if doubt:
                    answer.warnings[video.name] = doubt
            bar.update()
    return answer


def _table(out: Path, video: Video) -> Path:
    return out / f"{video.name}.csv"


def _write(path: Path, rows: np.ndarray) -> None:
    with replaced_when_complete(path) as partial, open(partial, "w", encoding="utf-8") as table:
        table.write(CSV_HEADER + "\n")
        for number, (*box, score, found) in enumerate(rows.tolist()):
            write_csv_row(table, number, tuple(box), score, bool(found))


def _agree(videos: Sequence[Video], factory: Callable[[], Tracker], out: Path) -> None:
    """Hold this run against the record of `out`, then write the record with this run's videos in it."""
    settings = factory.settings() if hasattr(factory, "settings") else {}
    settings = json.loads(json.dumps(settings))  # as it reads back: tuples are lists
    record = _read_record(out / RECORD) or {"settings": settings, "videos": {}}
    was, listed = record["settings"], record["videos"]
    if was != settings:
        differing = sorted(key for key in {*settings, *was} if settings.get(key) != was.get(key))
        raise ValueError(f"{out} holds boxes of other settings ({', '.join(differing)}); give another folder")
    for video in videos:
        entry = {"video": video.listed, "box": list(video.box)}
        table = _table(out, video)
        if table.exists() and listed.get(video.name) != entry:
            other = listed.get(video.name)
            of = f"of {other['video']} and the box {other['box']}" if other else "of no earlier run"
            raise ValueError(f"{table} is there, but {of}; move it, or give another folder")
        listed[video.name] = entry
    write_text(out / RECORD, json.dumps(record, indent=1) + "\n")


def _read_record(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(record["settings"]), "videos": dict(record["videos"])}
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path} is damaged; remove it with the boxes beside it, or give another folder"
        ) from None


# ---- dmv-fast annotate ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """List, outputs, workers, and how the tracker runs."""
    parser.add_argument("list", type=Path, metavar="LIST.csv", help="header video,x,y,w,h or video,box")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help=f"a file a video: {CSV_HEADER}"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--jobs", type=int, metavar="N", help="processes, a thread each (a core's; one on a GPU)"
    )
    where.add_argument(
        "--ray", metavar="ADDRESS", help="a Ray cluster, HOST:PORT, auto or local (extra: ray)"
    )
    parser.add_argument("--weights", default="dmv18", help="a shipped network or a file (dmv18)")
    parser.add_argument("-k", "--k", type=int, metavar="K", help="candidates a location (the network's own)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    parser.add_argument("--dtype", default="auto", help=DTYPES)
    parser.add_argument("--backend", default="auto", help="auto, or one that `dmv-fast doctor` lists (auto)")


def run(args: argparse.Namespace) -> int:
    """Annotate what is missing; 0 if every video's boxes are there now, 1 if some failed."""
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs must be 1 or more, not {args.jobs}")
    videos = read_list(args.list)
    from dmv_fast.evaluation.trackers import DMVFactory
    from dmv_fast.runtime.hardware import cores

    factory = DMVFactory(args.weights, args.k, args.device, args.dtype, args.backend)
    gpu = factory.settings()["device"] != "cpu"
    if args.ray is None:
        factory()  # a bad option is said once, before there are workers; a cluster may have what is not here
    jobs = args.jobs or (1 if gpu else cores())
    try:
        answer = annotate(videos, factory, args.out, jobs=jobs, ray=args.ray, gpu=gpu, progress=True)
    except KeyboardInterrupt:
        here = sum(_table(args.out, video).exists() for video in videos)
        print(
            f"stopped: {here} of {len(videos)} are in {args.out}; the same command does the rest",
            file=sys.stderr,
        )
        raise
    _report(answer, args.out)
    return 1 if answer.failed else 0


def _report(answer: Annotated, out: Path) -> None:
    earlier = f", {len(answer.before)} were there" if answer.before else ""
    print(f"{len(answer.done)} written to {out}{earlier}, {len(answer.failed)} failed")
    for name, doubt in answer.warnings.items():
        print(f"warning: {name}: {doubt}", file=sys.stderr)
    for name, reason in answer.failed.items():
        print(f"failed: {name}: {' '.join(reason.split())}", file=sys.stderr)
