"""What a class of another library becomes: a subclass of it, with one of these in front."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ..modules.block import Block, train_block
from ..modules.fused import (
    ConvNorm,
    activation_name,
    autocast_dtype,
    batch_norm_act,
    conv_norm_act,
    convolution_kind,
    uses_batch_statistics,
)
from ..modules.hooks import has_global_hooks, is_untouched
from ..modules.mbconv import NO_ACTIVATION
from ..modules.plan import Planned
from ..modules.squeeze_excite import fused_children, squeeze_excite


class Adapted(nn.Module):
    """What every class of an adapter has. Subclasses name the other library's class last."""

    @classmethod
    def accelerates(cls) -> type[nn.Module]:
        """The class that this one takes the place of."""
        return cls.__bases__[-1]


class Accelerated(Adapted, Planned):
    """A block or a network: in evaluation its own forward pass, recorded and replayed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        if self.training or len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return super().forward(*args, **kwargs)
        return self.planned(super().forward, args[0])


class AcceleratedBlock(Accelerated):
    """An inverted residual: in training one op where possible."""

    def as_block(self, *args: Any, **kwargs: Any) -> Block | None:
        """The block as modules; None: it must be called. Arguments are the forward pass's beyond
        its input."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        if self.training and len(args) == 1:
            block = self.as_block(**kwargs)
            trained = None if block is None else train_block(block, args[0])
            if trained is not None:
                return trained
        return super().forward(*args, **kwargs)


class AcceleratedNormAct(Adapted):
    """timm's BatchNormAct2d: in training BatchNorm and activation as one op. In evaluation it is
    part of a block's or a network's recording; alone a replay of it was slower than PyTorch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        norm = cast(nn.BatchNorm2d, self)
        if uses_batch_statistics(norm) and len(args) == 1 and not kwargs and not has_global_hooks():
            activation, drop = self._modules.get("act"), self._modules.get("drop")
            name = None if activation is None else activation_name(activation)
            if name is not None and type(drop) is nn.Identity and is_untouched(drop):
                return batch_norm_act(args[0], norm, name)
        return super().forward(*args, **kwargs)


class AcceleratedConvNormAct(Accelerated):
    """A Sequential of convolution, BatchNorm and perhaps an activation: in training as two ops."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        children = list(self._modules.values())
        if self.training and len(args) == 1 and not kwargs and len(children) in (2, 3):
            conv, norm, activation = (*children, NO_ACTIVATION)[:3]
            if (
                type(norm) is nn.BatchNorm2d
                and isinstance(conv, nn.Conv2d)
                and convolution_kind(conv) is not None
                and activation is not None
            ):
                return conv_norm_act(args[0], ConvNorm(conv, norm, activation))
        return super().forward(*args, **kwargs)


class AcceleratedSqueezeExcite(Adapted):
    """Squeeze-and-excitation: in training as one op, in evaluation as AcceleratedNormAct. Adapters
    register their children."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        if self.training and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            dtype = autocast_dtype(args[0])
            fused = None if has_global_hooks() else fused_children(self, dtype)
            # Under autocast the original's result has the dtype that promotion gives.
            if fused is not None and (dtype is None or args[0].dtype == dtype):
                return squeeze_excite(args[0], fused)
        return super().forward(*args, **kwargs)
