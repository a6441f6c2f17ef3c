"""Readers of benchmark layouts, on trees made here with the real layouts' names and quirks."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from dmv_fast.evaluation import datasets
from dmv_fast.evaluation.datasets import DatasetError

NAN = [np.nan] * 4


def frames(folder: Path, names: list[str]) -> None:
    """Empty files: the readers only list them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def numbered(count: int, pattern: str = "%04d.jpg", first: int = 1) -> list[str]:
    return [pattern % number for number in range(first, first + count)]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def lines(count: int) -> str:
    """Boxes x = 1, 2, ... so that a shift of the rows shows."""
    return "".join(f"{number},2,30,40\n" for number in range(1, count + 1))


def video(path: Path, count: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, (64, 48))
    for number in range(count):
        writer.write(np.full((48, 64, 3), 10 * number, np.uint8))
    writer.release()


# ---- box files ----


@pytest.mark.parametrize(
    "text",
    ["1,2,3,4\n5,6,7,8\n", "1\t2\t3\t4\r\n5\t6\t7\t8", "1 2  3 4\n5 6 7 8\n\n", "1, 2, 3, 4\n5;6;7;8\n"],
)
def test_separators_of_box_files(tmp_path: Path, text: str) -> None:
    write(tmp_path / "boxes.txt", text)
    assert datasets.read_boxes(tmp_path / "boxes.txt").tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_row_without_a_whole_box_is_absent(tmp_path: Path) -> None:
    write(tmp_path / "boxes.txt", "1,2,3,4\nNaN,NaN,NaN,NaN\n1,nan,3,4\n1,2,0,4\n0,0,0,0\n-5,-5,3,4\n")
    boxes = datasets.read_boxes(tmp_path / "boxes.txt")
    assert np.array_equal(boxes, [[1, 2, 3, 4], NAN, NAN, NAN, NAN, [-5, -5, 3, 4]], equal_nan=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,2,3,4\n1,2,3\n", "line 2: expected four numbers x,y,w,h, found '1,2,3'"),
        ("1,2,3,4\n1,2,3,4\n1,2,x,4\n", "line 3: expected four numbers x,y,w,h, found '1,2,x,4'"),
        ("1,2,3,4,5,6,7,8\n", "line 1: expected four numbers"),
        ("1,2,3,inf\n", "line 1: expected four numbers"),
        ("1,2,3,4\n\n1,2,3,4\n", "line 2: expected four numbers"),
        ("", "empty"),
        ("nan,nan,nan,nan\n", "no frame has a box"),
    ],
)
def test_a_malformed_box_file_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path / "Deer" / "groundtruth_rect.txt", text)
    frames(tmp_path / "Deer" / "img", numbered(2))
    with pytest.raises(DatasetError) as error:
        datasets.load("otb", tmp_path)
    assert str(tmp_path / "Deer" / "groundtruth_rect.txt") in str(error.value)
    assert said in str(error.value)


# ---- layouts ----


def test_otb_nested_groups_and_several_targets(tmp_path: Path) -> None:
    for folder in ("OTB/Deer", "OTB/Jogging", "Human4", "VOT/bag"):
        frames(tmp_path / folder / "img", numbered(3))
    write(tmp_path / "OTB/Deer/groundtruth_rect.txt", "1\t2\t3\t4\n" * 3)
    write(tmp_path / "OTB/Jogging/groundtruth_rect.1.txt", lines(3))
    write(tmp_path / "OTB/Jogging/groundtruth_rect.2.txt", lines(3))
    write(tmp_path / "Human4/groundtruth_rect.1.txt", "")  # as OTB ships it
    write(tmp_path / "Human4/groundtruth_rect.2.txt", lines(3))
    write(tmp_path / "VOT/bag/groundtruth_rect.txt", lines(3))
    sequences = datasets.load("auto", tmp_path)
    assert [s.name for s in sequences] == ["Human4", "Deer", "Jogging.1", "Jogging.2", "bag"]
    assert [path.name for path in sequences[1].frames] == numbered(3)
    assert sequences[1].boxes.shape == (3, 4)


def test_otb_folders_of_one_name_keep_their_group(tmp_path: Path) -> None:
    for folder in ("A/Deer", "B/Deer"):
        frames(tmp_path / folder / "img", numbered(2))
        write(tmp_path / folder / "groundtruth_rect.txt", lines(2))
    assert [s.name for s in datasets.load("otb", tmp_path)] == ["A/Deer", "B/Deer"]


