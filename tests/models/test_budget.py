"""The largest network within a budget."""

from __future__ import annotations

import math

import pytest
from effkernels.models import Budget, CompoundScaling, Infeasible, ScaledNetwork, solve
from effkernels.models import budget as budget_module
from effkernels.models.budget import machine_memory
from hypothesis import given, settings
from hypothesis import strategies as st

CIFAR = {"stem": "cifar", "num_classes": 10}


def quadratic(network: ScaledNetwork) -> float:
    """A latency without noise: 10 ms at φ = 0."""
    return 1e-2 * network.macs / ScaledNetwork("resnet18", 0, options=network.options).macs


@settings(max_examples=4)
@given(st.floats(1.2e9, 1e10), st.floats(1.2e7, 6e7))
def test_never_exceeds_and_is_the_largest(flops: float, parameters: float) -> None:
    limit = Budget(flops=flops, parameters=parameters)
    solution = solve("resnet18", limit, most_phi=3, **CIFAR)
    network = solution.network
    assert network.flops <= flops and network.parameters <= parameters
    larger = ScaledNetwork("resnet18", network.phi + 0.01, options=CIFAR)
    over = {
        name
        for name, value, most in (
            ("FLOPs", larger.flops, flops),
            ("parameters", larger.parameters, parameters),
        )
        if value > most
    }
    if network.phi == 3:
        assert solution.binding == ()
    else:
        assert {constraint.name for constraint in solution.binding} == over != set()
        for constraint in solution.binding:
            assert constraint.value > constraint.limit


def test_monotone() -> None:
    """A larger budget never gives a smaller network."""
    for name, values in (
        ("flops", (1.2e9, 1.5e9, 3e9)),
        ("parameters", (11.2e6, 2e7, 3e7)),
        ("memory", (1.5e8, 2.2e8)),
        ("latency", (0.0101, 0.02)),
    ):
        found = [
            solve(
                "resnet18",
                Budget(**{name: value}),
                most_phi=2,
                latency_of=quadratic,
                **CIFAR,
            ).network.phi
            for value in values
        ]
        assert found == sorted(found) and found[0] < found[-1], name


def test_training_memory() -> None:
    """A training step needs more, so that less of a network fits."""
    solutions = {}
    for mode in ("inference", "training"):
        limit = Budget(memory=5e8, mode=mode)
        solutions[mode] = solve("resnet18", limit, batch=8, optimizer="adam", **CIFAR)
        (binding,) = solutions[mode].binding
        assert binding.name == f"{mode} memory" and binding.excess > 1
    training = solutions["training"].network
    assert training.training_memory.total <= 5e8
    assert training.phi < solutions["inference"].network.phi


def test_a_tighter_constraint_binds() -> None:
    loose = {"flops": 1e12, "parameters": 1e9, "memory": 1e10, "latency": 100.0}
    tight = {"flops": 3e9, "parameters": 3e7, "memory": 2e8, "latency": 0.02}
    names = {
        "flops": "FLOPs",
        "parameters": "parameters",
        "memory": "inference memory",
        "latency": "latency",
    }
    for name, value in tight.items():
        limit = Budget(**{**loose, name: value})
        solution = solve("resnet18", limit, latency_of=quadratic, **CIFAR)
        assert [constraint.name for constraint in solution.binding] == [names[name]]


def test_measured_latency_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The returned network's latency is the one that was within the budget, noise or not."""
    sides = []

    def measure(model: object, input_shape: tuple[int, ...], batch: int) -> float:
        sides.append(input_shape[-1])
        return 0.5 if input_shape[-1] <= 36 and len(sides) < 20 else 2.0

    monkeypatch.setattr(budget_module, "measure_latency", measure)
    solution = solve("resnet18", Budget(latency=1.0), **CIFAR)
    assert solution.network.resolution <= 36 and solution.binding[0].value == 2.0
    calls = len(sides)
    sides += [0] * 20  # from now on everything would be slow
    assert solution.network.latency == 0.5 and len(sides) == calls + 20


def test_real_latency() -> None:
    network = solve("resnet18", Budget(latency=10.0, flops=1.3e9), **CIFAR).network
    assert 0 < network.latency <= 10.0 and network.flops <= 1.3e9


