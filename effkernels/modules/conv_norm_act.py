"""Convolution, BatchNorm and activation as one module."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from . import arguments
from .fused import ConvNorm, conv_norm_act
from .plan import Planned

__all__ = ["ConvNormAct"]


def same_or_own_padding(
    kernel_size: int, stride: int, padding: str
) -> tuple[tuple[int, int] | None, int]:
    """What ConvNorm.same and nn.Conv2d's padding have to be.

    At stride 1 TensorFlow's SAME is symmetric, so the convolution pads by itself.
    """
    if padding == "same" and stride > 1:
        return (kernel_size, stride), 0
    return None, kernel_size // 2


class ConvNormAct(Planned):
    """activation(BatchNorm(convolution) + residual), with timm's child names ``conv``, ``bn1``.

    In evaluation one op with the BatchNorm folded; in training a convolution and one op for
    BatchNorm, residual and activation.

    Args:
        in_channels, out_channels: C and K.
        kernel_size: odd.
        stride: step in both directions.
        groups: 1 (dense) or ``in_channels`` with K = C (depthwise) run fused; others run as
            PyTorch's.
        padding: ``"symmetric"`` (kernel_size // 2 on every side) or ``"same"`` (TensorFlow's).
        act_layer: builds the activation; None for none.
        norm_layer: builds the BatchNorm from K; None for a convolution with a bias instead.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        padding: str = "symmetric",
        act_layer: Callable[[], nn.Module] | None = nn.SiLU,
        norm_layer: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        arguments.positive(name, "in_channels", in_channels)
        arguments.positive(name, "out_channels", out_channels)
        arguments.odd(name, "kernel_size", kernel_size)
        arguments.positive(name, "stride", stride)
        arguments.positive(name, "groups", groups)
        arguments.padding_mode(name, padding)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{name}: groups is {groups}, a divisor of in_channels {in_channels} and "
                f"out_channels {out_channels} is accepted"
            )
        self._same, own_padding = same_or_own_padding(kernel_size, stride, padding)
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            own_padding,
            groups=groups,
            bias=norm_layer is None,
        )
        self.bn1 = nn.Identity() if norm_layer is None else norm_layer(out_channels)
        self.act1 = nn.Identity() if act_layer is None else act_layer()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(norm(conv(input)) + residual).

        Args:
            input: [N, C, H, W].
            residual: [N, K, H', W'] or None.

        Returns:
            [N, K, H', W'].
        """
        if residual is not None:
            return conv_norm_act(input, *self.conv_norms(), residual)
        output: Tensor = self.planned(self._without_residual, input)
        return output

    def _without_residual(self, input: Tensor) -> Tensor:
        return conv_norm_act(input, *self.conv_norms())

    def conv_norms(self) -> tuple[ConvNorm]:
        """The convolution with the BatchNorm that follows it."""
        return (ConvNorm(self.conv, self.bn1, self.act1, self._same),)
