"""Everything that people do with a block in training besides calling it and stepping."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import effkernels as ek
from tests.modules.test_training_parity import (
    BLOCKS,
    DropConnect,
    blocks,
    image_for,
    mbconv,
    mbconv_block,
    timm_block,
)
from tests.networks import batch_norms, make_realistic, training_ops

SQUEEZE = ("se.", "block.2.fc")  # squeeze-and-excitation, whose activations are in place
TIMM = {"dw_kernel_size": 3, "stride": 1, "exp_ratio": 4.0}
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "own": lambda: ek.MBConv(16, 16, drop_path=0.3),
    "torchvision": lambda: mbconv(4, 3, 1, 16, 16, 0.3),
    "timm": lambda: timm_block(16, 16, **TIMM, drop_path_rate=0.3),
    "efficientnet_pytorch": lambda: mbconv_block(16, 16, 3, 1, (9, 7)),
}


@pytest.fixture(params=MAKERS)
def block(request: pytest.FixtureRequest, backend: str) -> nn.Module:
    made = make_realistic(MAKERS[request.param]())
    return (made if request.param == "own" else ek.accelerate(made)).train()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(6, 16, 9, 7)


def gradients(block: nn.Module, run: Callable[[Tensor], Tensor], image: Tensor) -> list[Tensor]:
    """Of a fixed function of what ``run`` gives, for the image and the parameters."""
    torch.manual_seed(5)
    input = image.clone().requires_grad_()
    output = run(input)
    weights = torch.linspace(-1, 1, output.numel()).cos().view(output.shape)
    wanted = [input, *(p for p in block.parameters() if p.requires_grad)]
    return list(torch.autograd.grad((output * weights).sum(), wanted))


def assert_equal(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(block: nn.Module, image: Tensor, reentrant: bool) -> None:
    """The second forward pass drops the same samples and gives the same gradients."""
    twin = copy.deepcopy(block)

    def recomputed(input: Tensor) -> Tensor:
        return checkpoint(twin, input, use_reentrant=reentrant)

    due = gradients(block, block, image)
    if reentrant:  # wants backward(), which autograd.grad is not
        torch.manual_seed(5)
        input = image.clone().requires_grad_()
        output = recomputed(input)
        weights = torch.linspace(-1, 1, output.numel()).cos().view(output.shape)
        (output * weights).sum().backward()
        got = [tensor.grad for tensor in (input, *twin.parameters())]
    else:
        got = gradients(twin, recomputed, image)
    assert_equal(got, due)


def test_gradients_accumulate(block: nn.Module, image: Tensor) -> None:
    for module in block.modules():
        module.eval() if isinstance(module, nn.BatchNorm2d) else None
    if isinstance(block, ek.MBConv):
        block.drop_path = 0.0
    for module in block.modules():
        if type(module).__name__ in ("StochasticDepth", "DropPath"):
            module.p = module.drop_prob = 0.0
    block(image).square().sum().backward()
    due = [parameter.grad.clone() for parameter in block.parameters()]
    block.zero_grad()
    for half in image.chunk(2):
        block(half).square().sum().backward()
    assert_equal([parameter.grad for parameter in block.parameters()], due)


def test_gradient_scaler(block: nn.Module, image: Tensor) -> None:
    """Scaled losses: the gradients after ``unscale_`` are those without; infinities skip a step."""
    twin = copy.deepcopy(block)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    torch.manual_seed(5)
    block(image).square().mean().backward()
    torch.manual_seed(5)
    scaler.scale(twin(image).square().mean()).backward()
    scaler.unscale_(optimizer)
    assert_equal([p.grad for p in twin.parameters()], [p.grad for p in block.parameters()])
    before = [parameter.clone() for parameter in twin.parameters()]
    next(twin.parameters()).grad[0] = torch.inf
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(1))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(before, twin.parameters(), strict=True))


def test_averaged_weights(block: nn.Module, image: Tensor) -> None:
    """An EMA copy evaluates with the averaged weights, also after it has evaluated before."""
    averaged = AveragedModel(block, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        block(image).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(block)
        with torch.no_grad():
            got = averaged.eval()(image)
            with ek.use_backend("reference"):
                fresh = copy.deepcopy(averaged.module).eval()(image)
            torch.testing.assert_close(got, fresh, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(got, copy.deepcopy(block).eval()(image))


def test_freezing_computes_needed_gradients_only(block: nn.Module, image: Tensor) -> None:
    torch.manual_seed(5)
    block(image).square().mean().backward()
    due = {name: parameter.grad for name, parameter in block.named_parameters()}
    first = next(name for name in due if name.endswith("weight"))
    for chosen in (first, list(due)[-1]):
        twin = copy.deepcopy(block)
        twin.zero_grad()
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(name == chosen)
        torch.manual_seed(5)
        twin(image).square().mean().backward()
        for name, parameter in twin.named_parameters():
            if name == chosen:
                torch.testing.assert_close(parameter.grad, due[name], rtol=1e-4, atol=1e-6)
            else:
                assert parameter.grad is None, name


def saved_bytes(block: nn.Module, input: Tensor) -> int:
    """Kept between forward and backward, each memory once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(input)
    return sum(kept.values())


