"""Inference-only copies of networks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .accelerate import check_model, restore
from .cache import generation
from .dispatch import requested
from .kernels import kernels_for
from .modules.fused import convolution_kind
from .modules.hooks import has_global_hooks, is_untouched
from .modules.plan import Planned, is_observed
from .native import can_run, prepack
from .program import Replay
from .record import record

__all__ = ["Frozen", "freeze"]

_MOST_REPLAYS = 8  # a network that sees many input sizes should not collect them all
_version = torch.Tensor._version.__get__  # type: ignore[attr-defined]


def freeze(model: nn.Module) -> Frozen:
    """An inference-only copy of ``model``, as fast as this library can run it.

    BatchNorms are folded into the convolutions before them (in float64), weights are packed, and
    from the first call with an input size on, the forward pass is replayed as it was recorded:
    convolutions with their normalisations, activations, additions and whole inverted residuals as
    single kernels, one native call for as much of the network as these make up. Any PyTorch model
    may be frozen; what the kernels do not know runs as PyTorch's ops. A forward pass that depends
    on more than its input and its parameters (a random number, a counter) is left as it is; one
    that depends on a Python attribute, or asks for the batch size, keeps doing what it did when the
    image size was first seen.

    Args:
        model: left unchanged. In training mode, the copy is put into evaluation and a warning says
            so.

    Returns:
        A module of the same inputs and outputs, for any batch and image size. Its state dict is its
        own: folded weights under ``model.``, without the BatchNorms.

    Raises:
        TypeError: if ``model`` is no ``nn.Module``.
        ValueError: if it has parameters on the meta device, or quantized ones.
    """
    check_model("freeze", model)
    if isinstance(model, Frozen):
        return copy.deepcopy(model)
    if model.training:
        warnings.warn(
            "freeze: model is in training mode, its copy is put into evaluation", stacklevel=2
        )
    frozen = restore(copy.deepcopy(model)).eval().requires_grad_(False)
    _fold(frozen)
    for conv in frozen.modules():
        if isinstance(conv, nn.Conv2d) and can_run(conv.weight) is None:
            kind = convolution_kind(conv)
            if kind is not None:
                prepack(conv.weight, conv.stride, conv.dilation, kind == "depthwise")
    return Frozen(frozen)


class Frozen(nn.Module):
    """What :func:`freeze` returns; ``model`` is the folded network.

    Changes of its parameters in place and by ``load_state_dict`` are noticed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self._replays: dict[Hashable, _Kept] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        if torch.compiler.is_compiling() or len(args) != 1 or kwargs:
            return self.model(*args, **kwargs)
        (input,) = args
        choice = requested()
        if (
            not isinstance(input, Tensor)
            or (torch.is_grad_enabled() and input.requires_grad)
            or kernels_for(input) is None
            or is_observed(input)
            or has_global_hooks()
        ):
            return self.model(input)
        key = (input.shape[1:], input.dtype, input.device, choice)
        exact = (key, input.shape[0])
        kept = self._replays.get(key) or self._replays.get(exact)
        with torch.no_grad():
            if kept is None or not kept.valid():
                kept = _Kept(self.model)
                output, kept.replay = record(self.model, input, pure=True)
                if len(self._replays) >= _MOST_REPLAYS:
                    self._replays.clear()
                any_batch = kept.replay is None or kept.replay.any_batch
                self._replays[key if any_batch else exact] = kept
                return output
            if kept.replay is None or kept.watched():
                return self.model(input)
            return kept.replay(input)

    def train(self, mode: bool = True) -> Frozen:
        """Evaluation is all there is.

        Raises:
            RuntimeError: if ``mode``.
        """
        if mode:
            raise RuntimeError("freeze: a frozen model cannot train; train the model it came from")
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Frozen:
        """Gradients of the parameters are not to be had.

        Raises:
            RuntimeError: if ``requires_grad``.
        """
        if requires_grad:
            raise RuntimeError("freeze: a frozen model cannot train; train the model it came from")
        return super().requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_replays": {}}


