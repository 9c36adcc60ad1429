from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from effkernels import ops
from effkernels.ops import ACTIVATIONS, MBConvGeometry, MBConvParameters
from effkernels.testing import assert_matches

from ._cases import (
    AFFINES,
    LAYOUTS,
    PADDINGS,
    Arguments,
    Case,
    Draw,
    assert_memory_kept,
    assert_parity,
    assert_threads_agree,
    both,
    cases_of,
    geometry_size,
    gradient_function,
    has_output,
    pairwise,
    random_cases,
)

AXES = {
    "channels": (1, 3, 8, 15, 16, 17, 24, 33),
    # Expanded channels; None: no expansion, the depthwise convolution reads the input.
    "expanded": (None, 1, 8, 15, 16, 17, 31, 32, 33, 48, 65, 96, 100),
    # None: not those of the input, so there is no residual to add.
    "outputs": (None, 1, 3, 8, 15, 16, 17, 24, 33, 40),
    "reduced": (None, 1, 2, 4, 8, 9, 17),
    "size": ((1, 1), (1, 9), (2, 3), (5, 2), (7, 7), (3, 13), (14, 15), (9, 29), (16, 1)),
    "kernel": (1, 3, 5, 7, (3, 5)),
    "stride": (1, 2, 3, (2, 1)),
    "padding": PADDINGS,
    "dilation": (1, 2),
    "batch": (1, 2, 0, 3),
    "expand_affine": AFFINES,
    "depthwise_affine": AFFINES,
    "project_affine": AFFINES,
    "se_biases": (True, False),
    "activation": ACTIVATIONS,
    "se_activation": ("silu", "relu", "hard_swish"),
    "gate_activation": ("sigmoid", "relu6", "none"),
    "project_activation": ("none", "relu6", "silu"),
    "layout": LAYOUTS,
}
RANDOM = {
    **{name: st.sampled_from(values) for name, values in AXES.items()},
    "channels": st.integers(1, 40),
    "expanded": st.one_of(st.none(), st.integers(1, 120)),
    "outputs": st.one_of(st.none(), st.integers(1, 50)),
    "reduced": st.one_of(st.none(), st.integers(1, 20)),
    "size": st.tuples(st.integers(1, 20), st.integers(1, 20)),
    "padding": st.one_of(
        st.sampled_from(("symmetric", "same")), st.tuples(*[st.integers(0, 8)] * 4)
    ),
    "batch": st.integers(1, 3),
}
# Blocks of EfficientNet-B0, B0's first with no expansion, and one of Lite0 with no gate.
BLOCKS = {
    "b0 first": (1, 32, None, 16, 8, 56, 3, 1),
    "b0 stage 2": (1, 16, 96, 24, 4, 56, 3, 2),
    "b0 stage 2 residual": (3, 24, 144, None, 6, 28, 3, 1),
    "b0 stage 3": (2, 24, 144, 40, 6, 28, 5, 2),
    "b0 stage 5": (1, 112, 672, None, 28, 14, 5, 1),
    "b0 stage 6": (1, 112, 672, 192, 28, 14, 5, 2),
    "b0 last": (1, 192, 1152, 320, 48, 7, 3, 1),
    "lite0": (1, 40, 240, None, None, 28, 5, 1),
}
LAYERS = {
    name: Case(
        channels=c, expanded=e, outputs=k, reduced=r, size=(s, s), kernel=w, stride=d, batch=n
    )
    for name, (n, c, e, k, r, s, w, d) in BLOCKS.items()
}
# Without a gate and with a large hidden image: band by band.
ungated = partial(Case, reduced=None, activation="relu6")
LAYERS |= {
    "bands": ungated(
        channels=17, expanded=100, outputs=None, size=(29, 27), kernel=(3, 5), stride=1, batch=1
    ),
    "bands, stride": ungated(
        channels=24, expanded=144, outputs=40, size=(57, 60), kernel=5, stride=2, batch=1
    ),
    "bands, no expansion": ungated(
        channels=33, expanded=None, outputs=15, size=(47, 45), kernel=3, stride=1, batch=1
    ),
    "bands, dilation": ungated(
        channels=8,
        expanded=48,
        outputs=None,
        size=(31, 61),
        kernel=3,
        stride=1,
        dilation=2,
        batch=3,
    ),
    "bands of a row": ungated(
        channels=8, expanded=136, outputs=16, size=(6, 130), kernel=3, stride=1, batch=1
    ),
}


