"""The kernels of every instruction set, without torch, against plain loops in double.

isa_parity.cpp is linked with csrc/ for this machine, and for aarch64 to run under an emulator:
the only place where the NEON kernels run unless this machine has them.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from build_tools import locate, native

DRIVER = native.Unit(
    Path(__file__).with_name("isa_parity.cpp").relative_to(native.ROOT),
    "driver",
    (native.KERNEL_STANDARD,),
)


def link(compiler: Iterable[str], objects: Iterable[Path], work_dir: Path, *flags: str) -> Path:
    """The driver with these kernels."""
    program = work_dir / "isa_parity"
    run([*compiler, *flags, *map(str, objects), "-o", str(program)])
    return program


def compile_unit(compiler: Iterable[str], unit: native.Unit, work_dir: Path, *flags: str) -> Path:
    target = work_dir / unit.object_name
    flags = (*native.COMMON_FLAGS, *unit.flags, "-Icsrc", *flags)
    run([*compiler, *flags, "-c", str(unit.source), "-o", str(target)])
    return target


def kernels_of(machine: str) -> list[native.Unit]:
    units = native.translation_units(native.ROOT, native.ISA_FLAGS[machine])
    return [unit for unit in units if unit.label != "bindings"]


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=native.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def ops_run(output: str) -> dict[str, set[str]]:
    """The ops that the driver says it ran, by instruction set."""
    result: dict[str, set[str]] = {}
    for line in output.splitlines():
        isa, op = line.split()[:2]
        result.setdefault(isa, set()).add(op.rstrip(","))
    return result


OPS = {path.parent.name for path in native.ROOT.glob("csrc/*/cpu.cpp")} - {"bindings"}


def test_this_machine(tmp_path: Path) -> None:
    compiler, reason = locate.find_compiler()
    torch, missing = locate.find_torch()
    if compiler is None or torch is None:
        pytest.skip(reason or missing)
    machine = platform.machine()
    if machine not in native.ISA_FLAGS:
        pytest.skip(f"no instruction sets are known for {machine}")
    # The objects of the library that is installed, compiled as far as anything changed.
    installed = native.ROOT / "build" / "native"
    installed.mkdir(parents=True, exist_ok=True)
    with native.locked(installed):
        objects = native.compile_units(
            kernels_of(machine), native.common_flags(), compiler, torch, native.ROOT, installed
        )
        objects.append(compile_unit(compiler.command, DRIVER, tmp_path))
        program = link(compiler.command, objects, tmp_path)
    ran = ops_run(run([str(program)]))
    assert "portable" in ran
    assert set(ran) <= set(native.ISA_FLAGS[machine])
    assert all(ops >= OPS for ops in ran.values())


@pytest.mark.skipif(platform.machine() == "aarch64", reason="test_this_machine runs NEON")
def test_neon(tmp_path: Path) -> None:
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    for tool in (compiler, emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (g++-aarch64-linux-gnu, qemu-user)")

    def compiled(unit: native.Unit) -> Path:
        # As in a release, but for what is no NEON: that is only compiled.
        flags = ["-Werror"] if unit.label == "neon" else ["-O1", "-w"]
        return compile_unit([compiler], unit, tmp_path, *flags)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [DRIVER, *kernels_of("aarch64")]))
    ran = ops_run(run([emulator, str(link([compiler], objects, tmp_path, "-static"))]))
    assert set(ran) == {"portable", "neon"}
    assert all(ops >= OPS for ops in ran.values())