def test_otb_david_starts_at_frame_300_unless_it_is_an_excerpt(tmp_path: Path) -> None:
    frames(tmp_path / "whole/David/img", numbered(770))
    write(tmp_path / "whole/David/groundtruth_rect.txt", lines(471))
    frames(tmp_path / "excerpt/David/img", numbered(5))
    write(tmp_path / "excerpt/David/groundtruth_rect.txt", lines(5))
    (whole,) = datasets.load("otb", tmp_path / "whole")
    assert [whole.frames[0].name, whole.frames[-1].name, len(whole)] == ["0300.jpg", "0770.jpg", 471]
    (excerpt,) = datasets.load("otb", tmp_path / "excerpt")
    assert excerpt.frames[0].name == "0001.jpg"


def test_counts_of_boxes_and_frames_must_agree(tmp_path: Path) -> None:
    frames(tmp_path / "Deer/img", numbered(3))
    write(tmp_path / "Deer/groundtruth_rect.txt", lines(2))
    with pytest.raises(DatasetError, match="2 boxes for 3 frames"):
        datasets.load("otb", tmp_path)


def test_pairs_of_video_and_boxes(tmp_path: Path) -> None:
    video(tmp_path / "walk.mp4", 5)
    write(tmp_path / "walk.2.txt", "nan,nan,nan,nan\n" * 2 + lines(3))
    write(tmp_path / "walk.10.txt", lines(5))
    write(tmp_path / "walk.notes.txt", "not boxes")
    video(tmp_path / "run.mp4", 4)
    write(tmp_path / "run.txt", lines(4))
    sequences = datasets.load("auto", tmp_path)
    assert [(s.name, len(s), s.start) for s in sequences] == [
        ("run", 4, 0),
        ("walk.2", 5, 2),
        ("walk.10", 5, 0),
    ]
    assert sequences[1].frame_size() == (64, 48)
    levels = [round(image.mean() / 10) for image in sequences[1].images(first=2)]
    assert levels == [2, 3, 4]


def test_a_video_that_ends_before_its_boxes(tmp_path: Path) -> None:
    video(tmp_path / "walk.mp4", 3)
    write(tmp_path / "walk.txt", lines(5))
    (sequence,) = datasets.load("pairs", tmp_path)
    with pytest.raises(DatasetError, match=r"walk.mp4: ends after 3 frames; its boxes are for 5"):
        list(sequence.images())


def got10k_tree(root: Path, name: str, count: int) -> Path:
    write(root / "list.txt", name + "\n")
    frames(root / name, numbered(count, "%08d.jpg"))
    write(root / name / "groundtruth.txt", lines(count))
    write(root / name / "meta_info.ini", "[METAINFO]\nurl: none\nresolution: (1920, 1080)\n")
    return root / name


def test_got10k_hides_absent_frames_by_cover_or_absence(tmp_path: Path) -> None:
    folder = got10k_tree(tmp_path / "val", "GOT-10k_Val_000001", 4)
    write(folder / "absence.label", "0\n1\n0\n0\n")
    (sequence,) = datasets.load("got10k", tmp_path)
    assert np.isnan(sequence.boxes[:, 0]).tolist() == [False, True, False, False]
    assert sequence.frame_size() == (1920, 1080)
    write(folder / "cover.label", "8\n8\n0\n5\n")  # decides, as in the toolkit
    (sequence,) = datasets.load("auto", tmp_path / "val")
    assert np.isnan(sequence.boxes[:, 0]).tolist() == [False, False, True, False]


def test_got10k_test_sets_show_their_first_box_only(tmp_path: Path) -> None:
    folder = got10k_tree(tmp_path, "GOT-10k_Test_000001", 3)
    write(folder / "groundtruth.txt", "1,2,3,4\n")
    (sequence,) = datasets.load("got10k", tmp_path)
    assert len(sequence) == 3
    assert np.array_equal(sequence.boxes, [[1, 2, 3, 4], NAN, NAN], equal_nan=True)


def test_got10k_root_with_several_subsets_and_a_bad_list(tmp_path: Path) -> None:
    got10k_tree(tmp_path / "val", "a", 2)
    got10k_tree(tmp_path / "test", "b", 2)
    with pytest.raises(DatasetError, match="holds the subsets val, test: name one"):
        datasets.load("got10k", tmp_path)
    write(tmp_path / "val/list.txt", "a\nmissing\n")
    with pytest.raises(DatasetError, match=r"list.txt, line 2: no folder 'missing'"):
        datasets.load("got10k", tmp_path / "val")


