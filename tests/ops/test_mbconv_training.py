from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import effkernels as ek
from effkernels import ops
from effkernels.layout import output_size
from effkernels.ops import BatchNormParameters, MBConvGeometry, MBConvParameters
from effkernels.ops._common import resolve_padding
from effkernels.testing import assert_close_to
from tests.ops._blocks import (
    NORMS,
    assert_block_parity,
    block_tensors,
    expected_running,
    run_block,
)
from tests.ops._cases import (
    Case,
    Draw,
    assert_memory_kept,
    assert_threads_agree,
    gradient_function,
    pairwise,
    same_bits,
)

BLOCK = Case(
    batch=3,
    channels=16,
    expanded=48,
    outputs=16,
    reduced=4,
    size=(7, 6),
    kernel=3,
    stride=1,
    padding="same",
    residual=True,
    activation="silu",
)
SHALLOW = Case(**{**vars(BLOCK), "expanded": 0, "reduced": 0, "activation": "relu6"})
CASES = [BLOCK, SHALLOW, Case(**{**vars(BLOCK), "stride": 2, "residual": False, "kernel": 5})]


def _enough_values(case: Case) -> bool:
    """The BatchNorms see 8 values a channel. Two become 1 and -1 whatever they were, and the
    gradient is what rounding leaves: a draw alone decides over the error of many."""
    if min(case.size) + {0: 0, (3, 0, 1, 4): 3}.get(case.padding, 6) < case.kernel:
        return False  # no output
    window = [case.kernel] * 2, [case.stride] * 2
    sides = resolve_padding("padding", case.padding, case.size, *window, [1, 1])
    height, width = output_size(case.size, window[0], window[1], sides, [1, 1])
    return case.batch * height * width >= 8


# Around register tiles, panels and chunks of pixels; taps that see padding on one side only.
SHAPES = pairwise(
    {
        "batch": (1, 2, 3),
        "channels": (8, 13, 24),
        "expanded": (0, 48, 77),
        "outputs": (16, 24, 33),
        "reduced": (0, 4),
        "size": ((7, 6), (9, 1), (19, 23)),
        "kernel": (3, 5, 7),
        "stride": (1, 2, 3),
        "padding": ("same", "symmetric", 0, (3, 0, 1, 4)),
        "residual": (False,),
        # Smooth ones: at a corner one value of thousands may fall on the other side by rounding.
        # Corners are in CASES and, from inputs that are exact, in tests/native.
        "activation": ("silu", "sigmoid", "none"),
    },
    _enough_values,
)
LAYERS = [
    Case(**{**vars(BLOCK), "channels": 40, "outputs": 40, "expanded": 240, "size": (28, 28)}),
    Case(**{**vars(BLOCK), "batch": 5, "channels": 96, "outputs": 96, "expanded": 576}),
]
KEEP = torch.tensor([0.0, 1.25, 1.5])


@pytest.mark.parametrize("case", [*CASES, *SHAPES], ids=str)
def test_matches_reference(kernels, dtype, case):
    assert_block_parity(kernels, case, dtype)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_real_layers(kernels, dtype, case):
    assert_block_parity(kernels, case, dtype)


def test_keep_matches_reference(kernels, dtype):
    assert_block_parity(kernels, BLOCK, dtype, keep=KEEP)


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_agree(native_kernels, batch):
    case = Case(**{**vars(BLOCK), "batch": batch, "size": (33, 20)})
    tensors = block_tensors(case, Draw(9))
    assert_threads_agree(
        gradient_function(lambda **leaves: run_block(case, leaves)), ((tensors, {}), {})
    )


def test_memory_kept(native_kernels, dtype, monkeypatch):
    """Outputs are written whole, and nothing beyond them."""
    case = Case(**{**vars(BLOCK), "channels": 13, "outputs": 13, "expanded": 39})
    tensors = block_tensors(case, Draw(10, dtype))
    everything = gradient_function(lambda **leaves: run_block(case, leaves))
    assert_memory_kept(monkeypatch, lambda **leaves: everything(leaves, {}), ((), tensors))


@pytest.mark.parametrize("frozen", ["input", "expand", "depthwise", "project_weight", "se"])
def test_only_needed_gradients(native_kernels, frozen):
    """A gradient does not depend on which others are wanted."""
    tensors = block_tensors(BLOCK, Draw(5))
    everything = gradient_function(lambda **leaves: run_block(BLOCK, leaves))
    expected = dict(zip(tensors, everything(tensors, {}), strict=True))
    fixed = {n: t for n, t in tensors.items() if n.startswith(frozen)}
    free = {n: t for n, t in tensors.items() if n not in fixed}
    wanted = gradient_function(lambda **leaves: run_block(BLOCK, {**leaves, **fixed}))
    for name, gradient in zip(free, wanted(free, {}), strict=True):
        assert same_bits(gradient, expected[name]), name


