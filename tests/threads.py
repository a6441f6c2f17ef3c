"""The same work on one thread and on more, for tests that want the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

Answer = TypeVar("Answer")


def on_threads(counts: Iterable[int], run: Callable[[], Answer]) -> list[Answer]:
    """What `run` gives on each number of PyTorch's threads, which is left as it was."""
    before, answers = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            answers.append(run())
    finally:
        torch.set_num_threads(before)
    return answers
