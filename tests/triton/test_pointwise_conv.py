from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from effkernels.triton import DTYPES
from tests.triton import aot


def aot_calls() -> Iterator[Callable[[], Any]]:
    yield from aot.network_calls("pointwise_conv")
