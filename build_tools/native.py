"""Compiles csrc/ into shared libraries and records what was built, how, and what was not.

A library is not a Python extension module: `torch.ops.load_library` loads it and it registers
its kernels with torch's stable ABI, so one build serves every Python and every torch >= 2.10.

csrc/<op>/cpu.cpp       kernels; compiled once per instruction set of the machine's architecture
csrc/<op>/cuda.cu       kernels of the CUDA library; compiled by nvcc for all its architectures
csrc/common/*.cpp       compiled once, for any CPU of the architecture
csrc/bindings/cuda.cpp  of the CUDA library, the others of the CPU's; the only files that include
                        torch
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from build_tools.locate import (
    Compiler,
    Torch,
    find_compiler,
    find_nvcc,
    find_torch,
    nvcc_libraries,
    nvcc_version,
)

ROOT = Path(__file__).resolve().parent.parent
REQUESTS = ("auto", "cpu", "cuda", "0")
LIBRARY = "_cpu.so"
CUDA_LIBRARY = "_cuda.so"
INFO = "_build_info.json"
LABELS = {"cpu": "CPU", "cuda": "CUDA"}  # what the modules are called

# No -march=native and no -ffast-math: a wheel runs on any CPU of its architecture, and NaN and
# infinity keep their meaning. Contraction is off so that a fused multiply-add is one only where a
# kernel says so, and all instruction sets of one source round alike where they can.
COMMON_FLAGS: tuple[str, ...] = (
    *("-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wextra"),
)
SANITIZE_FLAGS = (
    *("-O1", "-g1", "-fno-omit-frame-pointer"),  # the last -O given wins
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    # What AddressSanitizer finds as well, and its checks as calls: half the time of compiling.
    *("-fno-sanitize=null,object-size", "--param", "asan-instrumentation-with-call-threshold=0"),
)
ISA_FLAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "portable": (),
        "avx2": ("-mavx2", "-mfma"),
        "avx512": ("-mavx512f", "-mavx2", "-mfma"),
    },
    # gcc 12 hoists loads of the matrix product over its 24 accumulators and spills two of them:
    # 39 instructions and 3 stack accesses in the inner loop instead of 36 and none.
    "aarch64": {"portable": (), "neon": ("-fno-schedule-insns",)},
}
# What of /proc/cpuinfo an instruction set takes.
CPU_FLAGS = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx2", "fma"}}
# gcc 12 warns about _mm512_undefined_epi32 in its own header (its bug 105593). clang knows no
# such warning, and gcc says nothing of options beginning with -Wno- that it does not know.
QUIET_FLAGS = {
    "avx512": ("-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-warning-option"),
    "neon": ("-Wno-ignored-optimization-argument", "-Wno-unknown-warning-option"),
}
# C++20 in the bindings alone, for torch's headers; g++ >= 10 and clang >= 10 have it.
KERNEL_STANDARD = "-std=c++17"
BINDINGS_FLAGS = ("-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000")

# Without TORCH_CUDA_ARCH_LIST. Code for 8.0 runs on 8.6 to 8.9 as it is, and the kernels use
# nothing that came with those; the last is kept as PTX for what comes later.
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
# Denormal numbers are zero, as in the CPU's kernels: half the instructions of an exponential.
NVCC_FLAGS = ("-O3", "-ftz=true", "-Xcompiler", "-fPIC,-fvisibility=hidden")

# A heavily unrolled kernel file or torch's headers can take this much while compiling.
BYTES_PER_JOB = 2 << 30


class BuildError(Exception):
    """Something cannot be built. The message is one line; `log` is the compiler's output."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


@dataclass(frozen=True)
class Unit:
    """One translation unit: a source file and the flags of this compilation of it."""

    source: Path  # relative to the root
    label: str  # instruction set, or "common", "bindings" or "cuda"
    flags: tuple[str, ...]
    compiler: Compiler | None = None  # if another one than the C++ compiler, with all its flags

    @property
    def object_name(self) -> str:
        return "_".join([*self.source.with_suffix("").parts[1:], self.label]) + ".o"


