"""Video in and out, and what is drawn on it: real files, made here by OpenCV."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest

from dmv_fast.files import replaced_when_complete
from dmv_fast.vision.draw import contact_sheet, draw_box, fit
from dmv_fast.vision.video import VideoError, VideoWriter, open_source


def grey(level: int, width: int = 64, height: int = 48) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def numbered(number: int) -> np.ndarray:
    """A frame that carries its number, as six black or white stripes that survive compression."""
    bits = [255 * (number >> bit & 1) for bit in range(6)]
    return np.repeat(np.uint8(bits), 10)[None, :, None].repeat(48, 0).repeat(3, 2)


def number_of(frame: np.ndarray) -> int:
    """What `numbered` has painted."""
    return sum(1 << bit for bit in range(6) if frame[:, 10 * bit + 2 : 10 * bit + 8].mean() > 127)


def write_video(path: Path, frames: int = 20, codec: str = "mp4v", fps: float = 24) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (60, 48))
    assert writer.isOpened()
    for i in range(frames):
        writer.write(numbered(i))
    writer.release()
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- sources ---------------------------------------------------------------------------------------------


def test_video_file_yields_its_frames_in_order(tmp_path):
    with open_source(str(write_video(tmp_path / "a.mp4"))) as source:
        assert (source.fps, source.length, source.size, source.start) == (24, 20, (60, 48), 0)
        frames = list(source)
    assert [number_of(frame) for frame in frames] == list(range(20))
    assert frames[0].shape == (48, 60, 3) and frames[0].dtype == np.uint8


def test_start_is_exact_and_length_stays_the_whole(tmp_path):
    with open_source(write_video(tmp_path / "a.mp4"), start=13) as source:
        assert (source.start, source.length) == (13, 20)
        assert [number_of(frame) for frame in source] == list(range(13, 20))


@pytest.mark.parametrize("pattern", ["", "*.png"])
def test_images_come_in_natural_order(tmp_path, pattern):
    for i in (10, 2, 1, 0):
        cv2.imwrite(str(tmp_path / f"{i}.png"), numbered(i))
    if not pattern:  # what lies about in folders
        (tmp_path / "notes.txt").write_text("not an image")
        (tmp_path / "._1.png").write_bytes(b"what macOS leaves")
    with open_source(str(tmp_path / pattern), start=1) as source:
        assert (source.fps, source.length, source.size) == (None, 4, (60, 48))
        assert [number_of(frame) for frame in source] == [1, 2, 10]


def test_one_image_is_one_frame_even_beside_others(tmp_path):
    for i in range(3):  # OpenCV would take 000.png for the start of a sequence
        cv2.imwrite(str(tmp_path / f"{i:03d}.png"), numbered(i))
    with open_source(tmp_path / "001.png") as source:
        assert [number_of(frame) for frame in source] == [1]


@pytest.mark.parametrize(
    "image",
    [
        np.full((48, 64), 50, np.uint8),
        np.full((48, 64, 4), 50, np.uint8),
        np.full((48, 64, 3), 50 * 257, np.uint16),
    ],
    ids=["grey", "alpha", "16 bit"],
)
def test_every_image_becomes_bgr_uint8(tmp_path, image):
    cv2.imwrite(str(tmp_path / "a.png"), image)
    (frame,) = open_source(tmp_path)
    assert frame.shape == (48, 64, 3) and frame.dtype == np.uint8 and (frame == 50).all()


def test_images_may_change_size(tmp_path):
    cv2.imwrite(str(tmp_path / "0.png"), grey(0, 64, 48))
    cv2.imwrite(str(tmp_path / "1.png"), grey(0, 10, 20))
    assert [frame.shape for frame in open_source(tmp_path)] == [(48, 64, 3), (20, 10, 3)]


@pytest.mark.parametrize("kind", ["video", "images"])
def test_frames_are_not_held(tmp_path, kind):
    if kind == "video":
        write_video(tmp_path / "a.mp4", 30)
    for i in range(30 if kind == "images" else 0):
        cv2.imwrite(str(tmp_path / f"{i}.png"), grey(i))
    seen: list[weakref.ref] = []
    with open_source(tmp_path / "a.mp4" if kind == "video" else tmp_path) as source:
        for frame in source:
            seen.append(weakref.ref(frame))
            assert sum(ref() is not None for ref in seen) <= 2
    assert len(seen) == 30


def test_closing_ends_the_iteration(tmp_path):
    with open_source(write_video(tmp_path / "a.mp4")) as source:
        next(source)
    assert list(source) == []


def test_avi_cut_short_yields_what_it_has_and_warns(tmp_path):
    path = write_video(tmp_path / "a.avi", 40, "MJPG")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with open_source(path) as source, pytest.warns(RuntimeWarning, match=r"ends after \d+ of 40 frames"):
        frames = list(source)
    assert 10 <= len(frames) < 30
    assert [number_of(frame) for frame in frames] == list(range(len(frames)))


def test_a_whole_video_does_not_warn(tmp_path, recwarn):
    list(open_source(write_video(tmp_path / "a.mp4")))
    list(open_source(write_video(tmp_path / "b.avi", 40, "MJPG")))
    assert not recwarn.list


def unreadable_sources(folder: Path) -> dict[str, str]:
    """What a person might give, and a part of the answer."""
    whole = write_video(folder / "whole.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # its index, at the end, is gone
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    (folder / "nothing").mkdir()
    answers = {name: "cannot be read as a video" for name in ("cut.mp4", "empty.mp4", "text.mp4")}
    answers |= {"gone.mp4": "no such file", "nothing": "no image", "*.tif": "no image"}
    answers |= {"broken.png": "as an image"}
    return {str(folder / name): answer for name, answer in answers.items()}


@pytest.mark.parametrize("index", range(7))
def test_unreadable_source_is_one_clear_error(tmp_path, index):
    source, answer = list(unreadable_sources(tmp_path).items())[index]
    with pytest.raises(VideoError, match=answer) as error:
        open_source(source)
    assert Path(source).name in str(error.value)


def test_camera_and_address_that_do_not_answer():
    with pytest.raises(VideoError, match="camera 97: does not open"):
        open_source("97")
    with pytest.raises(VideoError, match="http://127.0.0.1:9/a.mp4: does not open"):
        open_source("http://127.0.0.1:9/a.mp4")


def test_broken_image_amid_others_is_named(tmp_path):
    cv2.imwrite(str(tmp_path / "0.png"), grey(0))
    (tmp_path / "1.png").write_bytes(b"")
    with open_source(tmp_path) as source:
        next(source)
        with pytest.raises(VideoError, match=r"1\.png: cannot be read as an image"):
            next(source)


def test_start_outside_the_source(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match="cannot start at frame 20: it has 20 frames"):
        open_source(path, start=20)
    with pytest.raises(VideoError, match="start must be 0 or more"):
        open_source(path, start=-1)


@pytest.mark.skipif(os.name != "posix", reason="such names exist on POSIX alone")
def test_names_that_ffmpeg_or_opencv_would_stumble_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "out.mp4", 3).rename("10:30.mp4")
    assert len(list(open_source("10:30.mp4"))) == 3
    with VideoWriter("a:1.mp4") as writer:
        writer.write(grey(1))
    assert len(list(open_source("a:1.mp4"))) == 1
    Path("bad\udcff.mp4").write_bytes(Path("a:1.mp4").read_bytes())
    with pytest.raises(VideoError, match="not UTF-8"):
        open_source("bad\udcff.mp4")


# ---- writing ---------------------------------------------------------------------------------------------


def test_video_appears_when_complete(tmp_path):
    target = tmp_path / "out.mp4"
    with VideoWriter(target, 30) as writer:
        for i in range(12):
            writer.write(numbered(i))
        assert not target.exists()
    with open_source(target) as source:
        assert source.fps == 30
        assert [number_of(frame) for frame in source] == list(range(12))
    assert names(tmp_path) == {"out.mp4"}


def test_failure_leaves_the_former_video(tmp_path):
    target = write_video(tmp_path / "out.mp4", 3)
    former = target.read_bytes()
    with pytest.raises(RuntimeError, match="stop"), VideoWriter(target) as writer:
        writer.write(grey(1))
        raise RuntimeError("stop")
    assert target.read_bytes() == former and names(tmp_path) == {"out.mp4"}


def test_interrupt_keeps_the_frames_so_far(tmp_path):
    target = tmp_path / "out.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(target) as writer:
        for i in range(7):
            writer.write(numbered(i))
        raise KeyboardInterrupt
    assert [number_of(frame) for frame in open_source(target)] == list(range(7))
    assert names(tmp_path) == {"out.mp4"}


@pytest.mark.parametrize(
    ("width", "height", "written"),
    [(65, 49, (64, 48)), (1, 1, (2, 2)), (9000, 18, (8190, 16)), (3, 700, (2, 700))],
)
def test_any_frame_size_can_be_written(tmp_path, width, height, written):
    with VideoWriter(tmp_path / "out.mp4") as writer:
        for _ in range(3):
            writer.write(grey(100, width, height))
    with open_source(tmp_path / "out.mp4") as source:
        assert source.size == written and len(list(source)) == 3


def test_frames_of_other_sizes_are_fitted_not_dropped(tmp_path):
    with VideoWriter(tmp_path / "out.mp4") as writer:
        writer.write(grey(200, 64, 48))
        writer.write(grey(200, 32, 48))  # narrow: black bars at the sides
    frames = list(open_source(tmp_path / "out.mp4"))
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 2
    assert frames[1][:, :12].mean() < 20 and frames[1][:, 20:44].mean() > 180


def test_awkward_arrays_can_be_written(tmp_path):
    frozen = grey(100)
    frozen.flags.writeable = False
    with VideoWriter(tmp_path / "out.mp4") as writer:
        writer.write(frozen)
        writer.write(grey(100, 128, 96)[::2, ::2])
        writer.write(grey(100)[:, :, ::-1])
    levels = [frame.mean() for frame in open_source(tmp_path / "out.mp4")]
    assert np.allclose(levels, 100, atol=5) and len(levels) == 3


@pytest.mark.parametrize("fps", [119.967, 66.6667, 23.976, 1000.0, 0.0005])
def test_any_rate_can_be_written(tmp_path, fps):
    with VideoWriter(tmp_path / "out.mp4", fps) as writer:
        writer.write(grey(1))
        writer.write(grey(2))
    with open_source(tmp_path / "out.mp4") as source:
        assert source.fps == pytest.approx(max(fps, 0.1), rel=1e-3)


@pytest.mark.skipif(os.name != "posix", reason="pipes with names")
def test_only_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(OSError, match="not a file to write"):
        VideoWriter(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "real.mp4")
    with VideoWriter(tmp_path / "link.mp4") as writer:
        writer.write(grey(1))
    assert (tmp_path / "link.mp4").is_symlink() and (tmp_path / "real.mp4").is_file()


def test_no_frame_no_file(tmp_path):
    with VideoWriter(tmp_path / "out.mp4"):
        pass
    assert names(tmp_path) == set()


def test_bad_targets(tmp_path):
    with pytest.raises(VideoError, match="must end in .mp4"):
        VideoWriter(tmp_path / "out.xyz")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        VideoWriter(tmp_path / "gone" / "out.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        VideoWriter(tmp_path / "folder.mp4")


def test_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, former[1]))  # as a full disk: writes fail past it
        with pytest.raises(VideoError, match="of 30 frames were written"):
            with VideoWriter(tmp_path / "a.mp4") as writer:
                for _ in range(30):
                    writer.write(noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert names(tmp_path) == set()


def test_a_full_disk_names_the_file(tmp_path):
    resource = pytest.importorskip("resource")
    former, boxes = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "boxes.csv"
    boxes.write_text("of before")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, former[1]))
        with pytest.raises(OSError, match=r"boxes\.csv"), replaced_when_complete(boxes) as partial:
            with open(partial, "w") as file:
                file.writelines("1,2,3,4\n" for _ in range(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert names(tmp_path) == {"boxes.csv"} and boxes.read_text() == "of before"


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Two at a time, of one process or of two machines that share the folder: the later one stays, whole."""
    target = tmp_path / "a.csv"
    with replaced_when_complete(target) as first, replaced_when_complete(target) as second:
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first" and names(tmp_path) == {"a.csv"}


