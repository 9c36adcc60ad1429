"""Which cases run in which dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.ops._cases import Case


def few_dtypes(cases: Sequence[Case], narrow: int = 3) -> list[tuple[Case, torch.dtype]]:
    """All cases in float32, the first ``narrow`` in bfloat16 and float16, too: what these change is
    in kernels that have tests of their own, and the interpreter takes seconds for a block."""
    few = [(case, dtype) for dtype in (torch.bfloat16, torch.float16) for case in cases[:narrow]]
    return [(case, torch.float32) for case in cases] + few
