"""Recording a forward pass.

While a :class:`Recorder` is active every op that the forward pass reaches PyTorch's dispatcher
with is noted: what it was called with, and what came out. A replay is right for inputs of the
recorded shape and dtype, as long as nothing changes that the forward pass read:
:mod:`effkernels.modules.plan` watches that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from .dispatch import Operator, operators, select
from .fuse_blocks import fuse_blocks
from .kernels import kernels_for
from .layout import output_size
from .native import MBCONV_RESIDUAL, activation_codes
from .program import Call, Cover, Kind, Replay, Step, Value
from .simplify import simplify

aten = torch.ops.aten

# PyTorch's activations as this library calls them. In place or not makes no difference to a
# program, whose values have one writer each.
_ACTIVATIONS = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.silu.default: "silu",
    aten.silu_.default: "silu",
    aten.hardswish.default: "hard_swish",
    aten.hardswish_.default: "hard_swish",
    aten.hardsigmoid.default: "hard_sigmoid",
    aten.hardsigmoid_.default: "hard_sigmoid",
    aten.sigmoid.default: "sigmoid",
    aten.sigmoid_.default: "sigmoid",
    aten.hardtanh.default: "relu6",  # with these limits
    aten.hardtanh_.default: "relu6",
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
_BATCH_NORMS = (aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default)
_ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
_CONV2D_DEFAULTS = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
# What to call instead: a replay's tensors are not changed, and may have another memory format.
_FUNCTIONAL = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}


class _BatchNorm(NamedTuple):
    """Arguments of PyTorch's ops for BatchNorm after their input."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Any
    training: bool
    momentum: float
    eps: float


def _batch_norm_arguments(func: Any, args: tuple[Any, ...]) -> _BatchNorm:
    if func is aten.native_batch_norm.default:
        return _BatchNorm(*args[1:])
    return _BatchNorm._make((*args[1:5], False, *args[5:]))


class CannotRecord(Exception):
    """The forward pass does something that a replay would not repeat."""


def record(
    function: Callable[[Tensor], Any], input: Tensor, pure: bool = False
) -> tuple[Any, Replay | None]:
    """``function(input)`` and how to repeat it; None where a replay might differ.

    Args:
        function: of one tensor; its result may be a tensor, or a list, tuple or dict of them.
        input: [N, ...], in plain inference (no gradients, no autocast).
        pure: ``function`` may be called more often than once. It is then recorded on the first
            image alone if that is enough, which takes a batch's share of the memory and time, and
            without computing convolutions if nothing asks for their values.
    """
    if pure:
        batch = input.dim() == 4 and input.shape[0] > 1
        for example in (input[:1], input) if batch else (input,):
            replay = _rehearse(function, example)
            if replay is None:
                break
            if replay.any_batch or example is input:
                return replay(input), replay
    recorder = Recorder(input)
    with recorder:
        output = function(input)
    try:
        replay = recorder.finish(output)
    except CannotRecord:
        return output, None
    return replay(input), replay  # not `output`: the first call must not differ in its last bits


def _rehearse(function: Callable[[Tensor], Any], input: Tensor) -> Replay | None:
    """A replay of ``function`` without its large results, whose values nobody looks at: they were
    17 of the 56 ms of the first call of torchvision's EfficientNet-B0, and zeros in their place 5
    of 26. None: it has to be recorded as it really runs.
    """
    recorder = Recorder(input, compute=False)
    try:
        with recorder:
            output = function(input)
        return recorder.finish(output)
    except Exception:  # of those values, perhaps, and not of the real ones
        return None


