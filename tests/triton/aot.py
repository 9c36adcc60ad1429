"""Compiles what the heuristics can reach, for GPUs that are not here, and reads the result.

``python -m tests.triton.aot OP CAPABILITY`` (in a process without TRITON_INTERPRET) compiles every
distinct launch that the layers of the real networks make, forward and backward, and prints one
JSON line for each launch that breaks a promise, then how many were compiled. When all are as
promised, ``--record`` notes so in ``compiled.json``.

Compiling all 6,000 takes half an hour and gives the same result until a kernel, a promise or Triton
changes. The record holds a digest of everything that the result follows from; the tests, which say
``--known``, compile what differs from it, and in any case a random part (`_AGAIN`), so that a
record that is wrong is found out.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import effkernels as ek
from benchmarks.shapes import NETWORKS, read_layers
from effkernels.dispatch import operators
from effkernels.triton import DTYPES
from effkernels.triton.launch import A100, B200, H100, Device, Launch, collect
from effkernels.triton.promises import Promise

DEVICES = {80: A100, 90: H100, 100: B200}
BATCHES = (1, 256)
# Of one processor: registers, bytes of shared memory (beside which a block takes 1 KB), warps.
_REGISTERS, _BLOCK_OVERHEAD = 65536, 1024
_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
_MOST_WARPS, _MOST_BLOCKS = 64, 32

_RECORD = Path(__file__).with_name("compiled.json")
_AGAIN = 0.03  # of the recorded launches are compiled all the same

# Files without a configuration of their own.
_SAID_BY = {"expand_depthwise": "mbconv", "image_sums": "mbconv"}

# A layer's calls beyond those of `Layer.run`: op -> function that makes them on meta tensors.
Calls = Callable[[torch.dtype, int], None]


def launches(calls: Iterable[Callable[[], Any]], device: Device) -> list[Launch]:
    """What these calls (on meta tensors) launch on ``device``, each once."""
    _run_on_meta()
    with collect(device) as found, ek.use_backend("triton"), torch.device("meta"):
        for call in calls:
            call()
    return list(found)


@functools.cache
def _run_on_meta() -> torch.library.Library:
    """From now on this process runs ops on meta tensors, too, in place of their shape rules."""
    library = torch.library.Library("effkernels", "IMPL")
    for operator in operators.values():
        for name in (operator.name, f"{operator.name}_backward"):

            def run(*arguments: Any, name: str = name) -> Any:
                overload = getattr(torch.ops.effkernels, name).default
                return overload._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments)

            library.impl(name, run, "Meta", allow_override=True)
    return library


def network_calls(op: str, networks: Sequence[str] = NETWORKS) -> Iterator[Callable[[], Any]]:
    """Forward and backward passes of ``op`` on the real networks' layers, every dtype."""
    layers = {layer for name in networks for layer in read_layers(name) if layer.op == op}
    distinct = {dataclasses.replace(layer, count=1, in_block=False) for layer in layers}
    for layer in sorted(distinct, key=str):
        for dtype in DTYPES:
            for batch in BATCHES:
                yield lambda layer=layer, dtype=dtype, batch=batch: _layer(layer, dtype, batch)


def _layer(layer: Any, dtype: torch.dtype, batch: int) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in layer.tensors(batch).items()}
    with torch.no_grad():
        layer.run(tensors)
    differentiate(layer.run, tensors)


def differentiate(function: Callable[[dict[str, Tensor]], Any], tensors: dict[str, Tensor]) -> None:
    """A forward and a backward pass for all of ``tensors``."""
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    output = function(leaves)
    outputs = output if isinstance(output, tuple) else (output,)
    torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(o) for o in outputs])


def compile_launch(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name, _ in launch.signature]
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "maxnreg": launch.max_registers,
    }
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers a thread, bytes of local memory a thread, bytes of shared memory a block."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return {
        "registers": found["REG"],
        "local": found["STACK"] + found["LOCAL"],
        "shared": compiled.metadata.shared,
    }


