"""An inverted residual in training, written out in PyTorch's own modules and as op arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effkernels import ops
from effkernels.dispatch import use_backend
from effkernels.ops import BatchNormParameters, MBConvGeometry, MBConvParameters
from tests.ops._cases import Arguments, Case, Draw, assert_parity, gradient_function

NORMS = ("expand", "depthwise", "project")


def block_tensors(case: Case, draw: Draw) -> dict[str, Tensor]:
    """Everything of a block that may need a gradient, by name; ``keep`` if the case drops."""
    channels, expanded, outputs = case.channels, case.expanded, case.outputs
    found = {"input": draw.activations(case.batch, channels, case.size)}
    if expanded:
        found["expand_weight"] = draw.weight(expanded, channels, 1, 1)
    width = expanded or channels
    found["depthwise_weight"] = draw.weight(width, 1, case.kernel, case.kernel)
    if case.reduced:
        found["se_reduce_weight"] = draw.weight(case.reduced, width, 1, 1)
        found["se_reduce_bias"] = draw.normal(case.reduced, std=0.3)
        found["se_expand_weight"] = draw.weight(width, case.reduced, 1, 1)
        found["se_expand_bias"] = draw.normal(width, std=0.3)
    found["project_weight"] = draw.weight(outputs, width, 1, 1)
    for name in NORMS if expanded else NORMS[1:]:
        size = outputs if name == "project" else width
        found[f"{name}_norm_weight"] = draw.uniform(size, low=0.5, high=1.5)
        found[f"{name}_norm_bias"] = draw.normal(size, std=0.3)
    return found


def run_block(
    case: Case, tensors: dict[str, Tensor], running: dict[str, tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """``ops.mbconv_training`` on :func:`block_tensors`."""
    norms: dict[str, Any] = dict.fromkeys(NORMS)
    rest = dict(tensors)
    for name in NORMS:
        if f"{name}_norm_weight" in rest:
            means = (None, None) if running is None else running[name]
            weight, bias = rest.pop(f"{name}_norm_weight"), rest.pop(f"{name}_norm_bias")
            norms[name] = BatchNormParameters(weight, bias, *means, momentum=0.3, eps=1e-3)
    input, keep = rest.pop("input"), rest.pop("keep", None)
    geometry = MBConvGeometry(
        stride=case.stride,
        padding=case.padding,
        residual=case.residual,
        activation=case.activation,
        se_activation=case.activation,
    )
    return ops.mbconv_training(
        input,
        MBConvParameters(**rest),
        norms["expand"],
        norms["depthwise"],
        norms["project"],
        geometry,
        keep,
    )


def assert_block_parity(
    backend: str, case: Case, dtype: torch.dtype, device: str = "cpu", keep: Tensor | None = None
) -> None:
    """Output and gradients on ``backend`` are as accurate as the reference's.

    Args:
        backend: whose kernels run.
        case: the block.
        dtype: of the tensors.
        device: where they are.
        keep: [N] or None: what stochastic depth multiplies each image with.
    """
    extra = {} if keep is None else {"keep": keep.to(device)}
    gradients = gradient_function(lambda **leaves: run_block(case, {**leaves, **extra}))

    def function(tensors: dict[str, Tensor], norms: list[float]) -> tuple[Tensor, Tensor, Tensor]:
        for_input, *others = gradients(tensors, {})
        # Of a vector of a few numbers one draw's error says little: they are judged together.
        together = [
            other.flatten() / (norm * other.numel() ** -0.5)
            for other, norm in zip(others, norms, strict=True)
        ]
        return run_block(case, tensors | extra), for_input, torch.cat(together)

    def arguments(repetition: int) -> Arguments:
        tensors = block_tensors(case, case.draw(repetition, dtype))
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        with use_backend("reference"):
            _, *others = gradients({name: tensor.double() for name, tensor in tensors.items()}, {})
        return (tensors, [float(other.norm()) for other in others]), {}

    assert_parity(backend, function, arguments, channels_last=False)


def expected_running(case: Case, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Running statistics after one step from zeros and ones, by nn.BatchNorm2d."""
    conv = torch.nn.functional.conv2d
    from effkernels.ops._common import apply_activation, resolve_padding

    found = {}
    values, norm = tensors["input"], None

    def normalized(values: Tensor, name: str) -> Tensor:
        nonlocal norm
        norm = nn.BatchNorm2d(values.shape[1], eps=1e-3, momentum=0.3, dtype=values.dtype).train()
        norm.weight = nn.Parameter(tensors[f"{name}_norm_weight"])
        norm.bias = nn.Parameter(tensors[f"{name}_norm_bias"])
        result = norm(values)
        found[name] = (norm.running_mean, norm.running_var)
        return result

    if case.expanded:
        values = normalized(conv(values, tensors["expand_weight"]), "expand")
        values = apply_activation(values, case.activation)
    kernel, stride = [case.kernel] * 2, [case.stride] * 2
    sides = resolve_padding("test", case.padding, values.shape[2:], kernel, stride, [1, 1])
    values = torch.nn.functional.pad(values, sides)
    width = values.shape[1]
    values = conv(values, tensors["depthwise_weight"], None, case.stride, groups=width)
    values = apply_activation(normalized(values, "depthwise"), case.activation)
    if case.reduced:
        gate = ops.squeeze_excite_gate(
            values.mean((2, 3)),
            *(tensors[f"se_{n}"] for n in ("reduce_weight", "reduce_bias")),
            *(tensors[f"se_{n}"] for n in ("expand_weight", "expand_bias")),
            activation=case.activation,
        )
        values = values * gate[:, :, None, None]
    normalized(conv(values, tensors["project_weight"]), "project")
    return found
