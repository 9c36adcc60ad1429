"""Checkpoints of other libraries, recognised by their keys and converted strictly."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effkernels.modules import MBConv

from .efficientnet import EfficientNet, EfficientNetFeatures

OP = "load_checkpoint"
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys that training scripts save under
PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile
OPTIONAL = ".num_batches_tracked"  # counters that checkpoints from before torch 0.4.1 lack
LISTED = 5  # keys named in an error before "and N more"


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
    ``efficientnet_lite_pytorch`` are recognised. BatchNorm's eps is no part of a checkpoint: give
    it to ``create_model`` where the source's differs. A model without a head (``num_classes=0``,
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
    rename = _renaming(model, state)
    converted: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for key, tensor in state.items():
        name = rename(key)
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
    if isinstance(model, EfficientNet) and not model.num_classes:
        return ("classifier.",)
    return ()


def _renaming(model: nn.Module, state: Mapping[str, Tensor]) -> Callable[[str], str]:
    """From a checkpoint's keys to ``model``'s; a key that means nothing stays as it is."""
    if isinstance(model, (EfficientNet, EfficientNetFeatures)):
        layout = _block_layout(model)
        if any(key.startswith("_conv_stem.") for key in state):
            return lambda key: _from_lukemelas(key, layout)
        if any(key.startswith("features.0.0.") for key in state):
            return lambda key: _from_torchvision(key, layout)
    return lambda key: key


class _Block(NamedTuple):
    """A block's place and which of timm's two namings it has."""

    stage: int
    position: int
    expands: bool


def _block_layout(model: EfficientNet | EfficientNetFeatures) -> list[_Block]:
    return [
        _Block(stage, position, isinstance(block, MBConv) and block.has_expansion)
        for stage, blocks in enumerate(model.blocks.children())
        for position, block in enumerate(blocks.children())
    ]


def _joined(names: Mapping[str, str], part: str, leaf: str, fallback: str) -> str:
    return f"{names[part]}.{leaf}" if part in names else fallback


# efficientnet_pytorch and efficientnet_lite_pytorch: blocks are counted through.
_LUKEMELAS_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_LUKEMELAS_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_LUKEMELAS_SEPARABLE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def _from_lukemelas(key: str, layout: list[_Block]) -> str:
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if inside is None:
        part, _, leaf = key.rpartition(".")
        return _joined(_LUKEMELAS_OUTSIDE, part, leaf, key)
    index = int(inside[1])
    if index >= len(layout):
        return key
    block = layout[index]
    names = _LUKEMELAS_EXPANDING if block.expands else _LUKEMELAS_SEPARABLE
    name = _joined(names, inside[2], inside[3], "")
    return f"blocks.{block.stage}.{block.position}.{name}" if name else key


# torchvision: features.<0: stem, 1 to 7: stages, 8: head>, numbered children.
_TORCHVISION_OUTSIDE = {
    "features.0.0": "conv_stem",
    "features.0.1": "bn1",
    "features.8.0": "conv_head",
    "features.8.1": "bn2",
    "classifier.1": "classifier",
}
_TORCHVISION_EXPANDING = {
    "0.0": "conv_pw",
    "0.1": "bn1",
    "1.0": "conv_dw",
    "1.1": "bn2",
    "2.fc1": "se.conv_reduce",
    "2.fc2": "se.conv_expand",
    "3.0": "conv_pwl",
    "3.1": "bn3",
}
_TORCHVISION_SEPARABLE = {
    "0.0": "conv_dw",
    "0.1": "bn1",
    "1.fc1": "se.conv_reduce",
    "1.fc2": "se.conv_expand",
    "2.0": "conv_pw",
    "2.1": "bn2",
}


def _from_torchvision(key: str, layout: list[_Block]) -> str:
    inside = re.fullmatch(r"features\.(\d+)\.(\d+)\.block\.(\w+\.\w+)\.(\w+)", key)
    if inside is None:
        part, _, leaf = key.rpartition(".")
        return _joined(_TORCHVISION_OUTSIDE, part, leaf, key)
    place = (int(inside[1]) - 1, int(inside[2]))
    for block in layout:
        if (block.stage, block.position) == place:
            names = _TORCHVISION_EXPANDING if block.expands else _TORCHVISION_SEPARABLE
            name = _joined(names, inside[3], inside[4], "")
            return f"blocks.{block.stage}.{block.position}.{name}" if name else key
    return key
