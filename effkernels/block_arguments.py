"""The arguments of the op ``mbconv_training``, as its schema has them, for its implementations."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class BlockArguments(NamedTuple):
    """In the order of the schema; effkernels/ops/mbconv_training.py says what they are."""

    input: Tensor
    expand_weight: Tensor | None
    expand_norm_weight: Tensor | None
    expand_norm_bias: Tensor | None
    depthwise_weight: Tensor
    depthwise_norm_weight: Tensor | None
    depthwise_norm_bias: Tensor | None
    se_reduce_weight: Tensor | None
    se_reduce_bias: Tensor | None
    se_expand_weight: Tensor | None
    se_expand_bias: Tensor | None
    project_weight: Tensor
    project_norm_weight: Tensor | None
    project_norm_bias: Tensor | None
    keep: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    residual: bool
    eps: list[float]
    activation: str
    se_activation: str
    gate_activation: str

    @property
    def norms(self) -> tuple[tuple[Tensor | None, Tensor | None, float, str], ...]:
        """Weight, bias and eps of the three BatchNorms, and the activation behind each."""
        return (
            (self.expand_norm_weight, self.expand_norm_bias, self.eps[0], self.activation),
            (self.depthwise_norm_weight, self.depthwise_norm_bias, self.eps[1], self.activation),
            (self.project_norm_weight, self.project_norm_bias, self.eps[2], "none"),
        )

    @property
    def squeeze_excite(self) -> tuple[Any, Tensor | None, Any, Tensor | None]:
        """Its weights and biases; all are None where there is none."""
        return self[7:11]

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        """Of the depthwise convolution."""
        return self.stride, self.padding, self.dilation
