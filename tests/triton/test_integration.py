"""Around the kernels: autograd, torch.compile, the choice of a backend, launches, tuning."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch.autograd import gradgradcheck

import effkernels as ek
from effkernels import dispatch, ops
from effkernels.testing import relative_error
from effkernels.triton import launch, tune
from effkernels.triton.silu import _silu_kernel
from tests.networks import make_realistic


@pytest.fixture
def backward_calls(monkeypatch) -> list[str]:
    """Names of the gradient kernels that run."""
    calls: list[str] = []
    for name, operator in dispatch.operators.items():
        implementation = operator.implementations["triton"]

        def backward(*arguments, name=name, implementation=implementation):
            calls.append(name)
            return implementation.backward(*arguments)

        replacement = dispatch.Implementation(implementation.can_run, implementation.run, backward)
        monkeypatch.setitem(operator.implementations, "triton", replacement)
    return calls


def test_gradients_run_on_the_backend_of_the_forward_pass(device, backward_calls):
    input = torch.randn(64, device=device, requires_grad=True)
    output = ops.silu(input)
    with ek.use_backend("reference"):
        output.sum().backward()
        ops.silu(input).sum().backward()
    assert backward_calls == ["silu"]


def test_what_needs_no_gradient_gets_none(device, backward_calls):
    input = torch.randn(8, device=device)
    weight = torch.randn(8, device=device, requires_grad=True)
    (ops.silu(input) * weight).sum().backward()
    assert backward_calls == [] and input.grad is None


def test_double_backward(device, backward_calls):
    """The kernels have no second derivative: the formula that has one serves."""
    input = torch.randn(9, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.silu(input).sum(), input, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), input)
    with ek.use_backend("reference"):
        reference = torch.autograd.functional.hessian(lambda x: ops.silu(x).sum(), input)
        assert gradgradcheck(ops.silu, (input.detach().double().requires_grad_(),))
    torch.testing.assert_close(second, reference.diagonal())
    assert backward_calls == []


def test_compiles_whole(device, backward_calls):
    """One graph without breaks, forward and backward, each op a single node."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    def function(x: torch.Tensor) -> torch.Tensor:
        return ops.activation(ops.silu(x) + 1, "hard_swish")

    input = torch.randn(5, 7, device=device, requires_grad=True)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    output = compiled(input)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert targets.count("effkernels.silu.default") == 2
    assert targets.count("effkernels.silu_backward.default") == 2
    expected = function(input)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), input)[0])


def test_opcheck_of_the_backward_op(device):
    input = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    arguments = ([torch.randn_like(input)], [], [True, False], input, "silu")
    torch.library.opcheck(torch.ops.effkernels.silu_backward.default, arguments)


def test_launches_are_collected_and_not_made(device):
    input = torch.full((64,), torch.nan, device=device)
    with launch.collect(launch.A100) as launches:
        assert launch.device_of(input) is launch.A100
        launch.launch(_silu_kernel, (1,), input, input, 64, num_warps=2, VECTOR=1, BLOCK=64)
    (only,) = launches
    assert only.kernel is _silu_kernel and only.num_warps == 2
    assert dict(only.signature)["input_ptr"] == "*fp32" and dict(only.signature)["vectors"] == "i32"
    assert dict(only.constants)["BLOCK"] == 64 and only.aligned == ("output_ptr", "input_ptr")


def test_an_unaligned_view_is_not_called_aligned(device):
    input = torch.zeros(65, device=device)[1:]
    with launch.collect(launch.A100) as launches:
        launch.launch(_silu_kernel, (1,), input, input, 2**31, VECTOR=1, BLOCK=64)
    (only,) = launches
    assert only.aligned == () and dict(only.signature)["vectors"] == "i64"


def test_the_tensors_device_is_current_during_a_launch(monkeypatch):
    """With several GPUs in a process kernels go to the one that has the tensors."""
    current: list[torch.device] = []
    seen: list[list[torch.device]] = []

    class DeviceOf:
        def __init__(self, tensor):
            self._device = tensor.device

        def __enter__(self):
            current.append(self._device)

        def __exit__(self, *_):
            current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: seen.append(list(current))

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    tensor = torch.zeros(3)
    launch.launch(Kernel(), (1,), 7, None, tensor)
    launch.launch(Kernel(), (0,), tensor)  # nothing to do
    assert seen == [[tensor.device]] and current == []


@pytest.mark.parametrize(
    ("dtype", "sizes", "width"),
    [
        (torch.float32, (24,), 4),
        (torch.bfloat16, (24, 40), 8),
        (torch.bfloat16, (24, 36), 4),
        (torch.float16, (3,), 1),
        (torch.float16, (0,), 8),
    ],
)
def test_vector_width(dtype, sizes, width):
    assert launch.vector_width(dtype, *sizes) == width


@dataclass(frozen=True)
class _Problem:
    size: int


@dataclass(frozen=True)
class _Config:
    block: int