def requested(environ: Mapping[str, str] = os.environ) -> str:
    """The value of EFFKERNELS_BUILD, "auto" if unset. Raises BuildError for an unknown one."""
    request = environ.get("EFFKERNELS_BUILD") or "auto"
    if request not in REQUESTS:
        raise BuildError(f"EFFKERNELS_BUILD={request} is not one of {', '.join(REQUESTS)}")
    return request


def build(
    package_dir: Path,
    request: str,
    root: Path = ROOT,
    work_dir: Path | None = None,
    sanitize: bool = False,
) -> dict[str, Any]:
    """Builds what `request` asks for into `package_dir` and writes _build_info.json there.

    Returns the information that was written. With request "auto" a module that cannot be built
    is recorded with its reason; with "cpu" or "cuda" it raises BuildError.
    """
    package_dir.mkdir(parents=True, exist_ok=True)
    torch, torch_missing = find_torch() if request != "0" else (None, "")
    modules: dict[str, dict[str, Any]] = {}
    failure = None

    builders: dict[str, Callable[[], dict[str, Any]]] = {
        "cpu": lambda: build_cpu(
            package_dir / LIBRARY, torch, torch_missing, root, work_dir, sanitize
        ),
        "cuda": lambda: build_cuda(
            package_dir / CUDA_LIBRARY, torch, torch_missing, root, work_dir
        ),
    }
    for name, label in LABELS.items():
        try:
            if request == "0":
                raise BuildError("EFFKERNELS_BUILD=0")
            if name == "cuda" and request == "cpu":
                raise BuildError("not asked for (EFFKERNELS_BUILD=cpu)")
            modules[name] = builders[name]()
        except BuildError as error:
            # A library of an earlier build would contradict what is recorded here.
            (package_dir / f"_{name}.so").unlink(missing_ok=True)
            modules[name] = {"built": False, "reason": str(error)}
            if error.log:
                print(error.log)
            if request == name:
                failure = BuildError(f"{label} kernels not built: {error}")

    info = {
        "version": package_version(root),
        "requested": request,
        "machine": platform.machine(),
        "torch": torch.version if torch else None,
        "modules": modules,
    }
    replace_file(package_dir / INFO, (json.dumps(info, indent=2) + "\n").encode())
    if failure is not None:
        raise failure
    return info


def summary(info: Mapping[str, Any]) -> str:
    """One line that says what was built and what not and why."""
    parts = []
    for name, label in LABELS.items():
        module = info["modules"][name]
        if module["built"]:
            sets = ", ".join(module["isa_flags"] if name == "cpu" else module["architectures"])
            torch = f"torch {info['torch']}"
            parts.append(f"{label} kernels built ({sets}; {module['compiler_name']}; {torch})")
        else:
            parts.append(f"{label} kernels not built: {module['reason']}")
    return "effkernels: " + "; ".join(parts)


def why_no_cuda(torch: Torch | None, torch_missing: str, root: Path = ROOT) -> str | None:
    """Why the CUDA module cannot be built; None if it can. Nobody asks for a GPU."""
    if torch is None:
        return torch_missing
    if torch.cuda is None:
        return f"torch {torch.version} has no CUDA"
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc not found (CUDA_HOME, PATH, /usr/local/cuda)"
    release = nvcc_version(nvcc)
    if release is None or release.split(".")[0] != torch.cuda.split(".")[0]:
        return f"nvcc is CUDA {release or 'unknown'}, torch {torch.version} is CUDA {torch.cuda}"
    if not list(root.glob("csrc/*/cuda.cu")):
        return "there are no CUDA kernels in csrc/"
    return None


