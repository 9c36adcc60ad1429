"""A forward pass recorded once and replayed as few calls.

While a :class:`Recorder` is active every op that the forward pass reaches PyTorch's dispatcher
with is noted: what it was called with, and what came out. Ops of this library that ran on the
compiled CPU kernels become the steps of native programs (csrc/bindings/program.h): a whole
EfficientNet is one call, its values in one arena. Other ops are called again as they were.

A replay is right for inputs of the recorded shape and dtype, as long as nothing changes that the
forward pass read: :mod:`effkernels.modules.plan` watches that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from . import native
from .dispatch import operators, select
from .layout import nhwc

aten = torch.ops.aten

# The order of `enum Kind` in csrc/bindings/program.cpp.
_CONV, _POINTWISE_CONV, _DEPTHWISE_CONV, _MBCONV, _SQUEEZE_EXCITE, _SILU = range(6)
_NONE = -1
_WEIGHTS = 13  # places for weights in a step
_ALIGNMENT = 64  # bytes

# In-place activations of PyTorch, and those that are not, as this library calls them.
_ACTIVATIONS = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.silu.default: "silu",
    aten.silu_.default: "silu",
    aten.hardswish.default: "hard_swish",
    aten.hardswish_.default: "hard_swish",
    aten.hardsigmoid.default: "hard_sigmoid",
    aten.sigmoid.default: "sigmoid",
}
_RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.alias.default,
    aten.detach.default,
)


class CannotRecord(Exception):
    """The forward pass does something that a replay would not repeat."""


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

    kind: int
    input: Value
    output: Value
    weights: tuple[Tensor | None, ...]
    activations: list[int]
    geometry: list[int] = field(default_factory=lambda: [1, 1, 1, 1, 1, 1, 0, 0])
    residual: Value | None = None
    mean: Value | None = None
    planar: bool = False  # the input is NCHW

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

    def reads(self) -> list[Value]:
        return [value.root() for value in self.read]

    def writes(self) -> list[Value]:
        return [value for value in self.outputs if value is not None]


def record(function: Callable[[Tensor], Any], input: Tensor) -> tuple[Any, Replay | None]:
    """``function(input)`` and how to repeat it; None where a replay might differ.

    Args:
        function: of one tensor; its result may be a tensor, or a list or tuple of them.
        input: [N, ...], in plain inference (no gradients, no autocast).
    """
    recorder = Recorder(input)
    with recorder:
        output = function(input)
    try:
        replay = recorder.finish(output)
    except CannotRecord:
        return output, None
    return replay(input), replay  # not `output`: the first call must not differ in its last bits


class _Notes:
    """The ops of one forward pass on ``input``.

    Apart from :class:`Recorder` because TorchDispatchMode wraps what its subclasses define, to hide
    it from torch.compile, and the first call through that wrapper imports the compiler: a second.
    """

    def __init__(self, input: Tensor) -> None:
        self.steps: list[Step | Call] = []
        self.input = Value(tuple(input.shape), input.dtype)
        self._values: dict[int, Value] = {id(input): self.input}
        self._kept = [input]  # ids are only good while their tensors live
        self._names = {input.untyped_storage()._cdata: {id(input)}}  # tensors of a storage
        self._reason: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._reason is None:
            try:
                self._note(func, args, kwargs, result)
            except CannotRecord as error:
                self._reason = str(error)
        return result

    def finish(self, output: Any) -> Replay:
        """How to get ``output``, the result of the forward pass, for another input."""
        if self._reason is not None:
            raise CannotRecord(self._reason)
        leaves, structure = tree_flatten(output)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise CannotRecord("the output is more than tensors")
        values = []
        for leaf in leaves:
            value = self._find(leaf)
            if value is None or value.root() is self.input:
                raise CannotRecord("an output is not computed from the input")
            values.append(value)
        return Replay(self.input, self.steps, values, structure)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        found = [value for value in map(self._find, tensors) if value is not None]
        if not found:
            self._check_constant(func, tensors)
            return
        if not func._schema.is_mutable and any(result is tensor for tensor in tensors):
            return  # to() of a tensor that is there already
        if self._note_known(func, args, result):
            return
        if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            raise CannotRecord(f"{func} is not a function of its arguments alone")
        leaves, _ = tree_flatten(result)
        outputs: list[Value | None] = []
        for leaf in leaves:
            if leaf is None:
                outputs.append(None)
            elif isinstance(leaf, Tensor):
                outputs.append(self._new(leaf))
            else:
                raise CannotRecord(f"{func} gives {type(leaf).__name__}")
        arguments = tree_map(lambda leaf: self._find(leaf) or leaf, (args, kwargs))
        self.steps.append(Call(func, arguments, outputs, found))

    def _check_constant(self, func: Any, tensors: list[Tensor]) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CannotRecord(f"{func} draws random numbers")
        if any(tensor.untyped_storage()._cdata in self._names for tensor in tensors):
            raise CannotRecord(f"{func} sees a tensor in disguise")

    def _note_known(self, func: Any, args: tuple[Any, ...], result: Any) -> bool:
        """Note what a native program can do; False: it cannot."""
        input = self._find(args[0])
        if func is aten.addmm.default and input is None:
            return self._note_linear(args, result)
        if input is None or input.dtype not in native.DTYPES or len(input.shape) not in (2, 4):
            return False
        if func in _RESHAPES:
            if result.dim() not in (2, 4) or tuple(result.shape[:2]) != input.shape[:2]:
                return False
            if result.numel() != input.shape[0] * input.shape[1]:
                return False
            self._name(result, Value(tuple(result.shape), result.dtype, base=input))
            return True
        if func in _ACTIVATIONS:
            names = self._names[args[0].untyped_storage()._cdata]
            if func._schema.is_mutable and (len(names) > 1 or input is self.input):
                raise CannotRecord(f"{func} changes a tensor that somebody else may see")
            codes = native.activation_codes([_ACTIVATIONS[func]])
            self.steps.append(Step(_SILU, input, self._new(result), (), codes))
            return True
        if func is aten.mean.dim:
            return self._note_mean(args, input, result)
        return self._note_op(func, args, input, result)

    def _note_mean(self, args: tuple[Any, ...], input: Value, result: Tensor) -> bool:
        """The mean over pixels is free at the end of the convolution just before."""
        over_pixels = sorted(axis % 4 for axis in args[1]) == [2, 3] if args[1] else False
        step = self.steps[-1] if self.steps else None
        if (
            len(input.shape) != 4
            or not over_pixels
            or not isinstance(step, Step)
            or step.kind not in (_POINTWISE_CONV, _DEPTHWISE_CONV)
            or step.output is not input
            or step.mean is not None
            or result.dtype != input.dtype
        ):
            return False
        step.mean = self._new(result)
        return True

    def _note_linear(self, args: tuple[Any, ...], result: Tensor) -> bool:
        """addmm(bias, x, weight transposed) as a product over the channels of one pixel."""
        bias, x, matrix = args
        input = self._find(x)
        if input is None or self._find(matrix) is not None or len(input.shape) != 2:
            return False
        if native.can_run(x) is not None or matrix.dtype != x.dtype or bias.dim() != 1:
            return False
        # Not kept by the cache: views that are made here have no versions to go by.
        weights = (native.gemm_panels(matrix.t()), None, bias.detach().float().contiguous())
        codes = native.activation_codes(["none"])
        self.steps.append(Step(_POINTWISE_CONV, input, self._new(result), weights, codes))
        return True

    def _note_op(self, func: Any, args: tuple[Any, ...], input: Value, result: Any) -> bool:
        operator = operators.get(func._schema.name.removeprefix("effkernels::"))
        if operator is None or operator.overload is not func or operator.name not in _LOWER:
            return False
        if select(operator, args) is not operator.implementations["native"]:
            return False
        others = [leaf for leaf in tree_flatten(args[1:])[0] if isinstance(leaf, Tensor)]
        step = _LOWER[operator.name](args, input, self._find)
        depends = [value for value in map(self._find, others) if value is not None]
        if step is None or any(value is not step.residual for value in depends):
            return False  # a weight or a gate was computed from the input
        if any(value.dtype != input.dtype for value in depends):
            return False
        if isinstance(result, Tensor):
            step.output = self._new(result)
        else:
            output, mean = result
            step.output = self._new(output)
            if args[-1]:
                step.mean = self._new(mean)
        self.steps.append(step)
        return True

    def _find(self, tensor: Any) -> Value | None:
        return self._values.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def _new(self, tensor: Tensor) -> Value:
        value = Value(tuple(tensor.shape), tensor.dtype)
        self._name(tensor, value)
        return value

    def _name(self, tensor: Tensor, value: Value) -> None:
        self._kept.append(tensor)
        self._names.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))
        self._values[id(tensor)] = value


class Recorder(_Notes, TorchDispatchMode):
    """Notes the ops of one forward pass on ``input``."""

    def __init__(self, input: Tensor) -> None:
        TorchDispatchMode.__init__(self)
        _Notes.__init__(self, input)


class Replay:
    """The recorded steps, ready to run: native programs, and calls of other ops between them.

    Attributes:
        any_batch: inputs may have another batch size than the recorded one.
    """

    def __init__(
        self,
        input: Value,
        steps: Sequence[Step | Call],
        outputs: Sequence[Value],
        structure: Any,
    ) -> None:
        self._input = input
        self._outputs = outputs
        self._structure = structure
        self._parts: list[Program | Call] = []
        wanted = {output.root() for output in outputs}
        for part in reversed(_parts(steps)):
            if isinstance(part, Call):
                self._parts.append(part)
                wanted.update(part.reads())
            else:
                program = Program(part, wanted)
                self._parts.append(program)
                wanted.update(program.inputs)
        self._parts.reverse()
        self.any_batch = not any(isinstance(part, Call) for part in self._parts)
        self._plain = self.any_batch and len(self._parts) == 1 and structure.is_leaf()

    def __call__(self, input: Tensor) -> Any:
        if not self._plain:
            return self._run_parts(input)
        program, (output,) = self._parts[0], self._outputs
        assert isinstance(program, Program)
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
            if isinstance(part, Program):
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
    """Steps in a row as one native call.

    Args:
        steps: at least one, of one dtype.
        wanted: values that somebody needs afterwards.
    """

    def __init__(self, steps: Sequence[Step], wanted: set[Value]) -> None:
        written: set[Value] = set()
        self.inputs: list[Value] = []
        for step in steps:
            for value in step.reads():
                if value not in written and value not in self.inputs:
                    self.inputs.append(value)
            written.update(step.writes())
        # A value is planar for all steps or for none.
        hidden = {value for step in steps if not step.planar for value in step.reads()}
        for step in steps:
            step.planar = step.planar and step.input not in hidden and step.input in self.inputs
        self._planar = [
            value not in hidden and any(step.planar and step.input is value for step in steps)
            for value in self.inputs
        ]
        self.outputs = [value for step in steps for value in step.writes() if value in wanted]
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


def _parts(steps: Sequence[Step | Call]) -> list[Call | list[Step]]:
    """Steps in a row (of one dtype) together."""
    parts: list[Call | list[Step]] = []
    for step in steps:
        if isinstance(step, Call):
            parts.append(step)
        elif parts and isinstance(parts[-1], list) and _same_dtype(parts[-1][0], step):
            parts[-1].append(step)
        else:
            parts.append([step])
    return parts


def _same_dtype(a: Step, b: Step) -> bool:
    return a.input.dtype == b.input.dtype


def _arena(steps: Sequence[Step], external: set[Value]) -> dict[Value, int]:
    """Offsets, in values per image, that keep apart what is needed at the same time."""
    last = {value: i for i, step in enumerate(steps) for value in (*step.writes(), *step.reads())}
    unit = _ALIGNMENT // steps[0].input.dtype.itemsize
    offsets: dict[Value, int] = {}
    living: list[tuple[int, int, Value]] = []  # begin, end, sorted
    for index, step in enumerate(steps):
        living = [entry for entry in living if last[entry[2]] >= index]
        for value in step.writes():
            if value in external:
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


def _lower_conv(args: tuple[Any, ...], input: Value, find: Any) -> Step | None:
    *front, residual, activation = args
    if residual is not None and find(residual) is None:
        return None
    packed = native.pack_conv(*front, activation)
    return Step(
        _CONV,
        input,
        input,
        packed.weights,
        packed.activations,
        packed.geometry,
        residual=find(residual),
        planar=native.is_planar(args[0]),
    )


def _lower_pointwise_conv(args: tuple[Any, ...], input: Value, find: Any) -> Step | None:
    x, weight, scale, bias, gate, residual, activation, _ = args
    if gate is not None or (residual is not None and find(residual) is None):
        return None
    packed = native.pack_pointwise_conv(x, weight, scale, bias, activation)
    return Step(
        _POINTWISE_CONV,
        input,
        input,
        packed.weights,
        packed.activations,
        residual=find(residual),
    )


def _lower_depthwise_conv(args: tuple[Any, ...], input: Value, find: Any) -> Step | None:
    packed = native.pack_depthwise_conv(*args[:-1])
    return Step(_DEPTHWISE_CONV, input, input, packed.weights, packed.activations, packed.geometry)


def _lower_mbconv(args: tuple[Any, ...], input: Value, find: Any) -> Step | None:
    packed = native.pack_mbconv(*args)
    return Step(
        _MBCONV,
        input,
        input,
        packed.weights,
        packed.activations,
        packed.geometry,
        residual=input if args[17] else None,
    )


def _lower_squeeze_excite(args: tuple[Any, ...], input: Value, find: Any) -> Step | None:
    weights, activations = native.pack_squeeze_excite(*args[1:])
    return Step(_SQUEEZE_EXCITE, input, input, weights, activations)


def _lower_silu(args: tuple[Any, ...], input: Value, find: Any) -> Step | None:
    return Step(_SILU, input, input, (), native.activation_codes([args[1]]))


_LOWER: dict[str, Callable[[tuple[Any, ...], Value, Any], Step | None]] = {
    "conv": _lower_conv,
    "pointwise_conv": _lower_pointwise_conv,
    "depthwise_conv": _lower_depthwise_conv,
    "mbconv": _lower_mbconv,
    "squeeze_excite": _lower_squeeze_excite,
    "silu": _lower_silu,
}