class _Notes:
    """The ops of one forward pass on ``input``.

    ``names``: what the tensors of these ids are called, for the steps' ``covers``.
    ``compute``: False if any values will do as results of what takes long.

    Apart from :class:`Recorder` because TorchDispatchMode wraps what its subclasses define, to hide
    it from torch.compile, and the first call through that wrapper imports the compiler: a second.
    """

    def __init__(
        self, input: Tensor, names: Mapping[int, str] | None = None, compute: bool = True
    ) -> None:
        kernels = kernels_for(input)
        if kernels is None:
            raise ValueError("no backend with kernels of its own runs inputs like this one")
        self._kernels = kernels
        self._compute = compute
        self.steps: list[Step | Call] = []
        self._modules = dict(names or {})
        self.input = Value(tuple(input.shape), input.dtype)
        self._values: dict[int, Value] = {id(input): self.input}
        self._names = {input.untyped_storage()._cdata: {id(input)}}  # tensors of a storage
        self._made: set[int] = set()  # ids of tensors that the forward pass made of constants
        # Ids are good while their tensors live. None is kept alive for that: it would take as much
        # memory as training does.
        self._living: dict[int, weakref.ref[Tensor]] = {}
        self._watch(input)
        self._reason: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.conv2d.default and args[0].dim() == 4:
            # What it is made of, without the way there.
            given = (*args, *_CONV2D_DEFAULTS[len(args) :])
            func, args = aten.convolution.default, (*given[:6], False, [0, 0], given[6])
        elif torch.is_inference_mode_enabled():
            # Ops made of others (linear, dropout) come whole.
            with self:  # type: ignore[attr-defined]
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = None if self._compute or kwargs else self._placeholder(func, args)
        if result is None:
            result = func(*args, **kwargs)
        if self._reason is None:
            noted = len(self.steps)
            try:
                self._note(func, args, kwargs, result)
            except CannotRecord as error:
                self._reason = str(error)
            if self._modules:
                self._attribute(func, (args, kwargs), result, self.steps[noted:])
        return result

    def _placeholder(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Tensors like the results of an expensive op on a value, but empty: nothing of their
        memory is ever touched. None for any other op."""
        if not args or self._find(args[0]) is None:
            return None
        x = args[0]
        if func in _ACTIVATIONS:
            return x if func._schema.is_mutable else torch.empty_like(x)
        operator = self._ours(func, args)
        if operator is not None:
            return operator.shape_rule(*args)
        if x.dim() != 4:
            return None
        if func in _BATCH_NORMS:
            training = _batch_norm_arguments(func, args).training
            return None if training else (torch.empty_like(x), x.new_empty(0), x.new_empty(0))
        if func is aten.mean.dim and args[1:] in (([-1, -2], True), ([2, 3], True)):
            return x.new_empty(*x.shape[:2], 1, 1)
        if func in (aten.add.Tensor, aten.mul.Tensor) and self._find(args[1]) is not None:
            larger, other = sorted(args[:2], key=Tensor.numel, reverse=True)
            alike = other.shape == larger.shape and other.stride() == larger.stride()
            scales = other.shape == (*larger.shape[:2], 1, 1)
            fits = other.dtype == larger.dtype and (alike or scales)
            return torch.empty_like(larger) if fits else None
        if func is not aten.convolution.default:
            return None
        _, weight, _, *geometry, transposed, _, _ = args
        if transposed:
            return None
        size = output_size(x.shape[2:], weight.shape[2:], *_in_pairs(*geometry))
        if x.is_contiguous() and weight.is_contiguous():
            return x.new_empty(x.shape[0], weight.shape[0], *size)
        return x.new_empty(x.shape[0], *size, weight.shape[0]).permute(0, 3, 1, 2)

    def finish(self, output: Any) -> Replay:
        """How to get ``output``, the result of the forward pass, for another input.

        Raises:
            CannotRecord: with the reason why a replay might differ.
        """
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
        wanted = {value.root() for value in values}
        steps = fuse_blocks(simplify(self.steps, wanted), wanted, self._kernels)
        return Replay(self.input, steps, values, structure, self._kernels.Program)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        tensors = _tensors(args, *kwargs.values())
        found = [value for value in map(self._find, tensors) if value is not None]
        if not found:
            self._check_constant(func, tensors)
            made = _tensors(result)
            storages = {tensor.untyped_storage()._cdata for tensor in tensors}
            for tensor in made:  # views are somebody else's memory
                if tensor.untyped_storage()._cdata not in storages:
                    self._made.add(id(tensor))
            for tensor in made:
                self._watch(tensor)
            return
        if not func._schema.is_mutable and any(result is tensor for tensor in tensors):
            return  # to() of a tensor that is there already
        if func is aten.as_strided_.default and _same_in_memory(*args):
            return
        if func._schema.is_mutable:
            if func not in _ACTIVATIONS and func not in _FUNCTIONAL:
                raise CannotRecord(f"{func} changes its arguments")
            names = self._names.get(args[0].untyped_storage()._cdata, ())
            if len(names) != 1 or self._find(args[0]) is self.input:
                raise CannotRecord(f"{func} changes a tensor that somebody else may see")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CannotRecord(f"{func} draws random numbers")
        if not kwargs and self._note_known(func, args, result):
            return
        leaves, _ = tree_flatten(result)
        if not all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves):
            raise CannotRecord(f"{func} gives more than tensors")
        if func is aten.as_strided.default:
            raise CannotRecord(f"{func} knows how its argument lies in memory")
        func = _FUNCTIONAL.get(func, func)
        arguments = tree_map(lambda leaf: self._find(leaf) or leaf, (args, kwargs))
        outputs = [None if leaf is None else self._new(leaf) for leaf in leaves]
        self.steps.append(Call(func, arguments, outputs, found))

    def _attribute(self, func: Any, arguments: Any, result: Any, steps: list[Step | Call]) -> None:
        """Write down whose parameters ``func`` was called with."""
        args, kwargs = arguments
        tensors = _tensors(args, *kwargs.values())
        modules = tuple(
            dict.fromkeys(self._modules[id(t)] for t in tensors if id(t) in self._modules)
        )
        for step in steps:
            step.covers = [Cover(func._schema.name.partition("::")[2], modules)]
        if not steps and len(modules) == 1 and isinstance(result, Tensor):
            self._modules[id(result)] = modules[0]  # a transposed weight is the module's, too

    def _check_constant(self, func: Any, tensors: list[Tensor]) -> None:
        """An op that the input has nothing to do with need not be repeated."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CannotRecord(f"{func} draws random numbers")
        if func._schema.is_mutable and not any(id(tensor) in self._made for tensor in tensors[:1]):
            raise CannotRecord(f"{func} changes something that will still be there")
        if any(tensor.untyped_storage()._cdata in self._names for tensor in tensors):
            raise CannotRecord(f"{func} sees a tensor in disguise")

    def _note_known(self, func: Any, args: tuple[Any, ...], result: Any) -> bool:
        """Note what a program can do; False: it cannot."""
        if func is aten.addmm.default:
            return self._note_linear(args, result)
        if func is aten.cat.default:
            return self._note_cat(*args, output=result)
        input = self._find(args[0])
        if (
            input is None
            or self._kernels.can_run(args[0]) is not None
            or args[0].dim() not in (2, 4)
        ):
            return False
        if func in _RESHAPES:
            return self._note_reshape(input, result)
        if func in _ACTIVATIONS:
            if _ACTIVATIONS[func] == "relu6" and tuple(args[1:]) != (0, 6):
                return False
            codes = activation_codes([_ACTIVATIONS[func]])
            self.steps.append(Step(Kind.SILU, input, self._new(result), (), codes))
            return True
        if func in _BATCH_NORMS:
            return self._note_batch_norm(_batch_norm_arguments(func, args), input, result)
        if func is aten.convolution.default:
            return self._note_convolution(args, input, result)
        if func in _ADDITIONS:
            return self._note_addition(*args, output=result)
        if func in _SPLITS:
            return self._note_split(*args, outputs=result)
        if func is aten.slice.Tensor:
            return self._note_slice(*args, output=result)
        return self._note_op(func, args, input, result)

    def _note_reshape(self, input: Value, result: Tensor) -> bool:
        """[N, C] and [N, C, 1, 1] are the same in memory."""
        if result.dim() not in (2, 4) or tuple(result.shape[:2]) != input.shape[:2]:
            return False
        if result.numel() != input.shape[0] * input.shape[1]:
            return False
        self._name(result, Value(tuple(result.shape), result.dtype, base=input))
        return True

    def _note_addition(self, a: Tensor, b: Any, *, output: Tensor) -> bool:
        """The sum of two values; the convolution before may yet take it over."""
        one, other = self._values[id(a)], self._find(b)
        if other is None or not one.shape == other.shape == tuple(output.shape):
            return False
        if not one.dtype == other.dtype == output.dtype:
            return False
        codes = activation_codes(["none"])
        self.steps.append(Step(Kind.SILU, one, self._new(output), (), codes, residual=other))
        return True

    def _note_cat(self, tensors: list[Tensor], dim: int = 0, *, output: Tensor) -> bool:
        """Tensors side by side in their channels."""
        values = [self._find(tensor) for tensor in tensors]
        if not self._kernels.COPIES or self._kernels.can_run(output) is not None:
            return False
        if output.dim() not in (2, 4) or dim % output.dim() != 1:
            return False
        if any(v is None or v.dtype != output.dtype or v.shape[1] == 0 for v in values):
            return False
        whole, at = self._new(output), 0
        for value in values:
            assert value is not None
            channels = value.shape[1]
            self._note_copy(value, whole, 0, at, channels)
            at += channels
        return True

    def _note_split(
        self, x: Tensor, sizes: Any, dim: int = 0, *, outputs: Sequence[Tensor]
    ) -> bool:
        """Parts of the channels."""
        if not self._kernels.COPIES or dim % x.dim() != 1:
            return False
        at = 0
        for part in outputs:
            self._note_copy(self._values[id(x)], self._new(part), at, 0, part.shape[1])
            at += part.shape[1]
        return True

    def _note_slice(
        self,
        x: Tensor,
        dim: int = 0,
        start: int | None = None,
        end: int | None = None,
        step: int = 1,
        *,
        output: Tensor,
    ) -> bool:
        """Some channels in a row."""
        if not self._kernels.COPIES or dim % x.dim() != 1 or step != 1 or output is x:
            return False
        channels = range(x.shape[1])[start:end]
        if len(channels) == 0:
            return False
        self._note_copy(self._values[id(x)], self._new(output), channels[0], 0, len(channels))
        return True

    def _note_copy(self, input: Value, output: Value, start: int, to: int, count: int) -> None:
        geometry = [start, to, count, 0, 0, 0, 0, 0]
        self.steps.append(Step(Kind.COPY, input, output, (), activation_codes(["none"]), geometry))

    def _note_linear(self, args: tuple[Any, ...], result: Tensor) -> bool:
        """addmm(bias, x, weight transposed) as a product over the channels of one pixel."""
        bias, x, matrix = args
        input = self._find(x)
        if input is None or self._find(matrix) is not None or self._find(bias) is not None:
            return False
        if self._kernels.can_run(x) is not None or matrix.dtype != x.dtype or bias.dim() != 1:
            return False
        weights = self._kernels.pack_linear(matrix.t(), bias)
        codes = activation_codes(["none"])
        self.steps.append(Step(Kind.POINTWISE_CONV, input, self._new(result), weights, codes))
        return True

    def _note_convolution(self, args: tuple[Any, ...], input: Value, result: Tensor) -> bool:
        """PyTorch's own convolution, where one of this library's ops computes the same."""
        x, weight, bias, stride, padding, dilation, transposed, _, groups = args
        channels, _, *kernel = weight.shape
        depthwise = groups == input.shape[1] == channels and groups > 1
        if (
            len(input.shape) != 4
            or transposed
            or not (depthwise or groups == 1)
            or any(size % 2 == 0 for size in kernel)
            or weight.dtype != x.dtype
            or self._find(weight) is not None
            or (bias is not None and self._find(bias) is not None)
        ):
            return False
        geometry = stride, sides, _ = _in_pairs(stride, padding, dilation)
        pack = self._kernels.pack_depthwise_conv if depthwise else self._kernels.pack_conv
        kind = Kind.DEPTHWISE_CONV if depthwise else Kind.CONV
        planar = not depthwise and self._kernels.is_planar(x)
        if not depthwise and kernel == [1, 1] and not any(sides) and stride == [1, 1]:
            kind, planar = Kind.POINTWISE_CONV, False
        packed = pack(x, weight, None, bias, *geometry, "none")
        step = Step(kind, input, self._new(result), packed.weights, packed.activations)
        step.geometry, step.planar, step.source = packed.geometry, planar, weight
        self.steps.append(step)
        return True

    def _note_batch_norm(self, args: _BatchNorm, input: Value, result: Any) -> bool:
        """Normalisation with running statistics; the convolution before may yet take it over."""
        if args.training:
            raise CannotRecord("a BatchNorm is in training")
        vectors = args.mean, args.var, args.weight, args.bias
        if args.mean is None or any(self._find(vector) is not None for vector in vectors):
            return False
        output, *statistics = result
        if any(vector.numel() > 0 for vector in statistics):
            return False  # somebody may look at them
        # In double, so that folded into a convolution it errs no more than the original.
        vectors = (args.mean, args.var.double() + args.eps, args.weight, args.bias)
        weights = tuple(None if vector is None else vector.float() for vector in vectors)
        codes = activation_codes(["none"])
        self.steps.append(Step(Kind.BATCH_NORM_ACT, input, self._new(output), weights, codes))
        return True

    def _note_op(self, func: Any, args: tuple[Any, ...], input: Value, result: Any) -> bool:
        """An op of this library that its compiled kernel ran."""
        operator = self._ours(func, args)
        if operator is None:
            return False
        others = _tensors(args[1:])
        depends = [value for value in map(self._find, others) if value is not None]
        step = _LOWER[operator.name](self._kernels, args, input, self._find)
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

    def _ours(self, func: Any, args: tuple[Any, ...]) -> Operator | None:
        """The op of this library that ``func`` is, if a compiled kernel runs it that a program
        has."""
        operator = operators.get(func._schema.name.removeprefix("effkernels::"))
        if operator is None or operator.overload is not func or operator.name not in _LOWER:
            return None
        runs_it = select(operator, args) is operator.implementations[self._kernels.NAME]
        return operator if runs_it else None

    def _find(self, tensor: Any) -> Value | None:
        return self._values.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def _new(self, tensor: Tensor) -> Value:
        value = Value(tuple(tensor.shape), tensor.dtype)
        self._name(tensor, value)
        return value

    def _watch(self, tensor: Tensor) -> None:
        """Forget ``tensor`` when it dies."""
        key, storage = id(tensor), tensor.untyped_storage()._cdata

        def forget(reference: weakref.ref[Tensor]) -> None:
            if self._living.get(key) is not reference:
                return
            del self._living[key]
            self._values.pop(key, None)
            self._modules.pop(key, None)
            self._made.discard(key)
            names = self._names.get(storage, set())
            names.discard(key)
            if not names:
                self._names.pop(storage, None)

        if key not in self._living:
            self._living[key] = weakref.ref(tensor, forget)

    def _name(self, tensor: Tensor, value: Value) -> None:
        self._watch(tensor)
        self._names.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))
        self._values[id(tensor)] = value


