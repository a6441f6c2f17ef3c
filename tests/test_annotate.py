"""`dmv-fast annotate` in processes of this machine: the list, the boxes, what goes wrong, going on."""

from __future__ import annotations

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from bright_square import BOX, BrightTracker, Killer, expected_tables, make_videos, tables

from dmv_fast import cli
from dmv_fast.commands import annotate as command
from dmv_fast.commands.annotate import Video, annotate, read_list
from dmv_fast.evaluation import workers
from dmv_fast.vision.video import VideoWriter

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["clip0", "clip1", "clip2", "clip3"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Video]:
    return make_videos(tmp_path_factory.mktemp("videos"), NAMES)


# ---- the list ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "video,x,y,w,h\na.mp4,1,2,3.5,4\nb/a.mp4, -1 ,2,3,4\n\nrtsp://host/c,1,2,3,4\n",
        '\ufeffvideo,box\r\na.mp4,"1,2,3.5,4"\r\nb/a.mp4,"-1,2,3,4"\r\nrtsp://host/c,"1,2,3,4"\r\n',
    ],
)
def test_both_headers_say_the_same(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    assert read_list(tmp_path / "list.csv") == [
        Video("a", str(tmp_path / "a.mp4"), (1.0, 2.0, 3.5, 4.0), "a.mp4"),
        Video("a-2", str(tmp_path / "b" / "a.mp4"), (-1.0, 2.0, 3.0, 4.0), "b/a.mp4"),
        Video("c", "rtsp://host/c", (1.0, 2.0, 3.0, 4.0), "rtsp://host/c"),
    ]


def test_no_two_videos_share_a_name(tmp_path: Path) -> None:
    lines = "".join(f"{name},1,2,3,4\n" for name in ("a.mp4", "a-2.mp4", "a.avi", "a.mov"))
    (tmp_path / "list.csv").write_text("video,x,y,w,h\n" + lines)
    names = [video.name for video in read_list(tmp_path / "list.csv")]
    assert names[:2] == ["a", "a-2"] and len(set(names)) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the first line is ''"),
        ("a.mp4,1,2,3,4\n", "it must be video,x,y,w,h or video,box"),
        ("video,x,y,w,h\n", "lists no video"),
        ("video,x,y,w,h\na.mp4,1,2,3,4\nb.mp4,1,2,3\n", "line 3: 'b.mp4,1,2,3' must be video,x,y,w,h"),
        ("video,x,y,w,h\na.mp4,1,2,3,four\n", "line 2: the box must be four numbers"),
        ("video,x,y,w,h\na.mp4,1,2,0,4\n", "line 2: the box must have a width and height above 0"),
        ("video,x,y,w,h\n,1,2,3,4\n", "line 2"),
    ],
)
def test_a_bad_list_is_one_line_that_names_it(tmp_path: Path, capsys, text: str, said: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    assert cli.main(["annotate", str(tmp_path / "list.csv"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- the work ------------------------------------------------------------------------------------------


def test_a_killed_worker_costs_nothing(videos: list[Video], tmp_path: Path) -> None:
    killer = Killer(tmp_path / "marker")
    outcome = annotate(videos, BrightTracker(killer.marker), tmp_path / "out", jobs=2)
    assert killer.killed, "no worker was killed: this has shown nothing"
    assert sorted(outcome.done) == NAMES and not outcome.failed
    assert tables(tmp_path / "out") == expected_tables(NAMES)
    assert not list((tmp_path / "out").glob(".*"))


def test_what_fails_stops_nothing_else_and_is_done_again(videos: list[Video], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "0.png").write_bytes((Path(videos[0].source) / "0.png").read_bytes())
    (broken / "1.png").write_text("no image")
    listed = [
        Video("none", "/no/such", BOX, "none"),
        Video("broken", str(broken), BOX, "broken"),
        *videos[:2],
    ]
    outcome = annotate(listed, BrightTracker(), tmp_path / "out")
    assert outcome.done == NAMES[:2] and sorted(outcome.failed) == ["broken", "none"]
    assert "no such file" in outcome.failed["none"] and "1.png" in outcome.failed["broken"]
    assert tables(tmp_path / "out") == expected_tables(NAMES[:2])

    kept = (tmp_path / "out" / "clip0.csv").stat().st_mtime_ns
    (broken / "1.png").unlink()
    again = annotate(listed, BrightTracker(), tmp_path / "out")
    assert again.done == ["broken"] and again.before == NAMES[:2] and list(again.failed) == ["none"]
    assert (tmp_path / "out" / "clip0.csv").stat().st_mtime_ns == kept


def test_a_worker_that_dies_each_time_is_one_failure(videos: list[Video], tmp_path: Path) -> None:
    outcome = annotate(videos[:1], BrightTracker(always=True), tmp_path)
    assert not outcome.done and "died 3 times (exit code -9" in outcome.failed["clip0"]


def test_frames_of_a_dead_worker_are_not_counted_twice(videos: list[Video], tmp_path: Path) -> None:
    killer, frames = Killer(tmp_path / "marker"), []
    work = command.AnnotateVideo(BrightTracker(killer.marker, seconds=0.15))
    (answer,) = workers.hand_out(work, videos[1:2], on_frames=frames.append)
    assert killer.killed and answer[0] == videos[1] and len(answer[1][0]) == 8
    assert sum(frames) == 8 and min(frames) < 0


def test_a_video_cut_short_is_done_with_a_warning(tmp_path: Path) -> None:
    whole = tmp_path / "whole.avi"
    writer = cv2.VideoWriter(str(whole), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"MJPG"), 25, (80, 60))
    for frame in range(40):
        image = np.zeros((60, 80, 3), np.uint8)
        image[20:30, 10 + frame : 20 + frame] = 255
        writer.write(image)
    writer.release()
    (tmp_path / "cut.avi").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    rows, doubt = command.AnnotateVideo(BrightTracker())(
        Video("cut", str(tmp_path / "cut.avi"), BOX, "cut.avi"), lambda: None
    )
    assert 2 < len(rows) < 40 and f"ends after {len(rows)} of 40 frames" in doubt


# ---- what an earlier run left --------------------------------------------------------------------------


def test_boxes_of_other_settings_or_videos_are_not_mixed(videos: list[Video], tmp_path: Path) -> None:
    class Other(BrightTracker):
        def settings(self) -> dict[str, object]:
            return {"tracker": "bright", "k": 8}

    annotate(videos[:1], BrightTracker(), tmp_path)
    with pytest.raises(ValueError, match=r"holds boxes of other settings \(k\)"):
        annotate(videos, Other(), tmp_path)
    moved = Video("clip0", videos[0].source, (11.0, 20.0, 10.0, 10.0), "clip0")
    with pytest.raises(ValueError, match=r"clip0.csv is there, but of clip0 and the box \[10.0, 20.0"):
        annotate([moved], BrightTracker(), tmp_path)
    (tmp_path / "clip1.csv").write_text("video,x,y,w,h\n")  # a list of that name, say
    with pytest.raises(ValueError, match="clip1.csv is there, but of no earlier run"):
        annotate(videos, BrightTracker(), tmp_path)
    (tmp_path / command.RECORD).write_text("{")
    with pytest.raises(ValueError, match="annotate.json is damaged"):
        annotate(videos, BrightTracker(), tmp_path)


# ---- the command ---------------------------------------------------------------------------------------


def test_the_command_gives_what_track_gives(tmp_path: Path, capsys) -> None:
    """The same file as `dmv-fast track --boxes`; a video that is not there: exit code 1."""
    (video,) = make_videos(tmp_path, ["clip"])
    (tmp_path / "list.csv").write_text('video,box\nclip,"11,21,9,9"\nno,"1,2,3,4"\n')
    options = ["--device", "cpu", "--dtype", "float32"]
    words = ["annotate", str(tmp_path / "list.csv"), "--out", str(tmp_path / "out"), "--jobs", "1", *options]
    assert cli.main(words) == 1
    printed = capsys.readouterr()
    assert "1 written" in printed.out and "1 failed" in printed.out
    assert "failed: no: " in printed.err and "no such file" in printed.err
    single = tmp_path / "single.csv"
    assert cli.main(["track", video.source, "--box", "11,21,9,9", "--boxes", str(single), *options]) == 0
    ours, theirs = (list(csv.reader(path.open())) for path in (tmp_path / "out" / "clip.csv", single))
    assert ours[0] == theirs[0] and len(ours) == len(theirs) == 9
    np.testing.assert_allclose(np.float64(ours[1:]), np.float64(theirs[1:]), atol=0.02)


def test_what_the_page_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/annotate.md with its own list; `--ray local` is for test_ray. The Python block finds all done."""
    page = (ROOT / "docs" / "annotate.md").read_text()
    listing, shell, code = (
        re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("csv", "sh", "python")
    )
    (tmp_path / "list.csv").write_text(listing)
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        for _ in range(3):
            writer.write(np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(shell.removeprefix("dmv-fast "))) == 0
    assert [len(text.splitlines()) for text in tables(tmp_path / "boxes").values()] == [4, 4]
    names: dict[str, object] = {"__name__": "__main__"}
    exec(code, names)
    assert names["answer"].before == ["clip", "clip-2"] and not names["answer"].done


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_keeps_what_was_finished(videos: list[Video], tmp_path: Path) -> None:
    """In the whole group, as a terminal sends it, to a script that calls the function."""
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from bright_square import BOX, BrightTracker\n"
        "from dmv_fast.commands.annotate import Video, annotate\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    folder, out = sys.argv[1:]\n"
        f"    videos = [Video(name, f'{{folder}}/{{name}}', BOX, name) for name in {NAMES!r}]\n"
        "    annotate(videos, BrightTracker(seconds=0.2), Path(out), jobs=2)\n"
    )
    out, folder = tmp_path / "out", Path(videos[0].source).parent
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), str(out)], stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(out.glob("*.csv")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.count("KeyboardInterrupt") <= 1, errors  # the script's own; its workers say nothing
    kept = tables(out)
    assert kept and all(text == expected_tables(NAMES)[name] for name, text in kept.items())
    assert not list(out.glob(".*"))
    outcome = annotate(videos, BrightTracker(), out, jobs=2)
    assert outcome.before == sorted(kept) and tables(out) == expected_tables(NAMES)


def test_bad_options_are_one_line_before_any_work(videos: list[Video], tmp_path: Path, capsys) -> None:
    (tmp_path / "list.csv").write_text(f"video,x,y,w,h\n{videos[0].source},10,20,10,10\n")
    base = ["annotate", str(tmp_path / "list.csv"), "--out", str(tmp_path / "out")]
    for words, said in (
        (["--jobs", "0"], "--jobs must be 1 or more"),
        (["--weights", "none"], "none"),
        (["-k", "99"], "k is 99"),
    ):
        assert cli.main([*base, *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_ray_the_message_names_the_extra(
    videos: list[Video], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "dmv-fast\[ray\]"'):
        annotate(videos, BrightTracker(), tmp_path, ray="local")
