"""Which backend runs a call, what it says when it cannot, and what the environment changes."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import effkernels as ek
from effkernels import dispatch, native, ops, triton
from effkernels.testing import use_cpu_isa

REASON = ek.backends()["native"].reason
needs_native = pytest.mark.skipif(
    not ek.backends()["native"].available and not os.environ.get("EFFKERNELS_REQUIRE_NATIVE"),
    reason=REASON,
)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The names of the backends that ran silu, in order."""
    seen: list[str] = []
    implementations = dispatch.operators["silu"].implementations
    for name, implementation in list(implementations.items()):

        def run(*arguments, name=name, implementation=implementation):
            seen.append(name)
            return implementation.run(*arguments)

        replacement = dispatch.Implementation(implementation.can_run, run)
        monkeypatch.setitem(implementations, name, replacement)
    return seen


@pytest.fixture
def fake_native(monkeypatch) -> None:
    """Something that says it is the native backend of silu, for any call but float64's."""

    def can_run(input, activation):
        return None if input.dtype != torch.float64 else f"input has dtype {input.dtype}"

    monkeypatch.setitem(
        dispatch.operators["silu"].implementations,
        "native",
        dispatch.Implementation(can_run, lambda input, activation: torch.full_like(input, 7.0)),
    )


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    cleared = {k: v for k, v in os.environ.items() if not k.startswith("EFFKERNELS_")}
    kept = {k: v for k, v in os.environ.items() if k == "EFFKERNELS_LIBRARY"}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**cleared, **kept, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# What there is


def test_backends():
    backends = ek.backends()
    assert list(backends) == ["native", "triton", "reference"]
    assert all(isinstance(b.available, bool) and b.reason for b in backends.values())
    assert backends["reference"].available


@needs_native
def test_native_is_available():
    backend = ek.backends()["native"]
    assert backend.available, backend.reason
    assert native.cpu_isa() in backend.reason
    assert native.cpu_isa() in native.cpu_isas()
    assert native.cpu_isas()[0] == "portable"


def test_every_op_is_declared_once_and_tested():
    names = set(dispatch.operators)
    assert names == {
        "batch_norm_act",
        "conv",
        "depthwise_conv",
        "depthwise_separable_conv",
        "mbconv",
        "mbconv_training",
        "pointwise_conv",
        "silu",
        "squeeze_excite",
        "squeeze_excite_gate",
    }
    for name, operator in dispatch.operators.items():
        assert operator.overload is getattr(torch.ops.effkernels, name).default
        assert set(operator.implementations) == set(dispatch.BACKENDS)
        test = ROOT / "tests" / "ops" / f"test_{name.removesuffix('_gate')}.py"
        assert name in test.read_text()


# The choice


def test_auto_prefers_native(fake_native):
    assert ops.silu(torch.zeros(2)).tolist() == [7.0, 7.0]


def test_a_named_backend_runs(ran):
    with ek.use_backend("reference"):
        ops.silu(torch.zeros(2))
    assert ran == ["reference"]


@needs_native
def test_native_runs(ran):
    with ek.use_backend("native"):
        ops.silu(torch.zeros(2))
    ops.silu(torch.zeros(2))
    assert ran == ["native", "native"]


def test_use_backend_nests_and_restores():
    assert dispatch.requested() == "auto"
    with ek.use_backend("reference"):
        with ek.use_backend("native"):
            assert dispatch.requested() == "native"
            with ek.use_backend("auto"):
                assert dispatch.requested() == "auto"
        assert dispatch.requested() == "reference"
    assert dispatch.requested() == "auto"


def test_use_backend_restores_after_an_exception():
    with pytest.raises(KeyError), ek.use_backend("reference"):
        raise KeyError
    assert dispatch.requested() == "auto"


def test_use_backend_is_of_this_thread():
    inside, seen = threading.Event(), {}
    done = threading.Event()

    def other():
        inside.wait(10)
        seen["before"] = dispatch.requested()
        with ek.use_backend("native"):
            seen["within"] = dispatch.requested()
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with ek.use_backend("reference"):
        inside.set()
        assert done.wait(10)
        assert dispatch.requested() == "reference"
    thread.join()
    assert seen == {"before": "auto", "within": "native"}


def test_environment_chooses(monkeypatch, ran):
    monkeypatch.setenv("EFFKERNELS_BACKEND", "reference")
    ops.silu(torch.zeros(2))
    assert ran == ["reference"]
    with ek.use_backend("auto"):  # an explicit choice is stronger
        assert dispatch.requested() == "auto"
    monkeypatch.setenv("EFFKERNELS_BACKEND", "")
    assert dispatch.requested() == "auto"


