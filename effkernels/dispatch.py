"""The one rule that decides which implementation of an op runs.

Every op ``effkernels::<op>`` is one PyTorch dispatcher op. Its kernel, registered here for every
device, asks :func:`select` for the first backend that can run the call and hands the tensors to
it. The choice is made when the op executes, so a compiled or exported graph is free of it.

Backends
--------
``reference``
    Plain PyTorch, the definition of correct. Always available.
``native``
    Compiled C++ on the CPU (portable, AVX2+FMA, AVX-512F, NEON), CUDA C++ on NVIDIA GPUs.
``triton``
    Triton kernels on NVIDIA GPUs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cuda, triton

__all__ = ["Backend", "BackendUnavailable", "backends", "use_backend"]

logger = logging.getLogger("effkernels")

BACKENDS = ("native", "triton", "reference")
CHOICES = (*BACKENDS, "auto")

# Order per device type; the first backend that can run a call runs it. CPU, measured: the native
# kernels beat the reference on every layer of EfficientNet-B0 (see the README's table).
AUTO_ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}
DEFAULT_ORDER = ("reference",)

_choice: ContextVar[str | None] = ContextVar("effkernels_backend", default=None)
# The same for torch.compile, which in 2.10 and 2.11 cannot read a ContextVar: it compiles anew when
# this changes. Threads that ask for different backends at once may see each other's here.
_compiled_choice: str | None = None
_logged: set[tuple[str, str, str]] = set()


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why."""


@dataclass(frozen=True)
class Backend:
    """Whether a backend can be used in this process, and why (not)."""

    available: bool
    reason: str


@dataclass(frozen=True)
class Implementation:
    """One backend's version of an op.

    ``can_run`` takes the op's arguments and returns None, or the reason why it cannot run them.
    ``run`` takes the same arguments and returns the op's outputs.
    """

    can_run: Callable[..., str | None]
    run: Callable[..., Any]
    # Gradient kernels, called as :func:`define` says; None: the op's own formula serves.
    backward: Callable[..., Any] | None = None
    # (arguments, gradients) -> whether they are for this call; None: for every one.
    differentiates: Callable[..., bool] | None = None

    def has_gradients(self, arguments: Sequence[Any], gradients: Sequence[Tensor | None]) -> bool:
        """Whether gradient kernels serve this call."""
        if self.backward is None:
            return False
        return self.differentiates is None or self.differentiates(arguments, gradients)


@dataclass
class Operator:
    """An op's whole declaration: schema, shape rule, reference, gradient and implementations."""

    name: str
    overload: torch._ops.OpOverload
    shape_rule: Callable[..., Any]  # (arguments) -> outputs of the right shapes, not computed
    implementations: dict[str, Implementation] = field(default_factory=dict)
    cuda: Implementation | None = None  # the native backend's on a GPU

    def implementation(self, backend: str, arguments: Sequence[Any]) -> Implementation | None:
        """What ``backend`` has for a call with these arguments."""
        if backend == "native" and cuda.takes(arguments[0]):
            return self.cuda
        return self.implementations.get(backend)


operators: dict[str, Operator] = {}
_library = torch.library.Library("effkernels", "DEF")


def _check_choice(choice: str, source: str) -> str:
    if choice not in CHOICES:
        accepted = ", ".join(repr(name) for name in CHOICES)
        raise ValueError(f"{source}: unknown backend {choice!r}; accepted are {accepted}")
    return choice


