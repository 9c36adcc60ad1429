"""Networks of the family, built from the library's modules."""

from functools import partial

from .budget import Budget, Infeasible, ScaledNetwork, Solution, solve
from .checkpoints import LoadResult, convert_state_dict, load_checkpoint
from .common import DataConfig, Feature
from .efficientnet import EfficientNet, EfficientNetFeatures
from .memory import Memory, memory
from .registry import create_model, create_scaled, list_models
from .resnet import ResNet, ResNetFeatures
from .scaling import CompoundScaling
from .summary import Summary, summary

efficientnet_b0 = partial(create_model, "efficientnet_b0")
efficientnet_b1 = partial(create_model, "efficientnet_b1")
efficientnet_b2 = partial(create_model, "efficientnet_b2")
efficientnet_b3 = partial(create_model, "efficientnet_b3")
efficientnet_b4 = partial(create_model, "efficientnet_b4")
efficientnet_b5 = partial(create_model, "efficientnet_b5")
efficientnet_b6 = partial(create_model, "efficientnet_b6")
efficientnet_b7 = partial(create_model, "efficientnet_b7")
efficientnet_lite0 = partial(create_model, "efficientnet_lite0")
efficientnet_lite1 = partial(create_model, "efficientnet_lite1")
efficientnet_lite2 = partial(create_model, "efficientnet_lite2")
efficientnet_lite3 = partial(create_model, "efficientnet_lite3")
efficientnet_lite4 = partial(create_model, "efficientnet_lite4")
efficientnet_v2_s = partial(create_model, "efficientnet_v2_s")
efficientnet_v2_m = partial(create_model, "efficientnet_v2_m")
efficientnet_v2_l = partial(create_model, "efficientnet_v2_l")
resnet18 = partial(create_model, "resnet18")
resnet34 = partial(create_model, "resnet34")
resnet50 = partial(create_model, "resnet50")
resnet101 = partial(create_model, "resnet101")
resnet152 = partial(create_model, "resnet152")

__all__ = [
    "Budget",
    "CompoundScaling",
    "DataConfig",
    "EfficientNet",
    "EfficientNetFeatures",
    "Feature",
    "Infeasible",
    "LoadResult",
    "Memory",
    "ResNet",
    "ResNetFeatures",
    "ScaledNetwork",
    "Solution",
    "Summary",
    "convert_state_dict",
    "create_model",
    "create_scaled",
    "list_models",
    "load_checkpoint",
    "memory",
    "solve",
    "summary",
    *(f"efficientnet_b{index}" for index in range(8)),
    *(f"efficientnet_lite{index}" for index in range(5)),
    *(f"efficientnet_v2_{size}" for size in "sml"),
    *(f"resnet{layers}" for layers in (18, 34, 50, 101, 152)),
]