class Recorder(_Notes, TorchDispatchMode):
    """Notes the ops of one forward pass on ``input``."""

    def __init__(
        self, input: Tensor, names: Mapping[int, str] | None = None, compute: bool = True
    ) -> None:
        TorchDispatchMode.__init__(self)
        _Notes.__init__(self, input, names, compute)


def _in_pairs(stride: Any, padding: Any, dilation: Any) -> tuple[list[int], list[int], list[int]]:
    """aten.convolution's geometry, whose lists may have one number for both axes, as ops take it:
    stride, padding as (left, right, top, bottom), dilation."""
    stride, padding, dilation = ((list(each) * 2)[:2] for each in (stride, padding, dilation))
    return stride, [padding[1]] * 2 + [padding[0]] * 2, dilation


def _tensors(*values: Any) -> list[Tensor]:
    """The tensors among arguments or results (tree_flatten takes a tenth of a recording)."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(*value)
    return found


def _same_in_memory(tensor: Tensor, size: Any, stride: Any, offset: Any = None) -> bool:
    """These strides address the dense vectors [N, C, 1, 1] as any others would.

    adaptive_avg_pool2d does this to its result, to make it look like channels_last.
    """
    vectors = tuple(tensor.shape[2:]) == (1, 1) and tuple(size) == tuple(tensor.shape)
    return vectors and tuple(stride[:2]) == (tensor.shape[1], 1) and not offset


# From an op's arguments to its step, whose output is not known yet; None if it has none.


def _lower_conv(kernels: Any, args: tuple[Any, ...], input: Value, find: Any) -> Step | None:
    *front, residual, activation = args
    if residual is not None and find(residual) is None:
        return None
    packed = kernels.pack_conv(*front, activation)
    step = Step(Kind.CONV, input, input, packed.weights, packed.activations, packed.geometry)
    step.residual, step.planar = find(residual), kernels.is_planar(args[0])
    return step


def _lower_pointwise_conv(
    kernels: Any, args: tuple[Any, ...], input: Value, find: Any
) -> Step | None:
    x, weight, scale, bias, gate, residual, activation, _ = args
    if gate is not None or (residual is not None and find(residual) is None):
        return None
    packed = kernels.pack_pointwise_conv(x, weight, scale, bias, activation)
    step = Step(Kind.POINTWISE_CONV, input, input, packed.weights, packed.activations)
    step.residual, step.source = find(residual), weight
    return step


def _lower_depthwise_conv(
    kernels: Any, args: tuple[Any, ...], input: Value, find: Any
) -> Step | None:
    packed = kernels.pack_depthwise_conv(*args[:-1])
    kind = Kind.DEPTHWISE_CONV
    return Step(kind, input, input, packed.weights, packed.activations, packed.geometry)


def _lower_mbconv(kernels: Any, args: tuple[Any, ...], input: Value, find: Any) -> Step | None:
    packed = kernels.pack_mbconv(*args)
    step = Step(Kind.MBCONV, input, input, packed.weights, packed.activations, packed.geometry)
    if args[1 + MBCONV_RESIDUAL]:
        step.residual = input
    return step


def _lower_squeeze_excite(
    kernels: Any, args: tuple[Any, ...], input: Value, find: Any
) -> Step | None:
    weights, activations = kernels.pack_squeeze_excite(*args[1:])
    return Step(Kind.SQUEEZE_EXCITE, input, input, weights, activations)


def _lower_silu(kernels: Any, args: tuple[Any, ...], input: Value, find: Any) -> Step | None:
    return Step(Kind.SILU, input, input, (), activation_codes([args[1]]))


_LOWER: dict[str, Callable[[Any, tuple[Any, ...], Value, Any], Step | None]] = {
    "conv": _lower_conv,
    "pointwise_conv": _lower_pointwise_conv,
    "depthwise_conv": _lower_depthwise_conv,
    "mbconv": _lower_mbconv,
    "squeeze_excite": _lower_squeeze_excite,
    "silu": _lower_silu,
}