def test_got10k_flags_must_match_the_boxes(tmp_path: Path) -> None:
    folder = got10k_tree(tmp_path, "a", 3)
    write(folder / "cover.label", "8\n8\n")
    with pytest.raises(DatasetError, match=r"cover.label: 2 flags for 3 boxes"):
        datasets.load("got10k", tmp_path)
    write(folder / "cover.label", "8\nyes\n8\n")
    with pytest.raises(DatasetError, match=r"cover.label, line 2: expected numbers, found 'yes'"):
        datasets.load("got10k", tmp_path)


def test_lasot_hides_occluded_and_out_of_view_frames(tmp_path: Path) -> None:
    for name in ("airplane-10", "airplane-9"):
        folder = tmp_path / "airplane" / name
        frames(folder / "img", numbered(4, "%08d.jpg"))
        write(folder / "groundtruth.txt", lines(4))
        write(folder / "full_occlusion.txt", "0,1,0,0\n")
        write(folder / "out_of_view.txt", "0,0,0,1\n")
    sequences = datasets.load("auto", tmp_path)
    assert [s.name for s in sequences] == ["airplane-9", "airplane-10"]
    assert np.isnan(sequences[0].boxes[:, 0]).tolist() == [False, True, False, True]


def test_trackingnet_frames_are_sorted_as_numbers(tmp_path: Path) -> None:
    frames(tmp_path / "TEST/frames/abc_0", [f"{number}.jpg" for number in range(11)])
    write(tmp_path / "TEST/anno/abc_0.txt", lines(1))
    frames(tmp_path / "TRAIN_0/frames/xyz_0", [f"{number}.jpg" for number in range(3)])
    write(tmp_path / "TRAIN_0/anno/xyz_0.txt", lines(3))
    test, train = datasets.load("auto", tmp_path)
    assert [path.name for path in test.frames] == [f"{number}.jpg" for number in range(11)]
    assert (test.name, train.name, len(train)) == ("abc_0", "xyz_0", 3)


def test_uav123_sequences_are_cut_out_of_longer_ones(tmp_path: Path) -> None:
    frames(tmp_path / "data_seq/UAV123/car16", numbered(420, "%06d.jpg"))
    frames(tmp_path / "data_seq/UAV123/car1_s", numbered(3, "%06d.jpg"))
    write(tmp_path / "anno/UAV123/car16_1.txt", lines(4))
    write(tmp_path / "anno/UAV123/car16_2.txt", "NaN,NaN,NaN,NaN\n" + lines(5))
    write(tmp_path / "anno/UAV123/car1_s.txt", lines(3))
    sequences = {s.name: s for s in datasets.load("auto", tmp_path)}
    assert [path.name for path in sequences["car16_1"].frames] == numbered(4, "%06d.jpg")
    assert [path.name for path in sequences["car16_2"].frames] == numbered(6, "%06d.jpg", first=415)
    assert sequences["car16_2"].start == 1
    assert sequences["car1_s"].frames[0].parent.name == "car1_s"


# ---- what is asked for ----


def test_unknown_roots_and_layouts(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        datasets.load("otb", tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="dataset is 'coco'; known: otb, pairs"):
        datasets.load("coco", tmp_path)
    with pytest.raises(DatasetError, match="no sequence found"):
        datasets.load("auto", tmp_path)


def test_select_by_name_and_from_a_file(tmp_path: Path) -> None:
    for name in ("A", "B", "C"):
        frames(tmp_path / "set" / name / "img", numbered(2))
        write(tmp_path / "set" / name / "groundtruth_rect.txt", lines(2))
    sequences = datasets.load("otb", tmp_path / "set")
    write(tmp_path / "names.txt", "C\n\nA\n")
    assert [s.name for s in datasets.select(sequences, ["B", f"@{tmp_path / 'names.txt'}"])] == [
        "A",
        "B",
        "C",
    ]
    with pytest.raises(DatasetError, match="no D here; there is A, B, C"):
        datasets.select(sequences, ["A", "D"])


def test_a_frame_that_is_no_image(tmp_path: Path) -> None:
    frames(tmp_path / "A/img", numbered(2))
    write(tmp_path / "A/groundtruth_rect.txt", lines(2))
    (sequence,) = datasets.load("otb", tmp_path)
    with pytest.raises(DatasetError, match=r"0001.jpg: no such image"):
        next(sequence.images())
