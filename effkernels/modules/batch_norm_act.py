"""BatchNorm and activation as one module."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .fused import activation_name, batch_norm_act

__all__ = ["BatchNormAct2d"]


class BatchNormAct2d(nn.BatchNorm2d):
    """BatchNorm (Ioffe & Szegedy, 2015), then an optional residual, then an activation.

    Parameters, buffers, momentum and training rules are nn.BatchNorm2d's own; the whole runs as
    one ``ops.batch_norm_act``.

    Args:
        num_features: channels C.
        eps, momentum, affine, track_running_stats: as for nn.BatchNorm2d.
        act_layer: builds the activation; one the ops do not know is called behind them.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.act = act_layer()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(norm(input) + residual).

        Args:
            input: [N, C, H, W].
            residual: [N, C, H, W] or None.

        Returns:
            [N, C, H, W] channels_last.

        Raises:
            TypeError, ValueError: from ``ops.batch_norm_act``.
        """
        self._check_input_dim(input)
        name = activation_name(self.act)
        output = batch_norm_act(input, self, name or "none", residual)
        return output if name is not None else self.act(output)
