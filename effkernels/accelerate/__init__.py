"""Other libraries' models on this library's kernels, in place."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import TypeVar

from torch import nn

from ..modules.plan import Planned
from .kinds import Adapted

__all__ = ["accelerate", "check_model", "restore"]

# Libraries with an adapter: the module of that name in this package. Each is imported only once
# the library itself has been: without it there can be no model of it.
LIBRARIES = ("torchvision", "timm", "efficientnet_pytorch", "efficientnet_lite_pytorch")

_adapters: dict[type[nn.Module], type[Adapted]] = {}
_imported: set[str] = set()
_said: set[type[nn.Module]] = set()

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Let ``model`` run on this library's kernels wherever it can.

    Blocks and networks of torchvision, timm, ``efficientnet_pytorch`` and
    ``efficientnet_lite_pytorch`` are recognised by their exact class and get a subclass of it as
    their class, in place. Nothing else about them changes: parameters, state dict, hooks, copies,
    pickles, ``isinstance`` are as before. In evaluation without gradients a recognised block or
    network is one native call where possible; in training an inverted residual is one op where
    possible, and elsewhere BatchNorm with its activation. Whatever is not recognised runs as
    before. This library's own models need no acceleration.

    Args:
        model: any module.

    Returns:
        ``model`` itself. If nothing in it is recognised, a warning says so, once per class.

    Raises:
        TypeError: if ``model`` is no ``nn.Module``.
        ValueError: if it has parameters on the meta device, or quantized ones.
    """
    check_model("accelerate", model)
    known = _known_classes()
    found = False
    for module in model.modules():
        adapter = known.get(type(module))
        if adapter is not None:
            module.__class__ = adapter
        found = found or isinstance(module, (Adapted, Planned))
    if not found and type(model) not in _said:
        _said.add(type(model))
        warnings.warn(
            f"accelerate: nothing in {type(model).__name__} is recognised, it runs as before; "
            "freeze takes any model for inference",
            stacklevel=2,
        )
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`: give every module its original class back, in place.

    Raises:
        TypeError: if ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model is {type(model).__name__}, a torch.nn.Module is accepted")
    for module in model.modules():
        if isinstance(module, Adapted):
            module.__dict__.pop("_plans", None)
            module.__class__ = module.accelerates()  # type: ignore[assignment]
    return model


def check_model(function: str, model: object) -> None:
    """``model`` is a module that has memory and floating-point values.

    Raises:
        TypeError, ValueError: as :func:`accelerate` says.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}: model is {type(model).__name__}, a torch.nn.Module is accepted"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta or tensor.is_quantized:
            what = "on the meta device" if tensor.is_meta else "quantized"
            raise ValueError(f"{function}: {name} is {what}, a plain tensor is accepted")
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torchao.")):
            raise ValueError(f"{function}: {name or 'model'} is quantized, nn.Conv2d is accepted")


def _known_classes() -> dict[type[nn.Module], type[Adapted]]:
    """Every class with an adapter, as far as its library has been imported."""
    for library in LIBRARIES:
        if library in sys.modules and library not in _imported:
            adapters = importlib.import_module(f".{library}", __name__).ADAPTERS
            _adapters.update({adapter.accelerates(): adapter for adapter in adapters})
            _imported.add(library)
    return _adapters
