"""What a compiled kernel must look like; checked on the compiler's output, with no GPU.

Each ``<op>_config.py`` has a function ``promise(launch)`` that says it for every launch its
heuristic can make.
"""

from __future__ import annotations

from dataclasses import dataclass

from .launch import Launch


@dataclass(frozen=True)
class Promise:
    """No kernel spills registers or uses local memory; beyond that each promises its own.

    Attributes:
        warps: at least so many fit on one processor at a time, by registers and shared memory.
        vector_loads: tensors are read 16 bytes an access (or by cp.async or TMA).
        vector_stores: and written so.
        tensor_cores: products run on them (mma or wgmma).
        narrowest_load: no load of a thread takes fewer bytes at a time.
    """

    warps: int
    vector_loads: bool = False
    vector_stores: bool = False
    tensor_cores: bool = False
    narrowest_load: int = 0


def itemsize(launch: Launch) -> int:
    """Bytes of a value of the launch's narrowest tensor."""
    types = {"*fp32": 4, "*bf16": 2, "*fp16": 2}
    return min(types.get(kind, 4) for _, kind in launch.signature)


def is_vectored(launch: Launch, vector: str = "VECTOR") -> bool:
    """The launch's constant ``vector`` values of its tensors' dtype make 16 bytes."""
    return dict(launch.constants)[vector] * itemsize(launch) >= 16
