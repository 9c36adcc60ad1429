"""Fused kernels for EfficientNet-style networks, as drop-in PyTorch modules."""

import importlib
from typing import TYPE_CHECKING, Any

from . import ops
from .accelerate import accelerate, restore
from .cache import clear_cache
from .dispatch import Backend, BackendUnavailable, backends, use_backend
from .explain import Report, explain
from .freeze import Frozen, freeze
from .modules import (
    BatchNormAct2d,
    ConvNormAct,
    DepthwiseSeparableConv,
    FusedMBConv,
    MBConv,
    SiLU,
    SqueezeExcite,
)

if TYPE_CHECKING:
    from . import models

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BackendUnavailable",
    "BatchNormAct2d",
    "ConvNormAct",
    "DepthwiseSeparableConv",
    "Frozen",
    "FusedMBConv",
    "MBConv",
    "Report",
    "SiLU",
    "SqueezeExcite",
    "accelerate",
    "backends",
    "clear_cache",
    "explain",
    "freeze",
    "models",
    "ops",
    "restore",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "models":  # on first use: `import effkernels` stays quick
        return importlib.import_module(".models", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
