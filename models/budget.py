"""The largest compound-scaled network that a budget allows (Tan & Le, 2019, equation 2).

Maximise φ subject to FLOPs ≤ target, parameters ≤ target, memory ≤ target, and also to a latency
that is measured on this machine. Everything but the latency is counted on the meta device.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from effkernels.modules import arguments

from . import resnet
from .memory import MODES, OPTIMIZERS, Memory, memory
from .registry import Variant, create_scaled, scaled_variant
from .scaling import MOST_PHI, CompoundScaling, Multipliers
from .summary import BYTES, Summary, summary

STEPS = 100  # of φ to 1; between two of them networks hardly ever differ
_WARM_UP, _LEAST_CALLS = 2, 3
_MEASURE_S = 0.5  # seconds of calls, at least
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class ScaledNetwork:
    """A compound-scaled network and what it costs. A figure is found when it is asked for.

    Args:
        base: one of :func:`list_models`.
        phi: how far it is scaled.
        scaling: the coefficients.
        batch: images at once, for memory and latency; other figures are per image.
        optimizer: ``"sgd"`` (with momentum) or ``"adam"``, for the memory of training.
        options: of :func:`create_scaled`: ``num_classes``, ``stem``, ...

    Raises:
        ValueError: as :func:`create_scaled` does, or for ``batch`` and ``optimizer``.
    """

    base: str
    phi: float
    scaling: CompoundScaling = CompoundScaling()
    batch: int = 1
    optimizer: str = "sgd"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arguments.positive("ScaledNetwork", "batch", self.batch)
        if self.optimizer not in OPTIMIZERS:
            accepted = " or ".join(repr(name) for name in OPTIMIZERS)
            raise ValueError(
                f"ScaledNetwork: optimizer is {self.optimizer!r}, {accepted} is accepted"
            )
        _ = self.variant

    def at(self, phi: float) -> ScaledNetwork:
        """The same network, and what is known of it, as that of another φ with its variant."""
        other = copy.copy(self)
        object.__setattr__(other, "phi", phi)
        return other

    @cached_property
    def variant(self) -> Variant:
        """The table of its stages."""
        return scaled_variant(self.base, self.phi, self.scaling, **self.options)

    @property
    def multipliers(self) -> Multipliers:
        """α^φ, β^φ and γ^φ, before rounding."""
        return self.scaling.at(self.phi)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        if isinstance(self.variant, resnet.Variant):
            return self.variant.blocks
        return tuple(stage.blocks for stage in self.variant.stages)

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels of each stage; a ResNet's before its blocks' expansion."""
        if isinstance(self.variant, resnet.Variant):
            return self.variant.widths
        return tuple(stage.out_channels for stage in self.variant.stages)

    @property
    def resolution(self) -> int:
        """Side of the images."""
        if isinstance(self.variant, resnet.Variant):
            assert self.variant.resolution is not None  # it is scaled
            return self.variant.resolution
        return self.variant.data_config.resolution

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.options.get("in_channels", 3), self.resolution, self.resolution

    def build(self) -> nn.Module:
        """The network, with random weights."""
        return create_scaled(self.base, self.phi, self.scaling, **self.options)

    @cached_property
    def _meta(self) -> nn.Module:
        with torch.device("meta"):
            return self.build()

    @cached_property
    def _summary(self) -> Summary:
        return summary(self._meta, self.input_shape)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._meta.parameters())

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions and fully connected layers, per image."""
        return self._summary.macs

    @property
    def flops(self) -> int:
        """Two per multiply-add. What papers of this family print as FLOPs are multiply-adds."""
        return 2 * self.macs

    @property
    def activations(self) -> int:
        """Values that convolutions give, per image (Radosavovic et al., 2020, section 3.3)."""
        layers = (layer for layer in self._summary.layers if layer.type == "Conv2d")
        return sum(layer.activation_bytes // BYTES for layer in layers)

    @cached_property
    def inference_memory(self) -> Memory:
        """Predicted, see :func:`memory`."""
        return memory(self._meta, self.input_shape, self.batch, "inference")

    @cached_property
    def training_memory(self) -> Memory:
        """Predicted, see :func:`memory`."""
        return memory(self._meta, self.input_shape, self.batch, "training", self.optimizer)

    @cached_property
    def latency(self) -> float:
        """Seconds of a forward pass of the whole batch in evaluation mode: measured here, on
        torch's threads as they are set, the median of half a second of calls or more.

        Raises:
            ValueError: if it needs more memory than this machine has.
        """
        check_fits(self.inference_memory.total, f"{self.base} at phi = {self.phi:g}")
        return measure_latency(self.build(), self.input_shape, self.batch)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the latency, for JSON; memory is in bytes."""
        return {
            "base": self.base,
            "phi": self.phi,
            "multipliers": self.multipliers._asdict(),
            "resolution": self.resolution,
            "blocks": list(self.blocks),
            "channels": list(self.channels),
            "parameters": self.parameters,
            "macs": self.macs,
            "flops": self.flops,
            "activations": self.activations,
            "batch": self.batch,
            "optimizer": self.optimizer,
            "inference_memory": self.inference_memory.to_dict(),
            "training_memory": self.training_memory.to_dict(),
        }