@pytest.mark.parametrize("name", [name for name in BLOCKS if "SAME" in name or "pytorch" in name])
def test_padding_as_tensorflow_is_part_of_the_one_op(name: str, backend: str) -> None:
    ours, theirs = blocks(name)
    ours = (DropConnect(ours) if name.endswith("torch residual") else ours).train()
    ran = [op for op in training_ops(ours, image_for(name, theirs)) if "mbconv" in op]
    assert ran == (["mbconv_training", "mbconv_training_backward"] if backend == "native" else [])


def test_nothing_is_kept_where_nothing_is_trained(block: nn.Module, image: Tensor) -> None:
    everything = saved_bytes(copy.deepcopy(block), image.clone().requires_grad_())
    block.requires_grad_(False)
    assert saved_bytes(block, image) == 0 < everything
    with torch.no_grad():
        assert not block(image).requires_grad


@pytest.mark.parametrize("name", ["torchvision MBConv", "timm InvertedResidual"])
@pytest.mark.parametrize("first", ["convert", "accelerate"])
def test_sync_batch_norm(name: str, first: str, tmp_path: Path, backend: str) -> None:
    """Converted before or after it is asked for the other processes, which PyTorch has GPUs for."""
    ours, theirs = blocks(name)
    # PyTorch's would lose the activation in timm's BatchNorms
    torchs = nn.SyncBatchNorm.convert_sync_batchnorm
    convert = timm.layers.convert_sync_batchnorm if name.startswith("timm") else torchs
    ek.restore(ours)
    ours = ek.accelerate(convert(ours)) if first == "convert" else convert(ek.accelerate(ours))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in ours.modules())
    image = torch.randn(4, next(theirs.parameters()).shape[1], 8, 8)
    results = [gradients(block.eval(), block, image) for block in (ours, theirs)]
    assert_equal(*results)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for block in (ours, convert(theirs)):
            with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
                block.train()(image)
    finally:
        torch.distributed.destroy_process_group()


