"""The CUDA kernels and their bindings as host C++, run on CPU tensors.

``library()`` compiles ``csrc/*/cuda.cu`` and ``csrc/bindings/cuda.cpp`` with the emulated GPU of
``emulation.cpp``: with its race detector, or, where EFFKERNELS_EMULATION is ``asan``, under
AddressSanitizer and UBSan (``make test-asan``). Libraries with a mistake in a kernel are loaded
in processes of their own: see :func:`with_mistake`.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import shlex
import subprocess
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from build_tools import locate, native
from effkernels import cuda

HERE = Path(__file__).parent
BUILD = native.ROOT / "build" / "emulation"
SANITIZED = os.environ.get("EFFKERNELS_EMULATION") == "asan"
# Optimised, as the threads of a block run one after the other; not vectorised, so that an access
# of the source is an access of the program.
_FLAGS = (
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-DEFFKERNELS_EMULATED",
)
_WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
_SANITIZE = native.SANITIZE_FLAGS
_RACES = ("-fsanitize=thread",)  # only its hooks, which emulation.cpp has

Mistake = tuple[str, str, str]  # a file below csrc/, text in it, text in its place


def library(mistake: Mistake | None = None) -> Path:
    """The library, compiled as far as anything changed."""
    compiler, reason = locate.find_compiler()
    found, missing = locate.find_torch()
    if compiler is None or found is None:
        pytest.skip(reason or missing)
    kernels = sorted(native.ROOT.glob("csrc/*/cuda.cu"))
    others = [native.ROOT / "csrc" / "bindings" / "cuda.cpp", HERE / "emulation.cpp"]
    overlay: dict[Path, str] = {}
    if mistake is not None:
        name, old, new = mistake
        path = native.ROOT / "csrc" / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name}: {old!r} stands there {text.count(old)} times"
        overlay[path] = text.replace(old, new)
    headers = sorted([*native.ROOT.glob("csrc/*/*.h"), *HERE.glob("*.h")])
    BUILD.mkdir(parents=True, exist_ok=True)

    @functools.cache
    def text_of(path: Path) -> str:
        return overlay.get(path) or path.read_text()

    def included(path: Path, known: set[Path]) -> set[Path]:
        """``known`` and the headers that a file includes, directly or not."""
        for name in re.findall(r'^#include "(.+)"', text_of(path), re.MULTILINE):
            header = native.ROOT / "csrc" / name
            if header not in known and header.exists():
                known.add(header)
                included(header, known)
        return known

    def compiled(source: Path) -> Path:
        flags = [*_FLAGS, *(_SANITIZE if SANITIZED else _RACES if source.suffix == ".cu" else ())]
        if source.parent.name == "bindings":
            flags += [*native.BINDINGS_FLAGS, f"-isystem{found.root / 'include'}"]
        else:
            flags += [native.KERNEL_STANDARD, *_WARNINGS]
        texts = [text_of(path) for path in (source, *sorted(included(source, set())))]
        key = native.digest(compiler.description, shlex.join(flags), found.version, *texts)
        target = BUILD / f"{source.parent.name}-{source.stem}-{key[:20]}.o"
        if not target.exists():
            tree = BUILD / key
            if overlay:  # a copy of csrc/ with the mistake
                for path in [*headers, source]:
                    if path.is_relative_to(native.ROOT / "csrc"):
                        copy = tree / path.relative_to(native.ROOT)
                        copy.parent.mkdir(parents=True, exist_ok=True)
                        copy.write_text(text_of(path))
                if source.is_relative_to(native.ROOT / "csrc"):
                    source = tree / source.relative_to(native.ROOT)
            includes = f"-I{tree if overlay else native.ROOT}/csrc"
            command = [*compiler.command, *flags, includes, "-x", "c++", "-c", str(source)]
            _make(command, target)
        return target

    with native.locked(BUILD):
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, [*kernels, *others]))
        target = BUILD / f"cuda-{native.digest(*(path.name for path in objects))[:20]}.so"
        if not target.exists():
            sanitize = _SANITIZE if SANITIZED else ()
            lib = [f"-L{found.root / 'lib'}", "-ltorch_cpu"]
            _make([*compiler.command, "-shared", *sanitize, *map(str, objects), *lib], target)
    return target


def program(source: Path, target: Path, sanitized: bool) -> None:
    """A program of one file of kernels and the emulated GPU."""
    compiler, _ = locate.find_compiler()
    assert compiler is not None
    objects = []
    for path in (source, HERE / "emulation.cpp"):
        flags = _SANITIZE if sanitized else _RACES if path == source else ()
        objects.append(target.with_suffix(f".{path.stem}.o"))
        command = [*compiler.command, *_FLAGS, native.KERNEL_STANDARD, *_WARNINGS, *flags]
        _make([*command, f"-I{native.ROOT / 'csrc'}", "-x", "c++", "-c", str(path)], objects[-1])
    _make([*compiler.command, *(_SANITIZE if sanitized else ()), *map(str, objects)], target)


def _make(command: list[str], target: Path) -> None:
    temporary = target.with_suffix(f".{os.getpid()}")
    done = subprocess.run([*command, "-o", str(temporary)], capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    os.replace(temporary, target)


@functools.cache
def load() -> None:
    """Loads the library into this process."""
    torch.ops.load_library(str(library()))


def configure(
    seed: int = 0, capability: int = 90, processors: int = 132, shared_memory: int = 227 * 1024
) -> None:
    """The emulated GPU, and the order in which its threads run."""
    torch.ops.effkernels_cuda.configure(seed, capability, processors, shared_memory)


def with_mistake(mistake: Mistake | None, check: Callable[[], Any]) -> str:
    """What ``check``, a function of a module, raises on kernels with this mistake; "" if none."""
    path = library(mistake)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["effkernels", "tests.ops._cases"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_check, args=(str(path), check, sender))
    process.start()
    sender.close()
    try:
        return str(receiver.recv())
    except EOFError:  # a sanitizer ended the process
        return "the process died"
    finally:
        process.join()


def _check(path: str, check: Callable[[], Any], sender: Any) -> None:
    torch.set_num_threads(1)
    torch.ops.load_library(path)
    with cuda.emulated():
        try:
            check()
        except Exception as error:
            sender.send(f"{type(error).__name__}: {error}")
        except BaseException:
            sender.send(traceback.format_exc())
        else:
            sender.send("")
