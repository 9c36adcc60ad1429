"""Steps that make up an inverted residual, whatever module they came from, as one mbconv step."""

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
    """``steps`` with [pointwise →] depthwise [→ squeeze-and-excitation] → pointwise made one.

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
    for step in steps:
        block = _match(step, producers, readers, kernels) if isinstance(step, Step) else None
        if block is not None:
            parts = {id(part) for part in block.parts}
            gone.update(parts)
            fused[id(step)] = block.step
            block.step.covers = [
                cover for part in steps if id(part) in parts for cover in part.covers
            ]
            producers.update((value, block.step) for value in block.step.writes())
    return [
        fused.get(id(step), step) for step in steps if id(step) not in gone or id(step) in fused
    ]


class _Block(NamedTuple):
    step: Step
    parts: list[Step | Call]  # what it stands for


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
    scaling: Call, producers: dict[Value, Any], readers: Counter[Value], kernels: Any
) -> tuple[Any, _Gate | None]:
    """The depthwise convolution and the gate that ``scaling`` multiplies, (None, None) if not."""
    nothing = (None, None)
    args, kwargs = scaling.arguments
    if scaling.function is not aten.mul.Tensor or kwargs or len(args) != 2:
        return nothing
    output = scaling.outputs[0]
    if not all(isinstance(arg, Value) for arg in args) or output is None or readers[output] != 1:
        return nothing
    image, factor = args if args[0].shape == output.shape else args[::-1]
    depthwise, expand = producers.get(image.root()), producers.get(factor.root())
    if not _is(depthwise, Kind.DEPTHWISE_CONV) or not _is_dense_on_vectors(expand, readers):
        return nothing
    reduce = producers.get(expand.input.root())
    if not _is_dense_on_vectors(reduce, readers) or readers[depthwise.output] != 1:
        return nothing
    if factor.shape != (*image.shape[:2], 1, 1) or depthwise.mean is not reduce.input.root():
        return nothing
    if readers[depthwise.mean] != 1:
        return nothing
    assert reduce.source is not None and expand.source is not None
    matrices = kernels.pack_gate(reduce.source.flatten(1), expand.source.flatten(1))
    weights = (matrices[0], reduce.weights[2], matrices[1], expand.weights[2])
    activations = [*reduce.activations, *expand.activations]
    return depthwise, _Gate(weights, activations, [scaling, reduce, expand])


def _is(step: Any, kind: Kind) -> TypeGuard[Step]:
    return isinstance(step, Step) and step.kind == kind


def _is_dense_on_vectors(step: Any, readers: Counter[Value]) -> TypeGuard[Step]:
    """``step`` is a plain fully connected layer, which only one other step reads."""
    return (
        _is(step, Kind.POINTWISE_CONV)
        and step.source is not None
        and step.weights[1] is None
        and step.residual is None
        and step.mean is None
        and step.input.images()[:2] == (1, 1)
        and readers[step.output] == 1
    )
