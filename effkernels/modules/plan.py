"""Forward passes kept ready between calls.

Finding out what a block's children are, checking and packing their tensors costs ten times the
call itself: more than a millisecond per EfficientNet-B0 image, against five of arithmetic. A
:class:`Plan` keeps the recorded forward pass (:mod:`effkernels.program`), and before every later
call makes sure that nothing which led to it has changed: children, parameters and their contents,
modes, hooks (:mod:`effkernels.modules.snapshot`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import generation, may_be_gathered
from ..dispatch import requested
from ..kernels import kernels_for
from ..program import Replay
from ..record import record
from .hooks import has_global_hooks
from .snapshot import Entry, Snapshot

# Attributes of modules that decide what they compute and that a user may set.
_WATCHED = (
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "eps",
)
# Classes of other libraries, and this one's, decide by whatever plain attributes they have.
_PLAIN = (bool, int, float, str, tuple, type(None))
# Modules that do not look at their `training`.
_ALWAYS_THE_SAME = (
    *(nn.Conv2d, nn.Linear, nn.Sequential, nn.ModuleList, nn.Identity),
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid),
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # without gradients the others never run

_MOST_PLANS = 8  # per module; a network that sees many sizes should not collect them all


class Plan:
    """``run``, valid for as long as ``owner`` stays what it is.

    Args:
        owner: the module that ``run`` stands for, with everything in it.

    Attributes:
        run: gives the output of a call; None if ``owner`` has to run as it is.
    """

    __slots__ = ("_classes", "_generation", "_hooks", "_modules", "_snapshot", "run")

    def __init__(self, owner: nn.Module) -> None:
        self.run: Replay | None = None
        self._modules = modules = tuple(owner.modules())
        self._classes = tuple(map(type, modules))
        self._generation = generation()
        entries: list[Entry] = []
        tensors: list[Tensor] = []
        for module in modules:
            state = module.__dict__
            entries.append((state, "forward", state.get("forward")))
            entries += [(state, name, state[name]) for name in _WATCHED if name in state]
            if not type(module).__module__.startswith("torch.nn."):
                entries += [
                    (state, name, value) for name, value in state.items() if type(value) in _PLAIN
                ]
            if type(module) not in _ALWAYS_THE_SAME:
                entries.append((state, "training", module.training))
            entries += [(module._modules, *item) for item in module._modules.items()]
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if name == "num_batches_tracked":
                        continue
                    entries.append((table, name, tensor))
                    if tensor is not None:
                        tensors.append(tensor)
        # The owner's own hooks run around its forward.
        self._hooks = [m.__dict__[name] for m in modules if m is not owner for name in _HOOKS]
        children = [m._modules for m in modules if m._modules]
        self._snapshot = Snapshot(entries, children + self._hooks, tensors)

    def valid(self, owner: nn.Module) -> bool:
        """Whether ``owner`` is still what the plan was made from."""
        return (
            self._modules[0] is owner  # a shallow copy has its plans, and children of its own
            and self._generation == generation()
            and self._snapshot.holds()
            and tuple(map(type, self._modules)) == self._classes
        )

    def watched(self) -> bool:
        """Somebody wants to see a module in ``owner`` being called."""
        return any(self._hooks)


def is_observed(input: Tensor) -> bool:
    """Somebody watches, traces or transforms this call."""
    return (
        type(input) is not Tensor
        or torch.is_autocast_enabled(input.device.type)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _trackable(module: nn.Module) -> bool:
    """Every change of ``module``'s tensors would be seen."""
    tensors = (*module.parameters(), *module.buffers())
    return not may_be_gathered(tensors) and all(
        type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference() for tensor in tensors
    )


class Planned(nn.Module):
    """A module that keeps plans for its calls, one per input shape. Copies leave them behind."""

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_plans", None)
        return state

    def planned(self, body: Callable[[Tensor], Any], input: Tensor) -> Any:
        """``body(input)``, by a plan where that is safe.

        Args:
            body: a method of this module; reads nothing but ``input`` and the module.
        """
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or kernels_for(input) is None
            or is_observed(input)
            or has_global_hooks()
        ):
            return body(input)
        plans: dict[Hashable, Plan] = self.__dict__.setdefault("_plans", {})
        kind = input.shape[1:], input.dtype, input.device
        key = (body.__func__, *kind, requested())  # type: ignore[attr-defined]
        exact = (key, input.shape[0])
        plan = plans.get(key) or plans.get(exact)
        if plan is not None and plan.valid(self):
            return body(input) if plan.run is None else plan.run(input)
        # Made before the forward pass: a change during it is seen.
        if not _trackable(self):
            return body(input)
        plan = Plan(self)
        if plan.watched():
            output = body(input)
        else:
            pure = not any(module.training for module in self.modules())
            output, plan.run = record(body, input, pure)
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plans[key if plan.run is None or plan.run.any_batch else exact] = plan
        return output