def arguments(case: Case, dtype: torch.dtype, repetition: int = 0) -> Arguments:
    draw = case.draw(repetition, dtype)
    options = {
        "stride": case.stride,
        "padding": getattr(case, "padding", "symmetric"),
        "dilation": getattr(case, "dilation", 1),
    }
    channels = case.channels
    expanded = channels if case.expanded is None else case.expanded
    outputs = channels if case.outputs is None else case.outputs
    shape = (1, 1) if repetition % 2 == 0 else ()
    tensors = {
        "depthwise_weight": draw.weight(expanded, 1, *both(case.kernel)),
        "project_weight": draw.weight(outputs, expanded, *shape),
    }
    affines = {"depthwise": expanded, "project": outputs}
    if case.expanded is not None:
        tensors["expand_weight"] = draw.weight(expanded, channels, *shape)
        affines["expand"] = expanded
    for prefix, count in affines.items():
        affine = draw.affine(count, getattr(case, f"{prefix}_affine", "scale32+bias32"))
        tensors.update({f"{prefix}_{name}": value for name, value in affine.items()})
    if case.reduced is not None:
        tensors["se_reduce_weight"] = draw.weight(case.reduced, expanded, *shape)
        tensors["se_expand_weight"] = draw.weight(expanded, case.reduced, *shape)
        if getattr(case, "se_biases", True):
            tensors["se_reduce_bias"] = draw.normal(case.reduced, std=0.3)
            tensors["se_expand_bias"] = draw.normal(expanded, std=0.3)
    same_size = geometry_size(Case(size=case.size, kernel=case.kernel, **options)) == case.size
    geometry = MBConvGeometry(
        **options,
        residual=outputs == channels and same_size,
        activation=getattr(case, "activation", "silu"),
        se_activation=getattr(case, "se_activation", "silu"),
        gate_activation=getattr(case, "gate_activation", "sigmoid"),
        project_activation=getattr(case, "project_activation", "none"),
    )
    input = draw.activations(case.batch, channels, case.size, getattr(case, "layout", "nchw"))
    return (input, MBConvParameters(**tensors), geometry), {}


@pytest.mark.parametrize("case", pairwise(AXES, has_output), ids=str)
def test_matches_reference(kernels, dtype, case):
    assert_parity(kernels, ops.mbconv, partial(arguments, case, dtype))


@pytest.mark.parametrize("name", LAYERS)
def test_real_blocks(kernels, dtype, name):
    assert_parity(kernels, ops.mbconv, partial(arguments, LAYERS[name], dtype))


@random_cases
@given(case=cases_of(RANDOM).filter(has_output))
def test_random_shapes(kernels, dtype, case):
    assert_parity(kernels, ops.mbconv, partial(arguments, case, dtype))


@pytest.mark.parametrize("name", ["b0 stage 2 residual", "b0 stage 3"])
def test_is_the_ops_one_after_the_other(name):
    """The reference itself, against the ops it joins."""
    (input, p, geometry), _ = arguments(LAYERS[name], torch.float64)
    hidden = ops.pointwise_conv(
        input, p.expand_weight, p.expand_bias, activation="silu", scale=p.expand_scale
    )
    hidden, mean = ops.depthwise_conv(
        hidden,
        p.depthwise_weight,
        p.depthwise_bias,
        geometry.stride,
        activation="silu",
        return_mean=True,
        scale=p.depthwise_scale,
    )
    gate = ops.squeeze_excite_gate(
        mean, p.se_reduce_weight, p.se_reduce_bias, p.se_expand_weight, p.se_expand_bias
    )
    due = ops.pointwise_conv(
        hidden,
        p.project_weight,
        p.project_bias,
        gate,
        input if geometry.residual else None,
        scale=p.project_scale,
    )
    torch.testing.assert_close(ops.mbconv(input, p, geometry), due)
    assert geometry.residual == ("residual" in name)


