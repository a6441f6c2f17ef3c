"""Scalars of a run: to CSV files, and to TensorBoard where it is installed."""

from __future__ import annotations

import math
from pathlib import Path

from tqdm import tqdm

from dmv_fast.training.unroll import Outcome
from dmv_fast.training.validation import mean_known

_COLUMNS = (*Outcome._fields, "grad_norm", "rate")


class Log:
    """`log.csv` (steps and held-out samples) and `clips.csv` (held-out videos) in a run's folder."""

    def __init__(self, out: Path):
        self._out = out
        if not (out / "log.csv").is_file():
            (out / "log.csv").write_text("kind,step," + ",".join(_COLUMNS) + "\n")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board: SummaryWriter | None = SummaryWriter(str(out / "tensorboard"))
        except ImportError:
            self._board = None

    def step(self, step: int, outcome: Outcome, norm: float, rate: float) -> str:
        """One step of training -> what the progress bar shows of it."""
        values = {name: float(value) for name, value in outcome._asdict().items()}
        self._write("train", step, {**values, "grad_norm": norm, "rate": rate})
        return f"loss {values['loss']:.3f} iou {values['iou']:.3f}"

    def samples(self, step: int, values: dict[str, float]) -> None:
        """What `on_samples` measured."""
        self._write("val", step, values)
        tqdm.write(f"step {step}: held out: loss {values['loss']:.3f}, IoU {values['iou']:.3f}, "
                   f"score {values['score_present']:.2f} present, "
                   f"{values['score_absent']:.2f} absent")  # fmt: skip

    def videos(self, step: int, aucs: dict[str, float]) -> None:
        """What `on_videos` measured."""
        path, mean = self._out / "clips.csv", mean_known(aucs.values())
        lines = [] if path.is_file() else ["step,video,auc"]
        lines += [f"{step},{name},{auc:.4f}" for name, auc in {**aucs, "mean": mean}.items()]
        with open(path, "a") as file:
            file.write("\n".join(lines) + "\n")
        self._to_board("clips", step, {"auc": mean})
        tqdm.write(f"step {step}: tracked {len(aucs)} held-out videos: mean AUC {mean:.3f}")

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        with open(self._out / "log.csv", "a") as file:
            row = ",".join(f"{values.get(name, math.nan):.6g}" for name in _COLUMNS)
            file.write(f"{kind},{step},{row}\n")
        self._to_board(kind, step, values)

    def _to_board(self, kind: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if self._board is not None and math.isfinite(value):
                self._board.add_scalar(f"{kind}/{name}", value, step)
