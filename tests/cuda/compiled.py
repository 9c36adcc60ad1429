"""What nvcc makes of the kernels, read from the library that is shipped.

``library()`` builds the CUDA library with the installation's own build; ``kernels`` lists every
kernel in it with its registers, memory and instructions; ``promises`` reads what the kernels' files
promise:

    // promise: NAME threads 256, shared 0, warps 32, loads 16, stores 16, tensor cores

NAME is a pattern for the kernel's name with its template arguments, of which the first that fits
counts; the rest is said at :class:`Promise`.

Compiling for A100, H100, B200 and what comes later takes minutes and gives the same result until
a kernel, a promise or nvcc changes. ``compiled.txt`` holds a digest of everything that the result
follows from. Where it fits, ``library()`` is compiled for H100 alone; ``python -m
tests.cuda.compiled`` compiles for all, checks all and records the digest.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from build_tools import locate, native

# Of one processor: registers, bytes of shared memory (beside which a block takes 1 KB).
_REGISTERS, _BLOCK_OVERHEAD = 65536, 1024
_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}
_MOST_WARPS = {80: 64, 90: 64, 100: 64, 120: 48}
_MOST_BLOCKS = {80: 32, 90: 32, 100: 32, 120: 24}
CHECKED = (80, 90, 100)  # compute capabilities whose warps are promised
_RECORD = Path(__file__).with_name("compiled.txt")


@dataclass(frozen=True)
class Promise:
    """What a kernel's file says of its compiled code."""

    name: str
    threads: int  # of a block
    shared: int  # bytes of shared memory of a block, at most
    warps: int  # that one processor holds
    loads: int  # bytes of its widest load from global memory
    stores: int
    tensor_cores: bool


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one compute capability."""

    capability: int
    name: str
    registers: int
    local: int  # bytes of a thread: its stack, and spilled registers
    shared: int  # bytes of a block, beside what the launch asks for
    code: str  # SASS

    def wrong(self, promise: Promise) -> list[str]:
        """What is not as promised, in words."""
        wrong = []
        if self.local or re.search(r"\b(LDL|STL)\b", self.code):
            wrong.append(f"{self.local} bytes of local memory a thread")
        if self.capability in CHECKED:
            warps = self.warps(promise)
            if warps < promise.warps:
                wrong.append(
                    f"{warps} warps fit, {promise.warps} promised ({self.registers} registers)"
                )
        for what, promised in (("load", promise.loads), ("store", promise.stores)):
            widest = max(self.widths(what), default=0)
            if widest < promised:
                wrong.append(f"no {what} of {promised} bytes, {widest} at most")
        if promise.tensor_cores and not re.search(r"\b(HMMA|HGMMA|UTCHMMA|QGMMA)\b", self.code):
            wrong.append("no tensor-core instruction")
        return wrong

    def warps(self, promise: Promise) -> int:
        """How many warps of such blocks one processor holds."""
        warps = promise.threads // 32
        by_registers = _REGISTERS // (-(-self.registers // 8) * 8 * 32 * warps)
        used = promise.shared + self.shared + _BLOCK_OVERHEAD
        by_shared = _SHARED[self.capability] // used
        by_warps = _MOST_WARPS[self.capability] // warps
        return warps * min(by_registers, by_shared, by_warps, _MOST_BLOCKS[self.capability])

    def widths(self, what: str) -> set[int]:
        """Bytes that a thread moves at a time, by every kind of ``what``: "load" or "store"."""
        names = r"LDG|LDGSTS" if what == "load" else r"STG"
        found = re.findall(rf"\b(?:{names})\.([A-Z0-9._]*)", self.code)
        return {_width(modifiers) for modifiers in found}


def _width(modifiers: str) -> int:
    for part in modifiers.split("."):
        if part in ("64", "128"):
            return int(part) // 8
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:]) // 8
    return 4


def digest() -> str:
    """Of all that decides whether the kernels are as promised."""
    nvcc = locate.find_nvcc()
    version = native.nvcc_version(nvcc) if nvcc else None
    flags = (*native.NVCC_FLAGS, native.KERNEL_STANDARD, *native.CUDA_ARCHITECTURES)
    csrc = native.ROOT / "csrc"
    sources = sorted({*csrc.glob("*/cuda*"), *csrc.glob("common/*.h"), Path(__file__)})
    return native.digest(str(version), *flags, *(path.read_bytes() for path in sources))


def recorded() -> bool:
    """Whether these kernels were compiled for all architectures and found as promised."""
    return native.read_text(_RECORD).strip() == digest()


def library() -> Path:
    """The CUDA library, built as an installation builds it, as far as anything changed.

    For H100 alone where the rest is :func:`recorded`.
    """
    return _library("9.0" if recorded() else "")


@functools.cache
def _library(architectures: str) -> Path:
    torch, missing = locate.find_torch()
    reason = native.why_no_cuda(torch, missing)
    if reason is not None:
        pytest.skip(reason)
    target = native.ROOT / "build" / "cuda" / f"checked{architectures}" / native.CUDA_LIBRARY
    target.parent.mkdir(parents=True, exist_ok=True)
    environ = {"TORCH_CUDA_ARCH_LIST": architectures}
    native.build_cuda(target, torch, missing, environ=environ)
    return target


def broken(found: list[Kernel]) -> list[str]:
    """What is not as promised of these kernels, in words."""
    result = []
    for kernel in found:
        promise = promise_of(kernel, promises())
        if kernel.capability in CHECKED:
            wrong = ["nothing is promised"] if promise is None else kernel.wrong(promise)
        else:
            wrong = ["local memory"] if kernel.local else []
        result += [f"{kernel.name} on sm_{kernel.capability}: {words}" for words in wrong]
    return result


@functools.cache
def kernels(path: Path) -> list[Kernel]:
    """Every kernel in a library or fatbin."""
    usage = _cuobjdump("-res-usage", path)
    resources = {}
    capability = 0
    for line, after in zip(usage.splitlines(), [*usage.splitlines()[1:], ""], strict=True):
        if match := re.match(r"arch = sm_(\d+)", line):
            capability = int(match[1])
        if match := re.match(r" *Function (\S+):", line):
            numbers = dict(re.findall(r"(\w+):(\d+)", after))
            resources[capability, match[1]] = {key: int(n) for key, n in numbers.items()}
    code: dict[tuple[int, str], list[str]] = {}
    key = (0, "")
    for line in _cuobjdump("-sass", path).splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            capability = int(match[1])
        if match := re.match(r"\s*Function : (\S+)", line):
            key = (capability, match[1])
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.setdefault(key, []).append(match[1])
    names = _demangled([name for _, name in resources])
    return [
        Kernel(
            capability,
            names[name],
            used["REG"],
            used["STACK"] + used["LOCAL"],
            used["SHARED"],
            "\n".join(code.get((capability, name), [])),
        )
        for (capability, name), used in resources.items()
    ]


def _cuobjdump(option: str, path: Path) -> str:
    nvidia = pytest.importorskip("triton.backends.nvidia")
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def _demangled(names: list[str]) -> dict[str, str]:
    """The names without namespace, result and parameters: "activation_kernel<f16, false>"."""
    text = "\n".join(names)
    full = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    short = [_short(name) for name in full.stdout.splitlines()]
    return dict(zip(names, short, strict=True))


def _short(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "").replace("effkernels::", "")
    name = re.sub(r"_GLOBAL__N__\w+::", "", name).removeprefix("void ")
    depth = 0
    for index, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:index]
    return name


@functools.cache
def promises() -> list[Promise]:
    """What the kernels' files promise, in their order."""
    return [
        promise
        for source in sorted(native.ROOT.glob("csrc/*/cuda*"))
        for promise in read_promises(source.read_text())
    ]


def read_promises(text: str) -> Iterator[Promise]:
    """Every promise in a kernel's file."""
    for line in re.findall(r"^// promise: (.*)$", text, re.MULTILINE):
        match = re.fullmatch(
            r"(\S.*?) threads (\d+), shared (\d+), warps (\d+)"
            r"(?:, loads (\d+))?(?:, stores (\d+))?(, tensor cores)?",
            line,
        )
        assert match is not None, f"not a promise: {line}"
        name, *numbers, tensor_cores = match.groups()
        yield Promise(name, *(int(n or 0) for n in numbers), tensor_cores is not None)


def promise_of(kernel: Kernel, among: list[Promise]) -> Promise | None:
    return next((p for p in among if re.fullmatch(p.name, kernel.name)), None)


def record() -> None:
    """Compile for all architectures and note that all kernels are as promised, if they are."""
    found = kernels(_library(""))
    wrong = broken(found)
    if wrong or not {kernel.capability for kernel in found} > set(CHECKED):
        raise SystemExit("\n".join(wrong) or "not compiled for all architectures")
    _RECORD.write_text(digest() + "\n")


if __name__ == "__main__":
    record()
