"""Native calls kept ready between calls.

Finding out what a block's children are, checking and packing their tensors costs ten times the
call itself: more than a millisecond per EfficientNet-B0 image, against ten of arithmetic. A
:class:`Plan` remembers the outcome, and before every later call makes sure that nothing which led
to it has changed: children, parameters and their contents, modes, hooks. That takes about 5 µs, and
40 µs when the kernels in between have swept Python's data out of the caches, so the check runs in
C loops over few, dense tuples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import generation
from ..dispatch import requested
from ..native import can_run
from .hooks import has_global_hooks, is_untouched

# Attributes of modules that decide what they compute and that a user may set.
_WATCHED = (
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "eps",
    "has_residual",
    "drop_path",
    "drop_rate",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # without gradients the others never run

_METHODS = ("forward", "prepare")
_MOST_PLANS = 8  # per module; a network that sees many sizes should not collect them all

_data_ptr = torch.Tensor.data_ptr
_version = torch.Tensor._version.__get__  # type: ignore[attr-defined]

Run = Callable[[Tensor], Tensor]


class Plan:
    """``run``, valid for as long as ``owner`` stays what it is.

    Args:
        owner: the module that ``run`` stands for, with everything in it.
        run: gives the output of a call; None if ``owner`` has no such function.
    """

    __slots__ = (
        "_children",
        "_classes",
        "_counts",
        "_generation",
        "_hooks",
        "_kept",
        "_names",
        "_pointers",
        "_tables",
        "_tensors",
        "_values",
        "_versions",
        "_modules",
        "run",
    )

    def __init__(self, owner: nn.Module, run: Run | None) -> None:
        self.run = run
        self._modules = modules = tuple(owner.modules())
        self._classes = tuple(map(type, modules))
        self._generation = generation()
        self._children = tuple(m._modules for m in modules if m._modules)
        self._counts = tuple(map(len, self._children))
        entries: list[tuple[dict[str, Any], str, Any]] = []
        tensors: list[Tensor] = []
        for module in modules:
            state = module.__dict__
            entries.append((state, "forward", state.get("forward")))
            entries += [(state, name, state[name]) for name in _WATCHED if name in state]
            if isinstance(module, (nn.BatchNorm2d, Planned)):  # statistics, dropout
                entries.append((state, "training", module.training))
            entries += [(module._modules, *item) for item in module._modules.items()]
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if name == "num_batches_tracked":
                        continue
                    entries.append((table, name, tensor))
                    if tensor is not None:
                        tensors.append(tensor)
        self._tables, self._names, self._values = zip(*entries, strict=True)
        # The owner's own hooks run around its forward.
        self._hooks = tuple(m.__dict__[name] for m in modules if m is not owner for name in _HOOKS)
        self._tensors = tuple(tensors)
        self._pointers = tuple(map(_data_ptr, tensors))
        self._versions = tuple(map(_version, tensors))
        # Keeps a replaced memory from being handed out again at the same address.
        self._kept = tuple(tensor.untyped_storage() for tensor in tensors)

    def valid(self, owner: nn.Module) -> bool:
        """Whether ``owner`` is still what the plan was made from."""
        return (
            self._modules[0] is owner  # a shallow copy has its plans, and children of its own
            and self._generation == generation()
            and tuple(map(len, self._children)) == self._counts
            and all(map(is_, map(dict.get, self._tables, self._names), self._values))
            and tuple(map(_version, self._tensors)) == self._versions
            and tuple(map(_data_ptr, self._tensors)) == self._pointers
            and not any(self._hooks)
            and tuple(map(type, self._modules)) == self._classes
            and not has_global_hooks()
        )


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


def _trackable(module: nn.Module) -> bool:
    """Every change of ``module``'s tensors would be seen."""
    return all(
        type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()
        for tensor in (*module.parameters(), *module.buffers())
    )


class Planned(nn.Module):
    """A module that keeps plans for its calls, one per input shape. Copies leave them behind."""

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_plans", None)
        return state

    def prepare(self, example: Tensor) -> Run | None:
        """The module's function for inputs like ``example``, as it is now.

        Called in plain inference only. None if it cannot be had without calling child modules.
        """
        raise NotImplementedError

    def planned(self, input: Tensor) -> Tensor | None:
        """The output by a plan, made if there is none yet; None if the call needs another way."""
        if (
            torch.compiler.is_compiling()
            or not _plain_inference(input)
            or requested() not in ("auto", "native")
        ):
            return None
        plans: dict[Hashable, Plan] = self.__dict__.setdefault("_plans", {})
        key = (input.shape[1:], input.dtype, input.device)
        plan = plans.get(key)
        if plan is None or not plan.valid(self):
            if can_run(input) is not None or not _trackable(self):
                return None
            if len(plans) >= _MOST_PLANS:
                plans.clear()
            plan = plans[key] = Plan(self, None if has_global_hooks() else self.prepare(input))
        return None if plan.run is None else plan.run(input)


def prepare_block(block: nn.Module, example: Tensor) -> Run | None:
    """``block.prepare``, if calling ``block`` would do that and nothing else."""
    if not isinstance(block, Planned) or not is_untouched(block):
        return None
    # A subclass with a forward of its own has not said how to prepare it.
    first = {name: next(c for c in type(block).__mro__ if name in vars(c)) for name in _METHODS}
    return block.prepare(example) if first["forward"] is first["prepare"] else None


def prepare_chain(makers: Sequence[Callable[[Tensor], Run | None]], example: Tensor) -> Run | None:
    """One function after the other, each prepared for what the one before gives; None if one is."""
    runs = []
    for make in makers:
        run = make(example)
        if run is None:
            return None
        runs.append(run)
        example = run(example)

    def chain(input: Tensor) -> Tensor:
        for run in runs:
            input = run(input)
        return input

    return chain