@pytest.mark.parametrize("name", LAYERS)
def test_threads_agree(native_kernels, dtype, name):
    assert_threads_agree(ops.mbconv, arguments(LAYERS[name], dtype))


@pytest.mark.parametrize("reduced", [None, 3])
@pytest.mark.parametrize("channels,expanded", [(1, 1), (16, None), (17, 33), (16, 48)])
@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (5, 1), (7, 2)])
def test_memory(native_kernels, dtype, monkeypatch, channels, expanded, reduced, kernel, stride):
    case = Case(
        channels=channels,
        expanded=expanded,
        outputs=None,
        reduced=reduced,
        batch=2,
        size=(9, 13),
        kernel=kernel,
        stride=stride,
        layout="channels_last",
    )
    assert_memory_kept(monkeypatch, ops.mbconv, arguments(case, dtype))


@pytest.mark.parametrize("reduced", [None, 4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_values_stay_in_their_image(kernels, value, reduced):
    case = Case(
        channels=20,
        expanded=35,
        outputs=18,
        reduced=reduced,
        size=(9, 8),
        kernel=3,
        stride=1,
        batch=2,
    )
    (input, parameters, geometry), _ = arguments(case, torch.float32)
    input[1, 3, 4, 5] = value
    assert_matches(ops.mbconv, input, parameters, geometry, backend=kernels)


# Gradients


def flat(input, stride=1, padding="symmetric", residual=False, activation="silu", **tensors):
    """The op with its structures flattened."""
    geometry = MBConvGeometry(stride, padding, residual=residual, activation=activation)
    return ops.mbconv(input, MBConvParameters(**tensors), geometry)


def small(*names: str, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    draw = Draw(0, dtype)
    tensors = {
        "input": draw.activations(2, 2, (4, 3)),
        "expand_weight": draw.weight(4, 2, 1, 1),
        "depthwise_weight": draw.weight(4, 1, 3, 3),
        "se_reduce_weight": draw.weight(2, 4, 1, 1),
        "se_reduce_bias": draw.normal(2),
        "se_expand_weight": draw.weight(4, 2, 1, 1),
        "se_expand_bias": draw.normal(4),
        "project_weight": draw.weight(2, 4, 1, 1),
    }
    for prefix, channels in (("expand", 4), ("depthwise", 4), ("project", 2)):
        affine = draw.affine(channels, "scale+bias")
        tensors.update({f"{prefix}_{name}": value for name, value in affine.items()})
    return {name: value.requires_grad_() for name, value in tensors.items() if name in names}


EVERYTHING = ("input", *MBConvParameters._fields)
NO_GATE = tuple(name for name in EVERYTHING if not name.startswith("se_"))


def run(names, **options):
    return lambda *values: flat(**dict(zip(names, values, strict=True)), **options)


@pytest.mark.parametrize("names", [EVERYTHING, NO_GATE], ids=["gate", "no gate"])
@pytest.mark.parametrize(
    "options",
    [
        {"residual": True},
        {"stride": 2, "padding": "same"},
        {"padding": (0, 2, 1, 0), "activation": "relu6"},
    ],
    ids=["residual", "same", "explicit"],
)
def test_gradients(names, options):
    tensors = small(*names)
    assert gradcheck(run(tensors, **options), list(tensors.values()))


def test_second_gradients():
    tensors = small("input", "expand_weight", "depthwise_weight", "project_weight")
    assert gradgradcheck(run(tensors, residual=True), list(tensors.values()))


def test_gradients_after_native_forward(kernels):
    tensors = small(*EVERYTHING, dtype=torch.float32)
    assert_matches(gradient_function(flat), tensors, {"residual": True}, backend=kernels)


@pytest.mark.parametrize("name", EVERYTHING)
def test_only_needed_gradients_are_computed(name):
    tensors = small(*EVERYTHING)
    everything = torch.autograd.grad(flat(**tensors).sum(), list(tensors.values()))
    alone = {key: value.detach().requires_grad_(key == name) for key, value in tensors.items()}
    flat(**alone).sum().backward()
    for (key, tensor), due in zip(alone.items(), everything, strict=True):
        if key == name:
            torch.testing.assert_close(tensor.grad, due)
        else:
            assert tensor.grad is None


# The dispatcher's rules

SQUARE = ([1, 1], [1, 1, 1, 1], [1, 1])
STRIDED = ([2, 2], [0, 1, 0, 1], [1, 1])
SCHEMA = [
    f"{part}_{what}"
    for part in ("expand", "depthwise", "se_reduce", "se_expand", "project")
    for what in (("weight", "bias") if part.startswith("se_") else ("weight", "scale", "bias"))
]


def raw(*names: str, gradients: bool = False) -> list[torch.Tensor | None]:
    """The dispatcher's tensors, in its order; it takes the gate's weights as matrices."""
    tensors = {
        name: (value.flatten(1) if name.startswith("se_") and value.dim() == 4 else value)
        .detach()
        .requires_grad_(gradients)
        for name, value in small(*names, dtype=torch.float32).items()
    }
    return [tensors.get(name) for name in ("input", *SCHEMA)]


PLAIN = ("input", "expand_weight", "depthwise_weight", "project_weight")


@pytest.mark.parametrize(
    "arguments",
    [
        (*raw(*PLAIN), *SQUARE, False, "silu", "silu", "sigmoid", "none"),
        (*raw(*EVERYTHING), *STRIDED, False, "relu6", "relu", "hard_swish", "relu"),
        (*raw(*EVERYTHING, gradients=True), *SQUARE, True, "silu", "silu", "sigmoid", "none"),
    ],
    ids=["plain", "all", "gradients"],
)
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.effkernels.mbconv.default, arguments)


# Bad input

GOOD = {name: value.detach() for name, value in small(*EVERYTHING, dtype=torch.float32).items()}
X = GOOD.pop("input")
BAD_PARAMETERS = {
    "expand_weight has other channels": (
        {"expand_weight": torch.randn(4, 3)},
        ValueError,
        "expand_weight has 3 channels, its input has 2",
    ),
    "expand_weight is 3×3": (
        {"expand_weight": torch.randn(4, 2, 3, 3)},
        ValueError,
        r"expand_weight has shape \(4, 2, 3, 3\), \(4, 2, 1, 1\) is accepted",
    ),
    "expand_weight is a number": ({"expand_weight": 1}, TypeError, "expand_weight is int, a torch"),
    "expand_scale has another size": (
        {"expand_scale": torch.ones(2)},
        ValueError,
        r"expand_scale has shape \(2,\), \(4,\) is accepted",
    ),
    "expand_bias has another dtype": (
        {"expand_bias": torch.ones(4).double()},
        TypeError,
        "expand_bias has dtype torch.float64, torch.float32",
    ),
    "depthwise_weight is none": (
        {"depthwise_weight": None},
        TypeError,
        "depthwise_weight is NoneType, a torch.Tensor",
    ),
    "depthwise_weight has the input's channels": (
        {"depthwise_weight": torch.randn(2, 1, 3, 3)},
        ValueError,
        "depthwise_weight has 2 channels, its input has 4",
    ),
    "depthwise_weight has another dtype": (
        {"depthwise_weight": GOOD["depthwise_weight"].bfloat16()},
        TypeError,
        "depthwise_weight has dtype torch.bfloat16, input has torch.float32",
    ),
    "even kernel": (
        {"depthwise_weight": torch.randn(4, 1, 2, 2)},
        ValueError,
        "weight has a 2×2 kernel, odd sizes are accepted",
    ),
    "depthwise_bias is elsewhere": (
        {"depthwise_bias": torch.ones(4, device="meta")},
        ValueError,
        "depthwise_bias is on meta, input is on cpu",
    ),
    "depthwise_scale has 2 dimensions": (
        {"depthwise_scale": torch.ones(4, 1)},
        ValueError,
        r"depthwise_scale has shape \(4, 1\), \(4,\) is accepted",
    ),
    "se_expand_weight is missing": (
        {"se_expand_weight": None},
        ValueError,
        "se_reduce_weight and se_expand_weight must be given together",
    ),
    "se_reduce_weight has other channels": (
        {"se_reduce_weight": torch.randn(2, 2)},
        ValueError,
        "se_reduce_weight has 2 channels, its input has 4",
    ),
    "se_expand_weight has another shape": (
        {"se_expand_weight": torch.randn(4, 3)},
        ValueError,
        r"se_expand_weight has shape \(4, 3\), \(4, 2\) is accepted",
    ),
    "se_reduce_bias has another size": (
        {"se_reduce_bias": torch.ones(4)},
        ValueError,
        r"se_reduce_bias has shape \(4,\), \(2,\) is accepted",
    ),
    "se_expand_bias is integer": (
        {"se_expand_bias": torch.ones(4).int()},
        TypeError,
        "se_expand_bias has dtype torch.int32, a floating-point dtype",
    ),
    "project_weight has other channels": (
        {"project_weight": torch.randn(2, 2, 1, 1)},
        ValueError,
        "project_weight has 2 channels, its input has 4",
    ),
    "project_weight is elsewhere": (
        {"project_weight": GOOD["project_weight"].to("meta")},
        ValueError,
        "project_weight is on meta, input is on cpu",
    ),
    "project_bias has another size": (
        {"project_bias": torch.ones(4)},
        ValueError,
        r"project_bias has shape \(4,\), \(2,\) is accepted",
    ),
}
BAD_GEOMETRY = {
    "stride 0": ({"stride": 0}, ValueError, "stride is 0, a positive integer or a pair"),
    "dilation 0": ({"dilation": 0}, ValueError, "dilation is 0, a positive integer or a pair"),
    "padding is unknown": ({"padding": "none"}, ValueError, "padding is 'none'; accepted are"),
    "padding leaves nothing": (
        {"padding": 0, "dilation": 2},
        ValueError,
        "padding 0 leaves no output for a 4×3 input and a 3×3 kernel",
    ),
    "residual with a stride": (
        {"residual": True, "stride": 2},
        ValueError,
        r"residual=True needs an output like the input \(2, 2, 4, 3\), "
        r"it has 2 channels and size \(2, 2\)",
    ),
    **{
        f"{name} is unknown": (
            {name: "gelu"},
            ValueError,
            f"{name} is 'gelu', unknown activation; accepted are 'none', 'relu'",
        )
        for name in ("activation", "se_activation", "gate_activation", "project_activation")
    },
}
BAD_INPUT = {
    "input is none": (None, TypeError, "input is NoneType, a torch.Tensor is accepted"),
    "input is integer": (X.int(), TypeError, "input has dtype torch.int32, a floating-point"),
    "input has 3 dimensions": (X[0], ValueError, "input has 3 dimensions .* 4 are accepted"),
    "input has other channels": (
        torch.randn(2, 3, 4, 3),
        ValueError,
        "expand_weight has 2 channels, its input has 3",
    ),
}


@pytest.mark.parametrize("change,error,message", BAD_PARAMETERS.values(), ids=BAD_PARAMETERS)
def test_bad_parameters(change, error, message):
    with pytest.raises(error, match=f"^mbconv: {message}"):
        ops.mbconv(X, MBConvParameters(**{**GOOD, **change}))


@pytest.mark.parametrize("change,error,message", BAD_GEOMETRY.values(), ids=BAD_GEOMETRY)
def test_bad_geometry(change, error, message):
    with pytest.raises(error, match=f"^mbconv: {message}"):
        ops.mbconv(X, MBConvParameters(**GOOD), MBConvGeometry(**change))


@pytest.mark.parametrize("input,error,message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(input, error, message):
    with pytest.raises(error, match=f"^mbconv: {message}"):
        ops.mbconv(input, MBConvParameters(**GOOD))


def test_residual_needs_the_same_channels():
    parameters = MBConvParameters(**{**GOOD, "project_weight": torch.randn(3, 4)})
    parameters = parameters._replace(project_scale=None, project_bias=None)
    with pytest.raises(ValueError, match="^mbconv: residual=True needs .* it has 3 channels"):
        ops.mbconv(X, parameters, MBConvGeometry(residual=True))
