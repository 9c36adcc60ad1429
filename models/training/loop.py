"""Training from the first step to the last: :func:`train`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import v2

import effkernels
from effkernels.info import collect

from ..checkpoints import load_checkpoint
from ..common import DataConfig
from ..registry import create_model, create_scaled
from . import checkpoint, data, distributed
from .config import OWNER, TrainConfig
from .distributed import Ranks
from .history import History
from .run import CHECKPOINT, Request, Run, Say
from .schedules import build_optimizer, schedule


def train(config: TrainConfig, say: Say = lambda line: None) -> History:
    """Train a network and write its checkpoints and history into ``config.out``.

    Under torchrun every process calls this; the gradients are averaged
    (DistributedDataParallel), the first process writes. On one CPU, or with ``deterministic`` on
    one GPU, a run that was interrupted and resumed ends with the same bits as one that was not.
    The first SIGINT or SIGTERM saves and stops, the second one ends the process at once.

    Args:
        config: what to do.
        say: is given lines for the user.

    Returns:
        The course of the run, from its very beginning if it was resumed.

    Raises:
        ValueError, TypeError, FileNotFoundError, RuntimeError: for arguments, data, weights or a
            checkpoint that are not accepted, before any file is written.
        NonFiniteLoss: naming the step; ``checkpoint.pt`` is the last one before it.
        Interrupted: after saving.
    """
    ranks = distributed.ranks_from_environment()
    _check_out(config)
    device = distributed.choose_device(config.device, ranks)
    gpus = [device.index] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=gpus),
        _determinism(config.deterministic),
        contextlib.nullcontext() if config.accelerate else effkernels.use_backend("reference"),
        distributed.process_group(ranks, device),
        _stop_request() as request,
    ):
        run = _prepare(config, ranks, device, request, say)
        return run.until_done()


def _check_out(config: TrainConfig) -> None:
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{OWNER}: out is {config.out!r}, which is a file; a folder is accepted")
    if not config.resume and (out / CHECKPOINT).exists():
        raise ValueError(
            f"{OWNER}: out is {config.out!r}, where a run is already: resume it, or choose another"
        )


@contextlib.contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def _stop_request() -> Iterator[Request]:
    """Inside, the first SIGINT or SIGTERM is noted, and the second is as before."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python handles signals in the main thread only
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        request.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare(
    config: TrainConfig, ranks: Ranks, device: torch.device, request: Request, say: Say
) -> Run:
    """Everything that a run needs, checked and loaded; nothing is written yet."""
    saved = checkpoint.load(Path(config.out) / CHECKPOINT) if config.resume else None
    with torch.device("meta"):  # its name and options are right, before a dataset is fetched
        build_network(config, 0)
    torch.manual_seed(config.seed)
    source = _source(config, ranks)
    classes = source.classes if config.num_classes is None else config.num_classes
    if classes < source.classes:
        raise ValueError(
            f"{OWNER}: num_classes is {classes}, {config.dataset} has {source.classes} classes"
        )
    network = build_network(config, classes)
    expected = network.data_config
    assert isinstance(expected, DataConfig)
    if config.weights is not None and not _load_weights(network, config):
        say(f"weights: the head is for other classes, a new one of {classes} outputs is trained")

    pictures = data.training_pictures(config, source, expected)
    per_step = config.batch_size * config.accumulate * ranks.world_size
    steps_per_epoch = len(pictures) // per_step
    if not steps_per_epoch:
        raise ValueError(
            f"{OWNER}: batch_size is {config.batch_size}, so a step has {per_step} pictures "
            f"(× accumulate × processes), and there are {len(pictures)} to train on"
        )
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.accelerate:
        effkernels.accelerate(network)
    if config.sync_bn and ranks.world_size > 1:
        network = distributed.synchronize_batch_norms(network, device)
    optimizer = build_optimizer(config, network, per_step)
    run = Run(
        config=config,
        ranks=ranks,
        device=device,
        request=request,
        say=say,
        network=network,
        ema=AveragedModel(network, use_buffers=True) if config.ema_decay else None,
        optimizer=optimizer,
        scheduler=LambdaLR(optimizer, schedule(config, steps_per_epoch)),
        scaler=torch.amp.GradScaler(device.type, enabled=config.dtype == "float16"),
        criterion=nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
        mixup=v2.MixUp(alpha=config.mixup, num_classes=classes) if config.mixup else None,
        pictures=pictures,
        evaluation=data.evaluation_loader(config, source, expected, ranks, device),
        steps_per_epoch=steps_per_epoch,
        history=History(asdict(config) | {"num_classes": classes}, environment(device, ranks)),
    )
    # Initial weights are equal everywhere, dropout and mixup are not.
    torch.manual_seed(config.seed + ranks.rank)
    if saved is not None:
        run.load(saved)
    return run


def _source(config: TrainConfig, ranks: Ranks) -> data.Source:
    """The dataset; one process downloads it, the others wait."""
    if ranks.world_size == 1 or not config.download:
        return data.open_source(config)
    if ranks.first:
        data.open_source(config)
    dist.barrier()
    return data.open_source(dataclasses.replace(config, download=False))


def build_network(config: TrainConfig, num_classes: int) -> nn.Module:
    """The network that ``config`` names, with so many outputs and random weights."""
    options = {"num_classes": num_classes, **config.model_options}
    if config.phi is None:
        return create_model(config.model, **options)
    return create_scaled(config.model, config.phi, config.scaling(), **options)


def _load_weights(network: nn.Module, config: TrainConfig) -> bool:
    """Read ``config.weights``; False if they have a head for other classes, which is left out."""
    assert config.weights is not None
    try:
        load_checkpoint(network, config.weights)
        return True
    except RuntimeError:
        headless = build_network(config, 0)
        if not _fits(headless, config.weights) or _fits(network, config.weights, strict=False):
            raise  # the head is not misshapen, something is missing or left over
    network.load_state_dict(headless.state_dict(), strict=False)
    # The released EfficientNet code draws a head from ±1 / √classes, which for few classes starts
    # at a loss of 15 and ruins the features; torch.nn.Linear's own is ±1 / √features.
    (head,) = (module for module in network.modules() if isinstance(module, nn.Linear))
    head.reset_parameters()
    return False


def _fits(network: nn.Module, weights: str, strict: bool = True) -> bool:
    try:
        load_checkpoint(network, weights, strict)
    except RuntimeError:
        return False
    return True


def environment(device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """What a run depends on besides its arguments: machine, threads, versions."""
    info = collect()
    cpu = info["cpu"]["name"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {
        "device": f"{device.type} ({name})",
        "cores": info["threads"]["cores this process may use"],
        "processes": ranks.world_size,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "effkernels": effkernels.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
