"""Settings checked where they are given: one clear error then, not a wrong box in mid-video."""

from __future__ import annotations

import math
import numbers


def check_whole(name: str, value: object, least: int) -> int:
    """A setting as an int; ValueError unless it is a whole number of any type, `least` or more."""
    if not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, {least} or more")
    return int(value)


def check_number(name: str, value: object, least: float, most: float = math.inf) -> None:
    """ValueError unless a setting is a finite number of any type, `least` to `most`."""
    if isinstance(value, numbers.Real) and math.isfinite(value) and least <= float(value) <= most:
        return
    limits = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
    raise ValueError(f"{name} is {value!r}; it must be a number, {limits}")
