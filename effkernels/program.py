"""A recorded forward pass, ready to run again.

Its steps are kernel calls of this library and calls of other ops. On a CPU kernel calls in a row
become one native program (csrc/bindings/program.h), a single call through Python and PyTorch's
dispatcher with all its values in one arena: a whole EfficientNet is one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .layout import nhwc

_NONE = -1
_WEIGHTS = 13  # places for weights in a step
_ALIGNMENT = 64  # bytes


class Cover(NamedTuple):
    """An op that a step stands for, for people to read."""

    op: str
    modules: tuple[str, ...]  # whose parameters it was called with, where they have names


class Kind(IntEnum):
    """Which kernel a step calls; `enum Kind` in csrc/bindings/program.cpp."""

    CONV = 0
    POINTWISE_CONV = 1
    DEPTHWISE_CONV = 2
    MBCONV = 3
    SQUEEZE_EXCITE = 4
    SILU = 5  # of the sum, where there is a residual
    BATCH_NORM_ACT = 6
    COPY = 7  # channels of the input to channels of the output; geometry: from, to, how many


@dataclass(eq=False)
class Value:
    """A tensor that depends on the input; with ``base``, that one in another shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    base: Value | None = None

    def of(self, root: Tensor) -> Tensor:
        """This value, from the tensor of its root."""
        return root.reshape(root.shape[0], *self.shape[1:])

    def root(self) -> Value:
        return self if self.base is None else self.base.root()

    def images(self) -> tuple[int, int, int]:
        """Height, width and channels as the kernels see it; [N, C] are images of one pixel."""
        if len(self.shape) == 2:
            return 1, 1, self.shape[1]
        return self.shape[2], self.shape[3], self.shape[1]


@dataclass(eq=False)
class Step:
    """A kernel call."""

    kind: Kind
    input: Value
    output: Value
    weights: tuple[Tensor | None, ...]
    activations: list[int]
    geometry: list[int] = field(default_factory=lambda: [1, 1, 1, 1, 1, 1, 0, 0])
    residual: Value | None = None
    mean: Value | None = None
    planar: bool = False  # the input is NCHW
    source: Tensor | None = None  # a pointwise convolution's weight as it was given, [K, C, 1, 1]
    covers: list[Cover] = field(default_factory=list)

    def reads(self) -> list[Value]:
        return [value.root() for value in (self.input, self.residual) if value is not None]

    def writes(self) -> list[Value]:
        return [self.output] if self.mean is None else [self.output, self.mean]


@dataclass(eq=False)
class Call:
    """Any other op: its arguments with values in the place of tensors."""

    function: Any
    arguments: Any  # (args, kwargs)
    outputs: list[Value | None]  # flattened
    read: list[Value]
    covers: list[Cover] = field(default_factory=list)

    def reads(self) -> list[Value]:
        return [value.root() for value in self.read]

    def writes(self) -> list[Value]:
        return [value for value in self.outputs if value is not None]


class Replay:
    """The recorded steps, ready to run: native programs, and calls of other ops between them.

    Attributes:
        steps: what it does, in order.
        program: what makes steps in a row into one call; the backend's own.
        any_batch: inputs may have another batch size than the recorded one.
    """

    def __init__(
        self,
        input: Value,
        steps: Sequence[Step | Call],
        outputs: Sequence[Value],
        structure: Any,
        program: type[Any],
    ) -> None:
        self.steps = steps
        self.program = program
        self._input = input
        self._outputs = outputs
        self._structure = structure
        self._parts: list[Any] = []  # Call, or what `program` made
        wanted = {output.root() for output in outputs}
        for part in reversed(_parts(steps)):
            if isinstance(part, Call):
                self._parts.append(part)
                wanted.update(part.reads())
            else:
                program = self.program(part, wanted)
                self._parts.append(program)
                wanted.update(program.inputs)
        self._parts.reverse()
        self.any_batch = not any(isinstance(part, Call) for part in self._parts)
        self._plain = self.any_batch and len(self._parts) == 1 and structure.is_leaf()

    def __call__(self, input: Tensor) -> Any:
        if not self._plain:
            return self._run_parts(input)
        program, (output,) = self._parts[0], self._outputs
        (result,) = program([input])
        return result if output.base is None else output.of(result)

    def _run_parts(self, input: Tensor) -> Any:
        tensors: dict[Value, Tensor] = {self._input: input}

        def tensor(value: Any) -> Any:
            if not isinstance(value, Value):
                return value
            found = tensors[value.root()]
            return found if value.base is None else value.of(found)

        for part in self._parts:
            if not isinstance(part, Call):
                results = part([tensors[value] for value in part.inputs])
                tensors.update(zip(part.outputs, results, strict=True))
                continue
            args, kwargs = tree_map(tensor, part.arguments)
            leaves, _ = tree_flatten(part.function(*args, **kwargs))
            for value, leaf in zip(part.outputs, leaves, strict=True):
                if value is not None:
                    tensors[value] = leaf
        return tree_unflatten([tensor(value) for value in self._outputs], self._structure)


