"""A tiny network trained in two processes that share its weights by FSDP, and in one.

As a script: one of the two processes. Each has half of every batch; one process alone computes the
halves one after the other, with the running statistics that the process of each half would have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from effkernels.models import create_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torchvision.models import efficientnet

import effkernels as ek
from effkernels import ops
from tests.models import tiny_training

STEPS, BATCH = 12, 16
SHRINKS = 6  # times after the last step that all weights shrink in place
BLOCKS = 3  # of either network
FROZEN = 6  # from this step on the BatchNorms are: nothing but weights changes any more


class Trained(NamedTuple):
    """What one process saw: after every change of the weights evaluation, whose forward passes are
    recorded."""

    losses: Tensor  # [STEPS], of its half
    # [STEPS + SHRINKS, BATCH, CLASSES], of the whole batch, with its running statistics
    logits: Tensor
    whole_blocks: int = 0  # how often a block trained as one op


def torchvision_network() -> nn.Module:
    """With three blocks, on this library's kernels."""
    rows = [(1, 3, 1, 8, 8), (4, 5, 2, 8, 16), (4, 3, 1, 16, 16)]
    settings = [efficientnet.MBConvConfig(*row, 1, 1.0, 1.0) for row in rows]
    made = efficientnet.EfficientNet(
        settings, 0.0, stochastic_depth_prob=0.0, num_classes=tiny_training.CLASSES
    )
    return ek.accelerate(made)


def own_network() -> nn.Module:
    """``tiny``, without random numbers."""
    options = {"drop_rate": 0.0, "drop_path_rate": 0.0}
    return create_model("tiny", num_classes=tiny_training.CLASSES, **options)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "own": own_network,
    "torchvision": torchvision_network,
}


def network(name: str) -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(0)
    return NETWORKS[name]()


def batches() -> tuple[Tensor, Tensor]:
    """[STEPS, BATCH, 3, H, W] pictures and [STEPS, BATCH] classes."""
    generator = torch.Generator().manual_seed(1)
    size = tiny_training.SIZE
    pictures = torch.randn(STEPS, BATCH, 3, size, size, generator=generator)
    classes = torch.randint(tiny_training.CLASSES, (STEPS, BATCH), generator=generator)
    return pictures, classes


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


@torch.no_grad()
def shrink(model: nn.Module) -> None:
    """Other weights at the same addresses: between two evaluations nothing else is allocated."""
    for parameter in model.parameters():
        parameter.mul_(0.95)


def train_alone(name: str, dtype: torch.dtype, layout: torch.memory_format) -> list[Trained]:
    """One process and plain PyTorch, for each half."""
    model = network(name).to(dtype).to(memory_format=layout)
    halves = [{n: b.clone() for n, b in model.named_buffers()} for _ in range(2)]
    losses: list[list[Tensor]] = [[], []]
    logits: list[list[Tensor]] = [[], []]
    optimizer = sgd(model)
    with ek.use_backend("reference"):
        for step, (pictures, classes) in enumerate(zip(*batches(), strict=True)):
            pictures = pictures.to(dtype).contiguous(memory_format=layout)
            optimizer.zero_grad()
            model.train(step < FROZEN)
            for index, state in enumerate(halves):
                output = torch.func.functional_call(model, state, (pictures.chunk(2)[index],))
                loss = F.cross_entropy(output, classes.chunk(2)[index])
                (loss / 2).backward()
                losses[index].append(loss.detach())
            optimizer.step()
            model.eval()
            with torch.no_grad():
                for index, state in enumerate(halves):
                    logits[index].append(torch.func.functional_call(model, state, (pictures,)))
        for _ in range(SHRINKS):
            shrink(model)
            with torch.no_grad():
                for index, state in enumerate(halves):
                    logits[index].append(torch.func.functional_call(model, state, (pictures,)))
    return [Trained(torch.stack(losses[i]), torch.stack(logits[i])) for i in range(2)]


def shard_all(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def shard_modules(kinds: tuple[type[nn.Module], ...]) -> Callable[[nn.Module], nn.Module]:
    """Those of these kinds each by itself, then the rest."""

    def shard(model: nn.Module) -> nn.Module:
        for module in list(model.modules()):
            if isinstance(module, kinds):
                fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        return shard_all(model)

    return shard


def wrap(keeps_parameters: bool) -> Callable[[nn.Module], nn.Module]:
    """The older FSDP, which trains one long parameter."""
    cpu = torch.device("cpu")
    return lambda model: FullyShardedDataParallel(
        model, device_id=cpu, use_orig_params=keeps_parameters
    )


# The older wrapper first: fully_shard is noticed for a whole process, so behind it the test would
# not see whether the wrapper is.
WAYS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "FullyShardedDataParallel": ("own", wrap(False)),
    "FullyShardedDataParallel, use_orig_params": ("own", wrap(True)),
    "fully_shard": ("own", shard_all),
    "fully_shard of every block": ("own", shard_modules((ek.MBConv,))),
    "fully_shard of every layer": ("own", shard_modules((nn.Conv2d, nn.BatchNorm2d))),
    "torchvision, fully_shard of every block": (
        "torchvision",
        shard_modules((efficientnet.MBConv,)),
    ),
}


def train_sharded(way: str, rank: int) -> Trained:
    """One of two processes."""
    name, shard = WAYS[way]
    model = shard(network(name))
    optimizer = sgd(model)
    losses, logits, calls = [], [], 0
    real = ops.mbconv_training

    def counted(*args: object, **options: object) -> Tensor:
        nonlocal calls
        calls += 1
        return real(*args, **options)

    ops.mbconv_training = counted
    try:
        for step, (pictures, classes) in enumerate(zip(*batches(), strict=True)):
            optimizer.zero_grad()
            output = model.train(step < FROZEN)(pictures.chunk(2)[rank])
            loss = F.cross_entropy(output, classes.chunk(2)[rank])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            with torch.no_grad():
                logits.append(model.eval()(pictures))
        for _ in range(SHRINKS):
            if isinstance(model, FSDPModule):
                model.reshard()  # the root keeps what it has gathered
                shrink(model)
            else:
                with FullyShardedDataParallel.summon_full_params(model):
                    shrink(model)
            with torch.no_grad():
                logits.append(model(pictures))
    finally:
        ops.mbconv_training = real
    return Trained(torch.stack(losses), torch.stack(logits), calls)


def main(out: str) -> None:
    """Train every way and write what came of it to the folder ``out``."""
    tiny_training.register(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {way: tuple(train_sharded(way, rank)) for way in WAYS}
    torch.save(found, Path(out) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
