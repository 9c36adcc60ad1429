"""Finds what a build needs: torch, a C++ compiler, nvcc. Nothing here imports torch."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# The stable ABI that the bindings are compiled against (TORCH_TARGET_VERSION in native.py) promises
# that they load on this torch and every later 2.x.
TORCH_OLDEST = (2, 10)
TORCH_REQUIREMENT = "torch>=2.10,<3"

# Where nvcc is looked for last, as torch's own extension builder does.
CUDA_DEFAULT_HOME = Path("/usr/local/cuda")


@dataclass(frozen=True)
class Torch:
    """An installed torch, read from its files."""

    root: Path
    version: str  # "2.15.0+cu132"
    cuda: str | None  # "13.2"; None for a build without CUDA

    @property
    def supported(self) -> bool:
        """Whether the stable ABI covers this version."""
        major, minor = (int(number) for number in self.version.split(".")[:2])
        return major == TORCH_OLDEST[0] and minor >= TORCH_OLDEST[1]


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that runs."""

    command: tuple[str, ...]
    description: str  # first line of --version

    @property
    def name(self) -> str:
        """Short name for the summary line, e.g. "g++ 12.2.0"."""
        version = re.findall(r"\d+\.\d+(?:\.\d+)?", self.description)
        return " ".join([Path(self.command[-1]).name, *version[-1:]])


def read_torch(root: Path) -> Torch | None:
    """The torch whose package directory is `root`, or None if there is none."""
    try:
        text = (root / "version.py").read_text()
    except OSError:
        return None
    version = re.search(r"^__version__\s*=\s*['\"](\d+\.\d+[^'\"]*)['\"]", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=\n]*=\s*(None|'[^']*'|\"[^\"]*\")", text, re.MULTILINE)
    if version is None:
        return None
    return Torch(root, version[1], ast.literal_eval(cuda[1]) if cuda else None)


def target_site_packages() -> Iterator[Path]:
    """Where the environment that is being installed into keeps its packages.

    pip's isolated build runs on the target environment's own interpreter and only hides its
    packages from `sys.path`, so the interpreter still knows where they are.
    """
    for name in ("purelib", "platlib"):
        yield Path(sysconfig.get_path(name))
    configuration = Path(sys.prefix, "pyvenv.cfg")
    if configuration.is_file() and re.search(
        r"^include-system-site-packages\s*=\s*true", configuration.read_text(), re.M | re.I
    ):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        for name in ("purelib", "platlib"):
            yield Path(sysconfig.get_path(name, vars=base))
    if site.ENABLE_USER_SITE:
        yield Path(site.getusersitepackages())


def find_torch() -> tuple[Torch | None, str]:
    """The torch to compile against, or None and the reason.

    First one that the build environment can import, then the target environment's.
    """
    candidates = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent)
    candidates += [directory / "torch" for directory in target_site_packages()]

    unsupported = None
    for root in candidates:
        torch = read_torch(root)
        if torch is not None and torch.supported:
            return torch, ""
        unsupported = unsupported or torch
    if unsupported is not None:
        return None, f"torch {unsupported.version} is installed, {TORCH_REQUIREMENT} is needed"
    return None, "torch is not installed"


def find_compiler(environ: Mapping[str, str] = os.environ) -> tuple[Compiler | None, str]:
    """The C++ compiler named by CXX, else the first of g++, c++ and clang++; or the reason."""
    if environ.get("CXX"):
        commands = [tuple(shlex.split(environ["CXX"]))]  # may carry a launcher: "ccache g++"
        missing = f"the C++ compiler CXX={environ['CXX']} does not run"
    else:
        commands = [("g++",), ("c++",), ("clang++",)]
        missing = "no C++ compiler found (g++, c++, clang++); set CXX to name one"
    for command in commands:
        if shutil.which(command[0]) is None:
            continue
        run = subprocess.run([*command, "--version"], capture_output=True, text=True)
        if run.returncode == 0 and run.stdout:
            return Compiler(command, run.stdout.splitlines()[0].strip()), ""
    return None, missing


def find_nvcc(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Path of nvcc: from CUDA_HOME or CUDA_PATH, else from PATH, else from /usr/local/cuda."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if home:
        places = [Path(home, "bin", "nvcc")]
    else:
        on_path = shutil.which("nvcc", path=environ.get("PATH"))
        places = [Path(on_path)] if on_path else [CUDA_DEFAULT_HOME / "bin" / "nvcc"]
    return next((place for place in places if place.is_file()), None)


def nvcc_version(nvcc: Path) -> str | None:
    """The CUDA release of an nvcc, e.g. "13.0"; None if it does not say."""
    try:
        run = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
    except OSError:
        return None
    release = re.search(r"release (\d+\.\d+)", run.stdout)
    return release[1] if release else None


def nvcc_libraries(nvcc: Path) -> list[str]:
    """The directories in which this nvcc's own libraries are, as it says itself: it may be a script
    that calls another."""
    run = subprocess.run(
        [str(nvcc), "--dryrun", "-o", "program", "object.o"], capture_output=True, text=True
    )
    return re.findall(r'"-L([^"]+)"', run.stderr)
