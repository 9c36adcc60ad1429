"""Which configuration a kernel runs with.

The first of these that knows the problem decides: what was tuned on this machine (kept on disk),
the table that ships with the library for this device (``tables/``), the op's own heuristic. Tuning
happens only inside :func:`tuning`, never otherwise, and never while a CUDA graph is captured.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch

from .launch import Device

Config = TypeVar("Config")
TABLES = Path(__file__).with_name("tables")

_tuning: ContextVar[Callable[[Callable[[], Any]], float] | None] = ContextVar(
    "effkernels_tuning", default=None
)


@contextmanager
def tuning(measure: Callable[[Callable[[], Any]], float] | None = None) -> Iterator[None]:
    """Inside the ``with`` block a problem that was not tuned yet is, and the result is kept.

    Args:
        measure: milliseconds of a call; None: Triton's ``do_bench``, on the GPU.
    """
    if measure is None:
        from triton.testing import do_bench

        measure = do_bench
    token = _tuning.set(measure)
    try:
        yield
    finally:
        _tuning.reset(token)


def cache_directory() -> Path:
    """EFFKERNELS_CACHE_DIR, or ``~/.cache/effkernels``."""
    return Path(os.environ.get("EFFKERNELS_CACHE_DIR") or Path.home() / ".cache" / "effkernels")


def table_name(device: Device) -> str:
    """The file that holds the configurations of ``device``."""
    return re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-") + ".json"


def choose(
    op: str,
    problem: Any,
    device: Device,
    heuristic: Callable[[Any, Device], Config],
    candidates: Callable[[Any, Device], Iterable[Config]],
    run: Callable[[Config], Any],
) -> Config:
    """The configuration for ``problem``.

    Args:
        op: the kernel's name.
        problem: a frozen dataclass of sizes, dtypes and options.
        heuristic: gives the configuration where nothing was measured.
        candidates: those worth trying, of the same dataclass.
        run: launches the kernel with one of them, to be timed.
    """
    fallback = heuristic(problem, device)
    known = _known(device).get(_key(op, problem))
    if known is not None:
        try:
            return type(fallback)(**known)
        except TypeError:  # another version's fields
            pass
    measure = _tuning.get()
    if measure is None or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return fallback
    best, least = fallback, float("inf")
    for config in dict.fromkeys((fallback, *candidates(problem, device))):
        try:
            time = measure(functools.partial(run, config))
        except Exception:  # too much shared memory, too many registers: not for this device
            continue
        if time < least:
            best, least = config, time
    _keep(device, _key(op, problem), dataclasses.asdict(best))  # type: ignore[call-overload]
    return best


def _key(op: str, problem: Any) -> str:
    sizes = (
        f"{field.name}={getattr(problem, field.name)}" for field in dataclasses.fields(problem)
    )
    return f"{op}({', '.join(sizes)})"


_tables: dict[tuple[str, Path], dict[str, Any]] = {}


def _known(device: Device) -> dict[str, Any]:
    """Every problem's configuration that is known for ``device``."""
    where = (device.name, cache_directory())
    if where not in _tables:
        _tables[where] = {
            **_read(TABLES / table_name(device)),
            **_read(where[1] / table_name(device)),
        }
    return _tables[where]


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):  # not there, or cut short by a crash: tuned again
        return {}
    return table if isinstance(table, dict) else {}


def _keep(device: Device, key: str, config: dict[str, Any]) -> None:
    """Remember, on disk too: several processes may write, each leaves a whole file."""
    _known(device)[key] = config
    path = cache_directory() / table_name(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {**_read(path), key: config}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(table, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
