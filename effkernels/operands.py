"""What a kernel makes of a tensor while it loads it (prologues), the same in every op.

A training pass keeps only what the convolutions put out. Whatever follows one (BatchNorm,
activation, squeeze-and-excitation's gate), and its gradient, is recomputed by the kernel that
reads the tensor next.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Forward(NamedTuple):
    """activation(scale[c] · z + shift[c]) · gate[n, c] of a tensor z [N, C, H, W]."""

    scale: Tensor | None = None  # [C] float32: a BatchNorm's weight / √(var + eps)
    shift: Tensor | None = None  # [C] float32, given with scale
    activation: str = "none"
    gate: Tensor | None = None  # [N, C], z's dtype or float32

    def is_plain(self) -> bool:
        """The tensor itself."""
        return self == Forward()


class Gradient(NamedTuple):
    """The gradient for a raw convolution output z [N, C, H, W], from the one for what follows it.

    t     = (upstream · gate[n, c] + offset[n, c]) · activation'(scale[c] · z + shift[c])
    value = factor[c] · t + slope[c] · z + constant[c]

    ``factor``, ``slope`` and ``constant`` are BatchNorm's backward pass; None: value = t.
    """

    z: Tensor | None = None  # like upstream; may be None where nothing asks for it
    scale: Tensor | None = None  # [C] float32, as in Forward
    shift: Tensor | None = None
    activation: str = "none"
    gate: Tensor | None = None  # [N, C]
    offset: Tensor | None = None  # [N, C] float32
    factor: Tensor | None = None  # [C] float32
    slope: Tensor | None = None  # [C] float32, given with factor
    constant: Tensor | None = None  # [C] float32, given with factor
