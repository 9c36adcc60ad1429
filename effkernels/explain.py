"""What runs when a network is called, and why not more of it is fused."""

from __future__ import annotations

import os.path
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .accelerate import check_model
from .freeze import Frozen
from .kernels import kernels_for, why_no_kernels
from .modules.plan import Planned
from .program import Call, Replay, Step, Value
from .record import CannotRecord, Recorder

__all__ = ["Report", "Row", "explain"]

_RUNS = 5  # of every step when it is timed; the median counts


@dataclass(frozen=True)
class Row:
    """One thing that runs."""

    module: str  # its name in the network; several share what their names begin with
    op: str
    covers: tuple[str, ...]  # the ops that it does the work of
    backend: str
    variant: str  # data type and instruction set of a kernel of this library
    why: str  # why it is not part of a kernel of this library; "" if it is
    share: float | None = None  # of the measured time, with ``profile``


@dataclass(frozen=True)
class Report:
    """What :func:`explain` found. Prints as a table."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    milliseconds: float | None = None  # of all rows, with ``profile``

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Rows, notes and milliseconds for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ["module", "op", "covers", "backend", "variant", "why not"]
        lines = [
            [row.module, row.op, " + ".join(row.covers), row.backend, row.variant, row.why]
            for row in self.rows
        ]
        if self.milliseconds is not None:
            head.append("time")
            lines = [
                [*line, f"{row.share:.1%}"] for line, row in zip(lines, self.rows, strict=True)
            ]
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        rule = ["-" * width for width in widths]
        table = [
            "  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, rule, *lines)
        ]
        if self.milliseconds is not None:
            table.append(f"{self.milliseconds:.2f} ms, every step by itself")
        return "\n".join([*table, *self.notes])


@dataclass
class _Unit:
    """A part of the network that is recorded as a whole."""

    name: str
    module: nn.Module
    input: Tensor | None = None


@dataclass
class _Findings:
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def explain(model: nn.Module, x: Tensor, profile: bool = False) -> Report:
    """What runs when ``model`` is called with ``x`` in evaluation, without gradients.

    Args:
        model: frozen, accelerated, of this library, or any other; left as it is.
        x: [N, C, H, W].
        profile: measure the time of every row, each step run by itself.

    Returns:
        A row for every kernel call and every other op or module that computes something.

    Raises:
        TypeError: if ``model`` is no module or ``x`` no tensor.
        ValueError: if ``model`` has parameters on the meta device, or quantized ones.
    """
    check_model("explain", model)
    if not isinstance(x, Tensor):
        raise TypeError(f"explain: x is {type(x).__name__}, a torch.Tensor is accepted")
    found = _Findings()
    with _evaluation(model, found), torch.no_grad():
        if isinstance(model, Frozen):
            _explain_unit(_Unit("", model.model, x), profile, found)
        elif isinstance(model, Planned):
            _explain_unit(_Unit("", model, x), profile, found)
        else:
            _explain_pieces(model, x, profile, found)
    total = sum(found.seconds)
    if not profile:
        return Report(tuple(found.rows), tuple(found.notes))
    rows = [
        replace(row, share=seconds / total if total else 0.0)
        for row, seconds in zip(found.rows, found.seconds, strict=True)
    ]
    return Report(tuple(rows), tuple(found.notes), total * 1e3)


@contextmanager
def _evaluation(model: nn.Module, found: _Findings) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    if training:
        found.notes.append("The network is in training mode; this is what runs in evaluation.")
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _explain_pieces(model: nn.Module, x: Tensor, profile: bool, found: _Findings) -> None:
    """A network whose own forward pass is left alone: its blocks one by one, and the rest."""
    found.notes.append(
        f"{type(model).__name__} is not a network that accelerate knows: what it recognises in it "
        "runs block by block. freeze(model) records all of it."
    )
    called: list[_Unit] = []
    handles = []
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        known = isinstance(module, Planned) and module is not model
        if not known and any(True for _ in module.children()):
            continue
        if known:
            inside = f"{name}."
        unit = _Unit(name, module)

        def note(_: nn.Module, args: tuple[Any, ...], unit: _Unit = unit) -> None:
            if unit.input is None and args and isinstance(args[0], Tensor):
                unit.input = args[0]
                called.append(unit)

        handles.append(module.register_forward_pre_hook(note))
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    for unit in called:
        if isinstance(unit.module, Planned):
            _explain_unit(unit, profile, found)
        elif type(unit.module) is not nn.Identity:
            _add_module(unit, "no block that accelerate recognises", profile, found)


def _add_module(unit: _Unit, why: str, profile: bool, found: _Findings) -> None:
    kind = type(unit.module).__name__
    found.rows.append(Row(unit.name, kind, (kind,), "PyTorch", "", why))
    if profile:
        found.seconds.append(_time(lambda: unit.module(unit.input)))


def _explain_unit(unit: _Unit, profile: bool, found: _Findings) -> None:
    names = {}
    for name, module in unit.module.named_modules(prefix=unit.name):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                names[id(tensor)] = name
    assert unit.input is not None
    hooked = [
        name
        for name, module in unit.module.named_modules(prefix=unit.name)
        if module is not unit.module and (module._forward_hooks or module._forward_pre_hooks)
    ]
    if hooked:
        return _add_module(unit, f"{hooked[0]} has a hook", profile, found)
    kernels = kernels_for(unit.input)
    if kernels is None:
        return _add_module(unit, why_no_kernels(unit.input), profile, found)
    recorder = Recorder(unit.input, names)
    with recorder:
        output = unit.module.forward(unit.input)  # has no plans while it is recorded
    try:
        replay = recorder.finish(output)
    except CannotRecord as error:
        return _add_module(unit, str(error), profile, found)
    dtypes = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    variant = f"{dtypes[unit.input.dtype]} {kernels.variant(unit.input)}"
    tensors: dict[Value, Tensor] = {recorder.input: unit.input}
    for step in replay.steps:
        found.rows.append(_row(step, kernels.NAME, variant, unit.name))
        if profile:
            found.seconds.append(_run(step, tensors, replay))
    return None


def _row(step: Step | Call, backend: str, variant: str, unit: str) -> Row:
    modules = list(dict.fromkeys(name for cover in step.covers for name in cover.modules))
    name = _common(modules) or unit
    covers = tuple(_short(cover.op) for cover in step.covers)
    if isinstance(step, Step):
        if covers == ("mbconv",):
            covers = _block(step)
        return Row(name, step.kind.name.lower(), covers, backend, variant, "")
    op = step.function._schema.name
    return Row(name, _short(op.partition("::")[2]), covers, *_backend(step, backend, variant))


def _block(step: Step) -> tuple[str, ...]:
    """What a block does, where one op of this library stands for all of it."""
    present = {
        "expand": step.weights[0] is not None,
        "depthwise": True,
        "squeeze_excite": step.weights[6] is not None,
        "project": True,
        "residual": step.residual is not None,
    }
    return tuple(part for part, here in present.items() if here)


def _backend(call: Call, backend: str, variant: str) -> tuple[str, str, str]:
    """Backend, variant and reason of an op that is no step of a program."""
    library, _, name = call.function._schema.name.partition("::")
    if library != "effkernels":
        return "PyTorch", "", f"no kernel does {library}::{name} here"
    return backend, variant, "its arguments depend on the input in a way that no program knows"


def _common(modules: list[str]) -> str:
    """The longest name that all of ``modules`` are or lie in."""
    if len(modules) <= 1:
        return "".join(modules)
    parts = [name.split(".") for name in modules]
    return ".".join(os.path.commonprefix(parts)) or modules[0]


def _short(op: str) -> str:
    """An op's name as people say it."""
    return {"native_batch_norm": "batch_norm", "addmm": "linear"}.get(op, op).rstrip("_")


def _run(step: Step | Call, tensors: dict[Value, Tensor], replay: Replay) -> float:
    """Seconds that ``step`` takes; what it writes is added to ``tensors``."""

    def tensor(value: Any) -> Any:
        if not isinstance(value, Value):
            return value
        root = tensors[value.root()]
        return root if value.base is None else value.of(root)

    if isinstance(step, Call):
        args, kwargs = tree_map(tensor, step.arguments)
        leaves, _ = tree_flatten(step.function(*args, **kwargs))
        tensors.update((v, leaf) for v, leaf in zip(step.outputs, leaves, strict=True) if v)
        return _time(lambda: step.function(*args, **kwargs))
    # Copies into one value are a value together.
    together = [s for s in replay.steps if isinstance(s, Step) and s.output is step.output]
    program = replay.program(together, set(step.writes()))
    inputs = [tensors[value] for value in program.inputs]
    tensors.update(zip(program.outputs, program(inputs), strict=True))
    return _time(lambda: program(inputs)) / len(together)


def _time(function: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(_RUNS):
        _synchronize()
        start = time.perf_counter()
        function()
        _synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
