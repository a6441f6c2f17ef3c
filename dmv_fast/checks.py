"""Settings checked where they are given: one clear error then, not a wrong box in mid-video."""

from __future__ import annotations

import math
import numbers
from typing import cast


def check_whole(name: str, value: object, least: int) -> int:
    """A setting as an int; ValueError unless it is a whole number of any type, `least` or more."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, {least} or more")
    return int(value)


def check_number(name: str, value: object, least: float, most: float = math.inf) -> None:
    """ValueError unless a setting is a number of any type, `least` to `most`."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number and least <= cast(float, value) <= most:
        return
    limits = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
    raise ValueError(f"{name} is {value!r}; it must be a number, {limits}")
