"""Measurements run in fresh processes whose threads and allocator are set before they start."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Result = TypeVar("Result")

# glibc gives large blocks back to the system after every layer and gets them back page by page,
# unless the process has freed one before; eager takes up to 1.5 times as long then. Here all
# memory is kept, which is what PyTorch does best with.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str((1 << 63) - 1)}
# As users have it, whatever their shell says.
DEFAULT_MALLOC = dict.fromkeys((*MALLOC, "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"))
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Each runtime waits and binds threads as it does by default, whatever the user's shell says.
UNSET = ("OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "OMP_DYNAMIC", "GOMP_SPINCOUNT")
UNSET += ("GOMP_CPU_AFFINITY", "KMP_BLOCKTIME", "KMP_AFFINITY", "LD_PRELOAD")


def run_with_threads(
    threads: int,
    function: Callable[..., Result],
    *arguments: Any,
    malloc: Mapping[str, str | None] = MALLOC,
) -> Result:
    """``function(*arguments)`` in a process of its own in which all runtimes use ``threads``.

    Args:
        threads: of every runtime.
        function: what to run; it, its arguments and its result are pickled.
        *arguments: of ``function``.
        malloc: environment variables that set glibc's allocator up; None unsets one.

    Raises:
        RuntimeError: if the process dies; whatever ``function`` raises is raised as it is.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, threads, function, arguments))
    with _environment(threads, malloc):
        process.start()
    sender.close()
    try:
        result, error, trace = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the measuring process died with exit code {process.exitcode}"
        ) from None
    finally:
        process.join()
    if error is not None:
        raise error from RuntimeError(trace)
    return result


def _child(
    sender: Connection, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is shared by processes and would be left behind
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    try:
        sender.send((function(*arguments), None, ""))
    except Exception as error:
        sender.send((None, error, traceback.format_exc()))
    sender.close()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and some runtimes complain about it at length


@contextmanager
def _environment(threads: int, malloc: Mapping[str, str | None]) -> Iterator[None]:
    """What a process started inside inherits: malloc reads it before Python runs."""
    changed = {**malloc, **dict.fromkeys(THREADS, str(threads)), **dict.fromkeys(UNSET)}
    before = {name: os.environ.get(name) for name in changed}
    _set(changed)
    try:
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
