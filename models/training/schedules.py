"""Optimizers with their usual settings, and learning rates over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .config import TrainConfig
from .layers import layers

# Of RMSprop and SGD per 256 pictures of a step: 0.016 is the released EfficientNet code's
# (tensorflow/tpu, efficientnet/main.py; 0.256 at the paper's 4096), 0.1 that of Goyal et al., 2017.
LEARNING_RATES = {"sgd": 0.1, "rmsprop": 0.016, "adam": 1e-3, "adamw": 1e-3}
SCALED_WITH_BATCH = ("sgd", "rmsprop")
WEIGHT_DECAYS = {"sgd": 1e-4, "rmsprop": 1e-5, "adam": 0.0, "adamw": 1e-2}
# The paper's, section 5.2, and the released code's epsilon. TensorFlow adds it inside the square
# root and starts the mean square from 1, PyTorch outside and from 0.
RMSPROP_ALPHA, RMSPROP_EPS = 0.9, 1e-3


def learning_rate(config: TrainConfig, pictures: int) -> float:
    """The peak learning rate for steps over so many pictures."""
    if config.lr is not None:
        return config.lr
    scale = pictures / 256 if config.optimizer in SCALED_WITH_BATCH else 1.0
    return LEARNING_RATES[config.optimizer] * scale


def build_optimizer(config: TrainConfig, model: nn.Module, pictures: int) -> Optimizer:
    """The optimizer of ``model``'s parameters; weight decay only for weights, not for vectors.

    With a ``layer_decay`` there are such groups for each layer, those of the head first.

    Args:
        config: names it and its settings.
        model: whose parameters it has.
        pictures: of one step, in all processes.
    """
    decay = config.weight_decay
    decay = WEIGHT_DECAYS[config.optimizer] if decay is None else decay
    lr = learning_rate(config, pictures)
    parts = [list(model.parameters())]
    if config.layer_decay != 1.0:
        parts = [layer.parameters for layer in reversed(layers(model))]
    groups: list[dict[str, Any]] = []
    for distance, part in enumerate(parts):
        trained = [parameter for parameter in part if parameter.requires_grad]
        weights = [p for p in trained if p.ndim > 1]
        vectors = [p for p in trained if p.ndim <= 1]
        for parameters, own_decay in ((weights, decay), (vectors, 0.0)):
            own_lr = lr * config.layer_decay**distance
            groups.append({"params": parameters, "weight_decay": own_decay, "lr": own_lr})
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(
            groups, lr, alpha=RMSPROP_ALPHA, eps=RMSPROP_EPS, momentum=config.momentum
        )
    return torch.optim.SGD(groups, lr, momentum=config.momentum, nesterov=config.nesterov)


def schedule(config: TrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """What the peak learning rate is multiplied by at step 0, 1, ...

    Over W warm-up steps (s + 1) / W. Then, for T steps in all, ``"cosine"`` is
    (1 + cos(π (s - W) / (T - W))) / 2 (Loshchilov & Hutter, 2017); ``"step"`` is
    decay_rate^⌊s / (decay_epochs in steps)⌋, warm-up counted in, as in the released EfficientNet
    code; ``"constant"`` is 1. A function of the step alone, so nothing is lost by an interruption.
    """
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "cosine":
            progress = (step - warmup) / max(total - warmup, 1)
            return (1.0 + math.cos(math.pi * min(progress, 1.0))) / 2.0
        if config.schedule == "step":
            # A whole multiple of decay_epochs may come out a hair below it.
            periods = step / (config.decay_epochs * steps_per_epoch)
            return config.decay_rate ** math.floor(periods + 1e-9)
        return 1.0

    return factor
