"""The ops trace: one graph, no break, and the compiled graph computes the same."""

from __future__ import annotations

import pytest
import torch

from effkernels import ops
from effkernels.ops import MBConvGeometry, MBConvParameters

from ._cases import Draw


def parameters(draw: Draw) -> dict[str, torch.Tensor]:
    return {
        "stem": draw.weight(8, 3, 3, 3),
        "norm": draw.normal(8, mean=1.0, std=0.3),
        "depthwise": draw.weight(8, 1, 3, 3),
        "reduce": draw.weight(2, 8),
        "expand": draw.weight(8, 2),
        "project": draw.weight(8, 8, 1, 1),
    }


def network(x: torch.Tensor, p: dict[str, torch.Tensor], training: bool = False) -> torch.Tensor:
    """Every op once, the SAME padding from the size of the image."""
    x = ops.conv(x, p["stem"], stride=2, padding="same", activation="silu")
    mean, var = torch.zeros(8), torch.ones(8)
    x = ops.batch_norm_act(x, p["norm"], None, mean, var, training, activation="relu6")
    hidden, mean = ops.depthwise_conv(x, p["depthwise"], padding="same", return_mean=True)
    gate = ops.squeeze_excite_gate(mean, p["reduce"], None, p["expand"], None)
    x = ops.pointwise_conv(hidden, p["project"], gate=gate, residual=x)
    x = ops.squeeze_excite(x, p["reduce"], None, p["expand"], None)
    x = ops.depthwise_separable_conv(x, p["depthwise"], None, p["project"], stride=2)
    block = MBConvParameters(
        p["depthwise"], p["project"], se_reduce_weight=p["reduce"], se_expand_weight=p["expand"]
    )
    x = ops.mbconv(x, block, MBConvGeometry(padding="same", residual=True))
    return ops.silu(x)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [False, True])
def test_one_graph_with_gradients(training):
    """The same graph serves other sizes; the second one makes it dynamic."""
    draw = Draw(0)
    p = {name: value.requires_grad_() for name, value in parameters(draw).items()}
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=None)
    for batch, size in ((2, (13, 15)), (3, (16, 17)), (2, (20, 11))):
        image = draw.activations(batch, 3, size)
        due = network(image, p, training)
        got = compiled(image, p, training)
        torch.testing.assert_close(got, due)
        assert got.stride() == due.stride()
        leaves = list(p.values())
        for ours, theirs in zip(
            torch.autograd.grad(got.square().sum(), leaves),
            torch.autograd.grad(due.square().sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_running_statistics_are_updated_in_a_graph():
    def step(x, mean, var):
        return ops.batch_norm_act(x, None, None, mean, var, True, momentum=0.1)

    image = Draw(0).activations(2, 4, (5, 5))
    plain, compiled = (torch.zeros(4), torch.ones(4)), (torch.zeros(4), torch.ones(4))
    due = step(image, *plain)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(image, *compiled)
    torch.testing.assert_close(got, due)
    torch.testing.assert_close(compiled, plain)
    assert not torch.equal(plain[0], torch.zeros(4))


def test_inductor():
    draw = Draw(0)
    p, image = parameters(draw), draw.activations(2, 3, (13, 15))
    compiled = torch.compile(network, fullgraph=True)
    torch.testing.assert_close(compiled(image, p), network(image, p))


def test_bad_input_in_a_graph():
    compiled = torch.compile(ops.silu, backend="aot_eager")
    with pytest.raises(TypeError, match="silu: input has dtype torch.int64"):
        compiled(torch.arange(3))
