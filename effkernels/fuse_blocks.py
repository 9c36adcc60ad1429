"""Steps that make up an inverted residual or squeeze-and-excitation, whatever modules they came
from, as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from .native import activation_codes
from .program import Call, Kind, Step, Value

aten = torch.ops.aten

_SILU = activation_codes(["silu"])[0]
_SIGMOID = activation_codes(["sigmoid"])[0]


def fuse_blocks(
    steps: Sequence[Step | Call], outputs: set[Value], kernels: Any
) -> list[Step | Call]:
    """``steps`` with [pointwise →] depthwise [→ squeeze-and-excitation] → pointwise made one, and
    squeeze-and-excitation elsewhere.

    Args:
        steps: in the order they run.
        outputs: values that are wanted in the end.
        kernels: of the backend that the weights are packed for (:mod:`effkernels.kernels`).
    """
    readers = Counter(value for step in steps for value in set(step.reads()))
    readers.update(outputs)
    producers = {value: step for step in steps for value in step.writes()}
    gone: set[int] = set()
    fused: dict[int, Step] = {}

    def put(block: _Block | None) -> None:
        if block is None:
            return
        parts = {id(part) for part in block.parts}
        gone.update(parts)
        fused[id(block.parts[0])] = block.step
        block.step.covers = [cover for part in steps if id(part) in parts for cover in part.covers]
        producers.update((value, block.step) for value in block.step.writes())

    for step in steps:
        if isinstance(step, Step):
            put(_match(step, producers, readers, kernels))
    for step in steps:  # what no block took
        if isinstance(step, Call) and id(step) not in gone:
            put(_match_squeeze_excite(step, producers, readers, kernels))
    return [
        fused.get(id(step), step) for step in steps if id(step) not in gone or id(step) in fused
    ]


class _Block(NamedTuple):
    step: Step
    parts: list[Step | Call]  # what it stands for, the last to run first


class _Gate(NamedTuple):
    weights: tuple[Tensor | None, ...]  # as mbconv takes them
    activations: list[int]
    parts: list[Step | Call]


_NO_GATE = _Gate((None, None, None, None), [_SILU, _SIGMOID], [])


def _match(
    project: Step, producers: dict[Value, Any], readers: Counter[Value], kernels: Any
) -> _Block | None:
    """The block that ``project`` ends, if it ends one."""
    if project.kind != Kind.POINTWISE_CONV or project.mean is not None:
        return None
    before = producers.get(project.input.root())
    gate: _Gate | None = _NO_GATE
    if isinstance(before, Call):
        depthwise, gate = _match_gate(before, producers, readers, kernels)
    else:
        depthwise = before
    if gate is None or not _is(depthwise, Kind.DEPTHWISE_CONV):
        return None
    if gate is _NO_GATE and (depthwise.mean is not None or readers[depthwise.output] != 1):
        return None
    parts: list[Step | Call] = [project, depthwise, *gate.parts]
    expand = producers.get(depthwise.input.root())
    weights: tuple[Tensor | None, ...] = (None, None, None)
    input = depthwise.input
    if (
        _is(expand, Kind.POINTWISE_CONV)
        and expand.residual is None
        and expand.mean is None
        and expand.activations == depthwise.activations
        and readers[expand.output] == 1
    ):
        weights, input = expand.weights, expand.input
        parts.append(expand)
    if len(input.shape) != 4 or input.dtype != project.output.dtype:
        return None
    return _Block(
        Step(
            Kind.MBCONV,
            input,
            project.output,
            (*weights, *depthwise.weights, *gate.weights, *project.weights),
            [*depthwise.activations, *gate.activations, *project.activations],
            depthwise.geometry,
            project.residual,
        ),
        parts,
    )


def _match_gate(
    call: Call, producers: dict[Value, Any], readers: Counter[Value], kernels: Any
) -> tuple[Any, _Gate | None]:
    """The depthwise convolution and the gate that ``call`` multiplies, (None, None) if not."""
    scaling = _match_scaling(call, producers, readers)
    depthwise = None if scaling is None else producers.get(scaling.image.root())
    if scaling is None or not _is(depthwise, Kind.DEPTHWISE_CONV):
        return None, None
    read_once = (scaling.mean, depthwise.output, scaling.output)
    if depthwise.mean is not scaling.mean or any(readers[value] != 1 for value in read_once):
        return None, None
    return depthwise, _pack_gate(scaling, kernels)


def _match_squeeze_excite(
    call: Call, producers: dict[Value, Any], readers: Counter[Value], kernels: Any
) -> _Block | None:
    """Squeeze-and-excitation that ``call`` ends, behind whatever made its image."""
    scaling = _match_scaling(call, producers, readers)
    if scaling is None or readers[scaling.mean] != 1:
        return None
    image, mean, output = scaling.image, scaling.mean, scaling.output
    before = producers.get(mean)
    if before is None or image.base is not None or image.dtype != output.dtype:
        return None
    parts: list[Step | Call] = [call, scaling.reduce, scaling.expand]
    if isinstance(before, Step):
        if before.output is not image or before.mean is not mean:
            return None
        before.mean = None  # the step computes its own
    else:
        (input, axes, *_), _ = before.arguments
        if before.function is not aten.mean.dim or input is not image:
            return None
        if sorted(axis % 4 for axis in axes) != [2, 3]:
            return None
        parts.append(before)
    gate = _pack_gate(scaling, kernels)
    step = Step(Kind.SQUEEZE_EXCITE, image, output, gate.weights, gate.activations)
    return _Block(step, parts)


class _Scaling(NamedTuple):
    """A product of an image and factors that come from means over pixels."""

    call: Call
    image: Value
    output: Value
    mean: Value
    reduce: Step
    expand: Step


def _match_scaling(
    call: Call, producers: dict[Value, Any], readers: Counter[Value]
) -> _Scaling | None:
    args, kwargs = call.arguments
    if call.function is not aten.mul.Tensor or kwargs or len(args) != 2:
        return None
    output = call.outputs[0]
    if not all(isinstance(arg, Value) for arg in args) or output is None:
        return None
    image, factor = args if args[0].shape == output.shape else args[::-1]
    if len(image.shape) != 4 or factor.shape != (*image.shape[:2], 1, 1):
        return None
    expand = producers.get(factor.root())
    if not _is_dense_on_vectors(expand, readers):
        return None
    reduce = producers.get(expand.input.root())
    if not _is_dense_on_vectors(reduce, readers):
        return None
    return _Scaling(call, image, output, reduce.input.root(), reduce, expand)


def _pack_gate(scaling: _Scaling, kernels: Any) -> _Gate:
    reduce, expand = scaling.reduce, scaling.expand
    matrices = kernels.pack_gate(_matrix(reduce), _matrix(expand))
    weights = (matrices[0], reduce.weights[2], matrices[1], expand.weights[2])
    activations = [*reduce.activations, *expand.activations]
    return _Gate(weights, activations, [scaling.call, reduce, expand])


def _is(step: Any, kind: Kind) -> TypeGuard[Step]:
    return isinstance(step, Step) and step.kind == kind


def _is_dense_on_vectors(step: Any, readers: Counter[Value]) -> TypeGuard[Step]:
    """``step`` is a plain fully connected layer, which only one other step reads."""
    return (
        _is(step, Kind.POINTWISE_CONV)
        and step.source is not None
        # A scale goes into the weights, if that does not round them a second time.
        and (step.weights[1] is None or step.source.dtype == torch.float32)
        and step.residual is None
        and step.mean is None
        and step.input.images()[:2] == (1, 1)
        and readers[step.output] == 1
    )


def _matrix(dense: Step) -> Tensor:
    """A fully connected layer's weights, [K, C]."""
    assert dense.source is not None
    matrix, scale = dense.source.flatten(1), dense.weights[1]
    return matrix if scale is None else matrix * scale[:, None]
