"""A tracked video as a Rerun recording (.rrd): frames, boxes, scores, and what the memory answered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import rerun as rr
import rerun.blueprint as rrb

from dmv_fast.insight.overlay import heat
from dmv_fast.insight.watch import Insight, Remembered, Watch
from dmv_fast.vision.crop import cut
from dmv_fast.vision.draw import contact_sheet

Box = tuple[float, float, float, float]
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 80]
_FLUSH_EVERY = 100  # frames; no more than that waits in memory to be written
_FLUSH_AFTER = 5.0  # seconds; Rerun's own 0.2 makes thousands of tiny pieces
_COLUMNS, _TILE = 8, 128  # of the sheet of remembered frames; pixels
_FOUND, _LOST, _SOUGHT, _VOTE = (60, 220, 60), (240, 60, 60), (200, 200, 200), (255, 200, 60)  # RGB


@contextmanager
def recording(path: Path, watch: Watch) -> Iterator[Recording]:
    """A recording that is written to `path` as it is made; complete at the end of the block."""
    stream = rr.RecordingStream("dmv_fast", batcher_config=rr.ChunkBatcherConfig(flush_tick=_FLUSH_AFTER))
    stream.save(path)
    stream.send_blueprint(_layout())
    try:
        yield Recording(stream, watch)
    finally:
        stream.flush()
        stream.disconnect()


class Recording:
    """Logs frame by frame, on the timeline "frame".

    `video/image`, `video/box`, `video/search` (pixels of the frame); `curves/score`, `curves/found`;
    `search/map` (H, W) and `search/picture`, the search crop under it, with `search/picture/chosen`;
    `memory/sheet`, the remembered frames, with `memory/sheet/votes`, the K candidates of the chosen location
    where they are; `memory/weights` (T,), what each remembered frame weighs in that vote, in the sheet's
    order; `candidates`, the same K as numbers: memory_frame (-1: the null column), x, y (pixels of that
    frame) and score.
    """

    def __init__(self, stream: rr.RecordingStream, watch: Watch):
        self._stream, self._watch = stream, watch
        self._sheet: tuple[Remembered, ...] = ()  # what is on the sheet that was logged last
        self._frames = 0

    def write(self, number: int, frame: np.ndarray, box: Box, score: float, found: bool) -> None:
        """One frame (HWC uint8 BGR) and what was found in it."""
        log = self._stream.log
        self._stream.set_time("frame", sequence=number)
        log("video/image", _jpeg(frame))
        colour = _FOUND if found else _LOST
        log("video/box", rr.Boxes2D(array=[box], array_format=rr.Box2DFormat.XYWH, colors=[colour]))
        log("curves/score", rr.Scalars(score))
        log("curves/found", rr.Scalars(float(found)))
        insight = self._watch.look()
        if insight is not None:
            self._look_inside(frame, insight)
        self._frames += 1
        if self._frames % _FLUSH_EVERY == 0:
            self._stream.flush()

    def _look_inside(self, frame: np.ndarray, insight: Insight) -> None:
        log, window = self._stream.log, insight.window
        square = [window.x0, window.y0, window.side, window.side]
        log("video/search", rr.Boxes2D(array=[square], array_format=rr.Box2DFormat.XYWH, colors=[_SOUGHT]))
        log("search/map", rr.DepthImage(insight.score_map, colormap="viridis", depth_range=[0, 1]))
        crop = cut(frame, window)
        log("search/picture", _jpeg(heat(crop, insight.score_map)))
        row, column = divmod(insight.chosen, len(insight.score_map))
        step = len(crop) / len(insight.score_map)
        log("search/picture/chosen", rr.Points2D([[column * step, row * step]], radii=4, colors=[_FOUND]))
        self._log_votes(insight)

    def _log_votes(self, insight: Insight) -> None:
        log = self._stream.log
        held = [id(memory) for memory in insight.memory]  # two targets may both have begun in one frame
        if held != [id(memory) for memory in self._sheet]:
            log("memory/sheet", _jpeg(_memory_sheet(insight.memory, insight.capacity)))
            self._sheet = insight.memory
        candidates = insight.candidates(insight.chosen)
        real = [(c.score, c.memory, c.place) for c in candidates if c.memory and c.place]
        places = [_on_sheet(held.index(id(memory)), memory, place) for _, memory, place in real]
        radii, labels = [3 + 12 * score**0.5 for score, *_ in real], [f"{score:.2f}" for score, *_ in real]
        marks = rr.Points2D(
            np.reshape(places, (-1, 2)), radii=radii, labels=labels, show_labels=False, colors=[_VOTE]
        )
        log("memory/sheet/votes", marks)
        weights = insight.votes(insight.chosen)
        log("memory/weights", rr.BarChart(np.pad(weights, (0, insight.capacity - len(weights)))))
        frames = np.array([c.memory.frame if c.memory else -1 for c in candidates])
        xs, ys = np.array([c.place or (np.nan, np.nan) for c in candidates]).T
        scores = np.array([c.score for c in candidates])
        log("candidates", rr.AnyValues(memory_frame=frames, x=xs, y=ys, score=scores))


def _jpeg(image: np.ndarray) -> rr.EncodedImage:
    ok, data = cv2.imencode(".jpg", image, _JPEG)
    assert ok, "OpenCV cannot encode a JPEG"
    return rr.EncodedImage(contents=data.tobytes(), media_type="image/jpeg")


def _memory_sheet(memory: tuple[Remembered, ...], capacity: int) -> np.ndarray:
    """Always as large as for a full memory: the viewer shows no image whose size changes."""
    empty = -(-capacity // _COLUMNS) * _COLUMNS - len(memory)
    crops = [m.crop for m in memory] + [np.zeros_like(memory[0].crop)] * empty
    labels = [str(m.frame) for m in memory] + [""] * empty
    return contact_sheet(crops, _COLUMNS, tile_width=_TILE, labels=labels)


def _on_sheet(tile: int, memory: Remembered, place: tuple[float, float]) -> tuple[float, float]:
    """A place in a remembered frame -> x, y on the sheet, where that frame is the given tile."""
    row, column = divmod(tile, _COLUMNS)
    scale = _TILE / memory.window.side
    x, y = (place[0] - memory.window.x0) * scale, (place[1] - memory.window.y0) * scale
    return column * _TILE + x, row * _TILE + y


def _layout() -> rrb.Blueprint:
    """How the viewer shows it at first."""
    inside = rrb.Horizontal(
        rrb.Spatial2DView(origin="search/picture", name="search window and score map"),
        rrb.Spatial2DView(origin="memory/sheet", name="memory and the chosen location's candidates"),
        rrb.BarChartView(origin="memory/weights", name="weight of each remembered frame"),
    )
    video = rrb.Spatial2DView(origin="video", name="video")
    curves = rrb.TimeSeriesView(origin="curves", name="score")
    return rrb.Blueprint(rrb.Vertical(video, inside, curves, row_shares=[3, 2, 1]), collapse_panels=True)
