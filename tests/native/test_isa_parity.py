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


def build(
    compiler: Iterable[str], machine: str, work_dir: Path, release: str = "", static: bool = False
) -> Path:
    """The driver with every kernel of `machine`: at -O1, but the instruction set `release` with
    the flags of a release and without warnings."""
    units = [
        unit
        for unit in native.translation_units(native.ROOT, native.ISA_FLAGS[machine])
        if unit.label != "bindings"
    ]

    def compile_unit(unit: native.Unit) -> Path:
        target = work_dir / unit.object_name
        flags = [*native.COMMON_FLAGS, *unit.flags, "-Icsrc"]
        if unit.label != release:
            flags += ["-O1", "-w"]  # gcc 12's own AVX-512 header has warnings at -O1
        else:
            flags.append("-Werror")
        run([*compiler, *flags, "-c", str(unit.source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, [DRIVER, *units]))
    program = work_dir / "isa_parity"
    link = ["-static"] if static else []
    run([*compiler, *link, *map(str, objects), "-o", str(program)])
    return program


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
    if compiler is None:
        pytest.skip(reason)
    machine = platform.machine()
    if machine not in native.ISA_FLAGS:
        pytest.skip(f"no instruction sets are known for {machine}")
    ran = ops_run(run([str(build(compiler.command, machine, tmp_path))]))
    assert "portable" in ran
    assert set(ran) <= set(native.ISA_FLAGS[machine])
    assert all(ops >= OPS for ops in ran.values())


@pytest.mark.skipif(platform.machine() == "aarch64", reason="test_this_machine runs NEON")
def test_neon(tmp_path: Path) -> None:
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    for tool in (compiler, emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (g++-aarch64-linux-gnu, qemu-user)")
    program = build([compiler], "aarch64", tmp_path, release="neon", static=True)
    ran = ops_run(run([emulator, str(program)]))
    assert set(ran) == {"portable", "neon"}
    assert all(ops >= OPS for ops in ran.values())
