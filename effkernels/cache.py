"""What is derived from parameters (packed weights, folded BatchNorms) is kept here between calls.

An entry is valid as long as every tensor it came from is the same memory at the same version:
in-place updates and ``load_state_dict`` raise the version, ``.to`` and assignment change the
memory. Optimizers with ``fused=True`` write without raising it (seen in torch 2.15), so a hook
after every optimizer's step raises it for them. Like autograd, the cache cannot see a write
through ``tensor.data`` or a NumPy view; after one, call :func:`clear_cache`.

FSDP frees a gathered weight and gathers the next step's into the same tensor, at the same version
and, if the allocator likes, the same address: nothing is kept of its weights.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

__all__ = ["cached", "clear_cache"]


@dataclass(frozen=True, slots=True)
class _Entry:
    # A weak reference keeps a freed storage's identity from being taken for a new one's.
    storages: tuple[StorageWeakRef, ...]
    versions: tuple[int, ...]
    value: Any

    def expired(self) -> bool:
        return any(storage.expired() for storage in self.storages)


_SWEEP_EVERY = 256  # insertions; bounds how long the values of deleted models stay

_entries: dict[Hashable, _Entry] = {}
_generation = 0
_insertions = 0
_lock = threading.Lock()


def cached(kind: Hashable, tensors: tuple[Tensor, ...], build: Callable[[], Any]) -> Any:
    """``build()``, kept until one of ``tensors`` changes.

    Args:
        kind: what is built; part of the key.
        tensors: everything that ``build`` reads.
        build: computes the value; called again after a change.
    """
    if any(tensor.is_inference() for tensor in tensors):
        return build()  # inference tensors count no versions, so nothing tells of a change
    if may_be_gathered(tensors):
        return build()
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        # The graph will be replayed whatever has happened to the tensors since, and what is built
        # in it is not there before its first replay.
        return build()
    key = (
        kind,
        *[(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors],
    )
    versions = tuple([tensor._version for tensor in tensors])
    entry = _entries.get(key)
    if entry is not None and entry.versions == versions and not entry.expired():
        return entry.value
    value = build()
    storages = tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)
    _insert(key, _Entry(storages, versions, value))
    return value


def may_be_gathered(tensors: tuple[Tensor, ...]) -> bool:
    """Whether FSDP may write ``tensors`` unseen: what is derived from them must not be kept."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return False
    # fully_shard makes classes of modules; what it gathers looks like any other parameter. The
    # older wrapper gives out views of one long parameter.
    if fsdp.FSDPModule.__subclasses__():
        return True
    for tensor in tensors:
        base = tensor._base
        if base is not None and isinstance(base, fsdp.FlatParameter):  # this takes a microsecond
            return True
    return False


def _insert(key: Hashable, entry: _Entry) -> None:
    global _insertions
    with _lock:
        _entries[key] = entry
        _insertions += 1
        if _insertions % _SWEEP_EVERY == 0:
            for stale in [key for key, entry in _entries.items() if entry.expired()]:
                del _entries[stale]


def clear_cache() -> None:
    """Forget every packed weight and folded BatchNorm."""
    global _generation
    with _lock:
        _generation += 1
        _entries.clear()


def generation() -> int:
    """How often the cache was cleared: what was derived before the last time must go too."""
    return _generation


def _count_fused_step(optimizer: Optimizer, arguments: tuple[Any, ...], options: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version([p for p in group["params"] if not p.is_inference()])


register_optimizer_step_post_hook(_count_fused_step)