def test_nothing_is_measured_beyond_the_rest_of_the_budget() -> None:
    seen = []

    def latency_of(network: ScaledNetwork) -> float:
        seen.append(network)
        return 1e-3

    solve("resnet18", Budget(flops=2e9, latency=1.0), latency_of=latency_of, **CIFAR)
    assert seen and all(network.flops <= 2e9 for network in seen)
    assert len({network.variant for network in seen}) == len(seen)  # each once


def test_nothing_is_measured_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ScaledNetwork("resnet18", 0, options=CIFAR).inference_memory.total
    monkeypatch.setattr(budget_module, "machine_memory", lambda: 2 * base)
    solution = solve("resnet18", Budget(latency=1.0), latency_of=lambda _: 1e-3, **CIFAR)
    assert [constraint.name for constraint in solution.binding] == ["this machine's memory"]
    assert solution.network.inference_memory.total <= 2 * base
    with pytest.raises(ValueError, match=r"resnet18 at phi = 9 needs .* this machine has"):
        _ = ScaledNetwork("resnet18", 9, options=CIFAR).latency


def test_infeasible_says_what_binds_and_by_how_much() -> None:
    base = ScaledNetwork("resnet18", 0, options=CIFAR)
    limit = Budget(flops=base.flops / 2, parameters=base.parameters / 10, latency=1.0)
    with pytest.raises(Infeasible) as caught:
        solve("resnet18", limit, latency_of=quadratic, **CIFAR)
    worst, other = caught.value.constraints
    assert (worst.name, other.name) == ("parameters", "FLOPs")
    assert worst.excess == pytest.approx(10) and other.excess == pytest.approx(2)
    assert "parameters: 11.17 of at most 1.117 M (10.000 times)" in str(caught.value)
    with pytest.raises(Infeasible, match=r"latency: 10 of at most 5 ms \(2.000 times\)"):
        solve("resnet18", Budget(latency=5e-3), latency_of=quadratic, **CIFAR)


def test_smaller_than_the_base() -> None:
    base = ScaledNetwork("efficientnet_b0", 0)
    limit = Budget(flops=base.flops / 2)
    with pytest.raises(Infeasible):
        solve("efficientnet_b0", limit)
    network = solve("efficientnet_b0", limit, least_phi=-3).network
    assert -3 < network.phi < 0 and network.flops <= base.flops / 2


def test_no_limit_binds() -> None:
    solution = solve("efficientnet_b0", Budget(parameters=1e11), most_phi=0.5)
    assert solution.network.phi == 0.5 and solution.binding == ()


def test_figures_of_a_network() -> None:
    network = ScaledNetwork("efficientnet_b0", 1, CompoundScaling(1.1, 1.0, 1.2), batch=2)
    assert network.resolution == 268 and network.blocks == (2, 3, 3, 4, 4, 5, 2)
    assert network.channels == (16, 24, 40, 80, 112, 192, 320)
    assert network.flops == 2 * network.macs
    found = network.to_dict()
    assert found["training_memory"]["total"] == network.training_memory.total
    b0 = ScaledNetwork("efficientnet_b0", 0)
    assert b0.activations == pytest.approx(6.7e6, rel=0.01)  # Radosavovic et al., 2020, table 4
    assert machine_memory() > 2**28


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing is limited, one of flops, parameters, memory, latency is needed"),
        ({"flops": -1}, "flops is -1, a positive number"),
        ({"memory": 0}, "memory is 0"),
        ({"latency": math.nan}, "latency is nan"),
        ({"parameters": math.inf}, "parameters is inf"),
        ({"parameters": "10M"}, "parameters is '10M'"),
        ({"flops": 1e30}, r"flops is 1e\+30, at most 1e\+15 is accepted"),
        ({"flops": 1e9, "mode": "both"}, "mode is 'both', 'inference' or 'training'"),
    ],
)
def test_bad_budgets(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"Budget: {message}"):
        Budget(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least_phi": 2, "most_phi": 1}, "least_phi is 2, at most most_phi"),
        ({"most_phi": 21}, "most_phi is 21, a number from -20 to 20"),
        ({"least_phi": math.nan}, "least_phi is nan"),
        ({"batch": 0}, "batch is 0"),
        ({"optimizer": "lion"}, "optimizer is 'lion', 'sgd' or 'adam'"),
        ({"least_phi": -19}, "pixels wide; 32 or more"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve("resnet18", Budget(flops=1e12), **options)