class _Tuner:
    """Three configurations; the time of each is known, the largest does not run."""

    times = {16: 3.0, 32: 1.0}

    def __init__(self) -> None:
        self.ran: list[int] = []

    def choose(self, size: int = 7, device: launch.Device = launch.H100) -> _Config:
        def run(config: _Config) -> None:
            if config.block == 64:
                raise RuntimeError("out of resources: shared memory")
            self.ran.append(config.block)

        return tune.choose(
            "op",
            _Problem(size),
            device,
            lambda problem, device: _Config(16),
            lambda problem, device: [_Config(32), _Config(64), _Config(16)],
            run,
        )

    def measure(self, call) -> float:
        call()
        return self.times[self.ran[-1]]


@pytest.fixture
def tuner(monkeypatch, tmp_path) -> _Tuner:
    monkeypatch.setenv("EFFKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(tune, "_tables", {})
    return _Tuner()


def test_nothing_is_tuned_unasked(tuner):
    assert tuner.choose() == _Config(16)
    assert tuner.ran == [] and not tune.cache_directory().exists()


def test_tuning_finds_the_fastest_and_keeps_it(tuner, monkeypatch):
    with tune.tuning(tuner.measure):
        assert tuner.choose() == _Config(32)
        assert tuner.ran == [16, 32]
        assert tuner.choose() == _Config(32)
    assert tuner.ran == [16, 32], "tuned once"
    assert tuner.choose(size=8) == _Config(16), "another problem"
    assert tuner.choose(device=launch.A100) == _Config(16), "another device"
    monkeypatch.setattr(tune, "_tables", {})  # another process
    assert tuner.choose() == _Config(32)


def test_no_tuning_inside_a_captured_graph(tuner, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with tune.tuning(tuner.measure):
        assert tuner.choose() == _Config(16)
    assert tuner.ran == []


def test_the_shipped_table_and_bad_files(tuner):
    name = tune.table_name(launch.H100)
    assert name == "nvidia-h100-80gb-hbm3.json"
    tune.TABLES.mkdir()
    (tune.TABLES / name).write_text(json.dumps({"op(size=7)": {"block": 64}}))
    assert tuner.choose() == _Config(64)
    tune.cache_directory().mkdir()
    (tune.cache_directory() / name).write_text('{"op(size=7)": {"blo')
    tune._tables.clear()
    assert tuner.choose() == _Config(64), "a cut file is no file"
    (tune.cache_directory() / name).write_text(json.dumps({"op(size=7)": {"tile": 1}}))
    tune._tables.clear()
    assert tuner.choose() == _Config(16), "another version's fields"


def test_graph_of_a_gpu_program(device):
    """A frozen network's steps run on Triton, and say so."""
    network = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Hardswish()).eval().to(device)
    frozen = ek.freeze(network)
    input = torch.randn(2, 8, 3, 3, device=device)
    torch.testing.assert_close(frozen(input), network(input))
    report = ek.explain(frozen, input)
    assert [(row.op, row.backend) for row in report] == [("silu", "triton")] * 2
    assert SimpleNamespace(**report.to_dict()).rows


class _NormAndGate(torch.nn.Module):
    """BatchNorm in front, and squeeze-and-excitation that is in no block."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        self.squeeze_excite = torchvision.ops.SqueezeExcitation(8, 4)

    def forward(self, x):
        return self.squeeze_excite(self.act(self.norm(x) + x))


def test_norms_and_gates_of_a_gpu_program(device):
    network = make_realistic(_NormAndGate()).eval().to(device)
    frozen, input = ek.freeze(network), torch.randn(2, 8, 5, 5, device=device)
    torch.testing.assert_close(frozen(input), network(input))
    steps = [(row.op, row.backend) for row in ek.explain(frozen, input)]
    assert steps == [("batch_norm_act", "triton"), ("squeeze_excite", "triton")]


@pytest.mark.parametrize("change", [ek.freeze, ek.accelerate], ids=["freeze", "accelerate"])
def test_network_of_another_library(device, change):
    """torchvision's blocks become steps of one GPU program, SE, residuals and head included."""
    network = torchvision.models.mobilenet_v3_small(num_classes=10).eval()
    make_realistic(network)
    network = network.to(device).to(memory_format=torch.channels_last)
    image = torch.randn(1, 3, 64, 64, device=device).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(image.double())
        stock = network(image)
        changed = change(network)
        got = changed(image)
        report = ek.explain(changed, image)
    assert relative_error(got, expected) <= 4 * relative_error(stock, expected) + 1e-6
    assert {row.backend for row in report} == {"triton"}
    # five convolutions at the ends and eleven blocks, of which every one is a step
    assert [row.op for row in report].count("mbconv") == 11, str(report)


def test_block_under_autocast(device):
    block = ek.MBConv(16, 16).to(device)
    input = torch.randn(2, 16, 6, 6, device=device).to(memory_format=torch.channels_last)
    for training in (False, True):
        block.train(training)
        with torch.autocast(device.type, torch.bfloat16):
            output = block(input)
        with ek.use_backend("reference"):
            expected = block(input)
        assert output.dtype == torch.bfloat16
        assert relative_error(output, expected) < 0.03
