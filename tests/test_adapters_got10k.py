"""GOT10kTracker in the toolkit's own experiment, from the run to the report, over a made dataset."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from adapter_clip import blocks, clip, native

pytest.importorskip("got10k.experiments", reason="the got10k toolkit (extra `eval`) is not installed")
import matplotlib  # noqa: E402
from got10k.datasets import OTB  # noqa: E402
from got10k.trackers import Tracker  # noqa: E402
from PIL import Image  # noqa: E402

from dmv_fast.adapters.got10k import GOT10kTracker  # noqa: E402

COLOUR, GREY = (
    "Basketball",
    "Bolt",
)  # two names of the set tb50; the second one's images are grey, as some of OTB's are


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OTB tree: JPEG images, 1-based boxes. The toolkit wants a folder for every name, or it downloads."""
    folder = tmp_path_factory.mktemp("host") / "OTB"
    for name in OTB._OTB__version_dict["tb50"]:
        (folder / name / "img").mkdir(parents=True)
    frames, blue, red = clip()
    for name, boxes in ((COLOUR, blue), (GREY, red)):
        for i, frame in enumerate(frames):
            image = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) if name == GREY else frame
            cv2.imwrite(str(folder / name / "img" / f"{i + 1:04d}.jpg"), image)
        np.savetxt(folder / name / "groundtruth_rect.txt", boxes + [1, 1, 0, 0], fmt="%d", delimiter=",")
    return folder


def sequence(root: Path, name: str) -> tuple[list[str], np.ndarray]:
    """Files and boxes as the toolkit's dataset gives them."""
    return OTB(str(root), "tb50", download=False)[name]


def read(files: list[str]) -> list[np.ndarray]:
    """The frames as PIL decodes them, BGR; OpenCV's JPEG decoder may differ by a grey level."""
    return [np.ascontiguousarray(np.array(Image.open(file).convert("RGB"))[:, :, ::-1]) for file in files]


def test_experiment_from_run_to_report(root, monkeypatch):
    """The page's block, in a folder with OTB/: boxes recorded are ours to the toolkit's three digits."""
    matplotlib.use("Agg")
    monkeypatch.chdir(root.parent)
    (block,) = blocks("got10k toolkit", "python")
    exec(block, {})
    for name in (COLOUR, GREY):
        files, truth = sequence(root, name)
        recorded = np.loadtxt(f"results/OTBtb50/DMV18/{name}.txt", delimiter=",")
        np.testing.assert_allclose(recorded, native(read(files), truth[0])[0], rtol=0, atol=6e-4)
        times = np.loadtxt(f"results/OTBtb50/DMV18/times/{name}_time.txt")
        assert times.shape == (len(files),) and (times > 0).all()
    report = json.loads(Path("reports/OTBtb50/DMV18/performance.json").read_text())["DMV18"]
    assert set(report["seq_wise"]) == {COLOUR, GREY}
    assert report["overall"]["success_score"] > 0.7 and report["overall"]["speed_fps"] > 0
    assert Path("reports/OTBtb50/DMV18/success_plots.png").is_file()


def test_track_gives_the_boxes_of_the_toolkits_own_loop(root):
    files, truth = sequence(root, COLOUR)
    tracker = GOT10kTracker()
    boxes, times = tracker.track(files, truth[0])
    theirs, _ = Tracker.track(tracker, files, truth[0])
    np.testing.assert_array_equal(boxes, theirs)
    assert boxes.dtype == np.float64 and times.shape == (len(files),)


def test_an_image_that_cannot_be_read_stops_the_run(root, tmp_path):
    files, truth = sequence(root, COLOUR)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(OSError, match="broken.jpg"):
        GOT10kTracker().track([*files[:2], str(broken), *files[2:]], truth[0])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pil_modes_and_the_order_of_colours(mode):
    """Images reach the network as the same pixels in BGR would; handed over as BGR they would not."""
    frames, truth, _ = clip(4)
    images = [Image.fromarray(frame[:, :, ::-1]).convert(mode) for frame in frames]
    tracker = GOT10kTracker()

    def run(pictures):
        tracker.init(pictures[0], truth[0])
        return np.array([tracker.update(picture) for picture in pictures[1:]])

    rgb = [np.array(image.convert("RGB")) for image in images]
    expected = native([np.ascontiguousarray(image[:, :, ::-1]) for image in rgb], truth[0])[0][1:]
    np.testing.assert_array_equal(run(images), expected)
    if mode != "L":
        wrong = run([Image.fromarray(image[:, :, ::-1]) for image in rgb])
        assert np.abs(wrong - expected).max() > 0.5


def test_the_toolkit_runs_it_once():
    assert GOT10kTracker().is_deterministic and GOT10kTracker(name="mine").name == "mine"


@pytest.mark.parametrize("missing", ["got10k.trackers", "PIL"])
def test_without_the_toolkit_the_extra_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, GOT10kTracker.__module__)
    with pytest.raises(ImportError, match=rf'cannot import {missing}: pip install "dmv-fast\[eval\]"'):
        importlib.import_module(GOT10kTracker.__module__)
