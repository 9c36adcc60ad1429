"""Fewer steps for the same result: what a convolution's epilogue can do is done there.

BatchNorm in evaluation, a residual addition, an activation and the mean over pixels each read and
write a whole tensor when they are steps of their own, and cost next to nothing at the end of the
convolution before. Padding in front of a convolution goes into its geometry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .native import activation_codes
from .program import Call, Kind, Step, Value

aten = torch.ops.aten

_CONVOLUTIONS = (Kind.CONV, Kind.POINTWISE_CONV, Kind.DEPTHWISE_CONV)
_WITH_EPILOGUE = (*_CONVOLUTIONS, Kind.BATCH_NORM_ACT, Kind.SILU)
_NO_ACTIVATION, _SILU, _SIGMOID = ([code] for code in activation_codes(("none", "silu", "sigmoid")))


def simplify(steps: Sequence[Step | Call], outputs: set[Value]) -> list[Step | Call]:
    """``steps`` with as many of them as possible made part of a convolution.

    Args:
        steps: in the order they ran; a convolution may be changed in place.
        outputs: values that are wanted in the end.
    """
    return _Simplifier(steps, outputs).run()


class _Simplifier:
    def __init__(self, steps: Sequence[Step | Call], outputs: set[Value]) -> None:
        self._steps = steps
        self._outputs = outputs
        self._readers = Counter(value for step in steps for value in set(step.reads()))
        self._producers: dict[Value, Step | Call] = {}
        self._copies: dict[Value, list[Step]] = {}  # into a value
        self._order: dict[int, int] = {}

    def run(self) -> list[Step | Call]:
        kept: list[Step | Call] = []
        for position, original in enumerate(self._steps):
            step = self._as_silu(original) if isinstance(original, Call) else original
            self._order[id(step)] = position
            if isinstance(step, Step):
                if step.kind in _CONVOLUTIONS:
                    self._take_padding(step)
                if step.kind == Kind.COPY:
                    self._copies.setdefault(step.output, []).append(step)
                producer = self._absorb_step(step)
            else:
                producer = self._absorb_mean(step)
            for value in step.writes():
                self._producers[value] = step if producer is None else producer
            if producer is None:
                kept.append(step)
            else:
                producer.covers += step.covers
        return self._without_unread(kept)

    def _open(self, value: Value, kinds: Sequence[Kind] = _WITH_EPILOGUE) -> Step | None:
        """The step that made ``value``, if its epilogue may go on: an addition is one, too."""
        step = self._producers.get(value.root())
        if (
            isinstance(step, Step)
            and step.kind in kinds
            and step.output is value.root()
            and step.activations == _NO_ACTIVATION
            and step.mean is None
            and value.root() not in self._outputs
            and self._readers[value.root()] == 1
        ):
            return step
        return None

    def _open_parts(self, value: Value, kinds: Sequence[Kind]) -> list[tuple[Step, slice]]:
        """The steps that made the channels of ``value``, where the epilogues of all may go on."""
        step = self._open(value, kinds)
        if step is not None:
            return [(step, slice(None))]
        copies = self._copies.get(value, [])
        if value in self._outputs or self._readers[value] != 1:
            return []
        parts = []
        for copy in copies:
            begin, to, count, *_ = copy.geometry
            step = self._open(copy.input, kinds)
            if step is None or begin != 0 or count != copy.input.shape[1]:
                return []
            parts.append((step, slice(to, to + count)))
        return parts

    def _rename(self, value: Value, parts: list[tuple[Step, slice]], new: Value) -> Step:
        """``new`` is made instead of ``value``; by what?"""
        copies = self._copies.pop(value, None)
        if copies is None:
            ((step, _),) = parts
            step.output = new
            return step
        for copy in copies:
            copy.output = new
        self._copies[new] = copies
        return copies[-1]

    def _as_silu(self, call: Call) -> Step | Call:
        """x · sigmoid(x), written out by networks from before PyTorch had SiLU, as one step."""
        args, kwargs = call.arguments
        output = call.outputs[0]
        if call.function is not aten.mul.Tensor or kwargs or output is None:
            return call
        for input, factor in (args, args[::-1]):
            if not isinstance(input, Value) or not isinstance(factor, Value):
                return call
            step = self._producers.get(factor)
            if (
                isinstance(step, Step)
                and step.kind == Kind.SILU
                and step.activations == _SIGMOID
                and step.input is input
                and step.residual is None
                and self._readers[factor] == 1
                and factor not in self._outputs
            ):
                self._readers[input] -= 1  # the sigmoid is not read any more
                return Step(Kind.SILU, input, output, (), _SILU, covers=call.covers)
        return call

    def _absorb_step(self, step: Step) -> Step | Call | None:
        """The step that does the work of ``step`` from now on."""
        if step.kind == Kind.BATCH_NORM_ACT:
            return self._absorb_batch_norm(step)
        if step.kind == Kind.SILU and step.residual is not None:
            return self._absorb_residual(step.output, step.input, step.residual)
        parts = self._open_parts(step.input, _WITH_EPILOGUE) if step.kind == Kind.SILU else []
        for part, _ in parts:
            part.activations = step.activations
        return self._rename(step.input, parts, step.output) if parts else None

    def _absorb_batch_norm(self, norm: Step) -> Step | Call | None:
        if norm.residual is not None:
            return None
        call = self._foldable_call(norm.input)
        if call is not None:
            (x, matrix, shift, *rest), kwargs = call.arguments
            factor, offset = _scale_and_shift(norm, slice(None), shift)
            folded = (matrix.double() * factor.view(-1, 1, 1, 1)).to(matrix)
            call.arguments = (x, folded, offset.to(matrix), *rest), kwargs
            call.outputs = [norm.output]
            return call
        parts = self._open_parts(norm.input, _CONVOLUTIONS)
        if not parts or any(p.residual is not None or p.weights[1] is not None for p, _ in parts):
            return None
        for part, channels in parts:
            matrix, _, shift, *transformed = part.weights
            factor, offset = _scale_and_shift(norm, channels, shift)
            part.weights = (matrix, factor.float(), offset.float(), *transformed)
        return self._rename(norm.input, parts, norm.output)

    def _foldable_call(self, value: Value) -> Call | None:
        """PyTorch's convolution that made ``value``, if a scale and shift may go into its weights:
        grouped ones are, which this library has no kernel for."""
        call = self._producers.get(value)
        if (
            not isinstance(call, Call)
            or call.function is not aten.convolution.default
            or value in self._outputs
            or self._readers[value] != 1
        ):
            return None
        (_, weight, bias, *_, transposed, _, _), _ = call.arguments
        constant = isinstance(weight, Tensor) and not isinstance(bias, Value)
        exact = constant and weight.dtype == torch.float32  # twice rounded would be worse
        return call if exact and weight.dim() == 4 and not transposed else None

    def _absorb_residual(self, output: Value, a: Value, b: Value) -> Step | None:
        if a is b:
            return None
        # Both have to be there: the one that comes last adds the other.
        for value, other in ((a, b), (b, a)):
            step, before = self._open(value), self._producers.get(other.root())
            if step is None or step.residual is not None or step.kind == Kind.DEPTHWISE_CONV:
                continue
            if before is None or self._order[id(before)] < self._order[id(step)]:
                step.residual, step.output = other, output
                return step
        return None

    def _absorb_mean(self, call: Call) -> Step | None:
        args, kwargs = call.arguments
        if call.function is not aten.mean.dim or kwargs:
            return None
        if len(args) >= 3 and args[2] not in (True, False):
            return None
        input, axes, *_ = args
        output = call.outputs[0]
        if not isinstance(input, Value) or len(input.shape) != 4 or output is None:
            return None
        if not axes or sorted(axis % 4 for axis in axes) != [2, 3] or output.dtype != input.dtype:
            return None
        step = self._producers.get(input)
        if (
            isinstance(step, Step)
            and step.kind in (Kind.POINTWISE_CONV, Kind.DEPTHWISE_CONV)
            and step.output is input
            and step.mean is None
        ):
            step.mean = output
            return step
        return None

    def _take_padding(self, step: Step) -> None:
        pad = self._producers.get(step.input)
        if not isinstance(pad, Call) or pad.function is not aten.constant_pad_nd.default:
            return
        (source, sides, *value), _ = pad.arguments
        if len(sides) != 4 or min(sides) < 0 or any(v != 0 for v in value) or source.base:
            return
        if step.kind == Kind.POINTWISE_CONV:  # has no windows, and so no padding
            step.kind = Kind.CONV
        left, _, top, _ = sides
        step.geometry = [*step.geometry[:6], step.geometry[6] + left, step.geometry[7] + top]
        self._readers[step.input] -= 1
        self._readers[source] += 1
        step.input = source

    def _without_unread(self, steps: list[Step | Call]) -> list[Step | Call]:
        wanted = set(self._outputs)
        kept = []
        for step in reversed(steps):
            if any(value in wanted for value in step.writes()):
                wanted.update(step.reads())
                kept.append(step)
        return kept[::-1]


def _scale_and_shift(norm: Step, channels: slice, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What ``norm`` does to channels after ``bias`` was added, as a multiply and an add.

    In double, so that the folded network errs no more than the original.
    """
    mean, var, weight, shift = (None if v is None else v[channels].double() for v in norm.weights)
    assert mean is not None and var is not None
    scale = var.rsqrt() if weight is None else var.rsqrt() * weight
    center = mean if bias is None else mean - bias.double()
    return scale, -center * scale if shift is None else shift - center * scale
