"""The candidates of a location as one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmv_fast.insight.watch import Candidate
from dmv_fast.vision.draw import GROUND, draw_square, fit, text_bar

_TILE = 112  # pixels; side of a candidate's picture


def candidate_panel(candidates: Sequence[Candidate], width: int) -> np.ndarray:
    """The candidates of a location, each on the crop it comes from, with its frame and weight.

    As many as fit into two rows of `width` pixels, the strongest first -> (height, width, 3) uint8 BGR.
    """
    columns = max(1, width // _TILE)
    tiles = [_candidate_tile(candidate) for candidate in candidates[: 2 * columns]]
    blank = np.full_like(tiles[0], GROUND)
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    rows = [np.hstack(row + [blank] * (columns - len(row))) for row in rows]
    panel = np.full((len(rows) * blank.shape[0], width, 3), GROUND, np.uint8)
    panel[:, : rows[0].shape[1]] = np.vstack(rows)[:, :width]
    return panel


def _candidate_tile(candidate: Candidate) -> np.ndarray:
    memory, score = candidate.memory, candidate.score
    if memory is None:
        picture, name = np.full((_TILE, _TILE, 3), 60, np.uint8), "null" if score > 0 else "none"
    else:
        picture, name = fit(memory.crop, (_TILE, _TILE)), f"frame {memory.frame}"
        x, y = candidate.place
        scale = _TILE / memory.window.side
        draw_square(picture, ((x - memory.window.x0) * scale, (y - memory.window.y0) * scale), _TILE / 16)
    return np.vstack([picture, text_bar([name, f"{score:.3f}"], _TILE)])
