"""The setuptools commands that put the compiled kernels into a wheel or beside the sources."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from setuptools import Command, Distribution
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build as setuptools_build
from setuptools.errors import BaseError

from build_tools import native


class Build(setuptools_build):
    """The standard build, then the kernels."""

    sub_commands = [*setuptools_build.sub_commands, ("build_native", None)]


class BuildNative(Command):
    """Compiles csrc/ into effkernels/_cpu.so and _cuda.so, as EFFKERNELS_BUILD asks."""

    description = "compile the kernels"
    user_options: list[tuple[str, str | None, str]] = []

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False  # set by setuptools in an editable installation

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        assert self.build_lib is not None
        parent = native.ROOT if self.editable_mode else Path(self.build_lib)
        try:
            info = native.build((parent / "effkernels").resolve(), native.requested())
        except native.BuildError as error:
            raise BaseError(f"effkernels: {error}") from None
        tell(native.summary(info))

    # The rest is what setuptools asks of a build step (setuptools.command.build.SubCommand).

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in lists them

    def get_outputs(self) -> list[str]:
        if self.editable_mode:
            return []  # they lie beside the sources and need no copying
        assert self.build_lib is not None
        names = (native.LIBRARY, native.CUDA_LIBRARY, native.INFO)
        paths = [Path(self.build_lib, "effkernels", name) for name in names]
        return [str(path) for path in paths if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BdistWheel(bdist_wheel):
    """A wheel for one platform and any Python: the library inside knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class PlatformDistribution(Distribution):
    """Tells setuptools that the package holds compiled code though it has no Python extension."""

    def has_ext_modules(self) -> bool:
        try:
            return native.requested() != "0"
        except native.BuildError as error:
            raise BaseError(f"effkernels: {error}") from None


def tell(line: str) -> None:
    """Prints the line where the user sees it: pip hides a successful build's output."""
    print(line, flush=True)
    if not sys.stdout.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(f"\n{line}\n")
