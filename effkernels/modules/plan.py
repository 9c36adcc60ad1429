"""A block's native call, kept ready between calls.

Finding out what a block's children are, checking and packing their tensors costs ten times the
call itself: a millisecond or two per EfficientNet-B0 image, against ten of arithmetic. A
:class:`Plan` remembers the outcome, and on every later call makes sure in a few microseconds that
nothing which led to it has changed: children, parameters and their contents, modes, hooks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..cache import generation
from ..dispatch import requested
from ..native import can_run
from .fused import has_global_hooks

# Attributes of modules that decide what a block computes and that a user may set.
_WATCHED = (
    "training",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "eps",
    "track_running_stats",
    "has_residual",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_data_ptr = torch.Tensor.data_ptr
_version = torch.Tensor._version.__get__  # type: ignore[attr-defined]


class Plan:
    """``run``, valid for as long as the block that it was made for stays what it is."""

    __slots__ = (
        "_children",
        "_classes",
        "_entries",
        "_generation",
        "_hooks",
        "_kept",
        "_modules",
        "_pointers",
        "_run",
        "_tensors",
        "_versions",
    )

    def __init__(self, block: nn.Module, run: Callable[[Tensor], Tensor | None]) -> None:
        self._run = run
        self._generation = generation()
        self._children = block._modules
        self._entries: list[tuple[dict, str, object]] = []
        self._hooks: list[dict] = []
        tensors: list[Tensor] = []
        self._modules = tuple(block.modules())
        self._classes = tuple(map(type, self._modules))
        for module in self._modules:
            state = module.__dict__
            self._entries.append((state, "forward", state.get("forward")))
            self._entries += [(state, name, state[name]) for name in _WATCHED if name in state]
            self._entries += [(module._modules, *item) for item in module._modules.items()]
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if name == "num_batches_tracked":
                        continue
                    self._entries.append((table, name, tensor))
                    if tensor is not None:
                        tensors.append(tensor)
            if module is not block:  # its own hooks run around forward
                self._hooks += [state[name] for name in _HOOKS]
        self._tensors = tuple(tensors)
        self._pointers = tuple(map(_data_ptr, tensors))
        self._versions = tuple(map(_version, tensors))
        # Keeps a replaced memory from being handed out again at the same address.
        self._kept = [tensor.untyped_storage() for tensor in tensors]

    def valid(self, block: nn.Module) -> bool:
        """Whether ``block`` is still what the plan was made from."""
        if block._modules is not self._children or self._generation != generation():
            return False
        for table, name, value in self._entries:
            if table.get(name) is not value:
                return False
        if any(self._hooks) or has_global_hooks():
            return False
        return (
            tuple(map(type, self._modules)) == self._classes
            and tuple(map(_data_ptr, self._tensors)) == self._pointers
            and tuple(map(_version, self._tensors)) == self._versions
        )

    def run(self, input: Tensor) -> Tensor | None:
        """The block's output; None if the plan is not for such an input."""
        return self._run(input)


def _plain_inference(input: Tensor) -> bool:
    """Nobody watches, differentiates, traces or transforms this call."""
    return (
        not torch.is_grad_enabled()
        and type(input) is Tensor
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def planned(block: nn.Module, input: Tensor) -> Tensor | None:
    """``block``'s output by its plan, or None if it has none that holds for this call."""
    if torch.compiler.is_compiling():
        return None
    plan: Plan | None = block.__dict__.get("_plan")
    if plan is None or not _plain_inference(input) or requested() not in ("auto", "native"):
        return None
    if not plan.valid(block):
        del block.__dict__["_plan"]
        return None
    return plan.run(input)


def keep_plan(
    block: nn.Module, input: Tensor, prepare: Callable[[], Callable[[Tensor], Tensor | None]]
) -> None:
    """Make ``block``'s plan from ``prepare()`` if a call like this one may use it again."""
    if torch.compiler.is_compiling() or not _plain_inference(input) or can_run(input) is not None:
        return
    tensors = [*block.parameters(), *block.buffers()]
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_inference() for t in tensors):
        return  # nothing would tell of a change
    block.__dict__["_plan"] = Plan(block, prepare())


class Planned(nn.Module):
    """A module whose plan is left behind by copies and pickles."""

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop("_plan", None)
        return state