def test_double_backward_is_right_or_refused(block: nn.Module) -> None:
    """A penalty on the gradient: its gradient in float64 is that of finite differences."""
    block = block.double()
    if isinstance(block, ek.MBConv):
        block.drop_path = 0.0
    for module in block.modules():
        if type(module).__name__ in ("StochasticDepth", "DropPath"):
            module.p = module.drop_prob = 0.0
    image = torch.randn(2, 16, 3, 3, dtype=torch.float64, requires_grad=True)

    with ek.use_backend("reference"):  # native kernels have no float64

        def slope(input: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(block(input).sin().sum(), input, create_graph=True)
            return found.square().sum()

        assert gradcheck(slope, image, fast_mode=True)


def test_double_backward_in_float32(block: nn.Module, image: Tensor) -> None:
    """As the kernels' users have it: right, to float32's accuracy, or PyTorch's error."""
    twin = copy.deepcopy(block).double()

    def penalty(network: nn.Module, input: Tensor) -> Tensor:
        torch.manual_seed(5)
        (found,) = torch.autograd.grad(network(input).sin().sum(), input, create_graph=True)
        (second,) = torch.autograd.grad(found.square().sum(), input)
        return second

    with ek.use_backend("reference"):
        due = penalty(twin, image.double().requires_grad_())
    got = penalty(block, image.clone().requires_grad_())
    assert float((got - due).norm() / due.norm()) < 1e-3


def functional(block: nn.Module, image: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    """A loss as a function of the parameters; buffers are not changed in place."""
    for norm in batch_norms(block):
        norm.track_running_stats, norm.num_batches_tracked = False, None
    state = {name: value.detach() for name, value in block.named_buffers()}

    def loss(parameters: dict[str, Tensor], image: Tensor = image) -> Tensor:
        output = torch.func.functional_call(block, (parameters, state), (image,))
        return output.square().mean()

    return loss


def test_torch_func_grad(block: nn.Module, image: Tensor) -> None:
    """Works, or says what does not."""
    loss = functional(block, image)
    parameters = {name: value.detach() for name, value in block.named_parameters()}
    torch.manual_seed(5)
    try:
        got = torch.func.grad(loss)(parameters)
    except RuntimeError as error:
        assert "effkernels" in str(error) or "vmap" in str(error) or "functorch" in str(error)
        return
    torch.manual_seed(5)
    block.zero_grad()
    loss(dict(block.named_parameters())).backward()
    assert_equal(list(got.values()), [parameter.grad for parameter in block.parameters()])


def test_torch_func_vmap(block: nn.Module, image: Tensor) -> None:
    """Per-group gradients, in evaluation mode: work, or the error says what does not."""
    block.eval()
    loss = functional(block, image)
    parameters = {name: value.detach() for name, value in block.named_parameters()}
    try:
        got = torch.func.vmap(torch.func.grad(loss), (None, 0))(
            parameters, image.view(3, 2, 16, 9, 7)
        )
    except RuntimeError as error:
        assert "effkernels" in str(error) or "vmap" in str(error) or "functorch" in str(error)
        return
    for index, group in enumerate(image.view(3, 2, 16, 9, 7)):
        block.zero_grad()
        loss(dict(block.named_parameters()), group).backward()
        assert_equal([g[index] for g in got.values()], [p.grad for p in block.parameters()])


def test_compiled_step(block: nn.Module, image: Tensor, backend: str) -> None:
    """Forward, loss, backward and SGD in one compiled function."""
    if backend == "reference":  # the compiler takes its ops apart and sums in another order
        block, image = block.double(), image.double()
    for module in block.modules():
        if isinstance(module, ek.MBConv):
            module.drop_path = 0.0
        if type(module).__name__ in ("StochasticDepth", "DropPath"):
            module.p = module.drop_prob = 0.0
    twin = copy.deepcopy(block)
    torch.compiler.reset()

    def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = network(image).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = []
    for network, compile in ((block, True), (twin, False)):
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        run = torch.compile(step, backend="aot_eager") if compile else step
        losses.append(torch.stack([run(network, optimizer) for _ in range(3)]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert_equal(
        [*map(Tensor.detach, block.parameters())], [*map(Tensor.detach, twin.parameters())]
    )
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert_equal(gradients(block, compiled, image), gradients(twin, twin, image))


def test_hooks_on_children(block: nn.Module, image: Tensor) -> None:
    """Hooks run and change nothing; backward ones where no in-place activation follows."""
    twin = copy.deepcopy(block)
    seen: list[str] = []

    def forward(name: str, *_: Any) -> None:
        seen.append(f"forward of {name}")

    def backward(name: str, *_: Any) -> None:
        seen.append(f"backward of {name}")

    expected = []
    for name, module in twin.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_forward_hook(partial(forward, name))
            expected.append(f"forward of {name}")
        if isinstance(module, nn.Conv2d) and not name.startswith(SQUEEZE):
            module.register_full_backward_hook(partial(backward, name))
            expected.append(f"backward of {name}")
    got, due = gradients(twin, twin, image), gradients(block, block, image)
    assert_equal(got, due)
    assert sorted(seen) == sorted(expected)
