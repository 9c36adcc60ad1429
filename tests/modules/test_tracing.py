"""deepcopy, pickle, torch.compile, torch.export."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import effkernels as ek
from tests.networks import batch_norms, make_realistic


@pytest.fixture
def block() -> ek.MBConv:
    return make_realistic(ek.MBConv(8, 8, drop_path=0.2)).eval()


def test_copies_and_pickles(block: ek.MBConv, backend: str) -> None:
    image = torch.randn(2, 8, 6, 6)
    saved = io.BytesIO()
    with torch.no_grad():
        due = block(image)
        torch.save(block, saved)
        saved.seek(0)
        copies = [
            copy.deepcopy(block),
            copy.copy(block),
            pickle.loads(pickle.dumps(block)),
            torch.load(saved, weights_only=False),
        ]
        for other in copies:
            assert torch.equal(other(image), due)
        for other in (copies[0], copies[2], copies[3]):  # independent of the original
            other.bn3.bias.add_(1)
            assert not torch.allclose(other(image), due)
        assert torch.equal(block(image), due)


def test_compile_evaluation(block: ek.MBConv, backend: str) -> None:
    image = torch.randn(2, 8, 6, 6)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), block(image))
        block.bn2.running_var.mul_(2)
        block.conv_dw.weight.add_(0.1)
        torch.testing.assert_close(compiled(image), block(image))


def test_compile_training(block: ek.MBConv, backend: str) -> None:
    block.drop_path = 0.0
    plain = copy.deepcopy(block).train()
    compiled = torch.compile(block.train(), fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(2, 8, 6, 6).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    for network, image in zip((compiled, plain), inputs, strict=True):
        network(image).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for got, due in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, due.grad)
    for got, due in zip(batch_norms(block), batch_norms(plain), strict=True):
        torch.testing.assert_close(got.running_mean, due.running_mean)
        torch.testing.assert_close(got.running_var, due.running_var)
        assert int(got.num_batches_tracked) == int(due.num_batches_tracked) == 1


def test_compile_training_with_drop_path(block: ek.MBConv) -> None:
    compiled = torch.compile(block.train(), fullgraph=True, backend="aot_eager")
    compiled(torch.randn(4, 8, 6, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_inductor(block: ek.MBConv) -> None:
    """Once with the real compiler; the other tests trace only, which is what can break."""
    image = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(image), block(image))


def test_export(block: ek.MBConv, backend: str) -> None:
    image = torch.randn(2, 8, 6, 6)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(block, (image,), dynamic_shapes=({0: batch},))
    assert any(node.target is torch.ops.effkernels.mbconv.default for node in program.graph.nodes)
    exported = program.module()
    with torch.no_grad():
        for size in (2, 5):
            image = torch.randn(size, 8, 6, 6)
            torch.testing.assert_close(exported(image), block(image))
