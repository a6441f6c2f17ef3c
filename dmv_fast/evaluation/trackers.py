"""The trackers that `dmv-fast eval` runs: ours, and OpenCV's behind the same two calls."""

from __future__ import annotations

import ctypes
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import cv2
import numpy as np

if TYPE_CHECKING:
    from dmv_fast.tracker import FastDMVTracker, TrackerConfig

Box = tuple[float, float, float, float]

OPENCV_TRACKERS = {"csrt": "TrackerCSRT", "kcf": "TrackerKCF", "mil": "TrackerMIL", "nano": "TrackerNano"}


class Step(NamedTuple):
    """One frame's answer of a tracker that is not ours."""

    box: Box
    score: float
    found: bool


class Answer(Protocol):
    """What the evaluation reads of a frame's answer: a Step, or a TrackResult."""

    @property
    def box(self) -> Box: ...
    @property
    def score(self) -> float: ...
    @property
    def found(self) -> bool: ...


class Tracker(Protocol):
    """What is evaluated: `init` starts it over, as often as it is called."""

    def init(self, image: np.ndarray, bbox: Box, /) -> None:
        """image: HWC uint8 BGR; bbox: xywh in pixels."""

    def track(self, image: np.ndarray, /) -> Answer:
        """The target in the next frame."""


@dataclass(frozen=True)
class DMVFactory:
    """Makes our tracker, by FastDMVTracker's own arguments. It pickles, for `evaluate` with several jobs."""

    weights: str = "dmv18"
    k: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    config: TrackerConfig | None = None
    memory: bool = True
    """False: only the first frame is remembered (capacity 1)."""

    @property
    def label(self) -> str:
        """Its name in tables, plots and folders: the weights, and what is not the default."""
        parts = [Path(self.weights).stem, *([] if self.k is None else [f"k{self.k}"])]
        parts += [part for part in (self.dtype, self.backend) if part != "auto"]
        return "-".join([*parts, *([] if self.memory else ["no-memory"])])

    def settings(self) -> dict[str, object]:
        """All that its results depend on; the weights by their sha256. ValueError where there are none."""
        import torch

        from dmv_fast import weights
        from dmv_fast.runtime.precision import without_auto

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return {
            "tracker": "dmv",
            "weights": self.weights,
            "sha256": weights.sha256(weights.find(self.weights)),
            "k": self.k,
            "device": device,
            "dtype": without_auto(self.dtype, torch.device(device)),
            "backend": self.backend,
            "config": asdict(self._config()),
        }

    def _config(self) -> TrackerConfig:
        from dmv_fast.tracker import TrackerConfig

        config = TrackerConfig() if self.config is None else self.config
        return config if self.memory else replace(config, capacity=1)

    def __call__(self) -> FastDMVTracker:
        """A tracker with these settings."""
        from dmv_fast.tracker import FastDMVTracker

        return FastDMVTracker(self.weights, self.k, self.device, self.dtype, self.backend, self._config())


class OpenCVTracker:
    """A cv2.Tracker* behind `init` and `track`: whole pixels in and out, and a loss repeats the last box."""

    def __init__(self, kind: str, params: object | None = None):
        self._create = getattr(cv2, OPENCV_TRACKERS[kind]).create
        self._args = () if params is None else (params,)
        self._tracker: cv2.Tracker | None = None
        self._box: Box = (0.0, 0.0, 0.0, 0.0)

    def init(self, image: np.ndarray, bbox: Box) -> None:
        """Start over: a fresh cv2 tracker each time, since some of them refuse a second init."""
        _seed()
        tracker = self._tracker = self._create(*self._args)
        x, y, w, h = (round(v) for v in bbox)
        self._box = (float(x), float(y), float(max(w, 1)), float(max(h, 1)))
        tracker.init(image, (x, y, max(w, 1), max(h, 1)))

    def track(self, image: np.ndarray) -> Step:
        """One update; score is NaN where OpenCV has none."""
        assert self._tracker is not None, "track before init"
        found, box = self._tracker.update(image)
        if found:
            x, y, w, h = (float(v) for v in box)
            self._box = (x, y, w, h)
        score = self._tracker.getTrackingScore() if hasattr(self._tracker, "getTrackingScore") else -1.0
        return Step(self._box, score if score >= 0 else float("nan"), bool(found))


def _seed() -> None:
    """The same random features in whichever process and order: TrackerMIL draws them with C's rand()."""
    cv2.setRNGSeed(0)
    if os.name == "posix":
        ctypes.CDLL(None).srand(0)


@dataclass(frozen=True)
class OpenCVFactory:
    """Makes one of OpenCV's trackers. It pickles, for `evaluate` with several jobs."""

    kind: str
    """A key of OPENCV_TRACKERS."""
    nano_dir: Path | None = None
    """Where TrackerNano's two ONNX files are: *backbone*.onnx and *head*.onnx."""

    def __post_init__(self) -> None:
        if self.kind not in OPENCV_TRACKERS:
            raise ValueError(f"tracker is 'opencv:{self.kind}'; known: {', '.join(OPENCV_TRACKERS)}")
        if not hasattr(cv2, OPENCV_TRACKERS[self.kind]):
            raise ImportError(
                f"opencv:{self.kind} is not in this OpenCV {cv2.__version__}; opencv-contrib-python has it "
                "(install it in place of opencv-python: the two cannot share an environment)"
            )
        self._nano_files()

    @property
    def label(self) -> str:
        """Its name in tables and plots."""
        return f"opencv-{self.kind}"

    def settings(self) -> dict[str, object]:
        """All that its results depend on."""
        files = {path.name: path.stat().st_size for path in self._nano_files()}
        return {"tracker": f"opencv:{self.kind}", "opencv": cv2.__version__, "files": files}

    def _nano_files(self) -> list[Path]:
        if self.kind != "nano":
            return []
        if self.nano_dir is None:
            raise ValueError("opencv:nano needs --nano-dir, the folder of its backbone and head .onnx files")
        files = []
        for part in ("backbone", "head"):
            found = sorted(self.nano_dir.glob(f"*{part}*.onnx"))
            if len(found) != 1:
                what = f"{len(found)} files *{part}*.onnx"
                raise ValueError(f"nano-dir {self.nano_dir} holds {what}; it must hold one")
            files += found
        return files

    def __call__(self) -> OpenCVTracker:
        """A tracker of this kind."""
        params = None
        if self.kind == "nano":
            params = cv2.TrackerNano.Params()
            params.backbone, params.neckhead = (str(path) for path in self._nano_files())
        return OpenCVTracker(self.kind, params)
