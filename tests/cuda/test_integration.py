"""Around the CUDA kernels: which calls get them, and why others do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import effkernels as ek
from effkernels import cuda, dispatch, ops


@pytest.fixture
def backward_calls(monkeypatch) -> list[str]:
    """Names of the gradient kernels that run."""
    calls: list[str] = []
    for name, operator in dispatch.operators.items():
        kernels = operator.cuda
        if kernels is None or kernels.backward is None:
            continue

        def backward(*arguments, name=name, kernels=kernels):
            calls.append(name)
            return kernels.backward(*arguments)

        replacement = dispatch.Implementation(kernels.can_run, kernels.run, backward)
        monkeypatch.setattr(operator, "cuda", replacement)
    return calls


def test_gradients_run_on_the_backend_of_the_forward_pass(kernels, device, backward_calls):
    input = torch.randn(64, device=device, requires_grad=True)
    output = ops.silu(input)
    with ek.use_backend("reference"):
        output.sum().backward()
        ops.silu(input).sum().backward()
    assert backward_calls == ["silu"]


def test_double_backward(kernels, device, backward_calls):
    """The kernels have no second derivative: the formula that has one serves."""
    input = torch.randn(9, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.silu(input).sum(), input, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), input)
    with ek.use_backend("reference"):
        reference = torch.autograd.functional.hessian(lambda x: ops.silu(x).sum(), input)
    torch.testing.assert_close(second, reference.diagonal())
    assert backward_calls == []


def test_opcheck(kernels, device):
    input = torch.randn(3, 5, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.effkernels.silu.default, (input, "silu"))


def test_under_compile(kernels, device, backward_calls):
    function = torch.compile(ops.silu, fullgraph=True, backend="aot_eager")
    input = torch.randn(64, device=device, requires_grad=True)
    function(input).sum().backward()
    assert backward_calls == ["silu"]
    torch.testing.assert_close(
        input.grad, torch.autograd.grad(torch.nn.functional.silu(input).sum(), input)[0]
    )


def test_other_dtypes_are_refused(kernels, device):
    with pytest.raises(ek.BackendUnavailable, match=r"float64; float32, bfloat16 and float16"):
        ops.silu(torch.zeros(2, dtype=torch.float64, device=device))


def test_ops_without_kernels_are_refused(kernels, device):
    image = torch.zeros(1, 3, 8, 8, device=device)
    with pytest.raises(ek.BackendUnavailable, match="no native implementation on GPUs"):
        ops.conv(image, torch.zeros(4, 3, 3, 3, device=device))


def test_native_says_what_there_is_of_cuda():
    reason = ek.backends()["native"].reason
    if not torch.cuda.is_available():
        assert reason.endswith("no CUDA device")
    else:
        assert cuda.load_error() is None or str(cuda.load_error()) in reason


@pytest.mark.parametrize("op", ["silu", "depthwise_conv"])
def test_order_on_a_gpu(op):
    """Triton first, but for what CUDA C++ is expected to do faster."""
    input: Any = SimpleNamespace(device=torch.device("cuda"))
    first = "native" if op in cuda.BEFORE_TRITON else "triton"
    order = dispatch.backends_for(input, op)
    assert order[0] == first and order[-1] == "reference"
    assert set(order) == set(dispatch.BACKENDS)
    with ek.use_backend("triton"):
        assert dispatch.backends_for(input, op) == ("triton",)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"minor": 5}, None),
        ({"major": 12, "minor": 1}, None),
        ({"major": 13}, None),
        ({"major": 7, "minor": 5}, "has compute capability 7.5, 8.0 or later is needed"),
        ({"major": 8, "minor": 9}, "were built for 9.0, 12.0+PTX, GPU has 8.9"),
    ],
)
def test_devices(monkeypatch, change, reason):
    properties = SimpleNamespace(**{"name": "GPU", "major": 9, "minor": 0, **change})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    built = {"modules": {"cuda": {"architectures": ["9.0", "12.0+PTX"]}}}
    monkeypatch.setattr(cuda, "read_build_info", lambda: built)
    cuda.device_error.cache_clear()
    error = cuda.device_error(0)
    cuda.device_error.cache_clear()
    assert error is None if reason is None else reason in error


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("9.0a+PTX", (10, 0), False),
    ],
)
def test_what_code_runs_where(architecture, capability, runs):
    assert cuda.runs_on(architecture, capability) is runs
