"""SiLU as a module."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from .fused import register_activation

__all__ = ["SiLU"]


class SiLU(nn.SiLU):
    """x · sigmoid(x) (Elfwing et al., 2017) through ``ops.silu``: any shape, layout kept.

    The gradient is recomputed from the input, the only tensor saved. ``inplace`` is accepted for
    compatibility with ``nn.SiLU`` and has no effect: the input is never written.
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.silu(input)


register_activation(SiLU, "silu")
