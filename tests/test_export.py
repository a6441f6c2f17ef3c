"""The ONNX graphs: standard operators, PyTorch's numbers, and the tracker that runs on them alone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch

from dmv_fast import FastDMVTracker, cli, export, load_model
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.model.memory import MemoryPolicy
from dmv_fast.model.pick import cosine_window, pick
from dmv_fast.tracker import TrackerConfig
from dmv_fast.vision.crop import cut, normalise, search_window
from dmv_fast.vision.video import VideoWriter

onnx = pytest.importorskip("onnx", reason='the extra onnx is not here: pip install "dmv-fast[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='pip install "dmv-fast[onnx]"')
pytest.importorskip("onnxscript", reason='pip install "dmv-fast[onnx]"')

ROOT = Path(__file__).resolve().parent.parent
BOX = (20.0, 30.0, 24.0, 24.0)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first command of docs/export.md was run: a folder with `model`, a clip and the examples."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(ROOT / "examples", folder / "examples")
    with VideoWriter(folder / "clip.mp4") as writer:
        for frame in made_frames(4):
            writer.write(frame)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(shlex.split(blocks("sh")[0].removeprefix("dmv-fast "))) == 0
    return folder


def run_shell(text: str, folder: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", text], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def model() -> DMV:
    return load_model("dmv18")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("onnx_track", ROOT / "examples" / "onnx_track.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_frames(count: int) -> list[np.ndarray]:
    """A textured square of 24 pixels that starts at BOX, over a texture; it grows, and leaves the frame."""
    rng = np.random.default_rng(5)
    ground = cv2.GaussianBlur(rng.integers(0, 255, (120, 160, 3), dtype=np.uint8), (0, 0), 2)
    patch = cv2.resize(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8), (24, 24))
    frames = []
    for i in range(count):
        frame, side = ground.copy(), 24 + i
        x, y = 20 + 14 * i, 30 + 3 * i
        shown = cv2.resize(patch, (side, side))[: 120 - y, : max(0, 160 - x)]
        frame[y : y + shown.shape[0], x : x + shown.shape[1]] = shown
        frames.append(frame)
    return frames


def one_thread() -> dict[str, object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # its threads wait by spinning, which is poison beside other tests
    return {"sess_options": options, "providers": ["CPUExecutionProvider"]}


def session(place: Path, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(place / "model" / f"{name}.onnx", **one_thread())


def crops_of(frames: list[np.ndarray]) -> np.ndarray:
    window = search_window(BOX)
    return np.stack([cut(frame, window) for frame in frames])


# ---- the graphs ----------------------------------------------------------------------------------------


def test_only_standard_operators(place: Path) -> None:
    for name in export.GRAPHS:
        graph = onnx.load(place / "model" / f"{name}.onnx")
        onnx.checker.check_model(graph, full_check=True)
        assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", export.OPSET)]
        assert not graph.functions and {node.domain for node in graph.graph.node} == {""}


@torch.inference_mode()
def test_graphs_give_pytorchs_numbers_on_crops(place: Path, model: DMV) -> None:
    """Batches and memories of other lengths than the exporter saw; rows beyond `valid` are not looked at."""
    crops = crops_of(made_frames(3))
    features = model.backbone(normalise(torch.from_numpy(crops)))
    (ours,) = session(place, "backbone").run(None, {"crops": crops})
    np.testing.assert_allclose(ours, features.numpy(), atol=1e-3)

    soft = model.exact_maps(torch.tensor([[96.0, 96, 64, 64]] * 3))
    keys, values = model.remember(features, *soft)
    given = {name: value.numpy() for name, value in zip(("scores", "deltas"), soft, strict=True)}
    our_keys, our_values = session(place, "write").run(None, {"features": features.numpy(), **given})
    np.testing.assert_allclose(our_keys, keys.numpy(), atol=1e-4)
    np.testing.assert_allclose(our_values, model.read.voting.value_in(values).numpy(), atol=1e-3)

    junk = np.full_like(our_keys, 9.0), np.full_like(our_values, 9.0)
    memory = {
        "keys": np.concatenate([our_keys, our_keys[::-1], junk[0]], 1),
        "values": np.concatenate([our_values, our_values[::-1], junk[1]], 1),
        "valid": np.array([512, 256, 400], np.int32),
    }
    size = np.array([[60, 60], [64, 50], [90, 30]], np.float32)
    given = {"features": features.numpy(), **memory, "size": size}
    box, score, scores, deltas, boxes = session(place, "read").run(None, given)
    long = torch.cat([keys, keys.flip(0)], 1), torch.cat([values, values.flip(0)], 1)
    valid = torch.tensor([512, 256, 400], dtype=torch.int32)
    wanted = model(features, *long, valid=valid, backend="reference")
    np.testing.assert_allclose(scores, wanted.logits.sigmoid().numpy(), atol=1e-3)
    np.testing.assert_allclose(deltas, wanted.deltas.numpy(), atol=1e-3)
    np.testing.assert_allclose(boxes, model.decode(wanted.deltas).numpy(), atol=0.05)
    window, config = cosine_window(5, 16), TrackerConfig().pick
    best = pick(*map(torch.from_numpy, (scores, boxes, size)), window, config)
    np.testing.assert_allclose(box, best.box.numpy(), atol=1e-3)
    np.testing.assert_allclose(score, best.score.numpy(), atol=1e-6)


def test_the_first_frames_box_becomes_maps(place: Path, model: DMV) -> None:
    box = np.array([[96, 96, 64, 64], [30.5, -9, 40, 90], [200, 10, 20, 300]], np.float32)
    ours = session(place, "first").run(None, {"box": box})
    for given, wanted in zip(ours, model.exact_maps(torch.from_numpy(box)), strict=True):
        np.testing.assert_allclose(given, wanted.numpy(), atol=1e-5)


def test_one_candidate(tmp_path: Path, model: DMV) -> None:
    """K = 1: nobody to vote with, and no NaN for it."""
    graph = export.graph(model, "read", k=1)
    export.export_graph(graph, tmp_path / "read.onnx")
    assert export.difference(graph, tmp_path / "read.onnx") < 1e-3


def test_the_description_is_the_networks(place: Path, model: DMV) -> None:
    told = json.loads((place / "model" / "dmv.json").read_text())
    assert told["k"] == model.config.candidates and told["source"]["weights"] == "dmv18"
    assert told["shapes"] == {"A": 5, "H": 16, "W": 16, "M": 256, "D": 256, "C": 64}
    at = told["anchors"]["step"] * 3 - told["anchors"]["sizes"][4][0] / 2
    assert model.anchors[4, 7, 3, 0].item() == pytest.approx(at)
    assert told["tracker"]["policy"] == {"interval": 30, "threshold": 0.7}
    for name in export.GRAPHS:
        graph, words = onnx.load(place / "model" / f"{name}.onnx").graph, dict(told["graphs"][name])
        assert [output.name for output in graph.output] == list(words.pop("->"))
        assert [value.name for value in graph.input] == list(words)


# ---- the tracker on them -------------------------------------------------------------------------------


def follow(example: ModuleType, folder: Path, frames: list[np.ndarray], box: tuple, **settings) -> tuple:
    """Both trackers over the frames -> largest difference of a box (pixels), ours, PyTorch's answers."""
    ours = example.OnnxTracker(folder, **one_thread())
    theirs = FastDMVTracker(device="cpu", dtype="float32", backend="reference", **settings)
    ours.init(frames[0], box)
    theirs.init(frames[0], box)
    worst, results = 0.0, []
    for frame in frames[1:]:
        box, score, found = ours.track(frame)
        results.append(theirs.track(frame))
        worst = max(worst, float(np.abs(box - results[-1].box).max()))
        assert score == pytest.approx(results[-1].score, abs=0.01) and found == results[-1].found
    return worst, ours, results


