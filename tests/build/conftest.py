"""What the build's tests build in: trees, interpreters and ways to run the build."""

from __future__ import annotations

import shutil
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.build.trees import SITE_PACKAGES, SMALL_SOURCES, Run, copy_tree, run


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """A copy of the sources that a test may build in."""
    return copy_tree(tmp_path / "source")


@pytest.fixture
def small_tree(source_tree: Path) -> Path:
    """The same with SMALL_SOURCES for csrc/: compiles in a second."""
    shutil.rmtree(source_tree / "csrc")
    for name, text in SMALL_SOURCES.items():
        (source_tree / name).parent.mkdir(parents=True, exist_ok=True)
        (source_tree / name).write_text(text)
    return source_tree


@pytest.fixture
def pip_install(tmp_path: Path) -> Callable[..., tuple[Run, Path]]:
    """Installs a tree without isolation into a folder of its own; returns run and folder."""

    def install(tree: Path, **changes: str) -> tuple[Run, Path]:
        target = tmp_path / "installed"
        pip = [sys.executable, "-m", "pip", "install", "--verbose", "--no-build-isolation"]
        options = ["--no-deps", "--ignore-installed", "--target", target]
        return run([*pip, *options, tree], cwd=tmp_path, **changes), target

    return install


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """The interpreter of an environment in which nothing is installed."""
    venv.create(tmp_path / "bare", symlinks=True)
    return tmp_path / "bare" / "bin" / "python"


# What pip puts into an isolated build: the target environment's packages leave sys.path.
SITECUSTOMIZE = """
import sys, sysconfig
hidden = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
sys.path = [path for path in sys.path if path not in hidden]
"""


@pytest.fixture
def isolated_hook(tmp_path: Path) -> Callable[..., Run]:
    """Calls a hook of the build backend as pip's isolated build does.

    The interpreter is the target environment's own, its packages are hidden, and the build
    requirements are on PYTHONPATH.
    """
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    for path in [*SITE_PACKAGES.glob("setuptools*"), SITE_PACKAGES / "_distutils_hack"]:
        (overlay / path.name).symlink_to(path)
    (overlay / "sitecustomize.py").write_text(SITECUSTOMIZE)

    def call(python: str | Path, tree: Path, hook: str, *arguments: str, **changes: str) -> Run:
        script = (
            "import importlib.util; assert importlib.util.find_spec('torch') is None; "
            f"from build_tools import backend; print(backend.{hook}(*{arguments!r}))"
        )
        return run([python, "-c", script], cwd=tree, PYTHONPATH=str(overlay), **changes)

    return call
