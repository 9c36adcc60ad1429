"""The sdist and the wheel that `python -m build` makes, and the wheel at work."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.build.trees import copy_tree, run


@dataclass(frozen=True)
class Distribution:
    sdist: Path
    wheel: Path
    unpacked: Path  # the wheel's files


@pytest.fixture(scope="session")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """One build of the real kernels, shared by all xdist workers of a run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the worker's own folder lies in the run's
    folder = folder / "distribution"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "unpacked").exists():
            build_distribution(folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Distribution(sdist, wheel, folder / "unpacked")


def build_distribution(folder: Path) -> None:
    tree = copy_tree(folder / "source")
    # By default the wheel is built from the unpacked sdist, so it proves the sdist complete.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree]
    result = run(command, cwd=folder, EFFKERNELS_BUILD="cpu")
    assert result.returncode == 0, result.stdout
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "unpacked")


def python(distribution: Distribution, tmp_path: Path, *arguments: str, **changes: str) -> str:
    """Output of Python with the unpacked wheel, outside the checkout."""
    changes["PYTHONPATH"] = str(distribution.unpacked)
    result = run([sys.executable, *arguments], cwd=tmp_path, **changes)
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_sdist_holds_sources_and_nothing_built(distribution: Distribution) -> None:
    with tarfile.open(distribution.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in (
        *("csrc/silu/cpu.cpp", "models/__init__.py", "effkernels/py.typed", "LICENSE"),
        *("build_tools/backend.py", "pyproject.toml", "setup.py", "README.md", "CHANGELOG.md"),
    ):
        assert name in names
    assert any(name.startswith("csrc/common/") and name.endswith(".h") for name in names)
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_info.json"))]


def test_wheel_is_for_any_python_on_this_platform(distribution: Distribution) -> None:
    _, _, python_tag, abi_tag, platform_tag = distribution.wheel.stem.split("-")
    assert (python_tag, abi_tag) == ("py3", "none")
    assert platform_tag.startswith("linux_")


def test_wheel_holds_package_library_and_record(distribution: Distribution) -> None:
    for name in ("_cpu.so", "_build_info.json", "py.typed", "models/__init__.py", "ops/silu.py"):
        assert (distribution.unpacked / "effkernels" / name).is_file()
    tops = {path.name.split("-")[0] for path in distribution.unpacked.iterdir()}
    assert tops == {"effkernels"}
    info = json.loads((distribution.unpacked / "effkernels" / "_build_info.json").read_text())
    assert info["modules"]["cpu"]["built"] is True
    assert str(Path.home()) not in json.dumps(info)


def test_library_needs_torch_through_its_stable_interface_only(distribution: Distribution) -> None:
    library = distribution.unpacked / "effkernels" / "_cpu.so"
    dynamic = subprocess.check_output(["readelf", "--dynamic", library], text=True)
    assert "[libtorch_cpu.so]" in dynamic
    assert "libpython" not in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    undefined = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
    symbols = [line.split()[-1] for line in undefined.splitlines()]
    # C++ names of torch (at::, c10::, torch::) change between its versions; C names do not.
    assert not [name for name in symbols if name.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch"))]
    assert [name for name in symbols if name.startswith(("aoti_torch_", "torch_"))]


def test_wheel_runs_outside_the_checkout(distribution: Distribution, tmp_path: Path) -> None:
    script = """
import torch, effkernels, effkernels.models
x = torch.linspace(-8, 8, 2 * 19 * 5 * 7).reshape(2, 19, 5, 7)
with effkernels.use_backend("native"):
    y = effkernels.ops.silu(x)
print(effkernels.__file__)
print(effkernels.models.__file__)
print((y - torch.nn.functional.silu(x)).abs().max().item() < 1e-5)
"""
    package = distribution.unpacked / "effkernels"
    assert python(distribution, tmp_path, "-c", script).split() == [
        str(package / "__init__.py"),
        str(package / "models" / "__init__.py"),
        "True",
    ]


def test_info_of_the_wheel(distribution: Distribution, tmp_path: Path) -> None:
    command = ("-m", "effkernels.cli", "info")
    info = json.loads(python(distribution, tmp_path, *command, "--json", OMP_NUM_THREADS="1"))
    assert info["build"]["requested"] == "cpu"
    assert info["build"]["modules"]["cuda"]["built"] is False
    assert info["cpu"]["in_use"] in info["cpu"]["kernels_for"]
    assert set(info["cpu"]["kernels_for"]) <= set(info["build"]["modules"]["cpu"]["isa_flags"])
    assert info["backends"]["native"]["available"] is True
    assert info["backends"]["reference"]["available"] is True
    assert all(backend["reason"] for backend in info["backends"].values())
    assert info["threads"]["torch.get_num_threads"] == 1
    assert info["versions"]["effkernels"] == info["build"]["version"]

    text = python(distribution, tmp_path, *command)
    compiler = info["build"]["modules"]["cpu"]["compiler"]
    for expected in (compiler, "-ffp-contract=off", info["cpu"]["name"], "native", "reference"):
        assert expected in text


def test_chosen_instruction_set_is_shown(distribution: Distribution, tmp_path: Path) -> None:
    command = ("-m", "effkernels.cli", "info", "--json")
    info = json.loads(python(distribution, tmp_path, *command, EFFKERNELS_CPU_ISA="portable"))
    assert info["cpu"]["in_use"] == "portable"
    assert info["environment"] == {"EFFKERNELS_CPU_ISA": "portable"}