def requested() -> str:
    """The backend asked for by `use_backend`, else by EFFKERNELS_BACKEND, else ``"auto"``."""
    choice = _compiled_choice if torch.compiler.is_dynamo_compiling() else _choice.get()
    if choice is not None:
        return choice
    environment = os.environ.get("EFFKERNELS_BACKEND")
    return _check_choice(environment, "EFFKERNELS_BACKEND") if environment else "auto"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` block on one backend.

    Args:
        name: ``"native"``, ``"triton"``, ``"reference"`` or ``"auto"`` (the default rule).

    Raises:
        ValueError: for another name.
        BackendUnavailable: from an op inside the block that this backend cannot run.
    """
    global _compiled_choice
    token, before = _choice.set(_check_choice(name, "use_backend")), _compiled_choice
    _compiled_choice = name
    try:
        yield
    finally:
        _choice.reset(token)
        _compiled_choice = before


def _native_status() -> Backend:
    from . import native

    cpu, gpu = native.load_error(), cuda.load_error()
    on_gpu = gpu or "CUDA kernels loaded"
    if cpu is not None:
        return Backend(gpu is None, f"{cpu}; {on_gpu}")
    return Backend(True, f"CPU kernels loaded, instruction set {native.cpu_isa()}; {on_gpu}")


def backends() -> dict[str, Backend]:
    """Every backend with whether it can be used in this process and the reason."""
    return {
        "native": _native_status(),
        "triton": Backend(*triton.status()),
        "reference": Backend(True, "plain PyTorch"),
    }


def select(operator: Operator, arguments: tuple[Any, ...]) -> Implementation:
    """The implementation that runs this call.

    Raises:
        BackendUnavailable: if a backend was asked for by name and cannot run the call.
    """
    choice = requested()
    for name in backends_for(arguments[0], operator.name):
        reason = _why_not(operator, name, arguments)
        if reason is None:
            found = operator.implementation(name, arguments)
            assert found is not None
            return found
        if choice != "auto":
            raise BackendUnavailable(f"{operator.name}: backend {choice!r} cannot run: {reason}")
        _log_once(operator.name, name, reason)
    raise AssertionError("the reference backend runs every call")


def backends_for(input: Tensor, op: str | None = None) -> tuple[str, ...]:
    """The backends that may run ``op`` (None: whole networks) on ``input``, in the order that they
    are asked in."""
    choice = requested()
    if choice != "auto":
        return (choice,)
    if op in cuda.BEFORE_TRITON and input.device.type == "cuda":
        return ("native", "triton", "reference")
    return AUTO_ORDER.get(input.device.type, DEFAULT_ORDER)


def runs_on(op: str, backend: str, input: Tensor) -> bool:
    """Whether ``op`` of ``input`` runs on ``backend`` here, as far as ``input`` decides."""
    for name in backends_for(input, op):
        if _why_not(operators[op], name, (input,)) is None:
            return name == backend
    return False


def _why_not(operator: Operator, backend: str, arguments: tuple[Any, ...]) -> str | None:
    implementation = operator.implementation(backend, arguments)
    if implementation is None:
        on_gpu = " on GPUs" if backend == "native" and cuda.takes(arguments[0]) else ""
        return f"no {backend} implementation{on_gpu}"
    return implementation.can_run(*arguments)


def _log_once(op: str, backend: str, reason: str) -> None:
    key = (op, backend, reason)
    if key not in _logged:
        _logged.add(key)
        logger.info("%s: skipping backend %s: %s", op, backend, reason)


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    native: Implementation | None,
    backward: Callable[..., Any] | None = None,
    saves: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Declare ``effkernels::<name>`` and return what calls it.

    The Triton implementation and its backward are the functions ``<name>`` and ``<name>_backward``
    of ``effkernels/triton/<op>.py``; those in CUDA C++, of ``effkernels/cuda/<op>.py``.

    Args:
        name: the op's one name.
        schema: argument and result types in PyTorch's schema language; no defaults.
        reference: the op in plain, differentiable PyTorch.
        fake: the shape rule, called with fake tensors, and with real ones for empty outputs.
        native: the compiled implementation on a CPU, None if there is none.
        backward: the gradient formula ``(arguments, needed, saved, gradients) -> tuple``, or None
            to differentiate ``reference`` (recomputing it in the backward pass). ``saved`` are the
            outputs that ``saves`` names; NotImplemented as a result means the same as None.
        saves: which outputs the backward pass is given.
    """
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.effkernels, name).default
    operator = Operator(name, overload, fake)
    operator.implementations["reference"] = Implementation(lambda *_: None, reference)
    if native is not None:
        operator.implementations["native"] = native
    operator.implementations["triton"] = Implementation(
        triton.can_run, triton.function(name), triton.function(name, f"{name}_backward")
    )
    operator.cuda = cuda.implementation(name, Implementation)
    operators[name] = operator

    def kernel(*arguments: Any) -> Any:
        return select(operator, arguments).run(*arguments)

    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"effkernels::{name}", fake, lib=_library)
    torch.library.register_autograd(
        f"effkernels::{name}",
        _make_backward(operator, reference, backward, _define_backward(name, schema)),
        setup_context=_make_setup_context(saves),
        lib=_library,
    )
    return _make_call(operator, reference)


def _make_call(operator: Operator, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The dispatcher op, or under torch.func's transforms its formula, which they see through.

    An op with ``register_autograd`` they refuse (grad), and in forward mode PyTorch 2.14 takes its
    derivative for zero without a word.
    """
    overload = operator.overload

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not _is_transformed():
            return overload(*arguments)
        choice = requested()
        reason = "torch.func's transforms and forward-mode derivatives need plain PyTorch"
        if choice not in ("auto", "reference"):
            raise BackendUnavailable(f"{operator.name}: backend {choice!r} cannot run: {reason}")
        if choice == "auto":
            for name in backends_for(arguments[0], operator.name)[:-1]:
                _log_once(operator.name, name, reason)
        return reference(*arguments)

    return call


def _is_transformed() -> bool:
    """Inside of a torch.func transform, or where forward-mode derivatives are computed."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _define_backward(name: str, schema: str) -> torch._ops.OpOverload:
    """``effkernels::<name>_backward``, a backend's own gradient kernels as one opaque op.

    It takes the gradients of the outputs, the saved outputs, the op's arguments and which of them
    need a gradient, and gives those gradients, each laid out like its argument.
    """
    arguments = schema[1 : schema.index(") ->")]
    backward = f"{name}_backward"
    _library.define(
        f"{backward}(Tensor?[] gradients, Tensor[] saved, bool[] needed, {arguments}) -> Tensor[]",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def kernel(
        gradients: list[Tensor | None], saved: list[Tensor], needed: list[bool], *arguments: Any
    ) -> list[Tensor]:
        formula = select(operators[name], arguments).backward
        assert formula is not None
        results = formula(list(arguments), needed, tuple(saved), tuple(gradients))
        return [
            _laid_out_like(argument, result)
            for argument, result, need in zip(arguments, results, needed, strict=True)
            if need
        ]

    def fake(
        gradients: list[Tensor | None], saved: list[Tensor], needed: list[bool], *arguments: Any
    ) -> list[Tensor]:
        return [torch.empty_like(a) for a, need in zip(arguments, needed, strict=True) if need]

    _library.impl(backward, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"effkernels::{backward}", fake, lib=_library)
    return getattr(torch.ops.effkernels, backward).default


def _laid_out_like(argument: Tensor, result: Tensor | None) -> Tensor:
    if result is None:  # no output that got a gradient depends on it
        return torch.zeros_like(argument)
    if result.dtype == argument.dtype:
        if result.is_contiguous() and result.stride() == argument.stride():
            return result  # most weights, without making a tensor to find out
        if result.stride() == torch.empty_like(argument, device="meta").stride():
            return result
    return torch.empty_like(argument).copy_(result)


def _make_setup_context(saves: tuple[int, ...]) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.save_for_backward(*tensors, *(outputs[index] for index in saves))
        ctx.constants = [None if isinstance(value, Tensor) else (value,) for value in inputs]
        ctx.choice = requested()  # CUDA's backward passes run in threads of their own
        ctx.set_materialize_grads(False)

    return setup_context


def _make_backward(
    operator: Operator,
    reference: Callable[..., Any],
    formula: Callable[..., Any] | None,
    opaque: torch._ops.OpOverload,
) -> Any:
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        arguments = [
            next(tensors) if constant is None else constant[0] for constant in ctx.constants
        ]
        saved = tuple(tensors)
        needed = list(ctx.needs_input_grad)
        # A double backward goes through what can be differentiated once more.
        if not torch.is_grad_enabled() and any(needed):
            with use_backend(ctx.choice):
                if select(operator, tuple(arguments)).has_gradients(arguments, gradients):
                    results = iter(opaque(list(gradients), list(saved), needed, *arguments))
                    return tuple(next(results) if need else None for need in needed)
        if formula is not None:
            result = formula(arguments, needed, saved, gradients)
            if result is not NotImplemented:
                return result
        return _differentiate(reference, arguments, needed, gradients)

    return backward


def _differentiate(
    reference: Callable[..., Any],
    arguments: list[Any],
    needed: list[bool],
    gradients: tuple[Tensor | None, ...],
) -> tuple[Any, ...]:
    """Gradients of ``reference`` at ``arguments``, by running it again under autograd."""
    create_graph = torch.is_grad_enabled()  # a double backward is being recorded
    with torch.enable_grad():
        inputs = list(arguments)
        for index, need in enumerate(needed):
            if need:
                tensor = inputs[index]
                # A view keeps the graph for a double backward; a leaf is cheaper without one.
                inputs[index] = (
                    tensor.view_as(tensor) if create_graph else tensor.detach().requires_grad_()
                )
        outputs = reference(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
        if not pairs or not wanted:
            return (None,) * len(arguments)
        results = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                wanted,
                [gradient for _, gradient in pairs],
                allow_unused=True,
                create_graph=create_graph,
            )
        )
    return tuple(next(results) if need else None for need in needed)
