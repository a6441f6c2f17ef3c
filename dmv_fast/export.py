"""The network as three stateless ONNX graphs, float32, standard operators only; the memory is an input.

backbone: crops (B, 256, 256, 3) uint8 BGR -> features (B, D, H, W)
read:     features, keys (B, N, D), values (B, N, C), valid (B,) int32, size (B, 2) the last w and h
          -> box (B, 4) and score (B,) of the best, scores (B, A, H, W) in [0, 1], deltas (B, A, 4, H, W),
          boxes (B, A, H, W, 4); sizes and boxes (xywh) in crop pixels
write:    features, scores, deltas -> keys (B, M, D), values (B, M, C)

A fourth, without weights, stands in for the read in the first frame, where the box is known:
first:    box (B, 4) -> scores, deltas

B and N are free, N at least K. The first `valid` rows of the memory exist. A stored value is C wide: the
voting net's first linear map is applied when it is written (see runtime/fold.py).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmv_fast.model.dmv import DMV
from dmv_fast.model.pick import cosine_window, pick
from dmv_fast.model.retrieval import MemoryRead
from dmv_fast.ops.gather import gather_reference
from dmv_fast.ops.retrieve import retrieve_reference
from dmv_fast.tracker import TrackerConfig
from dmv_fast.vision.crop import CROP_SIZE, normalise

GRAPHS = ("backbone", "first", "read", "write")
DESCRIPTION = "dmv.json"
OPSET = 18
TOLERANCE = 0.05  # of the check: pixels of the crop for boxes, else the values' own unit
_MODULES = ("onnx", "onnxscript", "onnxruntime")
_CROP_RULE = (
    "p = (w + h) / 2; n = round(16 log2(max(4, 2 scale sqrt((w + p)(h + p))))); side = round(2^(n / 16)); "
    "step = max(1, round(side / 64)); x0 = step round((x + w/2 - side/2) / step), y0 likewise; round: half "
    "to even; scale: 1 unless the target is lost. Outside the frame: the frame's mean colour. "
    "Resized to 256 x 256 by area averaging where side > 256, else bilinear. "
    "A frame's x lies at (x - x0) 256 / side in the crop."
)


class Look(nn.Module):
    """Search crops to features; the normalisation is inside."""

    def __init__(self, model: DMV):
        super().__init__()
        self.backbone = model.backbone

    def forward(self, crops: Tensor) -> Tensor:
        """crops (B, 256, 256, 3) uint8 BGR -> features (B, D, H, W)."""
        return self.backbone(normalise(crops))


class First(nn.Module):
    """The box of the first frame as the read would have said it, were it sure."""

    def __init__(self, model: DMV):
        super().__init__()
        self.model = model

    def forward(self, box: Tensor) -> tuple[Tensor, Tensor]:
        """box (B, 4) xywh in crop pixels -> scores (B, A, H, W), deltas (B, A, 4, H, W)."""
        return self.model.exact_maps(box)


class Read(nn.Module):
    """Features and memory to boxes: retrieve, vote, head and the choice, by the plain operators."""

    window: Tensor  # (A, H, W)

    def __init__(self, model: DMV, k: int):
        super().__init__()
        self.model, self.k = model, k
        self.register_buffer("window", cosine_window(len(model.config.anchor_ratios), model.config.grid))

    def forward(
        self, features: Tensor, keys: Tensor, values: Tensor, valid: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Shapes: see the module's docstring. values are projected already (C wide)."""
        read = _read_of(self.model)
        vote = read.voting
        scores, indices = retrieve_reference(read.query(features), keys, self.k, valid)
        null = vote.value_in(read.null_value)
        query_part = vote.query_in(features.flatten(2).transpose(1, 2))  # (B, M, C)
        rows = gather_reference(values, null, query_part, indices, scores)
        logits, deltas = self.model.head(features, vote(rows))
        scores, boxes = logits.sigmoid(), self.model.decode(deltas)
        best = pick(scores, boxes, size, self.window, TrackerConfig().pick)
        return best.box, best.score, scores, deltas, boxes