def build_cpu(
    output: Path,
    torch: Torch | None,
    torch_missing: str,
    root: Path = ROOT,
    work_dir: Path | None = None,
    sanitize: bool = False,
) -> dict[str, Any]:
    """Compiles and links the CPU library, as far as anything changed, and copies it to `output`.

    Returns the module's part of the build information. Raises BuildError.
    """
    compiler = cxx_compiler()
    if torch is None:
        raise BuildError(torch_missing)
    isa_flags = ISA_FLAGS.get(platform.machine(), {"portable": ()})
    units = translation_units(root, isa_flags)
    if not units:
        raise BuildError("no sources in csrc/")

    common = common_flags()
    if sanitize:
        common = common_flags(*SANITIZE_FLAGS)
        # Nothing is found in kernels that cannot run here, and they take the longest to compile.
        units = [
            unit
            if runs_here(unit.label)
            else replace(unit, flags=(*unit.flags, "-fno-sanitize=all"))
            for unit in units
        ]
    work_dir = work_dir or root / "build" / ("native-asan" if sanitize else "native")
    tail = ["-ltorch_cpu"]
    if not sanitize:
        tail.append("-Wl,-z,defs")  # a kernel that is declared and not compiled is an error now
    make(output, units, common, compiler, torch, root, work_dir, tail)
    return {
        "built": True,
        "reason": "",
        "compiler": compiler.description,
        "compiler_name": compiler.name,
        "flags": shlex.join(common),
        "isa_flags": {name: shlex.join(flags) for name, flags in isa_flags.items()},
        "translation_units": len(units),
    }