class _Kept:
    """A replay, valid as long as the tensors are what they were."""

    def __init__(self, model: nn.Module) -> None:
        self.replay: Replay | None = None
        self._generation = generation()
        modules = tuple(model.modules())  # once: walking them is a tenth of a first call
        self._tensors = tuple(
            dict.fromkeys(
                tensor
                for module in modules
                for tensor in (*module._parameters.values(), *module._buffers.values())
                if tensor is not None
            )
        )
        self._tracked = not any(tensor.is_inference() for tensor in self._tensors)
        self._versions = tuple(map(_version, self._tensors)) if self._tracked else ()
        self._pointers = tuple(map(Tensor.data_ptr, self._tensors))
        self._hooks = tuple(
            hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)
        )

    def watched(self) -> bool:
        """Somebody wants to see a module being called."""
        return any(self._hooks)

    def valid(self) -> bool:
        return (
            self._generation == generation()
            and (not self._tracked or tuple(map(_version, self._tensors)) == self._versions)
            and tuple(map(Tensor.data_ptr, self._tensors)) == self._pointers
        )


def _fold(model: nn.Module) -> None:
    """Fold every BatchNorm that directly follows a convolution, in place."""
    names = {module: name for name, module in model.named_modules()}
    uses = _uses(model)
    for conv, norm in _pairs(model):
        mean, var = norm.running_mean, norm.running_var
        if uses.get(conv) != 1 or uses.get(norm) != 1 or mean is None or var is None:
            continue
        weight, bias = fuse_conv_bn_weights(
            conv.weight.double(),
            None if conv.bias is None else conv.bias.double(),
            mean.double(),
            var.double(),
            norm.eps,
            None if norm.weight is None else norm.weight.double(),
            None if norm.bias is None else norm.bias.double(),
        )
        dtype = conv.weight.dtype
        conv.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        conv.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        parent, _, child = names[norm].rpartition(".")
        # timm's BatchNormAct2d has its activation inside.
        setattr(model.get_submodule(parent), child, getattr(norm, "act", None) or nn.Identity())


def _uses(model: nn.Module) -> dict[nn.Module, int]:
    """How many names every module has."""
    uses: dict[nn.Module, int] = {}
    for module in model.modules():
        for child in module.children():
            uses[child] = uses.get(child, 0) + 1
    return uses


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions in ``module`` with the BatchNorm that their output goes to, and nowhere else."""
    stages = getattr(module, "conv_norms", None)
    if stages is not None:
        for stage in stages():
            if _foldable(stage.conv, stage.norm):
                yield stage.conv, stage.norm
    elif (graph := _trace(module)) is not None:
        for node in graph.nodes:
            if node.op != "call_module" or len(node.users) != 1:
                continue
            (user,) = node.users
            if user.op != "call_module" or user.args != (node,) or user.kwargs:
                continue
            first, second = module.get_submodule(node.target), module.get_submodule(user.target)
            if _foldable(first, second):
                yield first, second  # type: ignore[misc]
        leaves = {node.target for node in graph.nodes if node.op == "call_module"}
        for name in leaves:
            yield from _pairs(module.get_submodule(name))
        return
    for child in module.children():
        yield from _pairs(child)


def _foldable(conv: nn.Module, norm: nn.Module) -> bool:
    return (
        isinstance(conv, nn.Conv2d)
        and isinstance(norm, nn.BatchNorm2d)
        and norm.running_mean is not None
        and is_untouched(conv)
        and is_untouched(norm)
    )


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, (Planned, nn.Conv2d, nn.BatchNorm2d))
            or hasattr(m, "conv_norms")
            or super().is_leaf_module(m, module_qualified_name)
        )


def _trace(module: nn.Module) -> fx.Graph | None:
    """The module's own forward pass as a graph of its children; None if it has no such thing."""
    if not any(True for _ in module.children()):
        return None
    try:
        return _Tracer().trace(module)
    except Exception:  # whatever a foreign forward pass raises on symbols
        return None
