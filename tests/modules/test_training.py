"""Everything that people do with a block in training besides calling it and stepping."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    assert_same_formulas,
    blocks,
    image_for,
    mbconv,
    mbconv_block,
    timm_block,
)
from tests.networks import assert_pooled_close, batch_norms, make_realistic, training_ops

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


def trained(block: nn.Module, image: Tensor) -> list[Tensor]:
    """:func:`gradients` of the block itself."""
    return gradients(block, block, image)


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    """The same kernels have done the same: to the bit."""
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(a, b), index


def assert_accurate(
    got: list[Tensor],
    block: nn.Module,
    run: Callable[[nn.Module, Tensor], list[Tensor]],
    image: Tensor,
) -> None:
    """``got`` is as accurate as what ``run`` makes of a copy of ``block`` in plain PyTorch.

    Args:
        got: in float32, computed in another way than ``run`` does.
        block: as it was before.
        run: (copy of ``block``, image) -> what ``got`` should be.
        image: [N, C, H, W].
    """
    with ek.use_backend("reference"):
        due = run(copy.deepcopy(block).double(), image.double())
        stock = [
            run(
                copy.deepcopy(block).to(memory_format=layout),
                image.contiguous(memory_format=layout),
            )
            for layout in (torch.contiguous_format, torch.channels_last)
        ]
    assert_pooled_close(due, got, stock, "result")


def without_drop_path(block: nn.Module) -> nn.Module:
    for module in block.modules():
        if isinstance(module, ek.MBConv):
            module.drop_path = 0.0
        if type(module).__name__ in ("StochasticDepth", "DropPath"):
            module.p = module.drop_prob = 0.0
    return block


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
    assert_same(got, due)


def test_gradients_accumulate(block: nn.Module, image: Tensor) -> None:
    """Those of two halves add up to the batch's, as accurately as PyTorch sums over the batch."""
    without_drop_path(block)
    for norm in batch_norms(block):
        norm.eval()

    def train(network: nn.Module, *batches: Tensor) -> list[Tensor]:
        for batch in batches:
            network(batch).square().sum().backward()
        return [parameter.grad for parameter in network.parameters()]

    assert_accurate(train(copy.deepcopy(block), *image.chunk(2)), block, train, image)


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
    assert_same([p.grad for p in twin.parameters()], [p.grad for p in block.parameters()])
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
            assert_accurate([got], averaged.module, lambda net, x: [net.eval()(x)], image)
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
                assert torch.equal(parameter.grad, due[name]), name
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
    assert_accurate(gradients(ours.eval(), ours, image), theirs.eval(), trained, image)
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
    block = without_drop_path(block).double()
    image = torch.randn(2, 16, 3, 3, dtype=torch.float64, requires_grad=True)

    with ek.use_backend("reference"):  # native kernels have no float64

        def slope(input: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(block(input).sin().sum(), input, create_graph=True)
            return found.square().sum()

        assert gradcheck(slope, image, fast_mode=True)


def test_double_backward_in_float32(block: nn.Module, image: Tensor) -> None:
    """As the kernels' users have it, as accurate as PyTorch's."""

    def penalty(network: nn.Module, image: Tensor) -> list[Tensor]:
        torch.manual_seed(5)
        input = image.clone().requires_grad_()
        (found,) = torch.autograd.grad(network(input).sin().sum(), input, create_graph=True)
        return list(torch.autograd.grad(found.square().sum(), input))

    assert_accurate(penalty(copy.deepcopy(block), image), block, penalty, image)


def functional(block: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """A loss as a function of the parameters; buffers are not changed in place."""
    for norm in batch_norms(block):
        norm.track_running_stats, norm.num_batches_tracked = False, None
    state = {name: value.detach() for name, value in block.named_buffers()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        output = torch.func.functional_call(block, (parameters, state), (image,))
        return output.square().mean()

    return loss


def parameter_gradients(block: nn.Module, image: Tensor) -> list[Tensor]:
    """Of the loss of :func:`functional`, by backward()."""
    torch.manual_seed(5)
    return list(torch.autograd.grad(block(image).square().mean(), list(block.parameters())))


@contextmanager
def plain_under(backend: str, refused: str, call: Callable[[], Any]) -> Iterator[None]:
    """Kernels asked for by name refuse ``call``; inside, as everywhere else, it is taken apart.

    Args:
        backend: of the test.
        refused: the op that says so.
        call: must not be answered, least of all with zeros.
    """
    if backend == "reference":
        yield
        return
    message = f"{refused}: backend '{backend}' cannot run: torch.func's transforms and forward-mode"
    with pytest.raises(ek.BackendUnavailable, match=message):
        call()
    with ek.use_backend("auto"):
        yield


def plain_swish(block: nn.Module) -> nn.Module:
    """efficientnet_pytorch's default is an autograd.Function of its own, which PyTorch refuses to
    transform where the block's own code runs; the library has another for such uses."""
    if hasattr(block, "set_swish"):
        block.set_swish(memory_efficient=False)
    return block


def test_torch_func_grad(block: nn.Module, image: Tensor, backend: str) -> None:
    loss = functional(plain_swish(block))
    parameters = {name: value.detach() for name, value in block.named_parameters()}
    gradient = torch.func.grad(loss)
    with plain_under(backend, "mbconv_training", lambda: gradient(parameters, image)):
        torch.manual_seed(5)
        got = gradient(parameters, image)
    assert_accurate(list(got.values()), block, parameter_gradients, image)


def test_torch_func_vmap(block: nn.Module, image: Tensor, backend: str) -> None:
    """Per-group gradients, in evaluation mode, where other libraries' blocks run their own code."""
    own = isinstance(block, ek.MBConv)
    loss = functional(plain_swish(block).eval())
    parameters = {name: value.detach() for name, value in block.named_parameters()}
    groups = image.view(3, 2, 16, 9, 7)
    gradient = torch.func.vmap(torch.func.grad(loss), (None, 0))
    with plain_under(
        backend if own else "reference", "mbconv", lambda: gradient(parameters, groups)
    ):
        got = gradient(parameters, groups)
    for index, group in enumerate(groups):
        assert_accurate([g[index] for g in got.values()], block, parameter_gradients, group)


def test_forward_mode(block: nn.Module, backend: str) -> None:
    """PyTorch takes the derivative of an op that it does not know for zero, and does not say so."""
    block = plain_swish(without_drop_path(block)).double()
    for norm in batch_norms(block):  # in place, which transforms refuse
        norm.track_running_stats, norm.num_batches_tracked = False, None
    image = torch.randn(2, 16, 3, 3, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(image)

    def along(image: Tensor) -> Tensor:
        return torch.func.jvp(block, (image,), (direction,))[1]

    with plain_under(backend, "mbconv_training", lambda: along(image)):
        options = {"check_forward_ad": True, "check_backward_ad": False, "fast_mode": True}
        assert gradcheck(block, image, **options)
        transposed = torch.randn_like(along(image))
        (backward,) = torch.autograd.grad(block(image), image, transposed)
        pair = (along(image) * transposed).sum(), (backward * direction).sum()
        assert_same_formulas(*([value] for value in pair))


def test_compiled_step(block: nn.Module, image: Tensor, backend: str) -> None:
    """Forward, loss, backward and SGD in one compiled function."""
    without_drop_path(block)

    def train(network: nn.Module, image: Tensor, compile: bool = False) -> list[Tensor]:
        optimizer = torch.optim.SGD(network.parameters(), 0.1)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = network(image).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        run = torch.compile(step, backend="aot_eager") if compile else step
        losses = torch.stack([run() for _ in range(3)])
        return [losses, *map(Tensor.detach, network.parameters())]

    # The compiler takes the reference apart and sums in another order than PyTorch's own kernels.
    if backend == "reference":
        block, image = block.double(), image.double()
    torch.compiler.reset()
    stepped = train(copy.deepcopy(block), image, True)
    twin = copy.deepcopy(block)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    found = gradients(twin, compiled, image)
    if backend == "reference":
        assert_same_formulas(stepped, train(copy.deepcopy(block), image))
        assert_same_formulas(found, trained(block, image))
    else:
        assert_accurate(stepped, block, train, image)
        assert_accurate(found, block, trained, image)


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
    assert_accurate(gradients(twin, twin, image), block, trained, image)
    assert sorted(seen) == sorted(expected)
