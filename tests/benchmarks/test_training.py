"""The suite ``training``: its command, checks and files; figures themselves are never asserted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import inference, limits, targets, training
from benchmarks.__main__ import TARGETS, main
from benchmarks.limits import Limit, peaks_above, read_limits
from benchmarks.providers import CONTROL, NotAvailable
from benchmarks.records import Case, Record, Results, load
from benchmarks.training import PROVIDERS, Way

SMALL = "efficientnet_b0@64"
MEMORY = "training step: memory / eager"


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measuring processes start in seconds; here their functions are called."""

    def call(threads: int, function: Callable, *arguments: Any, **options: Any) -> Any:
        return function(*arguments)

    for module in (inference, limits, training):
        monkeypatch.setattr(module, "run_with_threads", call)
    yield
    gc.unfreeze()


def wrong(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda image: network(image) * 1.01


def test_steps_are_checked_and_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROVIDERS, "torch.compile", Way(True, wrong))
    file = tmp_path / "out.json"
    arguments = ["training", "--models", SMALL, "--batch", "4", "--threads", "1", "--rounds", "1"]
    arguments += ["--providers", "eager,eager channels_last,torch.compile,accelerate"]
    assert main([*arguments, "--json", str(file), "--plot", str(tmp_path / "plot.png")]) == 0
    assert "control / accelerate" in capsys.readouterr().out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    found = {record.provider: record for record in load(file)[1]}
    assert "gradient's relative error" in found.pop("torch.compile").note
    assert set(found) == {"eager", "eager channels_last", "accelerate", CONTROL}
    for record in found.values():
        assert record.ms_median and record.rel_err and record.rel_err < 1e-2
        assert record.key == Case("training", SMALL, "float32", 4, 1)


def test_memory_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        peaks_above([int])
    except NotAvailable as error:
        pytest.skip(str(error))
    results, wanted = Results({}), [Limit(MEMORY, SMALL, 4, 1, 1e9)]
    assert limits.run(wanted, results) == []
    record = results.limit(wanted[0].key)
    assert record is not None and set(record.figures) == {
        "accelerate",
        "eager",
        "eager channels_last",
    }
    assert min(record.figures.values()) > 20  # MB: gradients of 5.3 million parameters alone
    monkeypatch.setitem(PROVIDERS, "accelerate", Way(True, wrong))
    (failure,) = limits.run(wanted, Results({}))
    assert "accelerate is wrong" in failure


def records(**milliseconds: float) -> list[Record]:
    case = Case("training", "efficientnet_b0", "float32", 16, 2)
    fields = {"ms_p20": 1.0, "ms_p80": 1.0, "images_per_s": 1.0, "bytes": 1, "flops": 1}
    return [
        Record(
            **case._asdict(),
            provider=name.replace("__", " "),
            ms_median=value,
            floor_ms=0.1,
            rel_err=1e-6,
            control_of="accelerate" if name == CONTROL else "",
            **fields,  # type: ignore[arg-type]
        )
        for name, value in milliseconds.items()
    ]


@pytest.mark.parametrize(("compiled", "met"), [(16.0, True), (14.0, False)])
def test_every_layout_of_a_rival_counts(compiled: float, met: bool) -> None:
    wanted = training.read_targets(TARGETS / "cpu-training.csv")
    results = Results({})
    results.add(records(eager=21.0, eager__channels_last=30.0, accelerate=10.0, control=10.0))
    both = records(**{"torch.compile": 20.0, "torch.compile__NCHW": compiled})
    results.add(both)
    assert targets.check(results, wanted)[1] is met
    results.records = [record for record in results.records if record.provider != "eager"]
    assert not targets.check(results, wanted)[1]  # not measured
    assert [limit.limit for limit in read_limits(TARGETS / "cpu-training-limits.csv")] == [MEMORY]


def test_a_gpus_cases_are_the_campaigns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COPY_BYTES", "PRODUCT_SIDE"):
        monkeypatch.setattr(training, name, 64)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    case = training.gpu_case(SMALL, 4, "cpu")._replace(dtype="float32")
    results = Results({})
    assert training.run_on_gpu([case], results, 0.001) == []
    assert set(results.of(case)) == {"eager", "torch.compile", "accelerate", CONTROL}
    wanted = training.gpu_targets(TARGETS / "gpu.csv")
    assert {training.case_of(target) for target in wanted} == {
        training.gpu_case("efficientnet_b0", 256),
        training.gpu_case("efficientnet_b4", 64),
    }
    few = [target for target in wanted if target.quantity == "times as fast"][:2]
    table, met = training.check_on_gpu(results, few)
    assert "not measured" in table and not met
    fast = {"eager": 20.0, "torch.compile": 15.0, "accelerate": 10.0}
    results.records = [
        replace(record, device="cuda", batch=256, dtype="bfloat16") for record in records(**fast)
    ]
    assert training.check_on_gpu(results, few)[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["training", "--device", "cuda"]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