class Program:
    """Steps in a row as one native call; :mod:`effkernels.triton.program` has its like for GPUs.

    Args:
        steps: at least one, of one dtype.
        wanted: values that somebody needs afterwards.
    """

    def __init__(self, steps: Sequence[Step], wanted: set[Value]) -> None:
        self.inputs = inputs_of(steps)
        # A value is planar for all steps or for none.
        hidden = {value for step in steps if not step.planar for value in step.reads()}
        for step in steps:
            step.planar = step.planar and step.input not in hidden and step.input in self.inputs
        self._planar = [
            value not in hidden and any(step.planar and step.input is value for step in steps)
            for value in self.inputs
        ]
        self.outputs = outputs_of(steps, wanted)
        external = [*self.inputs, *self.outputs]
        places = {value: -1 - index for index, value in enumerate(external)}
        places.update(_arena(steps, set(external)))

        numbers = {value: index for index, value in enumerate(places)}
        weights: list[Tensor] = []

        def number(value: Value | None) -> int:
            return _NONE if value is None else numbers[value.root()]

        def weight(tensor: Tensor | None) -> int:
            if tensor is None:
                return _NONE
            weights.append(tensor)
            return len(weights) - 1

        code: list[int] = []
        for step in steps:
            code += [step.kind, number(step.input), number(step.residual)]
            code += [number(step.output), number(step.mean), int(step.planar)]
            code += step.geometry
            code += step.activations + [0] * (4 - len(step.activations))
            indices = [weight(tensor) for tensor in step.weights]
            code += indices + [_NONE] * (_WEIGHTS - len(indices))
        self._handle = torch.ops.effkernels_cpu.program_create(
            [n for value, place in places.items() for n in (*value.images(), place)],
            code,
            weights,
            steps[0].input.dtype == torch.bfloat16,
        )
        free = torch.ops.effkernels_cpu.program_free
        weakref.finalize(self, free, self._handle).atexit = False
        self._run = torch.ops.effkernels_cpu.program_run.default

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        tensors = [
            tensor.contiguous() if planar or tensor.dim() != 4 else nhwc(tensor)
            for tensor, planar in zip(inputs, self._planar, strict=True)
        ]
        outputs = [
            torch.empty(
                (tensors[0].shape[0], *value.shape[1:]),
                dtype=value.dtype,
                memory_format=torch.channels_last
                if len(value.shape) == 4
                else torch.contiguous_format,
            )
            for value in self.outputs
        ]
        self._run(self._handle, tensors + outputs)
        return outputs


def outputs_of(steps: Sequence[Step], wanted: set[Value]) -> list[Value]:
    """What ``steps`` write, several of them perhaps each a part, of what is ``wanted``."""
    return [v for v in dict.fromkeys(v for step in steps for v in step.writes()) if v in wanted]


def inputs_of(steps: Sequence[Step]) -> list[Value]:
    """What ``steps`` read and do not write before."""
    written: set[Value] = set()
    inputs: list[Value] = []
    for step in steps:
        for value in step.reads():
            if value not in written and value not in inputs:
                inputs.append(value)
        written.update(step.writes())
    return inputs


def _parts(steps: Sequence[Step | Call]) -> list[Call | list[Step]]:
    """Steps in a row (of one dtype and batch size) together."""
    parts: list[Call | list[Step]] = []
    for step in steps:
        if isinstance(step, Call):
            parts.append(step)
        elif parts and isinstance(parts[-1], list) and _fit(parts[-1][0], step):
            parts[-1].append(step)
        else:
            parts.append([step])
    return parts


def _fit(a: Step, b: Step) -> bool:
    return (a.input.dtype, a.input.shape[0]) == (b.input.dtype, b.input.shape[0])


def _arena(steps: Sequence[Step], external: set[Value]) -> dict[Value, int]:
    """Offsets, in values per image, that keep apart what is needed at the same time."""
    last = {value: i for i, step in enumerate(steps) for value in (*step.writes(), *step.reads())}
    unit = _ALIGNMENT // steps[0].input.dtype.itemsize
    offsets: dict[Value, int] = {}
    living: list[tuple[int, int, Value]] = []  # begin, end, sorted
    for index, step in enumerate(steps):
        living = [entry for entry in living if last[entry[2]] >= index]
        for value in step.writes():
            if value in external or value in offsets:
                continue
            height, width, channels = value.images()
            size = -(-height * width * channels // unit) * unit
            begin = 0
            for other_begin, other_end, _ in living:
                if begin + size <= other_begin:
                    break
                begin = max(begin, other_end)
            offsets[value] = begin
            living.append((begin, begin + size, value))
            living.sort(key=lambda entry: entry[:2])
    return offsets
