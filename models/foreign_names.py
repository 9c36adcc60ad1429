"""What other libraries call an EfficientNet's modules; their ResNets have torchvision's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from effkernels.modules import FusedMBConv, MBConv

from .efficientnet import EfficientNet, EfficientNetFeatures


def torchvision_names(model: nn.Module) -> dict[str, str]:
    """From torchvision's module names to ``model``'s, its head's even if it was built without.

    torchvision counts the stem, the stages and the head as ``features.<i>``, and the children of
    a block.
    """
    if not isinstance(model, (EfficientNet, EfficientNetFeatures)):
        return {}
    head = len(model.blocks) + 1
    names = {
        "features.0.0": "conv_stem",
        "features.0.1": "bn1",
        f"features.{head}.0": "conv_head",
        f"features.{head}.1": "bn2",
        "classifier.1": "classifier",
    }
    for stage, position, block in _blocks(model):
        children = _TORCHVISION[_kind(block)]
        names |= _prefixed(
            children, f"features.{stage + 1}.{position}.block", f"blocks.{stage}.{position}"
        )
    return names


def lukemelas_names(model: nn.Module) -> dict[str, str]:
    """From the module names of efficientnet_pytorch and efficientnet_lite_pytorch to ``model``'s.

    Their blocks are counted through.
    """
    if not isinstance(model, (EfficientNet, EfficientNetFeatures)):
        return {}
    names = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    for index, (stage, position, block) in enumerate(_blocks(model)):
        children = _LUKEMELAS.get(_kind(block), {})
        names |= _prefixed(children, f"_blocks.{index}", f"blocks.{stage}.{position}")
    return names


def _blocks(model: EfficientNet | EfficientNetFeatures) -> Iterator[tuple[int, int, nn.Module]]:
    for stage, blocks in enumerate(model.blocks.children()):
        for position, block in enumerate(blocks.children()):
            yield stage, position, block


def _kind(block: nn.Module) -> tuple[bool, bool]:
    """(is a FusedMBConv, has an expansion): what the names of its children depend on."""
    fused = isinstance(block, FusedMBConv)
    return fused, isinstance(block, (MBConv, FusedMBConv)) and block.has_expansion


def _prefixed(children: Mapping[str, str], theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{key}": f"{ours}.{name}" for key, name in children.items()}


_TORCHVISION = {
    (False, True): {
        "0.0": "conv_pw",
        "0.1": "bn1",
        "1.0": "conv_dw",
        "1.1": "bn2",
        "2.fc1": "se.conv_reduce",
        "2.fc2": "se.conv_expand",
        "3.0": "conv_pwl",
        "3.1": "bn3",
    },
    (False, False): {
        "0.0": "conv_dw",
        "0.1": "bn1",
        "1.fc1": "se.conv_reduce",
        "1.fc2": "se.conv_expand",
        "2.0": "conv_pw",
        "2.1": "bn2",
    },
    (True, True): {"0.0": "conv_exp", "0.1": "bn1", "1.0": "conv_pwl", "1.1": "bn2"},
    (True, False): {"0.0": "conv", "0.1": "bn1"},
}
_LUKEMELAS = {
    (False, True): {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_se_reduce": "se.conv_reduce",
        "_se_expand": "se.conv_expand",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    },
    (False, False): {
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn1",
        "_se_reduce": "se.conv_reduce",
        "_se_expand": "se.conv_expand",
        "_project_conv": "conv_pw",
        "_bn2": "bn2",
    },
}