class Write(nn.Module):
    """A frame to what the memory keeps of it."""

    def __init__(self, model: DMV):
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, scores: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """-> keys (B, M, D), values (B, M, C)."""
        keys, values = self.model.remember(features, scores, deltas)
        return keys, _read_of(self.model).voting.value_in(values)


def _read_of(model: DMV) -> MemoryRead:
    assert isinstance(model.read, MemoryRead), "export_onnx has refused the others"
    return model.read


@dataclass(frozen=True)
class Graph:
    """One graph to be: what it computes, and on what it is exported and checked."""

    module: nn.Module
    inputs: dict[str, Tensor]
    """An example of each; all but the free dimensions are taken from it."""
    outputs: tuple[str, ...]

    def free(self) -> tuple[dict[int, Any], ...]:
        """The free dimensions of each input, by name."""
        targets, rows = torch.export.Dim("B", max=4096), torch.export.Dim("N", min=32, max=1 << 24)
        return tuple(
            {0: targets, 1: rows} if name in ("keys", "values") else {0: targets} for name in self.inputs
        )


def graph(model: DMV, name: str, k: int) -> Graph:
    """One of GRAPHS as a module with examples of its inputs, made from noise."""
    noise = torch.Generator().manual_seed(0)
    c, batch = model.config, 2
    anchors = len(c.anchor_ratios)
    features = torch.randn(batch, c.key_dim, c.grid, c.grid, generator=noise)
    if name == "backbone":
        crops = torch.randint(256, (batch, CROP_SIZE, CROP_SIZE, 3), dtype=torch.uint8, generator=noise)
        return Graph(Look(model), {"crops": crops}, ("features",))
    if name == "first":
        box = torch.tensor([[96.0, 90.0, 64.0, 70.0], [80.0, 96.0, 90.0, 60.0]])
        return Graph(First(model), {"box": box}, ("scores", "deltas"))
    if name == "write":
        soft = {"scores": torch.rand(batch, anchors, c.grid, c.grid, generator=noise)}
        soft["deltas"] = torch.randn(batch, anchors, 4, c.grid, c.grid, generator=noise)
        return Graph(Write(model), {"features": features, **soft}, ("keys", "values"))
    rows = 3 * model.locations
    memory = {
        "keys": model.read.key(torch.randn(batch, c.key_dim, 1, rows, generator=noise)),
        "values": torch.randn(batch, rows, c.vote_dim, generator=noise),
        "valid": torch.tensor([model.locations, rows], dtype=torch.int32),
    }
    given = {"features": features, **memory, "size": torch.tensor([[64.0, 70.0], [90.0, 60.0]])}
    return Graph(Read(model, k), given, ("box", "score", "scores", "deltas", "boxes"))


def export_onnx(
    model: DMV, folder: Path, *, k: int | None = None, source: dict[str, str] | None = None
) -> dict[str, float]:
    """Write a file NAME.onnx for each of GRAPHS and dmv.json to a folder (made if need be), and check them.

    Args:
        model: float32 on the CPU, in evaluation mode.
        k: candidates K, 1 to 32, fixed in the graph; None: the network's own.
        source: said in dmv.json of where the weights come from.

    Returns:
        graph -> how far onnxruntime is from PyTorch on made input: the largest difference of an output, of
        the read in 99 of 100 values (a tie among candidates may fall to either side).

    Raises:
        ImportError: the extra `onnx` is not installed.
        ValueError: k out of range, or a network of another reader than the voting one.
        RuntimeError: the graphs do not compute what PyTorch does; nothing is written.
    """
    k = model.config.candidates if k is None else k
    if not 1 <= k <= 32:
        raise ValueError(f"k is {k}; it must be 1 to 32")
    reads = (model.config.reader, model.config.score_use)
    if reads != ("vote", "renormalised"):
        raise ValueError(f"model has the reader {reads}; only ('vote', 'renormalised') is exported")
    _need_extra()
    folder.mkdir(parents=True, exist_ok=True)
    differences = {}
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
        for name in GRAPHS:
            example = graph(model, name, k)
            export_graph(example, Path(part) / f"{name}.onnx")
            differences[name] = difference(example, Path(part) / f"{name}.onnx")
            if not differences[name] <= TOLERANCE:
                found = f"{name} differs by {differences[name]:.3g}, at most {TOLERANCE} is allowed"
                raise RuntimeError(f"onnxruntime and PyTorch disagree: {found}")
        described = json.dumps(description(model, k) | {"source": source or {}}, indent=1)
        (Path(part) / DESCRIPTION).write_text(described + "\n", encoding="utf-8")
        for name in [*(f"{name}.onnx" for name in GRAPHS), DESCRIPTION]:
            os.replace(Path(part) / name, folder / name)
    return differences