def test_large_mean(kernels):
    """Statistics of values far from zero, as PyTorch's."""
    tensors = block_tensors(SHALLOW, Draw(11, torch.float64))
    tensors["input"] += 300.0

    def run(dtype: torch.dtype, backend: str) -> torch.Tensor:
        with ek.use_backend(backend):
            return run_block(SHALLOW, {name: t.to(dtype) for name, t in tensors.items()})

    due, stock = run(torch.float64, "reference"), run(torch.float32, "reference")
    assert_close_to(due, run(torch.float32, kernels), stock)


def small_block(case: Case, **options: object) -> ek.MBConv:
    """The block as a module, with the tensors of :func:`block_tensors`."""
    module = ek.MBConv(
        case.channels,
        case.outputs,
        case.kernel,
        case.stride,
        expand_ratio=case.expanded / case.channels if case.expanded else 1,
        se_ratio=case.reduced / case.channels,
        padding=case.padding,
        act_layer={"silu": torch.nn.SiLU, "relu6": torch.nn.ReLU6}[case.activation],
        norm_layer=lambda channels: torch.nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3),
        **options,
    )
    return module.train()


def load(module: ek.MBConv, tensors: dict[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    """Put ``tensors`` into ``module``; its parameters by the tensors' names."""
    convolutions = [stage.conv for stage in module.conv_norms()]
    norms = [stage.norm for stage in module.conv_norms()]
    names = NORMS[-len(norms) :]
    found = {f"{n}_weight": c.weight for n, c in zip(names, convolutions, strict=True)}
    found |= {f"{n}_norm_weight": norm.weight for n, norm in zip(names, norms, strict=True)}
    found |= {f"{n}_norm_bias": norm.bias for n, norm in zip(names, norms, strict=True)}
    if "se_reduce_weight" in tensors:
        for part in ("reduce", "expand"):
            conv = getattr(module.se, f"conv_{part}")
            found |= {f"se_{part}_weight": conv.weight, f"se_{part}_bias": conv.bias}
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(tensors[name])
    return found


def assert_trains_as_one_op(backend: str, device: str) -> None:
    """ek.MBConv in training: outputs, gradients and buffers as stage by stage, and what is kept."""
    tensors = block_tensors(BLOCK, Draw(6))
    results = []
    for name in (backend, "reference"):
        module = small_block(BLOCK).to(device)
        parameters = load(module, tensors)
        input = tensors["input"].to(device).requires_grad_()
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with ek.use_backend(name):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = module(input)
            output.square().sum().backward()
        images = {id(t.untyped_storage()): t for t in kept if t.dim() == 4 and t.shape[2] > 3}
        state = [tensor for _, tensor in sorted(module.named_buffers())]
        gradients = [input.grad, *(parameters[name].grad for name in sorted(parameters))]
        results.append((output.detach(), gradients, state, sum(t.numel() for t in images.values())))
    (output, gradients, state, kept_by_us), (due, due_gradients, due_state, kept_by_it) = results
    torch.testing.assert_close(output, due)
    torch.testing.assert_close(gradients, due_gradients, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state, due_state)
    input = tensors["input"].numel()
    # the input, the expansion, the depthwise convolution and the projection
    assert kept_by_us == input * (1 + 3 + 3 + 1) < kept_by_it


def test_module_trains_as_one_op(native_kernels):
    assert_trains_as_one_op("native", "cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_like_the_stages_of_a_block(case):
    """Outputs and gradients in float64 are those of the block run stage by stage."""
    tensors = block_tensors(case, Draw(1, torch.float64))
    module = small_block(case).double()
    parameters = load(module, tensors)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    expected, got = module(tensors["input"]), run_block(case, leaves)
    torch.testing.assert_close(got, expected)
    names = [name for name in leaves if name != "input"]
    gradient = torch.randn_like(got)
    due = torch.autograd.grad(
        expected, [leaves["input"], *(parameters[n] for n in names)], gradient
    )
    results = torch.autograd.grad(got, [leaves["input"], *(leaves[n] for n in names)], gradient)
    for name, result, expectation in zip(["input", *names], results, due, strict=True):
        torch.testing.assert_close(result, expectation, msg=lambda text, name=name: name + text)


SMALL = Case(
    batch=2,
    channels=2,
    expanded=4,
    outputs=2,
    reduced=2,
    size=(4, 3),
    kernel=3,
    stride=1,
    padding="same",
    residual=True,
    activation="silu",
)


@pytest.mark.parametrize("keeps", [False, True], ids=["keeps all", "keep"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("reduced", [0, 2], ids=["no gate", "gate"])
@pytest.mark.parametrize("expanded", [0, 4], ids=["no expansion", "expansion"])
def test_gradients(expanded, reduced, residual, keeps):
    """Of everything that may need one are those of finite differences."""
    case = Case(**{**vars(SMALL), "expanded": expanded, "reduced": reduced, "residual": residual})
    assert_gradients(case, torch.tensor([0.5, 1.25]) if keeps else None)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "residual": False},
        {"padding": (0, 2, 1, 0), "residual": False},
        {"activation": "hard_swish"},
        {"activation": "relu6"},
    ],
    ids=str,
)
def test_gradients_of_other_geometries(options):
    assert_gradients(Case(**{**vars(SMALL), **options}))


def test_second_gradients():
    assert_gradients(SMALL, check=gradgradcheck)


def assert_gradients(
    case: Case, keep: torch.Tensor | None = None, check: Callable[..., bool] = gradcheck
) -> None:
    """``check`` of the reference on ``case``, for all of its tensors together."""
    tensors = block_tensors(case, Draw(0, torch.float64))
    extra = {} if keep is None else {"keep": keep.double()}
    tensors = {name: tensor.requires_grad_() for name, tensor in (tensors | extra).items()}

    def function(*values: torch.Tensor) -> torch.Tensor:
        return run_block(case, dict(zip(tensors, values, strict=True)))

    with ek.use_backend("reference"):
        assert check(function, list(tensors.values()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_running_statistics(case):
    tensors = block_tensors(case, Draw(2, torch.float64))
    names = NORMS if case.expanded else NORMS[1:]
    sizes = {n: tensors[f"{n}_norm_weight"].shape[0] for n in names}
    running = {n: (torch.zeros(s).double(), torch.ones(s).double()) for n, s in sizes.items()}
    run_block(case, tensors, running)
    for name, expected in expected_running(case, tensors).items():
        torch.testing.assert_close(running[name], expected)


def test_keep_drops_whole_images():
    tensors = block_tensors(BLOCK, Draw(3, torch.float64))
    plain = run_block(BLOCK, tensors) - tensors["input"]
    kept = run_block(BLOCK, tensors | {"keep": torch.tensor([0.0, 2.0, 0.5])}) - tensors["input"]
    torch.testing.assert_close(kept, plain * torch.tensor([0.0, 2.0, 0.5]).view(3, 1, 1, 1))


def test_opcheck():
    tensors = block_tensors(BLOCK, Draw(4))
    calls = []
    overload = torch.ops.effkernels.mbconv_training.default
    real = ops.mbconv_training.__globals__["_op"]
    ops.mbconv_training.__globals__["_op"] = lambda *args: (calls.append(args), real(*args))[1]
    try:
        run_block(BLOCK, {name: tensor.requires_grad_() for name, tensor in tensors.items()})
    finally:
        ops.mbconv_training.__globals__["_op"] = real
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(overload, calls[0], test_utils=tests)


def test_bad_input():
    input = torch.randn(2, 4, 5, 5)
    weights = MBConvParameters(torch.randn(4, 1, 3, 3), torch.randn(6, 4, 1, 1))
    norm = BatchNormParameters(None, None, None, None)
    call = ops.mbconv_training
    with pytest.raises(ValueError, match="expand_norm and expand_weight must be given together"):
        call(input, weights, norm, norm, norm)
    with pytest.raises(ValueError, match="depthwise_bias is given, None is accepted"):
        call(input, weights._replace(depthwise_bias=torch.zeros(4)), None, norm, norm)
    with pytest.raises(ValueError, match=r"project_norm.weight has shape \(4,\), \(6,\) is acc"):
        call(input, weights, None, norm, norm._replace(weight=torch.ones(4)))
    with pytest.raises(ValueError, match=r"keep has shape \(3,\), \(2,\) is accepted"):
        call(input, weights, None, norm, norm, keep=torch.ones(3))
    with pytest.raises(ValueError, match="project_activation is 'relu', 'none' is accepted"):
        call(input, weights, None, norm, norm, MBConvGeometry(project_activation="relu"))
    with pytest.raises(ValueError, match="depthwise_norm: expected more than 1 value per"):
        call(input[:1, :, :1, :1], weights, None, norm, norm)
    with ek.use_backend("native"), pytest.raises(ek.BackendUnavailable, match="input is empty"):
        call(input[:0], weights, None, norm, norm)