def test_a_partial_file_is_not_taken_for_a_whole_one(tmp_path):
    with replaced_when_complete(tmp_path / "frame.csv") as partial:
        partial.write_text("half")
        assert not list(tmp_path.glob("*.csv"))
    with replaced_when_complete(tmp_path / "sheet.png", keep_suffix=True) as partial:
        assert partial.suffix == ".png" and partial.name.startswith(".")
        partial.write_text("")
    with replaced_when_complete(tmp_path / ("n" * 250 + ".csv")) as partial:
        partial.write_text("")
    assert names(tmp_path) == {"frame.csv", "sheet.png", "n" * 250 + ".csv"}


def test_the_block_may_change_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with replaced_when_complete(Path("a.csv")) as partial:
        partial.write_text("new")
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert names(tmp_path) == {"a.csv", "elsewhere"}


def test_replaced_when_complete(tmp_path):
    target = tmp_path / "a.csv"
    with replaced_when_complete(target) as partial:
        partial.write_text("new")
        assert not target.exists() and partial.parent == tmp_path
    with pytest.raises(RuntimeError), replaced_when_complete(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), replaced_when_complete(target) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "new" and names(tmp_path) == {"a.csv"}
    with pytest.raises(KeyboardInterrupt), replaced_when_complete(target, keep_interrupted=True) as partial:
        partial.write_text("so far")
        raise KeyboardInterrupt
    assert target.read_text() == "so far" and names(tmp_path) == {"a.csv"}


