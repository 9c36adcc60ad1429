"""Every row of the installation's table, through pip or through the hooks that pip calls."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.build.trees import SITE_PACKAGES, Run, run

HOOKS = ("get_requires_for_build_wheel", "get_requires_for_build_editable")
TORCH = "torch>=2.10,<3"


def modules(package: Path) -> dict[str, dict[str, object]]:
    """What an installed effkernels records about its build."""
    return json.loads((package / "_build_info.json").read_text())["modules"]


# torch present, absent


@pytest.mark.parametrize("hook", HOOKS)
def test_torch_of_the_target_environment_serves(
    isolated_hook: Callable[..., Run], small_tree: Path, hook: str
) -> None:
    result = isolated_hook(sys.executable, small_tree, hook)
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("hook", HOOKS)
def test_absent_torch_is_asked_for(
    isolated_hook: Callable[..., Run], bare_python: Path, small_tree: Path, hook: str
) -> None:
    result = isolated_hook(bare_python, small_tree, hook)
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1] == repr([TORCH])


@pytest.mark.parametrize("changes", [{"EFFKERNELS_BUILD": "0"}, {"CXX": "/nonexistent"}])
def test_torch_is_not_asked_for_in_vain(
    isolated_hook: Callable[..., Run],
    bare_python: Path,
    small_tree: Path,
    changes: dict[str, str],
) -> None:
    result = isolated_hook(bare_python, small_tree, HOOKS[0], **changes)
    assert result.stdout.splitlines()[-1] == "[]"


def test_isolated_build_against_the_target_environment(
    isolated_hook: Callable[..., Run], small_tree: Path, tmp_path: Path
) -> None:
    result = isolated_hook(sys.executable, small_tree, "build_editable", str(tmp_path))
    assert result.returncode == 0, result.stdout
    assert "effkernels: CPU kernels built" in result.stdout
    assert (small_tree / "effkernels" / "_cpu.so").is_file()


def test_build_goes_on_without_torch(
    isolated_hook: Callable[..., Run], bare_python: Path, small_tree: Path, tmp_path: Path
) -> None:
    result = isolated_hook(bare_python, small_tree, "build_wheel", str(tmp_path))
    assert result.returncode == 0, result.stdout
    reason = "effkernels: CPU kernels not built: torch is not installed"
    assert [line for line in result.stdout.splitlines() if reason in line]
    assert list(tmp_path.glob("effkernels-*-py3-none-linux_*.whl"))


def test_build_without_torch_fails_if_asked_for(
    isolated_hook: Callable[..., Run], bare_python: Path, small_tree: Path, tmp_path: Path
) -> None:
    changes = {"EFFKERNELS_BUILD": "cpu"}
    result = isolated_hook(bare_python, small_tree, "build_wheel", str(tmp_path), **changes)
    assert result.returncode != 0
    assert "CPU kernels not built: torch is not installed" in result.stdout
    assert not list(tmp_path.glob("*.whl"))


# --no-build-isolation, and what can go wrong


def test_install_without_isolation(
    pip_install: Callable[..., tuple[Run, Path]], small_tree: Path
) -> None:
    result, target = pip_install(small_tree, EFFKERNELS_BUILD="cpu")
    assert result.returncode == 0, result.stdout
    assert modules(target / "effkernels")["cpu"]["built"] is True
    assert (target / "effkernels" / "_cpu.so").is_file()
    assert (target / "effkernels" / "models" / "__init__.py").is_file()


def test_install_without_compiler(
    pip_install: Callable[..., tuple[Run, Path]], source_tree: Path, tmp_path: Path
) -> None:
    result, target = pip_install(source_tree, CXX="/nonexistent")
    assert result.returncode == 0, result.stdout
    reason = "the C++ compiler CXX=/nonexistent does not run"
    assert f"effkernels: CPU kernels not built: {reason}" in result.stdout

    # The package works on the reference, and says why at any time.
    script = (
        "import torch, effkernels as ek; "
        "print(ek.ops.silu(torch.zeros(1, 2, 3, 3)).sum().item()); "
        "print(ek.backends()['native'].available)"
    )
    result = run([sys.executable, "-c", script], cwd=tmp_path, PYTHONPATH=str(target))
    assert result.stdout.split() == ["0.0", "False"], result.stdout
    info = [sys.executable, "-m", "effkernels.cli", "info"]
    assert reason in run(info, cwd=tmp_path, PYTHONPATH=str(target)).stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"EFFKERNELS_BUILD": "cpu", "CXX": "/nonexistent"},
            "CPU kernels not built: the C++ compiler CXX=/nonexistent does not run",
        ),
        ({"EFFKERNELS_BUILD": "cuda"}, "CUDA kernels not built: "),
        ({"EFFKERNELS_BUILD": "gpu"}, "EFFKERNELS_BUILD=gpu is not one of auto, cpu, cuda, 0"),
    ],
)
def test_explicit_request_fails_the_installation(
    pip_install: Callable[..., tuple[Run, Path]],
    small_tree: Path,
    changes: dict[str, str],
    message: str,
) -> None:
    result, target = pip_install(small_tree, **changes)
    assert result.returncode != 0
    assert f"error: effkernels: {message}" in result.stdout
    assert "Traceback" not in result.stdout
    assert not (target / "effkernels").exists()


def test_install_with_a_source_that_does_not_compile(
    pip_install: Callable[..., tuple[Run, Path]], small_tree: Path
) -> None:
    (small_tree / "csrc/silu/cpu.cpp").write_text("#error made for this test\n")
    result, target = pip_install(small_tree)
    assert result.returncode == 0, result.stdout
    reason = str(modules(target / "effkernels")["cpu"]["reason"])
    assert "csrc/silu/cpu.cpp" in reason
    assert "made for this test" in reason
    assert not (target / "effkernels" / "_cpu.so").exists()


def test_install_without_nvcc(
    pip_install: Callable[..., tuple[Run, Path]], small_tree: Path, tmp_path: Path
) -> None:
    result, target = pip_install(small_tree, CUDA_HOME=str(tmp_path))
    assert result.returncode == 0, result.stdout
    info = modules(target / "effkernels")
    assert info["cpu"]["built"] is True
    reason = str(info["cuda"]["reason"])
    assert reason.startswith("nvcc not found") or reason.endswith("has no CUDA")


# editable


def test_editable_install_imports_from_anywhere(
    bare_python: Path, source_tree: Path, tmp_path: Path
) -> None:
    # The bare environment borrows this one's packages, below its own.
    site_packages = next((bare_python.parents[1] / "lib").glob("python*/site-packages"))
    (site_packages / "borrowed.pth").write_text(f"{SITE_PACKAGES}\n")
    install = [bare_python, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    result = run(
        [*install, "--ignore-installed", "-e", source_tree], cwd=tmp_path, EFFKERNELS_BUILD="0"
    )
    assert result.returncode == 0, result.stdout

    script = (
        "import effkernels, effkernels.models; "
        "print(effkernels.__file__, effkernels.models.__file__)"
    )
    result = run([bare_python, "-c", script], cwd=tmp_path)
    expected = [source_tree / "effkernels/__init__.py", source_tree / "models/__init__.py"]
    assert result.stdout.split() == [str(path) for path in expected], result.stdout
    command = bare_python.with_name("effkernels")
    assert shutil.which("effkernels", path=str(command.parent)) == str(command)
    assert "EFFKERNELS_BUILD=0" in run([command, "info"], cwd=tmp_path).stdout
