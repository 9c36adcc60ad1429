"""Training of the networks; ``python -m effkernels.models.train`` is its command line."""

from .config import TrainConfig
from .history import EpochRecord, History, StepRecord
from .loop import train
from .run import Interrupted, NonFiniteLoss

__all__ = [
    "EpochRecord",
    "History",
    "Interrupted",
    "NonFiniteLoss",
    "StepRecord",
    "TrainConfig",
    "train",
]
