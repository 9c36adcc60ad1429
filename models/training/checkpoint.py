"""Files that are whole or not there, and the random state that a checkpoint needs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .config import OWNER

VERSION = 1


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a new file and give it the name ``path`` once it is on the disk.

    Whatever happens before, a file that was there stays; no half-written file is left.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are for their owner alone; others get what the umask leaves them
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save(path: Path, state: dict[str, Any]) -> None:
    """``torch.save``, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path) -> dict[str, Any]:
    """A run's checkpoint, on the CPU.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is no checkpoint of a run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{OWNER}: resume: {path} does not exist, nothing to resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever pickle, zipfile and its reader do
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{OWNER}: resume: {path} is damaged or no checkpoint: {reason[0]}"
        ) from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise ValueError(f"{OWNER}: resume: {path} is not a checkpoint of a training run")
    return state


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The random state of this process's CPU and, if it trains there, of its GPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Go on from what :func:`rng_state` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
