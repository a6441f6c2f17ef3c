"""The candidates of a location, and the remembered frames that they come from, as pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmv_fast.insight.watch import Candidate, Insight, Remembered
from dmv_fast.vision.draw import FOUND, GROUND, draw_square, fit, text_bar

_TILE = 112  # pixels; side of a candidate's picture
_SMALL_TILE = 80  # pixels; side of a remembered frame's picture
_BAR, _BENEATH = 8, 42  # pixels; height of its weight's bar, and of the two lines under that
_GAP = 6  # pixels; between two full bars
FIRST_FRAME = "nothing is matched in a target's first frame"


def candidate_panel(candidates: Sequence[Candidate], width: int) -> np.ndarray:
    """The candidates of a location, each on the crop it comes from, with its frame and weight.

    As many as fit into two rows of `width` pixels, the strongest first -> (height, width, 3) uint8 BGR.
    """
    columns = max(1, width // _TILE)
    tiles = [_candidate_tile(candidate) for candidate in candidates[: 2 * columns]]
    blank = np.full_like(tiles[0], GROUND)
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    picture = np.vstack([np.hstack(row + [blank] * (columns - len(row))) for row in rows])[:, :width]
    panel = np.full((len(picture), width, 3), GROUND, np.uint8)
    panel[:, : picture.shape[1]] = picture
    return panel


def _candidate_tile(candidate: Candidate) -> np.ndarray:
    memory, score = candidate.memory, candidate.score
    if memory is None or candidate.place is None:
        picture, name = np.full((_TILE, _TILE, 3), 60, np.uint8), "null" if score > 0 else "none"
    else:
        picture, name = fit(memory.crop, (_TILE, _TILE)), f"frame {memory.frame}"
        draw_square(picture, _in_crop(candidate, _TILE), _TILE / 16)
    return np.vstack([picture, text_bar([name, f"{score:.3f}"], _TILE)])


def _in_crop(candidate: Candidate, size: int) -> tuple[float, float]:
    """x, y of a candidate that is none of the null column, in its crop at `size` pixels."""
    assert candidate.memory is not None and candidate.place is not None
    x, y, _, _ = candidate.memory.window.to_crop((*candidate.place, 0, 0), size)
    return x, y


def memory_panel(insight: Insight | None, clicked: int | None, width: int) -> np.ndarray:
    """The remembered frames, the heaviest first, with the candidates where they are in them.

    The candidates are those of the clicked location; None: of the chosen one. As many frames as fit into a
    row of `width` pixels, each with its weight among them -> (height, width, 3) uint8 BGR. It is as high
    without an insight (a target's first frame), so that the window keeps its size.
    """
    row = np.full((_SMALL_TILE + _BAR + _BENEATH, width, 3), GROUND, np.uint8)
    if insight is None:
        return np.vstack([text_bar([FIRST_FRAME], width), row])
    location = insight.chosen if clicked is None else clicked
    candidates, weights = insight.candidates(location), insight.votes(location)
    heaviest = np.argsort(-weights, kind="stable")[: max(1, width // _SMALL_TILE)]
    tiles = [_memory_tile(insight.memory[i], weights[i], weights[heaviest[0]], candidates) for i in heaviest]
    filled = np.hstack(tiles)[:, :width]
    row[:, : filled.shape[1]] = filled
    null = sum(candidate.score for candidate in candidates if candidate.memory is None)
    words = f"{'chosen' if clicked is None else 'clicked'} location: {len(heaviest)} of {len(weights)} frames"
    words += f" shown; all weigh {weights.sum():.3g}, null {null:.3g}"
    return np.vstack([text_bar([words], width), row])


def _memory_tile(
    memory: Remembered, weight: float, most: float, candidates: Sequence[Candidate]
) -> np.ndarray:
    """The crop with those of the candidates that are in it, the heavier the larger, and its weight.

    Bar and squares are measured by `most`, the heaviest frame's weight: K of thousands of locations often
    weigh a hundredth together, and a bar of that could not be seen.
    """
    picture = fit(memory.crop, (_SMALL_TILE, _SMALL_TILE))
    for candidate in reversed(candidates):  # the strongest on top
        if candidate.memory is memory:
            side = 6 + 5 * _share(candidate.score, most) ** 0.5
            draw_square(picture, _in_crop(candidate, _SMALL_TILE), side)
    bar = np.full((_BAR, _SMALL_TILE, 3), GROUND, np.uint8)
    bar[2:, : round((_SMALL_TILE - _GAP) * _share(weight, most))] = FOUND
    return np.vstack([picture, bar, text_bar([f"frame {memory.frame}", f"{weight:.3g}"], _SMALL_TILE)])


def _share(weight: float, most: float) -> float:
    """weight / most, 0 to 1; 0 where that is no number."""
    return min(float(weight) / float(most), 1.0) if weight > 0 and most > 0 else 0.0
