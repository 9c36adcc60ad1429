"""Compound scaling of depth, width and resolution (Tan & Le, 2019, section 3).

A network is made α^φ times as deep, β^φ times as wide and given images of γ^φ times the side: its
FLOPs grow by about (α · β² · γ²)^φ. Here are the rule and how its results become whole numbers;
:func:`effkernels.models.create_scaled` builds a network by it, :mod:`effkernels.models.budget`
finds the largest φ that a budget allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

MOST_PHI = 20.0  # in either direction: (α · β² · γ²)^20 is half a million with the paper's
LEAST_RESOLUTION = 32  # a network of stride 32 then still has a pixel at its end
_DECIMALS = 9  # products of decimal fractions are exact to so many: 100 · 1.1 is 110


class Multipliers(NamedTuple):
    """Factors of a network's size."""

    depth: float
    width: float
    resolution: float


@dataclass(frozen=True)
class CompoundScaling:
    """The coefficients; as they come, those that the paper found for EfficientNet-B0.

    Args:
        alpha: of depth, the blocks of a stage.
        beta: of width, the channels.
        gamma: of resolution, the image's side.

    Raises:
        ValueError: naming the coefficient that is no finite number of at least 1 (section 3.3,
            equation 3).
    """

    alpha: float = 1.2
    beta: float = 1.1
    gamma: float = 1.15

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if not _is_number(value) or value < 1:
                raise ValueError(
                    f"CompoundScaling: {name} is {value!r}, a number of at least 1 is accepted"
                )

    @property
    def cost(self) -> float:
        """α · β² · γ², which the paper holds at about 2: FLOPs grow by it with every φ."""
        return self.alpha * self.beta**2 * self.gamma**2

    def at(self, phi: float) -> Multipliers:
        """α^φ, β^φ and γ^φ.

        Args:
            phi: 0 is the base network; a negative one makes it smaller.

        Raises:
            ValueError: if ``phi`` is no number, or beyond ±20.
        """
        if not _is_number(phi) or abs(phi) > MOST_PHI:
            raise ValueError(
                f"CompoundScaling: phi is {phi!r}, a number from {-MOST_PHI:g} to {MOST_PHI:g} "
                "is accepted"
            )
        return Multipliers(self.alpha**phi, self.beta**phi, self.gamma**phi)


def scale_channels(channels: int, width: float, divisor: int = 8) -> int:
    """``channels`` · ``width`` rounded to a multiple of ``divisor``, never down by over 10 %."""
    if width == 1.0:
        return channels
    scaled = round(channels * width, _DECIMALS)
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * scaled else rounded + divisor


def scale_depth(blocks: int, depth: float) -> int:
    """``blocks`` · ``depth``, rounded up."""
    return math.ceil(round(blocks * depth, _DECIMALS))


def scale_resolution(resolution: int, factor: float, divisor: int = 4) -> int:
    """``resolution`` · ``factor`` rounded to the nearest multiple of ``divisor``, at least one.

    All of B0's to B7's resolutions are multiples of 4, not all are of 8.
    """
    if factor == 1.0:
        return resolution
    scaled = round(resolution * factor, _DECIMALS)
    return max(1, math.floor(scaled / divisor + 0.5)) * divisor


def _is_number(value: Any) -> bool:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    return valid and math.isfinite(value)
