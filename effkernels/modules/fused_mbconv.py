"""The fused inverted-residual block of EfficientNet-V2."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from . import arguments
from .conv_norm_act import same_or_own_padding
from .fused import ConvNorm, conv_norm_act
from .mbconv import NO_ACTIVATION, drop_path
from .plan import Planned
from .squeeze_excite import SqueezeExcite

__all__ = ["FusedMBConv"]


class FusedMBConv(Planned):
    """MBConv with expansion and depthwise convolution in one dense k×k (Tan & Le, 2021).

    conv k×k → BatchNorm → act → [SE] → project 1×1 → BatchNorm, plus the input where stride is 1
    and the channels agree. Children have timm's names: ``conv_exp, bn1, se, conv_pwl, bn2``; with
    ``expand_ratio=1`` there is one convolution, ``conv, bn1``, and its activation comes before the
    input is added.

    Args:
        in_channels, out_channels: C and K.
        kernel_size: of the dense convolution, odd.
        stride: of the dense convolution.
        expand_ratio: expanded channels E = round(C · expand_ratio).
        se_ratio: SE reduces to max(1, int(C · se_ratio)) channels; 0 or None for none. A block
            without expansion has none.
        padding: ``"symmetric"`` (kernel_size // 2 on every side) or ``"same"`` (TensorFlow's).
        act_layer: builds an activation.
        norm_layer: builds a BatchNorm from its number of channels.
        drop_path: probability that training drops a sample's block (only with a residual).

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: float = 4,
        se_ratio: float | None = 0.0,
        padding: str = "symmetric",
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        arguments.positive(name, "in_channels", in_channels)
        arguments.positive(name, "out_channels", out_channels)
        arguments.odd(name, "kernel_size", kernel_size)
        arguments.positive(name, "stride", stride)
        arguments.ratio(name, "expand_ratio", expand_ratio)
        if se_ratio is not None and se_ratio != 0:
            arguments.ratio(name, "se_ratio", se_ratio)
        arguments.padding_mode(name, padding)
        self.drop_path = arguments.probability(name, "drop_path", drop_path)
        self.has_residual = stride == 1 and in_channels == out_channels
        self.has_expansion = expand_ratio != 1
        if se_ratio and not self.has_expansion:
            raise ValueError(
                f"{name}: se_ratio is {se_ratio!r}, 0 is accepted where expand_ratio is 1"
            )
        self._same, own_padding = same_or_own_padding(kernel_size, stride, padding)

        def dense(channels: int) -> nn.Conv2d:
            return nn.Conv2d(in_channels, channels, kernel_size, stride, own_padding, bias=False)

        if not self.has_expansion:
            self.conv = dense(out_channels)
            self.bn1 = norm_layer(out_channels)
            self.act1 = act_layer()
            return
        expanded = round(in_channels * expand_ratio)
        arguments.positive(name, "in_channels · expand_ratio", expanded)
        self.conv_exp = dense(expanded)
        self.bn1 = norm_layer(expanded)
        self.act1 = act_layer()
        self.se: nn.Module = nn.Identity()
        if se_ratio:
            self.se = SqueezeExcite(expanded, max(1, int(in_channels * se_ratio)), act_layer)
        self.conv_pwl = nn.Conv2d(expanded, out_channels, 1, bias=False)
        self.bn2 = norm_layer(out_channels)

    def forward(self, input: Tensor) -> Tensor:
        """The block.

        Args:
            input: [N, C, H, W].

        Returns:
            [N, K, H', W'], H' = ceil(H / stride) with either padding.

        Raises:
            TypeError, ValueError: from the ops, naming the argument.
            BackendUnavailable: if a backend was asked for that cannot run this call.
        """
        output: Tensor = self.planned(self._block, input)
        return output

    def conv_norms(self) -> tuple[ConvNorm, ...]:
        """The convolutions with the BatchNorms that follow them."""
        if not self.has_expansion:
            return (ConvNorm(self.conv, self.bn1, self.act1, self._same),)
        return (
            ConvNorm(self.conv_exp, self.bn1, self.act1, self._same),
            ConvNorm(self.conv_pwl, self.bn2, NO_ACTIVATION),
        )

    def _block(self, input: Tensor) -> Tensor:
        dropping = self.training and self.has_residual and self.drop_path > 0.0
        if not self.has_expansion:
            (only,) = self.conv_norms()
            output = conv_norm_act(input, only)
        else:
            expand, project = self.conv_norms()
            hidden = self.se(conv_norm_act(input, expand))
            if self.has_residual and not dropping:
                return conv_norm_act(hidden, project, residual=input)
            output = conv_norm_act(hidden, project)
        if not self.has_residual:
            return output
        if dropping:
            output = drop_path(output, self.drop_path)
        return output + input.to(output.dtype)  # autocast may differ

    def extra_repr(self) -> str:
        return f"residual={self.has_residual}, drop_path={self.drop_path:g}"
