"""Where cases run: a process that may crash, hang or lose its GPU context without ending the rest.

A kernel that writes where it must not makes every later CUDA call of its process fail. So the
driver never touches the GPU itself: a worker does, one case after the other, and a new one takes
over when it dies, is killed at a case's deadline, or says that its device is lost.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Function = Callable[..., Iterable[Row]]

POLL_S = 0.25
MOST_HELD = 16 << 30  # bytes of GPU memory between cases
START_S = 60.0  # a process may take this long to import what it needs, on top of its first case


class Worker:
    """Runs functions in a process of its own that is started on first use.

    Args:
        log: file that gets everything the process prints.
        environment: variables to set in it; None unsets one.
    """

    def __init__(self, log: Path, environment: Mapping[str, str | None] | None = None) -> None:
        self._log = log
        self._environment = dict(environment or {})
        self._process: Any = None
        self._connection: Connection | None = None

    def run(
        self,
        function: Function,
        arguments: tuple[Any, ...],
        timeout_s: float,
        on_row: Callable[[Row], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> str | None:
        """``function(*arguments)``, whose rows go to ``on_row`` one by one.

        Returns:
            None, or in a few words what ended it: an exception, a crash, the timeout, ``stopped``.
        """
        until = time.monotonic() + timeout_s
        if self._process is None:
            self._start()
            until += START_S
        assert self._connection is not None
        try:
            self._connection.send((function, arguments))
            while (left := until - time.monotonic()) > 0 and not stopped():
                if not self._connection.poll(min(left, POLL_S)):
                    continue
                kind, value = self._connection.recv()
                if kind == "row":
                    on_row(value)
                    continue
                if kind == "lost":
                    self.close()
                return value
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            return f"the measuring process died with exit code {code}"
        self.close()
        return f"killed after {timeout_s:.0f} s"

    def close(self) -> None:
        """End the process; the next run starts another."""
        if self._process is None:
            return
        assert self._connection is not None
        self._connection.close()
        self._process.join(0.5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._log))
        before = {name: os.environ.get(name) for name in self._environment}
        _set(self._environment)
        try:
            self._process.start()
        finally:
            _set(before)
        theirs.close()


class InProcess:
    """The same without a process: for tests, and to look into a case with a debugger."""

    def run(
        self,
        function: Function,
        arguments: tuple[Any, ...],
        timeout_s: float,
        on_row: Callable[[Row], None],
    ) -> str | None:
        """As :meth:`Worker.run`; a function is not stopped at its timeout."""
        try:
            for row in function(*arguments):
                on_row(row)
        except Exception as error:
            return in_words(error)
        return None

    def close(self) -> None:
        """Nothing is open."""


def in_words(error: BaseException) -> str:
    """An exception's class and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _serve(connection: Connection, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    frozen = False
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            break
        error: str | None = None
        try:
            for row in function(*arguments):
                connection.send(("row", row))
        except Exception as raised:
            traceback.print_exc()
            error = in_words(raised)
        sys.stdout.flush()
        sys.stderr.flush()
        if not frozen:
            # What was imported is there to stay; a collection took 0.25 s for it every time.
            gc.collect()
            gc.freeze()
            frozen = True
        kind = "done" if clean_up() else "lost"
        connection.send((kind, error))
    os._exit(0)  # nothing is left to do, and compilers' helpers would be waited for


def clean_up() -> bool:
    """Free what a case left; False if the GPU no longer answers.

    There are a thousand small cases: memory goes back to the driver only if much of it is held.
    """
    import torch

    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > MOST_HELD:
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
