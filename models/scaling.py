"""Compound scaling of width, depth and resolution (Tan & Le, 2019, section 3)."""

from __future__ import annotations

import math


def scale_channels(channels: int, width: float, divisor: int = 8) -> int:
    """``channels`` · ``width`` rounded to a multiple of ``divisor``, never down by over 10 %."""
    if width == 1.0:
        return channels
    scaled = channels * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * scaled else rounded + divisor


def scale_depth(blocks: int, depth: float) -> int:
    """``blocks`` · ``depth``, rounded up."""
    return math.ceil(blocks * depth)
