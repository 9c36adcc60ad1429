"""Checks of constructor arguments: one clear error each."""

from __future__ import annotations

import math
from typing import Any

PADDINGS = ("symmetric", "same")


def positive(owner: str, name: str, value: Any) -> int:
    """``value`` if it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner}: {name} is {value!r}, a positive integer is accepted")
    return value


def odd(owner: str, name: str, value: Any) -> int:
    """``value`` if it is an odd positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 2 == 0:
        raise ValueError(f"{owner}: {name} is {value!r}, an odd positive integer is accepted")
    return value


def padding_mode(owner: str, value: Any) -> str:
    """``value`` if it is one of PADDINGS."""
    if value not in PADDINGS:
        accepted = " or ".join(repr(name) for name in PADDINGS)
        raise ValueError(f"{owner}: padding is {value!r}, {accepted} is accepted")
    return value


def probability(owner: str, name: str, value: Any) -> float:
    """``value`` if it is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{owner}: {name} is {value!r}, a number in [0, 1) is accepted")
    return float(value)


def ratio(owner: str, name: str, value: Any) -> float:
    """``value`` if it is a finite positive number."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not valid or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{owner}: {name} is {value!r}, a positive number is accepted")
    return float(value)
