"""How much memory a network needs, predicted from what runs and what has to be kept.

The network runs on the meta device, where tensors have a shape and no contents: one inference, or
one training step of forward, loss, backward and optimizer. The prediction follows from the ops
that run, from what autograd saves and from when tensors die, so it holds for any module. What a
kernel keeps to itself is added by rule.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effkernels import native
from effkernels.dispatch import operators, use_backend
from effkernels.modules import arguments

MODES = ("inference", "training")
# How each is built; no option matters to what it keeps per parameter. `foreach`, which is for
# GPUs, would have temporaries of all parameters at once.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=False),
    "adam": functools.partial(torch.optim.Adam, foreach=False),
}
_UNPACKED = "reduce_weight"  # of squeeze-and-excitation, which is read as it is
_FLOAT = torch.float32.itemsize


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment when most are in use, by what they are for."""

    weights: int  # parameters and buffers
    packed: int  # weights once more, as the CPU kernels read them
    gradients: int  # of parameters
    optimizer: int  # its state
    activations: int  # with the images. Inference: what lives at once; training: saved for backward
    workspace: int  # what ops need while they run; in training also gradients of activations

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def to_dict(self) -> dict[str, int]:
        """Parts and total for JSON."""
        return asdict(self) | {"total": self.total}


def memory(
    model: nn.Module,
    input_shape: Sequence[int],
    batch: int = 1,
    mode: str = "inference",
    optimizer: str = "sgd",
    kernels: bool | None = None,
) -> Memory:
    """What ``model`` needs at the peak of an inference or of a training step, predicted.

    Nothing is computed; ``model`` may be on the meta device and is left as it is. Counted is what
    is in use, in float32, from the second call on. Not counted are PyTorch itself, the code that
    oneDNN compiles for each layer that it computes, and what the allocator holds back: of a process
    that trained, with glibc's malloc as it comes, up to 1.6 times as much was resident.

    Args:
        model: takes [N, C, H, W] and gives [N, classes], as the networks of this library.
        input_shape: of one image, (C, H, W).
        batch: images at once.
        mode: ``"inference"`` (evaluation mode, no gradients) or ``"training"`` (a step with
            cross entropy).
        optimizer: ``"sgd"`` (with momentum) or ``"adam"``.
        kernels: whether the CPU kernels run, which pack weights and keep a block's inner tensors
            to themselves, or the reference; None: as here.

    Raises:
        ValueError: naming the argument, what came and what is accepted; from ``model`` for an
            image that it cannot take.
    """
    arguments.positive("memory", "batch", batch)
    for name, value, accepted in (("mode", mode, MODES), ("optimizer", optimizer, OPTIMIZERS)):
        if value not in accepted:
            listed = " or ".join(repr(choice) for choice in accepted)
            raise ValueError(f"memory: {name} is {value!r}, {listed} is accepted")
    if kernels is None:
        kernels = native.load_error() is None
    with torch.no_grad():
        twin = copy.deepcopy(model).to("meta").train(mode == "training")
    image = torch.empty(batch, *input_shape, device="meta")
    if mode == "training":
        return _training(twin, image, OPTIMIZERS[optimizer], kernels)
    return _replay(twin, image) if kernels else _inference(twin, image)


