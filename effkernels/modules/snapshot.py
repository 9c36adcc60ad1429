"""Whether a thousand Python objects are what they were, asked between calls of kernels.

A network's modules and tensors are spread over the heap, and its kernels sweep the caches.
Comparing them in Python takes 0.1 ms for torchvision's EfficientNet-B0 if all is in the caches,
0.3 to 0.5 ms after its kernels: a tenth of them. So the compiled library does it, fetching ahead.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native

Entry = tuple[dict[str, Any], str, Any]  # dict, name and the value there, or None

_TENSOR_BYTES = 192  # of a TensorImpl, up to what is read of it

_data_ptr = torch.Tensor.data_ptr
_version = torch.Tensor._version.__get__  # type: ignore[attr-defined]


def _load() -> ctypes.PyDLL | None:
    library = native.with_interpreter_lock()
    if library is None or sys.implementation.name != "cpython":  # id() is an address there
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.effkernels_entries_hold.argtypes = (pointer, pointer, count)
    library.effkernels_sizes_hold.argtypes = (pointer, pointer, pointer, count)
    library.effkernels_prefetch.argtypes = (pointer, count, count)
    library.effkernels_prefetch.restype = None
    return library


_library = _load()
_get_item = ctypes.cast(ctypes.pythonapi.PyDict_GetItemWithError, ctypes.c_void_p)
_size = ctypes.cast(ctypes.pythonapi.PyDict_Size, ctypes.c_void_p)


class Snapshot:
    """What dicts and tensors were at one time.

    Args:
        entries: values that have to stay the same objects.
        dicts: nothing may be added to them or taken out.
        tensors: have to stay where they are in memory, and unwritten.
    """

    __slots__ = (
        *("_dicts", "_entries", "_kept", "_pointers", "_sizes", "_tensors", "_versions"),
        *("_native_dicts", "_native_entries", "_native_sizes", "_native_tensors"),
    )

    def __init__(
        self,
        entries: Sequence[Entry],
        dicts: Sequence[dict[Any, Any]],
        tensors: Sequence[Tensor],
    ) -> None:
        self._entries = tuple(entries)
        self._dicts = tuple(dicts)
        self._sizes = tuple(map(len, dicts))
        self._tensors = tuple(tensors)
        self._pointers = tuple(map(_data_ptr, tensors))
        self._versions = tuple(map(_version, tensors))
        # Keeps a replaced memory from being handed out again at the same address.
        self._kept = storages = tuple(tensor.untyped_storage() for tensor in tensors)
        if _library is None:
            return
        self._native_entries = _pointers(
            [
                address
                for table, name, value in entries
                for address in (id(table), id(name), id(value) if name in table else 0)
            ]
        )
        self._native_dicts = _pointers([id(table) for table in dicts])
        self._native_sizes = (ctypes.c_int64 * len(dicts))(*self._sizes)
        self._native_tensors = _pointers(
            [id(t) for t in tensors] + [it._cdata for found in (tensors, storages) for it in found]
        )

    def holds(self) -> bool:
        """Whether all that is still so."""
        if not (self._dicts_hold() if _library is None else self._dicts_hold_natively(_library)):
            return False
        return (
            tuple(map(_version, self._tensors)) == self._versions
            and tuple(map(_data_ptr, self._tensors)) == self._pointers
        )

    def _dicts_hold(self) -> bool:
        return tuple(map(len, self._dicts)) == self._sizes and all(
            dict.get(table, name) is value for table, name, value in self._entries
        )

    def _dicts_hold_natively(self, library: ctypes.PyDLL) -> bool:
        dicts, entries = self._native_dicts, self._native_entries
        if not library.effkernels_sizes_hold(_size, dicts, self._native_sizes, len(dicts)):
            return False
        if not library.effkernels_entries_hold(_get_item, entries, len(entries) // 3):
            return False
        tensors = self._native_tensors
        library.effkernels_prefetch(tensors, len(tensors), _TENSOR_BYTES)
        return True


def _pointers(addresses: list[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(addresses)).from_buffer(array("Q", addresses))
