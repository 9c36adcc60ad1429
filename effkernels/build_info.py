"""What the build recorded about itself in ``_build_info.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["BUILD_INFO", "read_build_info", "why_not_built"]

BUILD_INFO = Path(__file__).with_name("_build_info.json")


def read_build_info() -> dict[str, Any] | None:
    """The record of the build, or None if this copy of the package was never built.

    Keys: ``version``, ``requested`` (EFFKERNELS_BUILD), ``machine``, ``torch`` (compiled against)
    and ``modules``: for ``cpu`` and ``cuda`` a dict with ``built`` and ``reason``, and for a built
    one ``compiler``, ``flags`` and ``isa_flags`` (CPU) or ``architectures`` (CUDA).
    """
    try:
        return json.loads(BUILD_INFO.read_text())
    except FileNotFoundError:
        return None


def why_not_built(module: str) -> str:
    """Why the build left out ``"cpu"`` or ``"cuda"``; ``""`` if it built that module."""
    info = read_build_info()
    if info is None:
        return f"nothing was built here ({BUILD_INFO.name} is missing); run pip install -e ."
    return str(info["modules"][module]["reason"])
