"""PEP 517 backend: setuptools, plus torch as a build requirement where it is needed.

torch's headers and libraries are needed to compile the kernels. Listing torch in pyproject.toml
would download it into every isolated build, even where the environment that is being installed
into already has it; so it is asked for here, and only if nothing else serves.
"""

from __future__ import annotations

from typing import Any

import setuptools
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from build_tools.locate import TORCH_REQUIREMENT, find_compiler, find_torch
from build_tools.native import BuildError, requested

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# The first that reads `license = "Apache-2.0"`. pip installs it into an isolated build; without
# isolation the environment's own is used, whatever its age.
SETUPTOOLS_OLDEST = 77
if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS_OLDEST:
    raise SystemExit(
        f"error: effkernels is built with setuptools >= {SETUPTOOLS_OLDEST}, this environment has "
        f"{setuptools.__version__}; upgrade it, or install without --no-build-isolation"
    )


def torch_requirement() -> list[str]:
    """The torch to install into the build environment; empty where the build does without."""
    try:
        request = requested()
    except BuildError as error:
        raise SystemExit(f"error: {error}") from None
    if request == "0" or find_torch()[0] is not None:
        return []
    if find_compiler()[0] is None:
        return []  # headers would be of no use; the build itself gives the reason
    return [TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What pip must install before `build_wheel`."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *torch_requirement()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """What pip must install before `build_editable`."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *torch_requirement()]
