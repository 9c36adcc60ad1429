"""Feature extractors against timm's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks import assert_networks_agree, settle


def assert_feature_maps_agree(ours: nn.Module, theirs: nn.Module) -> None:
    """Same keys, same maps from the same weights, on odd sizes; the same channels and strides."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    image = torch.randn(2, 3, 65, 97)
    settle(theirs, image)
    ours.load_state_dict(theirs.state_dict())
    assert_networks_agree(ours, theirs, image, gradients=False, forward=_all_maps)
    assert [f.reduction for f in ours.feature_info] == theirs.feature_info.reduction()
    assert [f.channels for f in ours.feature_info] == theirs.feature_info.channels()


def _all_maps(network: nn.Module, image: Tensor) -> Tensor:
    """The feature maps in one tensor, each divided by its norm."""
    return torch.cat([F.normalize(map.flatten(1)) for map in network(image)], 1)
