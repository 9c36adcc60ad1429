"""What only a GPU can show: graphs, streams, autocast, compiled training, very large tensors.

Everything else about the GPU kernels is in tests/triton and tests/cuda, which run on the GPU where
there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn

import effkernels as ek
from effkernels import cuda, ops
from effkernels.testing import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """What every op of a test runs on: Triton, if the test does not ask for another backend."""
    name = getattr(request, "param", "triton")
    if name == "native" and (reason := cuda.load_error()) is not None:
        pytest.skip(reason)
    with ek.use_backend(name):
        yield name


either = pytest.mark.parametrize("backend", ["triton", "native"], indirect=True)


@pytest.fixture
def no_sync() -> Iterator[Callable[[], None]]:
    """From its call to the end of the test, waiting for the GPU is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def image(batch: int, size: int = 64, dtype: torch.dtype = torch.float16) -> Tensor:
    values = torch.randn(batch, 3, size, size, device="cuda", dtype=dtype)
    return values.to(memory_format=torch.channels_last)


def b0(dtype: torch.dtype = torch.float16) -> nn.Module:
    return torchvision.models.efficientnet_b0(num_classes=10).eval().to("cuda", dtype)


def capture(function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of ``function`` after two warm calls on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph, output


@pytest.mark.parametrize("change", [ek.freeze, lambda model: ek.accelerate(model)])
def test_graph_of_a_network(change):
    """Captured once, replayed with other images."""
    model, input = change(b0()), image(2)
    with torch.no_grad():
        graph, output = capture(lambda: model(input))
        for _ in range(3):
            input.copy_(image(2))
            graph.replay()
            got, expected = output.clone(), model(input)
            assert torch.equal(got, expected)


def test_replay_does_not_wait(no_sync):
    model, input = ek.freeze(b0()), image(1)
    with torch.no_grad():
        model(input)
        torch.cuda.synchronize()
        no_sync()
        model(input)


def test_graph_of_a_training_step():
    block = ek.MBConv(16, 16, drop_path=0.0).cuda().train()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
    input = torch.randn(4, 16, 28, 28, device="cuda").to(memory_format=torch.channels_last)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = block(input).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    graph, loss = capture(step)
    before = float(loss)
    for _ in range(10):
        graph.replay()
    assert float(loss) < before


def test_autocast():
    block = ek.MBConv(16, 16).cuda()
    input = torch.randn(4, 16, 28, 28, device="cuda").to(memory_format=torch.channels_last)
    for training in (False, True):
        block.train(training)
        with torch.autocast("cuda", torch.bfloat16):
            output = block(input)
        assert output.dtype == torch.bfloat16
        with ek.use_backend("reference"), torch.autocast("cuda", torch.bfloat16):
            expected = block(input)
        assert relative_error(output, expected) < 0.02


def test_compiled_training_step_is_whole():
    block = ek.MBConv(16, 16).cuda().train()
    input = torch.randn(4, 16, 28, 28, device="cuda").to(memory_format=torch.channels_last)
    compiled = torch.compile(block, fullgraph=True)
    compiled(input).square().mean().backward()
    got = [parameter.grad.clone() for parameter in block.parameters()]
    block.zero_grad()
    block(input).square().mean().backward()
    for gradient, parameter in zip(got, block.parameters(), strict=True):
        assert relative_error(gradient, parameter.grad) < 1e-2


@either
def test_graph_of_an_op():
    input = torch.randn(2, 16, 28, 28, device="cuda").to(memory_format=torch.channels_last)
    taps = torch.randn(16, 1, 5, 5, device="cuda")
    graph, output = capture(lambda: ops.depthwise_conv(input, taps, activation="silu"))
    input.normal_()
    graph.replay()
    assert torch.equal(output, ops.depthwise_conv(input, taps, activation="silu"))


@either
def test_own_stream():
    input = torch.randn(2**22, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        output = ops.silu(input)
    stream.synchronize()
    torch.testing.assert_close(output, nn.functional.silu(input))


@either
def test_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    input = torch.randn(1000, device="cuda:1")
    torch.testing.assert_close(ops.silu(input), nn.functional.silu(input))


@either
@pytest.mark.parametrize("op", ["silu", "pointwise_conv", "depthwise_conv", "batch_norm_act"])
def test_past_two_to_the_31_elements(op):
    """The last images of a tensor of more than 2³¹ elements come out like the first ones."""
    images, channels, size = 132, 64, 512  # 2.2e9 elements, 4.4 GB
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB")
    part = torch.randn(2, channels, size, size, device="cuda", dtype=torch.float16)
    part = part.to(memory_format=torch.channels_last)
    input = torch.empty(
        (images, channels, size, size),
        device="cuda",
        dtype=torch.float16,
        memory_format=torch.channels_last,
    )
    for start in range(0, images, 2):
        input[start : start + 2] = part
    weight = torch.randn(channels, channels, 1, 1, device="cuda", dtype=torch.float16) / 8
    taps = torch.randn(channels, 1, 3, 3, device="cuda", dtype=torch.float16)
    vector = torch.ones(channels, device="cuda")
    run: Callable[[Tensor], Tensor] = {
        "silu": ops.silu,
        "pointwise_conv": lambda x: ops.pointwise_conv(x, weight, activation="silu"),
        "depthwise_conv": lambda x: ops.depthwise_conv(x, taps, activation="silu"),
        "batch_norm_act": lambda x: ops.batch_norm_act(
            x, vector, vector, vector, vector, False, activation="silu"
        ),
    }[op]
    with torch.no_grad():
        output, expected = run(input), run(part)
    assert torch.equal(output[:2], expected) and torch.equal(output[-2:], expected)
