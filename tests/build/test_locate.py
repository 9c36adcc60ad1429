"""What a build finds on the machine, from files that the tests lay out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from build_tools import locate


def fake_torch(directory: Path, version: str, cuda: str | None = None) -> Path:
    package = directory / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('the build imported torch')")
    (package / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n"
    )
    return directory


def executable(path: Path, output: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("version", "cuda", "supported"),
    [
        ("2.10.0", None, True),
        ("2.10.0a0+gitabc", "12.6", True),
        ("2.15.0+cu132", "13.2", True),
        ("2.9.1+cpu", None, False),
        ("1.13.1", None, False),
        ("3.0.0", None, False),
    ],
)
def test_torch_is_read_without_importing_it(
    tmp_path: Path, version: str, cuda: str | None, supported: bool
) -> None:
    torch = locate.read_torch(fake_torch(tmp_path, version, cuda) / "torch")
    assert torch is not None
    assert (torch.version, torch.cuda, torch.supported) == (version, cuda, supported)


def test_no_torch_there(tmp_path: Path) -> None:
    assert locate.read_torch(tmp_path / "torch") is None


@pytest.mark.parametrize(
    ("importable", "target", "found"),
    [
        ("2.11.0", "2.12.0", "2.11.0"),  # the build environment comes first
        (None, "2.12.0", "2.12.0"),
        ("2.9.0", "2.12.0", "2.12.0"),  # too old does not count
    ],
)
def test_order_of_search(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    importable: str | None,
    target: str,
    found: str,
) -> None:
    path = [str(fake_torch(tmp_path / "build", importable))] if importable else []
    place = fake_torch(tmp_path / "target", target)
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(locate, "target_site_packages", lambda: iter([place]))
    torch, _ = locate.find_torch()
    assert torch is not None
    assert torch.version == found


def test_reasons_for_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(locate, "target_site_packages", lambda: iter([tmp_path]))
    assert locate.find_torch() == (None, "torch is not installed")
    fake_torch(tmp_path, "2.4.1")
    assert locate.find_torch() == (None, "torch 2.4.1 is installed, torch>=2.10,<3 is needed")


def test_compiler_from_cxx_with_a_launcher(tmp_path: Path) -> None:
    launcher = executable(tmp_path / "ccache", "g++ (Distribution 1.2-3) 12.2.0")
    compiler, reason = locate.find_compiler({"CXX": f"{launcher} my-g++"})
    assert compiler is not None, reason
    assert compiler.command == (str(launcher), "my-g++")
    assert compiler.name == "my-g++ 12.2.0"


def test_compiler_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "the C++ compiler CXX=/nonexistent does not run"
    assert locate.find_compiler({"CXX": "/nonexistent"}) == (None, missing)
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler, reason = locate.find_compiler({})
    assert compiler is None
    assert reason.startswith("no C++ compiler found")


def test_nvcc_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "CUDA_DEFAULT_HOME", tmp_path / "default")
    nothing = {"PATH": str(tmp_path / "empty")}
    assert locate.find_nvcc(nothing) is None

    release = "Cuda compilation tools, release 13.0, V13.0.88"
    default = executable(tmp_path / "default" / "bin" / "nvcc", release)
    assert locate.find_nvcc(nothing) == default
    on_path = executable(tmp_path / "path" / "nvcc", release)
    assert locate.find_nvcc({"PATH": str(on_path.parent)}) == on_path
    home = executable(tmp_path / "home" / "bin" / "nvcc", release)
    environ = {"PATH": str(on_path.parent), "CUDA_HOME": str(home.parents[1])}
    assert locate.find_nvcc(environ) == home
    # A home that was named and holds no nvcc is not replaced by another one.
    assert locate.find_nvcc({**environ, "CUDA_HOME": str(tmp_path)}) is None

    assert locate.nvcc_version(home) == "13.0"
    assert locate.nvcc_version(tmp_path / "missing") is None
