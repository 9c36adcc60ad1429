"""Whether somebody wants to see a module being called."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as _nn_module


def is_untouched(module: nn.Module) -> bool:
    """Calling ``module`` would do what its class says and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def has_global_hooks() -> bool:
    """Some hook wants to see every module call of this process."""
    return bool(
        _nn_module._global_forward_hooks
        or _nn_module._global_forward_pre_hooks
        or _nn_module._global_backward_hooks
        or _nn_module._global_backward_pre_hooks
    )