def _need_extra() -> None:
    for name in _MODULES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            message = f'the export needs {", ".join(_MODULES)}: pip install "dmv-fast[onnx]" ({error})'
            raise ImportError(message) from None


def export_graph(example: Graph, path: Path) -> None:
    """One graph as an ONNX file, its weights inside."""
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            example.module.eval(), tuple(example.inputs.values()), dynamo=True, opset_version=OPSET,
            input_names=list(example.inputs), output_names=list(example.outputs),
            dynamic_shapes=example.free(), verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(str(path), external_data=False)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """It reports what it does not need (torchvision), and warns of its own deprecated calls."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def difference(example: Graph, path: Path) -> float:
    """How far onnxruntime's outputs are from PyTorch's on the example's inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = session.run(
        list(example.outputs), {name: value.numpy() for name, value in example.inputs.items()}
    )
    with torch.no_grad():
        wanted = example.module(*example.inputs.values())
    wanted = (wanted,) if isinstance(wanted, Tensor) else wanted
    share = 0.99 if isinstance(example.module, Read) else 1.0
    gaps = [np.abs(a - b.numpy()) for a, b in zip(given, wanted, strict=True)]
    return max(float(np.quantile(gap, share)) for gap in gaps)


def description(model: DMV, k: int) -> dict[str, Any]:
    """What a host needs to know beside the graphs: shapes, anchors, the tracker's settings and its crop."""
    c = model.config
    first = model.anchors[:, 0, 0]  # (A, 4)
    return {
        "format": 1,
        "opset": OPSET,
        "k": k,
        "shapes": {
            "A": len(c.anchor_ratios), "H": c.grid, "W": c.grid, "M": model.locations,
            "D": c.key_dim, "C": c.vote_dim,
        },
        "graphs": {
            "backbone": {"crops": "uint8 (B, 256, 256, 3) BGR", "->": {"features": "(B, D, H, W)"}},
            "first": {
                "box": "(B, 4) x, y, w, h in crop pixels",
                "->": {"scores": "(B, A, H, W)", "deltas": "(B, A, 4, H, W)"},
            },
            "read": {
                "features": "(B, D, H, W)", "keys": "(B, N, D)", "values": "(B, N, C)",
                "valid": "int32 (B,): leading rows of keys and values that exist",
                "size": "(B, 2) the target's last width and height in crop pixels",
                "->": {
                    "box": "(B, 4) the best by tracker.pick, x, y, w, h in crop pixels; its size is smoothed",
                    "score": "(B,) of that box, in [0, 1]",
                    "scores": "(B, A, H, W) in [0, 1]", "deltas": "(B, A, 4, H, W)",
                    "boxes": "(B, A, H, W, 4) x, y, w, h in crop pixels",
                },
            },
            "write": {
                "features": "(B, D, H, W)", "scores": "(B, A, H, W)", "deltas": "(B, A, 4, H, W)",
                "->": {"keys": "(B, M, D)", "values": "(B, M, C)"},
            },
        },
        "anchors": {
            "sizes": first[:, 2:].double().tolist(),
            "step": CROP_SIZE / c.grid,
            "rule": "anchor a of row i, column j: width and height sizes[a], centre (j step, i step)",
            "deltas": "dx, dy of the centres / anchor size; log of the size ratio",
        },
        "crop": {"size": CROP_SIZE, "rule": _CROP_RULE},
        "tracker": asdict(TrackerConfig()),
    }  # fmt: skip
