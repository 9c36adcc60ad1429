"""Fused kernels for EfficientNet-style networks, as drop-in PyTorch modules."""

from . import ops
from .cache import clear_cache
from .dispatch import Backend, BackendUnavailable, backends, use_backend

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BackendUnavailable",
    "backends",
    "clear_cache",
    "ops",
    "use_backend",
]
