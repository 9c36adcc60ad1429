"""What named GPUs can do, for reckoning without one."""

from __future__ import annotations

from dataclasses import dataclass

SHARE_OF_BANDWIDTH = 0.85  # of the published one, that a copy reaches where nobody measured it
SHARE_OF_MATRIX = 0.8  # of the published dense rate, that a product reaches


@dataclass(frozen=True)
class Rates:
    """Limits of a GPU.

    Attributes:
        bytes_per_s: of a large copy, read and written bytes together.
        matrix_flops_per_s: of a large bfloat16 product, two per multiply-add.
        vector_flops_per_s: of float32 multiply-adds outside of the tensor cores.
        source: where these come from.
    """

    bytes_per_s: float
    matrix_flops_per_s: float
    vector_flops_per_s: float
    source: str

    def floor_ms(self, bytes: float, matrix_flops: float = 0, vector_flops: float = 0) -> float:
        """What the work takes if each unit runs at its limit and all of them at the same time."""
        seconds = (
            bytes / self.bytes_per_s,
            matrix_flops / self.matrix_flops_per_s,
            vector_flops / self.vector_flops_per_s,
        )
        return max(seconds) * 1e3


GPUS = {
    "a100": Rates(
        SHARE_OF_BANDWIDTH * 2.039e12,
        SHARE_OF_MATRIX * 312e12,
        19.5e12,
        "NVIDIA A100-SXM4-80GB: 85 % of the published bandwidth, 80 % of the published bf16 rate",
    ),
    "h100": Rates(
        3.0e12,
        800e12,
        67e12,
        "NVIDIA H100 SXM: measured copy and bf16 product, published float32 rate",
    ),
    "h200": Rates(
        4.3e12,
        790e12,
        67e12,
        "NVIDIA H200 SXM: measured copy and bf16 product, published float32 rate",
    ),
    "b200": Rates(
        SHARE_OF_BANDWIDTH * 8e12,
        SHARE_OF_MATRIX * 2.25e15,
        75e12,
        "NVIDIA B200: 85 % of the published bandwidth, 80 % of the published bf16 rate",
    ),
}


def named_rates(name: str) -> Rates:
    """The rates of a GPU by its short name.

    Raises:
        ValueError: for an unknown one.
    """
    if name not in GPUS:
        raise ValueError(f"no GPU is called {name!r}, accepted: {', '.join(GPUS)}")
    return GPUS[name]
