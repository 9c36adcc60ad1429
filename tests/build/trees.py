"""Source trees and commands that the build's tests share. None of them needs network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
Run = subprocess.CompletedProcess[str]

# Everything that a source distribution is made from.
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md")
FOLDERS = ("build_tools", "csrc", "effkernels", "models")

# A library in miniature: one kernel per instruction set, without torch's headers.
SMALL_SOURCES = {
    "csrc/common/name.h": "#define JOIN(a, b) a##b\n#define NAME(a, b) JOIN(a, b)\n",
    "csrc/common/answer.cpp": "int answer() { return 42; }\n",
    "csrc/silu/cpu.cpp": (
        '#include "common/name.h"\nint NAME(silu_, EFFKERNELS_ISA)() { return 0; }\n'
    ),
}


def copy_tree(target: Path) -> Path:
    """The repository's sources, without what was built in them."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json", "*.egg-info")
    shutil.rmtree(target, ignore_errors=True)  # left by a build that failed
    target.mkdir(parents=True)
    for name in FILES:
        shutil.copy(ROOT / name, target)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    return target


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would steer a build, and with `changes`."""
    steering = ("EFFKERNELS_", "CXX", "LDFLAGS", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH", "LD_PRELOAD")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    # No terminal to write to, no index to ask, nothing left in the tree by imports.
    return {**kept, "PIP_NO_INDEX": "1", "PYTHONDONTWRITEBYTECODE": "1", **changes}


def run(command: list[str | Path], cwd: Path, **changes: str) -> Run:
    """Runs a command apart from this process's terminal; stdout holds both outputs."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
