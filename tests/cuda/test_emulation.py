"""The emulated GPU finds mistakes: each kernel of faults.cu, with its mistake and without."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from build_tools import locate
from tests.cuda import emulated

# Of a write and a read without a barrier between, whichever comes first.
UNORDERED = "race: a write and a read in byte|a read of shared memory that nobody wrote"
# kernel -> what the emulated GPU says of its mistake: with the race detector, under sanitizers
FAULTS = {
    "barrier": (UNORDERED, None),
    "warp_barrier": (UNORDERED, None),
    "reuse": ("race: a (read and a write|write and a read) in byte", None),
    "unwritten": ("a read of shared memory that nobody wrote", None),
    "divergent": ("threads wait for each other for ever", "threads wait for each other for ever"),
    "two_barriers": ("at the barrier of", "at the barrier of"),
    "shuffle": ("at the warp's operation of", "at the warp's operation of"),
    "copy": ("that an asynchronous copy is writing", None),
    "copy_barrier": (f"{UNORDERED}|that an asynchronous copy is writing", None),
    "blocks": ("race: two writes in global memory", None),
    "aligned": ("no multiple of 16", "misaligned address"),
    "outside": (None, "heap-buffer-overflow"),
    "shared_memory": ("launch: 1048576 bytes of shared memory", "bytes of shared memory"),
    "threads": ("launch: a block of 2048 threads", "a block of 2048 threads"),
}
SEEDS = range(3)


@pytest.fixture(scope="module", params=["races", "asan"])
def program(request, tmp_path_factory) -> tuple[str, Path]:
    compiler, reason = locate.find_compiler()
    if compiler is None:
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("faults") / request.param
    emulated.program(Path(__file__).with_name("faults.cu"), path, sanitized=request.param == "asan")
    return request.param, path


@pytest.mark.parametrize("name", FAULTS)
def test_the_mistake_is_named(program, name):
    kind, path = program
    words = FAULTS[name][kind == "asan"]
    if words is None:
        pytest.skip(f"{kind} is not for this mistake")
    for seed in SEEDS:
        run = subprocess.run([path, name, "wrong", str(seed)], capture_output=True, text=True)
        assert run.returncode != 0
        assert re.search(words, run.stdout + run.stderr)


@pytest.mark.parametrize("name", FAULTS)
def test_the_right_kernel_runs(program, name):
    for seed in SEEDS:
        run = subprocess.run([program[1], name, "right", str(seed)], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
