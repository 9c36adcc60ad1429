"""What the kernels' tests share: which cases run in which dtype, and kernels with a mistake."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from tests.ops._cases import Case


def few_dtypes(cases: Sequence[Case], narrow: int = 3) -> list[tuple[Case, torch.dtype]]:
    """All cases in float32, the first ``narrow`` in bfloat16 and float16, too: what these change is
    in kernels that have tests of their own, and the interpreter takes seconds for a block."""
    few = [(case, dtype) for dtype in (torch.bfloat16, torch.float16) for case in cases[:narrow]]
    return [(case, torch.float32) for case in cases] + few


def broken_module(directory: Path, name: str, old: str, new: str) -> ModuleType:
    """``effkernels.triton.<name>`` with ``new`` in place of ``old``."""
    source = Path(str(importlib.import_module(f"effkernels.triton.{name}").__file__)).read_text()
    assert old in source, f"{name} has no {old!r}"
    file = directory / "broken.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("effkernels.triton.broken", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Triton looks there for what a kernel calls
    spec.loader.exec_module(module)
    return module
