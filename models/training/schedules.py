"""Optimizers with their usual settings, and learning rates over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from .config import TrainConfig

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

    Args:
        config: names it and its settings.
        model: whose parameters it has.
        pictures: of one step, in all processes.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = config.weight_decay
    decay = WEIGHT_DECAYS[config.optimizer] if decay is None else decay
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    lr = learning_rate(config, pictures)
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