def resident_warps(registers: int, shared: int, num_warps: int, capability: int) -> int:
    """How many warps of such blocks one processor holds."""
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * 32 * num_warps)
    by_shared = _SHARED[capability] // (shared + _BLOCK_OVERHEAD)
    return num_warps * min(by_registers, by_shared, _MOST_WARPS // num_warps, _MOST_BLOCKS)


def broken_promises(
    launch: Launch, promise: Promise, capability: int, compiled: Any = None
) -> list[str]:
    """What is wrong with the compiled launch, in words; nothing, if it is as promised."""
    compiled = compiled or compile_launch(launch, capability)
    used = resources(compiled)
    ptx = compiled.asm["ptx"]
    wrong = []
    if used["local"]:
        wrong.append(f"{used['local']} bytes of local memory a thread")
    warps = resident_warps(used["registers"], used["shared"], launch.num_warps, capability)
    if warps < promise.warps:
        wrong.append(f"{warps} warps fit, {promise.warps} promised ({used})")
    most = DEVICES[capability].shared_memory
    if used["shared"] > most:
        wrong.append(f"{used['shared']} bytes of shared memory a block, there are {most}")
    wide_loads = (
        r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\S* .*, 0x10|cp\.async\.bulk"
    )
    if promise.vector_loads and not re.search(wide_loads, ptx):
        wrong.append("no load of 16 bytes")
    if promise.vector_stores and not re.search(
        r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64|cp\.async\.bulk", ptx
    ):
        wrong.append("no store of 16 bytes")
    narrowest = min(load_widths(ptx), default=promise.narrowest_load)
    if narrowest < promise.narrowest_load:
        wrong.append(f"a load of {narrowest} bytes, {promise.narrowest_load} are promised")
    if promise.tensor_cores and not re.search(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx):
        wrong.append("no tensor-core instruction")
    return wrong


def load_widths(ptx: str) -> set[int]:
    """Bytes that a thread takes at a time, by every kind of load from global memory."""
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    return {int(count or 1) * int(bits) // 8 for count, bits in loads}


def describe(launch: Launch) -> str:
    constants = ", ".join(f"{name}={value}" for name, value in launch.constants)
    types = ", ".join(kind for _, kind in launch.signature if kind.startswith("*"))
    return (
        f"{launch.kernel.fn.__name__}({types}; {constants}) "
        f"warps={launch.num_warps} stages={launch.num_stages} "
        f"registers={launch.max_registers}"
    )


def promise_of(launch: Launch) -> Promise:
    """What the op says that the kernel is a part of: of `pointwise_conv_weight`'s kernels
    `pointwise_conv_config` does."""
    package, _, name = launch.kernel.fn.__module__.rpartition(".")
    name = _SAID_BY.get(name, name)
    while importlib.util.find_spec(f"{package}.{name}_config") is None:
        name = name.rpartition("_")[0]
    promise: Promise = importlib.import_module(f"{package}.{name}_config").promise(launch)
    return promise


def digest(launches: Iterable[Launch], capability: int) -> str:
    """Of all that decides which of ``launches`` break their promise."""
    import triton

    known = hashlib.sha256()
    for part in (triton.__version__, Path(__file__).read_text(), str(capability)):
        known.update(part.encode())
    for line in sorted(
        # cache_key: the source of the kernel and of all that it calls
        f"{launch.kernel.cache_key} {describe(launch)} {launch.signature} {launch.aligned} "
        f"{promise_of(launch)}"
        for launch in launches
    ):
        known.update(line.encode())
    return known.hexdigest()


def check(op: str, capability: int, *, known: bool = False, record: bool = False) -> None:
    """Compile ``op``'s launches; print those that break a promise, as JSON lines.

    The last line says how many launches there are and how many were compiled. ``known``: those of
    the record, but for a random part, are not; ``record``: note that all are as promised.
    """
    calls = importlib.import_module(f"tests.triton.test_{op}").aot_calls()
    found = launches(calls, DEVICES[capability])
    entry, seen = f"{op} sm_{capability}", digest(found, capability)
    compiled = found
    if known and json.loads(_RECORD.read_text()).get(entry) == seen:
        compiled = random.sample(found, math.ceil(_AGAIN * len(found)))
    broken = 0
    for launch in compiled:
        wrong = broken_promises(launch, promise_of(launch), capability)
        if wrong:
            broken += 1
            print(json.dumps({"launch": describe(launch), "wrong": wrong}), flush=True)
    if record and not broken:
        records = json.loads(_RECORD.read_text()) | {entry: seen}
        _RECORD.write_text(json.dumps(records, indent=2, sort_keys=True) + "\n")
    print(json.dumps({"launches": len(found), "compiled": len(compiled)}))


def run(op: str, capability: int) -> tuple[int, list[str]]:
    """:func:`check` in a process of its own, without the interpreter: (compiled, broken)."""
    *broken, last = _without_interpreter("-m", __name__, op, str(capability), "--known")
    return last["compiled"], [f"{b['launch']}: {'; '.join(b['wrong'])}" for b in broken]


def result_of(function: str) -> Any:
    """What ``module:function`` gives (as JSON) in a process of its own, without the interpreter."""
    module, name = function.split(":")
    code = f"import json, {module} as m; print(json.dumps(m.{name}()))"
    return _without_interpreter("-c", code)[-1]


def _without_interpreter(*command: str) -> list[Any]:
    """The JSON lines that Python prints in a process that can compile kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


if __name__ == "__main__":
    check(
        sys.argv[1],
        int(sys.argv[2]),
        known="--known" in sys.argv,
        record="--record" in sys.argv,
    )
