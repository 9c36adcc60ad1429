"""Checkpoints of other libraries, recognised by their keys and converted strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effkernels.modules import FusedMBConv, SqueezeExcite

from .efficientnet import EfficientNet, EfficientNetFeatures
from .foreign_names import lukemelas_names, torchvision_names
from .resnet import ResNet, ResNetFeatures

OP = "load_checkpoint"
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys that training scripts save under
PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile
OPTIONAL = ".num_batches_tracked"  # counters that checkpoints from before torch 0.4.1 lack
LISTED = 5  # keys named in an error before "and N more"
LIBRARIES = ("timm", "torchvision", "efficientnet_pytorch", "efficientnet_lite_pytorch")


class LoadResult(NamedTuple):
    """What ``strict=False`` let pass."""

    missing: list[str]  # keys of the model that the checkpoint lacks
    unexpected: list[str]  # keys of the checkpoint that the model lacks


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    strict: bool = True,
) -> LoadResult:
    """Copy a checkpoint into ``model``; on any error ``model`` is as before.

    Keys of this library and timm, torchvision, ``efficientnet_pytorch`` and
    ``efficientnet_lite_pytorch`` are recognised. BatchNorm's eps and the padding are no
    part of a checkpoint: give them to ``create_model`` where the source's differ
    (``efficientnet_pytorch`` pads ``"same"``). A model without a head (``num_classes=0``,
    ``features_only=True``) leaves a checkpoint's head unread.

    Args:
        model: one of ``list_models()``, or any module if the keys already are its own.
        checkpoint: file written by ``torch.save`` (read with ``weights_only=True``) or a state
            dict; either may be wrapped in a dict under ``state_dict``, ``model`` or
            ``model_state_dict``, with ``module.`` before every key.
        strict: False lets keys be missing or left over; shapes have to agree all the same.

    Raises:
        FileNotFoundError: if the file is missing.
        TypeError: if ``checkpoint`` is no path and no mapping.
        ValueError: for a file that is no checkpoint, or a checkpoint with no weights in it.
        RuntimeError: for missing, left over or misshapen keys, all named.
    """
    source, loaded = _read(checkpoint)
    state = _unwrapped(source, loaded)
    targets = model.state_dict()
    if any(tensor.is_meta for tensor in targets.values()):
        raise ValueError(f"{OP}: model is on the meta device, give it memory first (to_empty)")
    names = _names(model, state)
    converted: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for key, tensor in state.items():
        name = _renamed(key, names)
        if name in converted:
            raise RuntimeError(f"{OP}: {source}: {origins[name]} and {key} both mean {name}")
        converted[name], origins[name] = tensor, key

    headless = _absent_prefixes(model)
    missing = [k for k in targets if k not in converted and not k.endswith(OPTIONAL)]
    unexpected = [origins[k] for k in converted if k not in targets and not k.startswith(headless)]
    misshapen = [
        f"{origins[k]} has shape {tuple(tensor.shape)}, the model's {k} has "
        f"{tuple(targets[k].shape)}"
        for k, tensor in converted.items()
        if k in targets and tensor.shape != targets[k].shape
    ]
    problems = [("misshapen", misshapen)]
    if strict:
        problems += [("missing", missing), ("left over", unexpected)]
    lines = [f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in problems if keys]
    if lines:
        raise RuntimeError(f"{OP}: {source} does not fit the model; " + "; ".join(lines))
    model.load_state_dict({k: t for k, t in converted.items() if k in targets}, strict=False)
    return LoadResult(missing, unexpected)


def convert_state_dict(model: nn.Module, to: str) -> dict[str, Tensor]:
    """``model``'s state dict as another library's network of the same kind loads it, strictly.

    Args:
        model: one of ``list_models()``.
        to: ``"timm"``, ``"torchvision"``, ``"efficientnet_pytorch"`` or
            ``"efficientnet_lite_pytorch"``.

    Returns:
        The same tensors under ``to``'s keys.

    Raises:
        ValueError: if ``to`` is another library, or one that has no such network.
    """
    if to not in LIBRARIES:
        raise ValueError(
            f"convert_state_dict: to is {to!r}, one of {', '.join(LIBRARIES)} is accepted"
        )
    accepted = _libraries_with(model)
    if to not in accepted:
        raise ValueError(
            f"convert_state_dict: {to} has no network like this {type(model).__name__}, "
            f"{' or '.join(accepted) or 'none of the libraries'} has"
        )
    theirs: dict[str, str] = {}
    if to != "timm":
        names = torchvision_names(model) if to == "torchvision" else lukemelas_names(model)
        theirs = {ours: name for name, ours in names.items()}
    return {_renamed(key, theirs): tensor for key, tensor in model.state_dict().items()}


def _libraries_with(model: nn.Module) -> list[str]:
    """Libraries that have a network like ``model``."""
    squeezes = any(isinstance(module, SqueezeExcite) for module in model.modules())
    if isinstance(model, (ResNet, ResNetFeatures)):
        return ["timm"] if squeezes else ["timm", "torchvision"]
    if not isinstance(model, (EfficientNet, EfficientNetFeatures)):
        return []
    if any(isinstance(module, FusedMBConv) for module in model.modules()):  # V2
        return ["timm", "torchvision"]
    if squeezes:
        return ["timm", "torchvision", "efficientnet_pytorch"]
    return ["timm", "efficientnet_lite_pytorch"]


def _listed(keys: list[str]) -> str:
    more = f", and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return ", ".join(keys[:LISTED]) + more


def _read(checkpoint: Any) -> tuple[str, Any]:
    """What errors call the checkpoint, and what is in it."""
    if isinstance(checkpoint, Mapping):
        return "the state dict", checkpoint
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(
            f"{OP}: checkpoint is {type(checkpoint).__name__}, a path or a mapping is accepted"
        )
    path = os.fspath(checkpoint)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{OP}: {path} does not exist")
    try:
        return path, torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever pickle, zipfile and its reader do
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{OP}: {path} is not a checkpoint that torch.load(weights_only=True) can read, "
            f"or it is truncated: {reason[0]}"
        ) from error


def _unwrapped(source: str, loaded: Any) -> dict[str, Tensor]:
    """The state dict in what was loaded, without wrappers and prefixes."""
    for wrapper in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        kind = "nothing" if isinstance(loaded, Mapping) else type(loaded).__name__
        raise ValueError(f"{OP}: {source} holds {kind}, a dict of tensors is accepted")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{OP}: {source} holds {type(value).__name__} under {key!r}, tensors under names "
                f"are accepted (or a dict of them under {', '.join(WRAPPERS)})"
            )
    state = dict(loaded)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _absent_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Parts of the full network that ``model`` was built without."""
    if isinstance(model, EfficientNetFeatures):
        return ("conv_head.", "bn2.", "classifier.")
    if isinstance(model, ResNetFeatures):
        return ("fc.",)
    if isinstance(model, (EfficientNet, ResNet)) and not model.num_classes:
        return ("classifier.", "fc.")
    return ()


def _names(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, str]:
    """``model``'s module names by those of the library that ``state``'s keys are from."""
    if any(key.startswith("_conv_stem.") for key in state):
        return lukemelas_names(model)
    if any(key.startswith("features.0.0.") for key in state):
        return torchvision_names(model)
    return {}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """``key`` with its module's other name; one that has none stays as it is."""
    module, _, leaf = key.rpartition(".")
    return f"{names[module]}.{leaf}" if module in names else key
