"""Networks of the family, built from the library's modules."""

from functools import partial

from .checkpoints import LoadResult, load_checkpoint
from .efficientnet import DataConfig, EfficientNet, EfficientNetFeatures
from .registry import create_model, list_models

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

__all__ = [
    "DataConfig",
    "EfficientNet",
    "EfficientNetFeatures",
    "LoadResult",
    "create_model",
    "list_models",
    "load_checkpoint",
    *(f"efficientnet_b{index}" for index in range(8)),
    *(f"efficientnet_lite{index}" for index in range(5)),
]