def build_cuda(
    output: Path,
    torch: Torch | None,
    torch_missing: str,
    root: Path = ROOT,
    work_dir: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Compiles and links the CUDA library, as :func:`build_cpu` does the CPU's.

    Its CUDA runtime is torch's, needed by name and already loaded by whoever imported torch, so
    that both agree on the current device. The driver is looked for when a kernel is first used: the
    library loads on machines without a GPU.
    """
    reason = why_no_cuda(torch, torch_missing, root)
    if reason is not None:
        raise BuildError(reason)
    compiler = cxx_compiler()
    nvcc = find_nvcc()
    assert torch is not None and nvcc is not None
    architectures = cuda_architectures(nvcc, environ)
    flags = (
        *("-ccbin", compiler.command[-1], KERNEL_STANDARD),
        *NVCC_FLAGS,
        *(flag for name in architectures for flag in gencode(name)),
    )
    nvcc_compiler = Compiler((str(nvcc),), f"nvcc {nvcc_version(nvcc)}")
    units = [
        Unit(source.relative_to(root), "cuda", flags, nvcc_compiler)
        for source in sorted(root.glob("csrc/*/cuda.cu"))
    ]
    bindings = (*BINDINGS_FLAGS, "-Wno-unknown-pragmas")  # nvcc's, in headers of kernels
    units.append(Unit(Path("csrc/bindings/cuda.cpp"), "bindings", bindings))

    def size(unit: Unit) -> int:  # of the file and of the headers that are its alone
        return sum(path.stat().st_size for path in (root / unit.source).parent.glob("cuda*"))

    units.sort(key=size, reverse=True)
    common = common_flags()
    tail = [
        *(f"-L{directory}" for directory in nvcc_libraries(nvcc)),
        *("-lcudart", "-ltorch_cpu", "-ltorch_cuda"),
        "-Wl,-z,defs",
    ]
    make(output, units, common, compiler, torch, root, work_dir or root / "build" / "cuda", tail)
    return {
        "built": True,
        "reason": "",
        "compiler": f"{nvcc_compiler.description}, {compiler.description}",
        "compiler_name": nvcc_compiler.name,
        "flags": shlex.join(flags),
        "architectures": architectures,
        "translation_units": len(units),
    }


def common_flags(*more: str) -> tuple[str, ...]:
    """Flags of every compilation: the library's, ``more``, and last the user's CXXFLAGS."""
    return (*COMMON_FLAGS, *more, *shlex.split(os.environ.get("CXXFLAGS", "")))


def cxx_compiler() -> Compiler:
    """The C++ compiler. Raises BuildError if there is none, or this is not Linux."""
    if not sys.platform.startswith("linux"):
        raise BuildError(f"kernels are built on Linux only, this is {sys.platform}")
    compiler, missing = find_compiler()
    if compiler is None:
        raise BuildError(missing)
    return compiler


def cuda_architectures(nvcc: Path, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Compute capabilities to compile for, as TORCH_CUDA_ARCH_LIST has them: "9.0a", "12.0+PTX".

    Raises BuildError for one that is none, or that this nvcc or the kernels do not support.
    """
    run = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True)
    supported = set(re.findall(r"compute_(\d+)", run.stdout))
    wanted = re.split(r"[;,\s]+", environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if wanted == [""]:
        known = [name for name in CUDA_ARCHITECTURES if name.replace(".", "") in supported]
        if not known:
            raise BuildError(f"{nvcc} compiles for none of {', '.join(CUDA_ARCHITECTURES)}")
        return [*known[:-1], f"{known[-1]}+PTX"]
    for name in wanted:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if match is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: {name!r} is no compute capability like 9.0")
        if int(match[1]) < 8:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: {name}: the kernels are for 8.0 and later")
        if match[1] + match[2] not in supported:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: {nvcc} does not know {name}")
    return wanted


def gencode(name: str) -> list[str]:
    """nvcc's flags for one architecture of :func:`cuda_architectures`."""
    number = name.removesuffix("+PTX").replace(".", "")
    flags = ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    if name.endswith("+PTX"):
        flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def translation_units(root: Path, isa_flags: Mapping[str, tuple[str, ...]]) -> list[Unit]:
    """Every compilation that the CPU library consists of, largest source first."""
    units = []
    for source in sorted(root.glob("csrc/*/*.cpp")):
        path = source.relative_to(root)
        if path.parts[1] == "bindings" and path.name != "cuda.cpp":
            units.append(Unit(path, "bindings", BINDINGS_FLAGS))
        elif path.parts[1] == "common":
            units.append(Unit(path, "common", (KERNEL_STANDARD,)))
        elif path.name == "cpu.cpp":
            for isa, flags in isa_flags.items():
                define = f"-DEFFKERNELS_ISA={isa}"
                quiet = QUIET_FLAGS.get(isa, ())
                units.append(Unit(path, isa, (KERNEL_STANDARD, define, *flags, *quiet)))
    # Long compilations first keep both ends of the job queue busy.
    return sorted(units, key=lambda unit: -(root / unit.source).stat().st_size)


def runs_here(label: str) -> bool:
    """Whether this machine's CPU has the instruction set that a unit's label names, if any."""
    flags = re.search(r"^flags\s*:(.*)", read_text(Path("/proc/cpuinfo")), re.MULTILINE)
    return CPU_FLAGS.get(label, set()) <= set(flags[1].split() if flags else ())


def make(
    output: Path,
    units: list[Unit],
    common: tuple[str, ...],
    compiler: Compiler,
    torch: Torch,
    root: Path,
    work_dir: Path,
    tail: Sequence[str],
) -> None:
    """Compiles the units and links them, as far as anything changed, and copies to `output`."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with locked(work_dir):
        objects = compile_units(units, common, compiler, torch, root, work_dir)
        library = link(objects, common, compiler, torch, work_dir / output.name, tail)
        replace_file(output, library.read_bytes(), mode=0o755)


def compile_units(
    units: list[Unit],
    common: tuple[str, ...],
    compiler: Compiler,
    torch: Torch,
    root: Path,
    work_dir: Path,
) -> list[Path]:
    """Compiles the units whose inputs changed, in parallel; returns all object files."""
    headers = digest(*(path.read_bytes() for path in sorted(root.glob("csrc/*/*.h"))))
    pending = []
    for unit in units:
        if unit.compiler is not None:
            used, command = unit.compiler, [*unit.compiler.command, *unit.flags]
        else:
            used, command = compiler, [*compiler.command, *common, *unit.flags]
        # torch's path is left out of the key: an isolated build has a new one every time.
        uses = torch.version if unit.label == "bindings" else ""
        key = digest(
            used.description,
            shlex.join(command),
            uses,
            headers,
            (root / unit.source).read_bytes(),
        )
        command.append("-Icsrc")
        if unit.label == "bindings":
            command += ["-isystem", str(torch.root / "include")]
        target = work_dir / unit.object_name
        if not (target.is_file() and read_text(target.with_suffix(".key")) == key):
            command += ["-c", str(unit.source), "-o", str(target)]
            pending.append((unit, command, target, key))

    def compile_one(job: tuple[int, tuple[Unit, list[str], Path, str]]) -> None:
        number, (unit, command, target, key) = job
        # With the newline inside, so that two threads' lines do not mix.
        print(f"[{number}/{len(pending)}] {unit.source} ({unit.label})\n", end="", flush=True)
        target.with_suffix(".key").unlink(missing_ok=True)
        run = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if run.returncode != 0:
            raise BuildError(
                f"{unit.source} ({unit.label}) does not compile: {first_error(run.stderr)}",
                shlex.join(command) + "\n" + run.stderr,
            )
        if run.stderr:
            print(run.stderr, flush=True)  # warnings
        target.with_suffix(".key").write_text(key)

    with ThreadPoolExecutor(max_jobs()) as pool:
        jobs = [pool.submit(compile_one, job) for job in enumerate(pending, start=1)]
        try:
            for job in jobs:
                job.result()
        except BuildError:
            pool.shutdown(cancel_futures=True)  # one error is enough
            raise
    return [work_dir / unit.object_name for unit in units]


def link(
    objects: list[Path],
    common: tuple[str, ...],
    compiler: Compiler,
    torch: Torch,
    library: Path,
    tail: Sequence[str],
) -> Path:
    """Links the objects into `library`, unless it is of the same objects."""
    # torch is a needed library without a path: whoever loads this one has imported torch before.
    flags = ["-shared", *common, *shlex.split(os.environ.get("LDFLAGS", ""))]
    keys = [read_text(path.with_suffix(".key")) for path in objects]
    key = digest(compiler.description, shlex.join([*flags, *tail]), torch.version, *keys)
    if library.is_file() and read_text(library.with_suffix(".key")) == key:
        return library
    library.with_suffix(".key").unlink(missing_ok=True)
    names = [path.name for path in objects]
    command = [*compiler.command, *flags, *names, "-o", library.name]
    command += [f"-L{torch.root / 'lib'}", *tail]
    run = subprocess.run(command, cwd=library.parent, capture_output=True, text=True)
    if run.returncode != 0:
        raise BuildError(
            f"{library.name} does not link: {first_error(run.stderr)}",
            shlex.join(command) + "\n" + run.stderr,
        )
    library.with_suffix(".key").write_text(key)
    return library


def max_jobs() -> int:
    """Compilations at a time: as many as cores, memory and MAX_JOBS allow, at least one."""
    limits = [len(os.sched_getaffinity(0)), available_memory() // BYTES_PER_JOB]
    if os.environ.get("MAX_JOBS", "").isdigit():
        limits.append(int(os.environ["MAX_JOBS"]))
    return max(1, min(limits))


def available_memory() -> int:
    """Bytes that a new process may use: the machine's, or the control group's limit if lower."""
    meminfo = read_text(Path("/proc/meminfo"))
    kibibytes = re.search(r"^MemAvailable:\s*(\d+)", meminfo, re.MULTILINE)
    available = int(kibibytes[1]) << 10 if kibibytes else BYTES_PER_JOB
    limit = read_text(Path("/sys/fs/cgroup/memory.max")).strip()
    return min(available, int(limit)) if limit.isdigit() else available


def first_error(stderr: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|undefined reference", line)]
    return (errors or lines[-1:] or ["the compiler gives no reason"])[0]


def package_version(root: Path = ROOT) -> str:
    """The version that pyproject.toml states."""
    text = (root / "pyproject.toml").read_text()
    return re.search(r'^version = "(.+)"', text, re.MULTILINE)[1]  # type: ignore[index]


def digest(*parts: str | bytes) -> str:
    """A hash over the parts that tells ("ab", "c") from ("a", "bc")."""
    result = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        result.update(len(data).to_bytes(8, "little") + data)
    return result.hexdigest()


def read_text(path: Path) -> str:
    """The file's text, empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def replace_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Gives `path` these contents in one step: a process that has the old file open keeps it."""
    if path.is_file() and path.read_bytes() == data:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.chmod(mode)
    os.replace(temporary, path)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps two builds of one tree from writing the same object files."""
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
