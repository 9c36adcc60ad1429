"""What every test starts from: one thread, one seed, a hypothesis profile, a required backend."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import effkernels as ek

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=25, **_COMMON)
# The same examples on every machine: a red run can be repeated.
settings.register_profile("ci", max_examples=50, derandomize=True, **_COMMON)
# AddressSanitizer runs several times slower: fewer examples, and of a test's cases one in five.
settings.register_profile("asan", max_examples=10, derandomize=True, **_COMMON)
# Compute Sanitizer runs slower still: hardly any.
settings.register_profile("first", max_examples=2, derandomize=True, **_COMMON)
_PROFILE = os.environ.get("EFFKERNELS_HYPOTHESIS_PROFILE", "default")
settings.load_profile(_PROFILE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under a sanitizer: of every test the first case and some others.

    ``asan``: a fifth of them, by name. ``first``: the first one in bfloat16; these come last.
    """
    if _PROFILE not in ("asan", "first"):
        return
    seen: set[tuple[str, bool]] = set()
    first, others, left = [], [], []
    for item in items:
        test, _, case = item.nodeid.partition("[")
        bfloat16 = "bfloat16" in case
        if _PROFILE == "asan":
            chosen = zlib.crc32(item.nodeid.encode()) % 5 == 0
        else:
            chosen = bfloat16 and (test, True) not in seen
        is_first = not seen & {(test, False), (test, True)}
        (first if is_first else others if chosen else left).append(item)
        seen.add((test, bfloat16))
    config.hook.pytest_deselected(items=left)
    items[:] = [*first, *others]


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """One thread and seed 0; what a test changes of them is undone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs on this backend; native is skipped only where nobody promised it."""
    status = ek.backends()[request.param]
    if not status.available:
        if os.environ.get("EFFKERNELS_REQUIRE_NATIVE"):
            pytest.fail(f"EFFKERNELS_REQUIRE_NATIVE is set, but {status.reason}")
        pytest.skip(status.reason)
    with ek.use_backend(request.param):
        yield request.param