def measure_latency(model: nn.Module, input_shape: tuple[int, ...], batch: int) -> float:
    """Seconds of a forward pass in evaluation mode; the median."""
    model = model.eval()
    image = torch.randn(batch, *input_shape)
    seconds: list[float] = []
    with torch.inference_mode():
        for _ in range(_WARM_UP):  # the first call is recorded and packs weights
            model(image)
        while len(seconds) < _LEAST_CALLS or sum(seconds) < _MEASURE_S:
            start = time.perf_counter()
            model(image)
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def machine_memory() -> int:
    """Bytes that this machine has, or that this process's control group may use."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int(_CGROUP_LIMIT.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return total
    return min(total, limit)


def check_fits(needed: int, what: str) -> None:
    """Nothing is run that this machine has no memory for.

    Raises:
        ValueError: saying how much is missing.
    """
    there = machine_memory()
    if needed > there:
        raise ValueError(
            f"{what} needs {needed / 2**30:.1f} GiB of memory, this machine has "
            f"{there / 2**30:.1f} GiB"
        )


_MOST = {"flops": 1e15, "parameters": 1e12, "memory": 2.0**50, "latency": 3600.0}


@dataclass(frozen=True)
class Budget:
    """What a network may cost; None: any.

    Args:
        flops: per image, two per multiply-add.
        parameters: values.
        memory: bytes, at the peak of ``mode``.
        latency: seconds per forward pass of a batch, measured.
        mode: ``"inference"`` or ``"training"``, which of them ``memory`` is about.

    Raises:
        ValueError: naming the argument that is no positive number or absurdly large (a petaflop
            per image, 10¹² parameters, a pebibyte, an hour), or if all are None.
    """

    flops: float | None = None
    parameters: float | None = None
    memory: float | None = None
    latency: float | None = None
    mode: str = "inference"

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and arguments.ratio("Budget", name, value) > most:
                raise ValueError(f"Budget: {name} is {value!r}, at most {most:g} is accepted")
        if all(getattr(self, name) is None for name in _MOST):
            raise ValueError(f"Budget: nothing is limited, one of {', '.join(_MOST)} is needed")
        if self.mode not in MODES:
            accepted = " or ".join(repr(mode) for mode in MODES)
            raise ValueError(f"Budget: mode is {self.mode!r}, {accepted} is accepted")


@dataclass(frozen=True)
class Constraint:
    """What a network costs, and the most that it may."""

    name: str
    value: float
    limit: float

    @property
    def excess(self) -> float:
        """How many times the limit."""
        return self.value / self.limit

    def __str__(self) -> str:
        divisor, unit = _UNITS[self.name]
        value, limit = (f"{number / divisor:,.4g}" for number in (self.value, self.limit))
        if value == limit:
            value = f"{self.value / divisor:,.8g}"
        return f"{self.name}: {value} of at most {limit}{unit} ({self.excess:.3f} times)"


_UNITS = {
    "FLOPs": (1e9, " G"),
    "parameters": (1e6, " M"),
    "inference memory": (2**20, " MiB"),
    "training memory": (2**20, " MiB"),
    "this machine's memory": (2**20, " MiB"),
    "latency": (1e-3, " ms"),
}


class Infeasible(ValueError):
    """No network is small enough. ``constraints`` are those that the smallest one breaks."""

    def __init__(self, message: str, constraints: tuple[Constraint, ...]) -> None:
        super().__init__(message)
        self.constraints = constraints


@dataclass(frozen=True)
class Solution:
    """The largest network within a budget.

    Attributes:
        network: it.
        binding: what the next larger network breaks; empty if none does up to the largest φ.
    """

    network: ScaledNetwork
    binding: tuple[Constraint, ...]


def solve(
    base: str,
    budget: Budget,
    scaling: CompoundScaling | None = None,
    *,
    batch: int = 1,
    optimizer: str = "sgd",
    least_phi: float = 0.0,
    most_phi: float = 10.0,
    latency_of: Callable[[ScaledNetwork], float] | None = None,
    **options: Any,
) -> Solution:
    """The network with the largest φ that keeps to ``budget``, in steps of 0.01.

    All three factors grow with φ, and so does every counted cost: the largest φ is found by
    bisection, and a larger budget never gives a smaller network. Measured latency grows with φ,
    too, but for noise: the network that is returned was measured within the budget, but a slightly
    larger one may have been as quick. It is measured only where the rest of the budget is kept and
    the network fits into this machine's memory.

    Args:
        base: one of :func:`list_models`.
        budget: what it may cost.
        scaling: the coefficients; None for the paper's.
        batch, optimizer: as for :class:`ScaledNetwork`.
        least_phi, most_phi: between these, ends included.
        latency_of: seconds of a network; None: measured.
        options: of :func:`create_scaled`.

    Raises:
        Infeasible: if even ``least_phi`` breaks the budget, saying which constraints and by how
            much, the worst one first.
        ValueError: naming the argument, what came and what is accepted.
    """
    scaling = scaling or CompoundScaling()
    for name, value in (("least_phi", least_phi), ("most_phi", most_phi)):
        if not isinstance(value, (int, float)) or not abs(value) <= MOST_PHI:
            raise ValueError(
                f"solve: {name} is {value!r}, a number from {-MOST_PHI:g} to {MOST_PHI:g} is "
                "accepted"
            )
    if least_phi > most_phi:
        raise ValueError(
            f"solve: least_phi is {least_phi!r}, at most most_phi ({most_phi!r}) is accepted"
        )
    networks: dict[Variant, ScaledNetwork] = {}  # most steps change nothing
    latency_of = latency_of or (lambda network: network.latency)
    latencies: dict[Variant, float] = {}

    def network_at(step: int) -> ScaledNetwork:
        network = ScaledNetwork(base, step / STEPS, scaling, batch, optimizer, options)
        return networks.setdefault(network.variant, network)

    def constraints(step: int) -> Iterator[Constraint]:
        """Cheap ones first; latency only of what keeps to all others."""
        network = network_at(step)
        kept = True
        for constraint in _counted(network, budget):
            kept = kept and constraint.excess <= 1
            yield constraint
        if budget.latency is None or not kept:
            return
        needed = network.inference_memory.total
        fits = Constraint("this machine's memory", needed, machine_memory())
        yield fits
        if fits.excess > 1:
            return
        if network.variant not in latencies:
            latencies[network.variant] = latency_of(network)
        yield Constraint("latency", latencies[network.variant], budget.latency)

    def broken(step: int) -> tuple[Constraint, ...]:
        return tuple(constraint for constraint in constraints(step) if constraint.excess > 1)

    def keeps(step: int) -> bool:
        return all(constraint.excess <= 1 for constraint in constraints(step))

    lowest, highest = math.ceil(least_phi * STEPS - 1e-6), math.floor(most_phi * STEPS + 1e-6)
    over = broken(lowest)
    if over:
        over = tuple(sorted(over, key=lambda constraint: -constraint.excess))
        listed = "; ".join(map(str, over))
        raise Infeasible(
            f"solve: {base} is over the budget at phi = {lowest / STEPS:g} already. {listed}", over
        )
    # Whole φ upwards: a far too large network is never measured.
    low, high = lowest, highest + 1
    while high - low > 1:
        step = (low + high) // 2 if high <= highest else min(low + STEPS, highest)
        if keeps(step):
            low = step
        else:
            high = step
    network = network_at(low).at(low / STEPS)
    return Solution(network, broken(high) if high <= highest else ())


def _counted(network: ScaledNetwork, budget: Budget) -> Iterator[Constraint]:
    if budget.parameters is not None:
        yield Constraint("parameters", network.parameters, budget.parameters)
    if budget.flops is not None:
        yield Constraint("FLOPs", network.flops, budget.flops)
    if budget.memory is not None:
        training = budget.mode == "training"
        needed = network.training_memory if training else network.inference_memory
        yield Constraint(f"{budget.mode} memory", needed.total, budget.memory)