def test_unknown_names(monkeypatch):
    accepted = "accepted are 'native', 'triton', 'reference', 'auto'"
    with (
        pytest.raises(ValueError, match=f"use_backend: unknown backend 'cuda'; {accepted}"),
        ek.use_backend("cuda"),
    ):
        pass
    assert dispatch.requested() == "auto"
    monkeypatch.setenv("EFFKERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match=f"EFFKERNELS_BACKEND: unknown backend 'fast'; {accepted}"):
        ops.silu(torch.zeros(2))


# What cannot run says so


@pytest.fixture
def compiled_triton(monkeypatch):
    """As outside of tests: kernels are compiled, not interpreted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton.load_error.cache_clear()
    yield
    triton.load_error.cache_clear()


def test_triton_says_why_not(compiled_triton):
    message = "^silu: backend 'triton' cannot run: input is on cpu; .* run on CUDA devices$"
    with ek.use_backend("triton"), pytest.raises(ek.BackendUnavailable, match=message) as raised:
        ops.silu(torch.zeros(2))
    assert isinstance(raised.value, RuntimeError)


def test_triton_status(compiled_triton, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.status() == (False, "no CUDA device")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "Triton cannot be imported: "),
        ("3.4.0+git", r"Triton 3.4.0\+git is too old, 3.5 or later is needed"),
    ],
)
def test_unusable_triton(compiled_triton, monkeypatch, version, reason):
    module = None if version is None else SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "triton", module)
    assert re.match(reason, triton.status()[1])
    assert not ek.backends()["triton"].available


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"major": 7, "minor": 5}, "has compute capability 7.5, 8.0 or later is needed"),
        ({"shared_memory_per_block_optin": 49152}, "has 49152 bytes of shared memory a block"),
    ],
    ids=["good", "capability", "shared memory"],
)
def test_unusable_gpu(monkeypatch, change, reason):
    good = {"name": "GPU", "major": 9, "minor": 0, "shared_memory_per_block_optin": 232448}
    properties = SimpleNamespace(**{**good, **change})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    triton.device_error.cache_clear()
    error = triton.device_error(0)
    triton.device_error.cache_clear()
    assert error is None if reason is None else reason in error


def test_triton_takes_no_float64():
    with ek.use_backend("triton"), pytest.raises(ek.BackendUnavailable, match="float64; float32"):
        ops.silu(torch.zeros(2, dtype=torch.float64))


def test_a_named_backend_is_never_replaced(fake_native):
    with (
        ek.use_backend("native"),
        pytest.raises(
            ek.BackendUnavailable,
            match="^silu: backend 'native' cannot run: input has dtype torch.float64",
        ),
    ):
        ops.silu(torch.zeros(2, dtype=torch.float64))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_native_names_the_dtype_it_does_not_have(dtype):
    with (
        ek.use_backend("native"),
        pytest.raises(
            ek.BackendUnavailable,
            match=f"^silu: backend 'native' cannot run: input has dtype {dtype}; float32 and bfl",
        ),
    ):
        ops.silu(torch.zeros(2, dtype=dtype))


@needs_native
def test_native_names_the_device_it_does_not_run_on():
    with FakeTensorMode():
        reason = native.can_run(torch.zeros(2, device="cuda"))
    assert reason is not None and reason.startswith("input is on cuda:0; the native kernels")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_auto_falls_to_the_reference_and_says_so_once(dtype, ran, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.INFO, logger="effkernels"):
        for _ in range(3):
            output = ops.silu(torch.ones(2, dtype=dtype))
    assert ran == ["reference"] * 3
    assert output.dtype == dtype
    messages = [record.getMessage() for record in caplog.records if record.name == "effkernels"]
    assert len(messages) == 1
    assert messages[0].startswith("silu: skipping backend native: ")
    if ek.backends()["native"].available:
        assert str(dtype) in messages[0]


def test_meta_tensors_take_the_shape_rule(ran):
    output = ops.silu(torch.zeros(2, 3, device="meta"))
    assert output.shape == (2, 3) and output.device.type == "meta"


# What the environment says about the compiled kernels

PROBE = """
import json, torch, effkernels as ek
from effkernels import native
output = ek.ops.silu(torch.ones(2)).tolist()
backend = ek.backends()["native"]
print(json.dumps([backend.available, backend.reason, native.cpu_isa(), native.cpu_isas(), output]))
"""


def probe(**environment: str) -> list:
    result = run_python(PROBE, **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_without_the_library_everything_runs_on_the_reference(tmp_path):
    missing = str(tmp_path / "nothing.so")
    available, reason, isa, isas, output = probe(EFFKERNELS_LIBRARY=missing)
    assert not available and missing in reason and "not built" in reason
    assert isa == "" and isas == []
    assert output == pytest.approx([0.7310586] * 2)


def test_a_library_that_does_not_load_is_a_reason(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    available, reason, *_, output = probe(EFFKERNELS_LIBRARY=str(broken))
    assert not available and f"{broken} cannot be loaded: " in reason
    assert output == pytest.approx([0.7310586] * 2)


def test_a_missing_library_that_is_asked_for_raises(tmp_path):
    missing = str(tmp_path / "nothing.so")
    result = run_python(PROBE, EFFKERNELS_LIBRARY=missing, EFFKERNELS_BACKEND="native")
    assert result.returncode != 0
    assert "BackendUnavailable: silu: backend 'native' cannot run: " in result.stderr
    assert missing in result.stderr


@needs_native
def test_environment_chooses_the_instruction_set():
    for name in native.cpu_isas():
        available, reason, isa, isas, output = probe(EFFKERNELS_CPU_ISA=name)
        assert available and isa == name and name in reason
        assert isas == native.cpu_isas()
        assert output == pytest.approx([0.7310586] * 2)


@needs_native
def test_an_unknown_instruction_set_is_an_error():
    result = run_python(PROBE, EFFKERNELS_CPU_ISA="mmx")
    assert result.returncode != 0
    assert "ValueError: EFFKERNELS_CPU_ISA: 'mmx' cannot run here; accepted are" in result.stderr
    assert "'portable'" in result.stderr


@needs_native
def test_use_cpu_isa_restores():
    before = native.cpu_isa()
    for name in native.cpu_isas():
        with pytest.raises(KeyError), use_cpu_isa(name):
            assert native.cpu_isa() == name
            raise KeyError
        assert native.cpu_isa() == before
    with (
        pytest.raises(ValueError, match="'mmx' cannot run here; accepted are"),
        use_cpu_isa("mmx"),
    ):
        pass
    assert native.cpu_isa() == before