def test_the_example_tracks_as_pytorch_does(place: Path, example: ModuleType, tmp_path: Path) -> None:
    """With a memory that fills and drops frames, and a target that leaves.

    No score counts as a loss here: the example does not search for what is lost as the tracker does.
    """
    folder = shutil.copytree(place / "model", tmp_path / "model")
    told = json.loads((folder / "dmv.json").read_text())
    told["tracker"] |= {"capacity": 3, "policy": {"interval": 2, "threshold": 0.5}, "found_score": 0.0}
    (folder / "dmv.json").write_text(json.dumps(told))
    config = TrackerConfig(capacity=3, policy=MemoryPolicy(interval=2, threshold=0.5), found_score=0.0)
    worst, ours, results = follow(example, folder, made_frames(10), BOX, config=config)
    assert worst < 0.5
    assert len(ours.memory) == 3 and sum(result.memory_written for result in results) > 3


@pytest.mark.slow
def test_the_example_over_a_whole_real_clip(place: Path, example: ModuleType, shared_dir: Path) -> None:
    clip = shared_dir / "data" / "dev" / "OTB" / "Deer"
    frames = [cv2.imread(str(path)) for path in sorted((clip / "img").iterdir())]
    box = tuple(float(v) for v in (clip / "groundtruth_rect.txt").read_text().split()[0].split(","))
    worst, ours, results = follow(example, place / "model", frames, box)
    assert len(results) == 70 and len(ours.memory) > 1
    assert worst < 0.5


def test_what_the_page_shows_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_shell(blocks("sh")[1], place)
    rows = (place / "boxes.csv").read_text().splitlines()
    assert rows[:2] == ["frame,x,y,w,h,score,found", "0,20,30,24,24,1,1"] and len(rows) == 5
    monkeypatch.chdir(place)
    (code,) = blocks("python")
    names: dict[str, np.ndarray] = {}
    exec(code, names)
    assert names["boxes"].shape == (1, 5, 16, 16, 4) and names["box"].shape == (1, 4)
    assert len(blocks("sh")) == 2


# ---- what goes wrong -----------------------------------------------------------------------------------


def test_a_graph_that_disagrees_is_not_written(
    tmp_path: Path, model: DMV, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "export_graph", lambda example, path: path.write_bytes(b""))
    monkeypatch.setattr(export, "difference", lambda example, path: float("nan"))
    with pytest.raises(RuntimeError, match="disagree: backbone differs by nan"):
        export.export_onnx(model, tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


@pytest.mark.parametrize(
    ("words", "said"), [(["-k", "0"], "k is 0"), (["--weights", "none"], "none"), (["--k", "33"], "k is 33")]
)
def test_bad_arguments_are_one_line(tmp_path: Path, capsys, words: list[str], said: str) -> None:
    assert cli.main(["export", "--onnx", str(tmp_path / "model"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_networks_for_comparison_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'softmax'"):
        export.export_onnx(DMV(DMVConfig(reader="softmax")), tmp_path)


def test_without_the_extra_the_message_names_it(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert cli.main(["export", "--onnx", str(tmp_path / "model")]) == 2
    assert 'pip install "dmv-fast[onnx]"' in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
