"""A run in several processes, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import OWNER

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # that torchrun sets


class Ranks(NamedTuple):
    """Which of how many processes this is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine: the number of its GPU

    @property
    def first(self) -> bool:
        """This process writes files and talks."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """What torchrun has set; one process if it has not."""
    texts = [os.environ.get(name, default) for name, default in zip(_VARIABLES, "010", strict=True)]
    for name, text in zip(_VARIABLES, texts, strict=True):
        if not text.isdigit():
            raise ValueError(f"{OWNER}: {name} is {text!r}, a number as torchrun sets it is needed")
    return Ranks(*map(int, texts))


def choose_device(name: str, ranks: Ranks) -> torch.device:
    """The device called ``name``, of this process.

    Raises:
        ValueError: if it is unknown or not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{OWNER}: device is {name!r}, one of auto, cpu, cuda and cuda:N is accepted"
        )
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = ranks.local_rank if device.index is None else device.index
    if ranks.world_size > 1 and device.index is not None:
        raise ValueError(
            f"{OWNER}: device is {name!r}, cuda is accepted in {ranks.world_size} processes: "
            "each takes the GPU of its LOCAL_RANK"
        )
    if index >= count:
        raise ValueError(f"{OWNER}: device is {name!r} (GPU {index}), PyTorch sees {count} GPUs")
    return torch.device("cuda", index)


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """The processes can talk to each other inside; nothing to do for one."""
    if ranks.world_size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def total(values: Tensor, ranks: Ranks) -> Tensor:
    """The sum of all processes' ``values``."""
    if ranks.world_size > 1:
        dist.all_reduce(values)
    return values


def gathered(value: Any, ranks: Ranks) -> list[Any]:
    """Every process's ``value``, by rank."""
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


def synchronize_batch_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with BatchNorms over all processes' pictures: PyTorch's, on a CPU ours."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CpuSyncBatchNorm2d
    return model


class _SumOverProcesses(torch.autograd.Function):
    """Every process's output depends on every input, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes on a CPU, which nn.SyncBatchNorm refuses.

    For tests of a distributed run without GPUs: two small messages per call, nothing fused.
    Every process needs at least one picture; running statistics are as nn.BatchNorm2d keeps them.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        values = input.float()  # [N, C, H, W]
        pixels = values.numel() // values.shape[1]
        sums = torch.cat([values.sum((0, 2, 3)), values.new_tensor([float(pixels)])])
        sums = _SumOverProcesses.apply(sums)
        count = sums[-1].detach()
        mean = (sums[:-1] / count)[:, None, None]  # [C, 1, 1]
        # in a second pass: the mean of squares minus the squared mean would cancel
        variance = _SumOverProcesses.apply((values - mean).square().sum((0, 2, 3))) / count  # [C]
        if self.running_mean is not None and self.running_var is not None:
            self._update(mean.flatten(), variance * (count / (count - 1)))
        output = (values - mean) * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            output = output * self.weight[:, None, None] + self.bias[:, None, None]
        return output.to(input.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(unbiased_variance, momentum)