# ---- drawing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 240, 1080, 2160])
def test_box_is_drawn_where_it_is_at_every_resolution(side):
    frame = grey(0, side * 2, side)
    box = (side * 0.5, side * 0.4, side * 0.8, side * 0.4)
    drawn = draw_box(frame, box)
    assert not frame.any(), "the frame given is not drawn on"
    rows, columns = np.nonzero(drawn.any(2))
    slack = max(2, side // 100)
    edges = (columns.min(), rows.min(), columns.max(), rows.max())
    assert np.allclose(edges, (box[0], box[1], box[0] + box[2], box[1] + box[3]), atol=slack)
    share = draw_box(frame, box, 0.5).any(2).mean() - drawn.any(2).mean()
    assert share > 0.001, "the score is as large beside a large frame as beside a small one"


def test_lost_looks_different():
    frame = grey(0)
    found, lost = (draw_box(frame, (10, 20, 30, 20), found=flag)[30, 10] for flag in (True, False))
    assert found.argmax() == 1 and lost.argmax() == 2  # green, red


@pytest.mark.parametrize(
    "box",
    [(0, 0, 64, 48), (-10, -10, 200, 200), (1e12, 0, 5, 5), (-1e12, -1e12, 2e12, 2e12), (60, 40, 0.1, 0.1)],
)
def test_any_box_can_be_drawn(box):
    drawn = draw_box(grey(0), box, 0.123)
    assert drawn.shape == (48, 64, 3) and drawn.any(), "the score stays in sight"


def test_contact_sheet_lays_out_row_by_row():
    frames = [grey(40 * (i + 1)) for i in range(5)]
    sheet = contact_sheet(frames, 2, tile_width=32)
    assert sheet.shape == (3 * 24, 2 * 32, 3)
    tiles = [sheet[r * 24 : r * 24 + 24, c * 32 : c * 32 + 32].mean() for r in range(3) for c in range(2)]
    assert np.allclose(tiles, [40, 80, 120, 160, 200, 0])
    assert contact_sheet(frames[:2], 10, tile_width=32).shape == (24, 64, 3)
    labelled = contact_sheet(frames, 2, tile_width=64, labels=["7"] * 5)
    assert (labelled[:10, :8] != 40).any() and (labelled[:, 50:64][:40] == 40).all()


def test_contact_sheet_errors():
    with pytest.raises(ValueError, match="needs frames"):
        contact_sheet([], 3)
    with pytest.raises(ValueError, match="columns >= 1"):
        contact_sheet([grey(0)], 0)
    with pytest.raises(ValueError, match="one a frame"):
        contact_sheet([grey(0)], 1, labels=["a", "b"])


@pytest.mark.parametrize("size", [(64, 48), (10, 100), (100, 10), (1, 1)])
def test_fit_keeps_the_shape(size):
    fitted = fit(grey(255, 40, 20), size)
    assert fitted.shape == (size[1], size[0], 3)
    columns, rows = fitted.any(2).any(0).sum(), fitted.any(2).any(1).sum()
    if size != (1, 1):
        assert columns == size[0] or rows == size[1]
        assert abs(columns - 2 * rows) <= 2