def _replay(model: nn.Module, image: Tensor) -> Memory:
    """Of a forward pass that :mod:`effkernels.program` replays.

    Between kernels of this library values lie in an arena, each until its last use. Other ops cut
    the replay into parts, and what they read and write is kept until the end.
    """
    notes = _Notes(image)
    with torch.no_grad(), notes:
        model(image)
    last = {key: index for index, op in enumerate(notes.ops) for key in (*op.reads, *op.writes)}
    kept = {
        key: size
        for op in notes.ops
        if not op.is_kernel
        for key, size in {**op.reads, **op.writes}.items()
    }
    kept[_key(image)] = image.untyped_storage().nbytes()
    arena, living = 0, dict[int, int]()
    for index, op in enumerate(notes.ops):
        living = {key: size for key, size in living.items() if last[key] >= index}
        living |= {key: size for key, size in op.writes.items() if key not in kept}
        arena = max(arena, sum(living.values()))
    linear = sum(  # packed as pointwise convolutions
        native.packed_bytes(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )
    return Memory(
        weights=_bytes([*model.parameters(), *model.buffers()]),
        packed=sum(notes.packed.values()) + linear,
        gradients=0,
        optimizer=0,
        activations=sum(kept.values()) + arena,
        workspace=notes.block * (torch.get_num_threads() if len(image) > 1 else 1),
    )


def _inference(model: nn.Module, image: Tensor) -> Memory:
    """Of a forward pass in plain PyTorch."""
    meter = _Meter(kernels=False)
    meter.count("weights", [*model.parameters(), *model.buffers()])
    meter.count("activations", [image])
    with torch.no_grad(), meter:
        model(image)
    peak = meter.peak
    peak["activations"] += peak.pop("workspace")
    return Memory(**peak, workspace=0)


def _training(
    model: nn.Module,
    image: Tensor,
    optimizer_of: Callable[..., torch.optim.Optimizer],
    kernels: bool,
) -> Memory:
    """Of a step that is not the first, so that the optimizer has its state."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(parameters)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    labels = torch.zeros(len(image), dtype=torch.long, device="meta")
    meter = _Meter(kernels)
    meter.count("weights", [*model.parameters(), *model.buffers()])
    meter.count("optimizer", tree_leaves([dict(state) for state in optimizer.state.values()]))
    meter.count("activations", [image, labels])
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(meter.keep_gradient)
    with use_backend("native" if kernels else "reference"), meter:
        loss = F.cross_entropy(model(image), labels)
        meter.rename("workspace", "activations")
        loss.backward()
        optimizer.step()
    return Memory(**meter.peak)


def _key(tensor: Tensor) -> int:
    """What a tensor shares with its views, and with no other while it lives."""
    return tensor.untyped_storage()._cdata


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _packed(function: Any, args: Sequence[Any], outputs: Any) -> dict[int, int]:
    """Bytes of the copies of weights that a kernel makes and keeps, by the weights' storages."""
    found = {}
    for argument, weight in zip(function._schema.arguments, args, strict=False):
        name = argument.name
        if not name.endswith("weight") or name.endswith(_UNPACKED):
            continue
        if weight is None or weight.dim() < 2:  # a BatchNorm's
            continue
        width = 0
        if function._schema.name == "effkernels::conv":
            _, _, _, _, stride, _, dilation, *_ = args
            width = native.winograd_width(weight, stride, dilation, outputs.shape[2:])
        found[_key(weight)] = native.packed_bytes(weight, width)
    return found


def _inner_bytes(function: Any, args: Sequence[Any]) -> int:
    """What an op needs beside its outputs while it runs, as far as it counts."""
    if function is torch.ops.aten.convolution_backward.default:
        return 2 * _bytes([args[2]])  # oneDNN's own layouts of the weight and of its gradient
    if function is torch.ops.effkernels.mbconv_training_backward.default:
        _, (expanded, hidden, *_), *_ = args
        return _bytes([expanded, hidden])  # the gradients for what these become
    return 0


@dataclass(frozen=True)
class _Op:
    """An op on something that depends on the image: bytes of what it reads and writes."""

    is_kernel: bool
    reads: dict[int, int]
    writes: dict[int, int]


class _Notes(TorchDispatchMode):
    """The ops of a forward pass. Their tensors are kept, so that no two have one storage."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.ops: list[_Op] = []
        self.packed: dict[int, int] = {}
        self.block = 0  # what a block's depthwise convolution gives, of one image
        self._sizes = {_key(image): image.untyped_storage().nbytes()}
        self._kept: list[Tensor] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = function(*args, **(kwargs or {}))
        results = _tensors(outputs)
        self._kept += results
        is_kernel = function.namespace == "effkernels"
        if is_kernel:
            self.packed |= _packed(function, args, outputs)
        if function._schema.name == "effkernels::mbconv":
            # csrc/mbconv/cpu.cpp, run_image: `hidden`, a buffer of each thread
            depthwise_weight = args[4]
            pixels = outputs.shape[2] * outputs.shape[3]
            self.block = max(self.block, pixels * depthwise_weight.shape[0] * _FLOAT)
        reads = {key: self._sizes[key] for key in map(_key, _tensors(args)) if key in self._sizes}
        writes = {
            _key(result): result.untyped_storage().nbytes()
            for result in results
            if _key(result) not in reads
        }
        if reads and writes:  # neither a view nor made of weights alone
            self._sizes |= writes
            self.ops.append(_Op(is_kernel, reads, writes))
        return outputs


class _Meter(TorchDispatchMode):
    """Bytes of living storages by kind, and what they were at the peak.

    Args:
        kernels: the CPU kernels run, else the reference implementations.
    """

    def __init__(self, kernels: bool) -> None:
        super().__init__()
        self._kernels = kernels
        self._kinds: dict[int, tuple[str, int]] = {}  # storage -> its kind, its bytes
        self._references: dict[int, weakref.ref[Any]] = {}
        self._packed: set[int] = set()
        self._bytes = dict.fromkeys((field.name for field in fields(Memory)), 0)
        self.peak = dict(self._bytes)

    def count(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Tensors that are there, or new."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._kinds:
                continue
            self._kinds[key] = kind, storage.nbytes()
            # PyTorch keeps the storage's Python object for as long as the storage.
            self._references[key] = weakref.ref(storage, functools.partial(self._forget, key))
            self._add(kind, storage.nbytes())

    def rename(self, old: str, new: str) -> None:
        """What lives is of another kind from now on."""
        for key, (kind, size) in self._kinds.items():
            if kind == old:
                self._kinds[key] = new, size
        self._bytes[new] += self._bytes[old]
        self._bytes[old] = 0

    def keep_gradient(self, parameter: Tensor) -> None:
        """A hook: the parameter's gradient is no longer in the works."""
        assert parameter.grad is not None
        key = _key(parameter.grad)
        kind, size = self._kinds[key]
        self._kinds[key] = "gradients", size
        self._bytes[kind] -= size
        self._bytes["gradients"] += size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kernel = operators.get(function._opname) if function.namespace == "effkernels" else None
        if kernel is not None and not self._kernels:
            with self:
                return kernel.implementations["reference"].run(*args)
        outputs = function(*args, **(kwargs or {}))
        self.count("workspace", _tensors(outputs))
        if kernel is not None:
            for key, size in _packed(function, args, outputs).items():
                if key not in self._packed:
                    self._packed.add(key)
                    self._add("packed", size)
        inner = _inner_bytes(function, args)
        self._add("workspace", inner)
        self._bytes["workspace"] -= inner
        return outputs

    def _add(self, kind: str, size: int) -> None:
        self._bytes[kind] += size
        if sum(self._bytes.values()) > sum(self.peak.values()):
            self.peak = dict(self._bytes)

    def _forget(self, key: int, _: Any) -> None:
        kind, size = self._kinds.pop(key)
        del self._references[key]
        self._bytes[kind] -= size
