"""For pytest under a tool that slows it down: it ends in time, and says what ran on the GPU.

``python -m pytest -p benchmarks.pytest_plugin --seconds 60``: in the campaign's ``sanitizer``.
"""

from __future__ import annotations

import time

import pytest

ON_GPU = "(on the GPU)"  # behind PASSED
LATE = "LATE"  # outcome of a test that there was no time for
_START = time.monotonic()
_OUT_OF_TIME = "out of time"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--seconds``."""
    text = "start no test after so many seconds"
    parser.addoption("--seconds", type=float, default=float("inf"), help=text)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What comes too late is skipped, so that pytest and the tool around it end as usual."""
    if time.monotonic() - _START > item.config.getoption("--seconds"):
        pytest.skip(_OUT_OF_TIME)


def pytest_runtest_call(item: pytest.Item) -> None:
    """Note tests of CUDA kernels (tests/cuda/conftest.py) whose device is a GPU."""
    fixtures = getattr(item, "funcargs", {})
    if "kernels" in fixtures and getattr(fixtures.get("device"), "type", "") == "cuda":
        item.user_properties.append((ON_GPU, True))


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """The word that a test's line ends with."""
    if report.skipped and _OUT_OF_TIME in str(report.longrepr):
        return LATE.lower(), "l", LATE
    if report.passed and report.when == "call" and (ON_GPU, True) in report.user_properties:
        return "passed", ".", f"PASSED {ON_GPU}"
    return None
