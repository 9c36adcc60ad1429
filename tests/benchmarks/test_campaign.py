"""The campaign's machinery, without a GPU; figures themselves are never asserted."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmarks.campaign as campaign_module
from benchmarks.__main__ import main
from benchmarks.campaign import (
    Campaign,
    StageFile,
    counters,
    device,
    layers,
    models,
    readme,
    report,
    sanitizer,
    targets,
)
from benchmarks.campaign.layers import EAGER, OURS, Elementwise, LayerCase, measure_layer, plain
from benchmarks.campaign.models import ModelCase, measure_inference, measure_training
from benchmarks.campaign.plan import STAGES, Plan, full_plan, rehearsal_plan
from benchmarks.campaign.timing import WARM_UP, Memory, Stopwatch, captured, time_in_turns
from benchmarks.campaign.worker import InProcess, Row, Worker
from benchmarks.gpus import GPUS
from benchmarks.levels import table
from benchmarks.providers import CONTROL
from benchmarks.shapes import OPS, Layer, read_layers

H100 = GPUS["h100"]
NETWORK = "mobilenet_v2@32"


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A campaign of seconds."""
    found = rehearsal_plan()
    return replace(
        found,
        kernels=found.kernels[:1] + found.kernels[-1:],
        parity=("tests/test_harness.py", "-k", "test_statistics"),
    )


def make_quick(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(campaign_module, "TIMING_S", dict.fromkeys(STAGES, 0.001))
    patch.setattr(device, "SAMPLES", 3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def run(
    plan: Plan,
    out: Path,
    stages: tuple[str, ...] = tuple(STAGES),
    again: bool = False,
    **options: Any,
) -> tuple[int, str]:
    said: list[str] = []
    budget_s = options.get("budget_s", 300.0)
    campaign = Campaign(plan, out, budget_s, options.get("worker", InProcess()), said.append)
    return campaign.run(stages, again), "\n".join(said)


def content(out: Path, stage: str) -> dict[str, Any]:
    return json.loads((out / f"{stage}.json").read_text())


@pytest.fixture(scope="module")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("campaign")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        torch.set_num_threads(1)  # other tests run beside this one
        status, said = run(plan, out)
    assert status == 0, said
    return out, said


def test_every_stage_leaves_its_files(finished: tuple[Path, str], plan: Plan) -> None:
    out, said = finished
    for stage in STAGES:
        assert content(out, stage)["complete"], said
        drawn = stage not in ("build", "sanitizer", "counters")
        assert (out / f"{stage}.png").exists() == drawn
    assert (out / "memory.png").exists() and "Targets" in (out / "summary.md").read_text()
    everything = json.loads((out / "rehearsal.json").read_text())
    assert set(everything) == set(STAGES)
    rows = content(out, "kernels")["rows"]
    assert {row["task"] for row in rows} == {case.name for case in plan.kernels}
    for row in rows:
        assert row["ms_median"] > 0 and row["bytes"] > 0 and row["rel_err"] < 1e-4
    assert {row["provider"] for row in rows} == {EAGER, OURS, CONTROL}
    found = content(out, "inference")["rows"]
    assert [row["provider"] for row in found] == ["eager", "accelerate", "freeze", CONTROL]
    assert all(row["images_per_s"] > 0 and not row["note"] for row in found)
    assert {row["provider"] for row in content(out, "training")["rows"]} >= {"eager", "accelerate"}
    parity = content(out, "parity")["content"]
    assert parity["ok"] and parity["counts"]["PASSED"] == 1
    assert content(out, "ceilings")["rows"][0]["per_s"] > 0
    for stage in ("sanitizer", "counters"):
        assert f"{stage}: needs a GPU" in said
        assert content(out, stage)["content"]["reason"] == "needs a GPU"


def test_complete_stages_are_not_run_again(
    finished: tuple[Path, str], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    before = {stage: content(out, stage)["date"] for stage in STAGES}
    monkeypatch.setattr(device, "parity", lambda *arguments: pytest.fail("runs again"))
    monkeypatch.setattr(layers, "measure_layer", lambda *arguments: pytest.fail("runs again"))
    status, said = run(plan, out)
    assert status == 0 and "kernels: complete, not run again" in said
    assert all(
        content(out, stage)["date"] == date for stage, date in before.items() if stage != "summary"
    )


def test_only_runs_named_stages_again(plan: Plan, tmp_path: Path) -> None:
    run(plan, tmp_path, ("build", "ceilings", "kernels"))
    file = tmp_path / "kernels.json"
    changed = json.loads(file.read_text())
    changed["rows"] = []
    file.write_text(json.dumps(changed))
    _, said = run(plan, tmp_path, ("kernels",), again=True)
    assert content(tmp_path, "kernels")["rows"] and "ceilings:" not in said
    assert not (tmp_path / "training.json").exists()


def test_other_code_or_device_is_measured_again(plan: Plan, tmp_path: Path) -> None:
    run(plan, tmp_path, ("build", "ceilings"))
    file = tmp_path / "ceilings.json"
    changed = json.loads(file.read_text())
    changed["fingerprint"]["device"] = "another"
    file.write_text(json.dumps(changed))
    _, said = run(plan, tmp_path, ("ceilings",))
    assert "ceilings: copy" in said
    file.write_text("{")  # cut short
    _, said = run(plan, tmp_path, ("ceilings",))
    assert "ceilings: copy" in said and content(tmp_path, "ceilings")["complete"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("def test_it(): assert False", "1 failed"),
        ("def test_it(): __import__('pytest').skip()", "no test passed"),
        ("import no_such_module", "exit status 2"),
        ("", "exit status 5"),
    ],
)
def test_failing_parity_is_the_exit_status(
    body: str, reason: str, plan: Plan, tmp_path: Path
) -> None:
    """Later stages still run, and the status stays when they run alone."""
    tests, out = tmp_path / "test_it.py", tmp_path / "out"
    tests.write_text(body)
    plan = replace(plan, parity=(str(tests),))
    status, said = run(plan, out, ("parity", "training"))
    assert status == 1 and reason in said and "training: 1 of 1 cases" in said
    assert not content(out, "parity")["content"]["ok"]
    assert run(plan, out, ("ceilings",))[0] == 1
    tests.write_text("def test_it(): pass")
    assert run(plan, out, ("parity",))[0] == 1  # complete, not run again
    assert run(plan, out, ("parity",), again=True)[0] == 0


def test_parity_that_does_not_end_is_not_passed(plan: Plan, tmp_path: Path) -> None:
    status, said = run(plan, tmp_path, ("parity",), budget_s=0.0)
    assert status == 1 and "not every test had run" in said
    assert not content(tmp_path, "parity")["complete"]


def test_failed_tests_are_named(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    found = device.parity((str(test),), False, tmp_path / "log", 120)
    assert not found["ok"] and found["counts"]["PASSED"] == 1
    (failed,) = found["failed"]
    assert failed.endswith("test_it.py::test_bad")
    assert "assert False" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "line",
    [
        "tests/a.py::test_b[float32-shape 1] PASSED                  [ 50%]",
        "[gw3] [ 50%] PASSED tests/a.py::test_b[float32-shape 1] ",
    ],
)
def test_outcomes_are_read(line: str) -> None:
    assert device._outcome(line) == ("tests/a.py::test_b[float32-shape 1]", "PASSED")
    assert device._outcome("collected 3 items") is None


def failing(*arguments: Any) -> Iterator[Row]:
    yield {"name": "half", "per_s": 1.0, "unit": "byte"}
    raise torch.OutOfMemoryError("CUDA out of memory.\nand more")


def test_an_exception_ends_its_case_alone(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "measure_copy", failing)
    status, said = run(plan, tmp_path, ("ceilings",))
    found = content(tmp_path, "ceilings")
    assert status == 0 and found["complete"]
    assert found["failures"] == {"copy": "OutOfMemoryError: CUDA out of memory."}
    assert [row["name"] for row in found["rows"]] == ["half", "float32"]
    assert "FAILED: OutOfMemoryError" in said


def test_out_of_time_cases_are_listed_and_run_later(plan: Plan, tmp_path: Path) -> None:
    _, said = run(plan, tmp_path, ("ceilings", "summary"), budget_s=0.0)
    found = content(tmp_path, "ceilings")
    assert not found["complete"] and found["left_out"] == ["copy", "product, float32"]
    assert "out of time" in said and "product, float32" in (tmp_path / "summary.md").read_text()
    run(plan, tmp_path, ("ceilings",))
    found = content(tmp_path, "ceilings")
    assert found["complete"] and not found["left_out"] and len(found["rows"]) == 3


def test_a_stage_goes_on_where_it_stopped(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first case takes the stage's whole time."""
    measure = device.measure_copy

    def slow(*arguments: Any) -> Iterator[Row]:
        time.sleep(1.5)
        yield from measure(*arguments)

    monkeypatch.setattr(device, "measure_copy", slow)
    run(plan, tmp_path, ("ceilings",), budget_s=1.0)
    found = content(tmp_path, "ceilings")
    assert found["left_out"] == ["product, float32"] and len(found["rows"]) == 2
    monkeypatch.setattr(device, "measure_copy", lambda *arguments: pytest.fail("runs again"))
    run(plan, tmp_path, ("ceilings",))
    assert content(tmp_path, "ceilings")["complete"]


def test_worker_survives_crash_hang_and_exception(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "log.txt", {"CAMPAIGN_TEST": "set"})
    rows: list[Row] = []
    try:
        assert worker.run(device.environment, ("cpu",), 60, rows.append) is None
        assert rows[0]["device"] == "cpu"
        first = worker._process.pid
        error = worker.run(measure_layer, ("not a case",), 60, rows.append)
        assert error is not None and "TypeError" in error
        assert worker._process.pid == first
        assert "Traceback" in (tmp_path / "log.txt").read_text()
        assert "exit code 3" in str(worker.run(os._exit, (3,), 60, rows.append))
        assert "CAMPAIGN_TEST" not in os.environ
        rows.clear()
        assert worker.run(device.environment, ("cpu",), 60, rows.append) is None and rows
        assert worker.run(time.sleep, (600,), 0.5, rows.append) == "killed after 0 s"
        assert worker._process is None
    finally:
        worker.close()


def test_a_build_that_fails_does_not_end_the_campaign(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = {"exit_code": 1, "output": "no compiler", "seconds": 0.1}
    monkeypatch.setattr(device, "build", lambda timeout_s: built)
    status, said = run(replace(plan, install=True), tmp_path, ("build", "ceilings"))
    assert status == 0 and "no compiler" in said
    assert content(tmp_path, "build")["content"]["build"] == built
    _, said = run(replace(plan, install=True), tmp_path, ("build",))
    assert "no compiler" not in said  # complete


def test_interrupted_commands_may_still_speak() -> None:
    body = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('found')"
    assert device.run_command([sys.executable, "-c", body], 1.0, grace_s=20) == (None, "found\n")
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)"
    start = time.monotonic()
    assert device.run_command([sys.executable, "-c", deaf], 1.0, grace_s=0.5) == (None, "")
    assert time.monotonic() - start < 60


def test_commands_are_stopped_at_their_limit() -> None:
    assert device.run_command(["sh", "-c", "echo out; exit 3"], 60) == (3, "out\n")
    assert device.run_command(["sh", "-c", "echo out; sleep 600 & sleep 600"], 0.1) == (
        None,
        "out\n",
    )


PASSED = {
    **{"ok": True, "reason": "", "exit_code": 0, "counts": {"PASSED": 1}, "failed": []},
    "files": {},
}
SMALL = {
    "conv": Layer("conv", 1, False, 3, 8, 9, 9, 3, 2, 0, 0, "silu", False),
    "pointwise_conv": Layer("pointwise_conv", 1, False, 8, 16, 5, 5, 1, 1, 0, 0, "none", True),
    "depthwise_conv": Layer("depthwise_conv", 1, False, 8, 8, 9, 9, 5, 2, 0, 0, "silu", False),
    "squeeze_excite": Layer("squeeze_excite", 1, False, 8, 8, 5, 5, 1, 1, 0, 2, "silu", False),
    "mbconv": Layer("mbconv", 1, False, 8, 8, 9, 9, 3, 1, 48, 2, "silu", True),
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_our_layers_are_those_of_plain_pytorch(op: str, backward: bool) -> None:
    """For every op: `plain` is written without this library."""
    case = LayerCase("it", SMALL[op], 3, backward)
    rows = list(measure_layer(case, "cpu", "float32", ("reference",), H100, 0.001))
    assert [row["provider"] for row in rows] == [EAGER, OURS, CONTROL]
    assert all(row["ms_median"] for row in rows), rows
    assert all(row["case"] == case.label and not row["note"] for row in rows)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", ["silu", "batch_norm_act", "batch_norm_act training"])
def test_elementwise(op: str, backward: bool) -> None:
    case = LayerCase("it", Elementwise(op, 8, 5, 5), 3, backward)
    rows = list(measure_layer(case, "cpu", "bfloat16", ("reference",), H100, 0.001))
    assert all(row["ms_median"] for row in rows), rows
    assert rows[0]["bytes"] >= 2 * 3 * 8 * 25 * 2 and rows[0]["flops"] == 0


@pytest.mark.parametrize("image", [0, 1, 2])
@pytest.mark.parametrize("value", [3.0, float("nan")])
def test_a_wrong_result_is_not_timed(
    image: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whichever image it is, also where only eager's is there to compare with."""
    run_layer = Layer.run

    def wrong(layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
        output = run_layer(layer, tensors).clone()
        output[image] *= value
        return output

    monkeypatch.setattr(Layer, "run", wrong)
    case = LayerCase("it", SMALL["conv"], 3)
    rows = list(measure_layer(case, "cpu", "bfloat16", ("reference",), H100, 0.001))
    eager, ours, control = rows
    assert eager["ms_median"] and ours["ms_median"] is None
    assert "WRONG" in ours["note"] and control["control_of"] == EAGER


def test_a_backend_that_cannot_run_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise RuntimeError("no such kernel\nsee the log")

    monkeypatch.setattr(Layer, "run", refuse)
    for backward in (False, True):
        case = LayerCase("it", SMALL["conv"], 2, backward)
        rows = list(measure_layer(case, "cpu", "float32", ("reference",), H100, 0.001))
        assert rows[1]["note"] == "RuntimeError: no such kernel" and rows[0]["ms_median"]


def test_compiled_layers_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda run, **options: asked.append(options) or run)
    case = LayerCase("it", SMALL["conv"], 2, compiled=True)
    rows = list(measure_layer(case, "cpu", "float32", ("reference",), H100, 0.001))
    assert [row["provider"] for row in rows] == [EAGER, "torch.compile", OURS, CONTROL]
    assert asked == [{"dynamic": False}]


def test_networks_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []

    def compile(module: Any, dynamic: bool, mode: str | None = None) -> Any:
        modes.append(mode)
        return module

    monkeypatch.setattr(torch, "compile", compile)
    for kind, mode in (("compile", None), ("max-autotune", "max-autotune-no-cudagraphs")):
        case = ModelCase(NETWORK, 1, kind)
        rows = list(measure_inference(case, "cpu", "float32", H100, 0.001))
        assert all(row["ms_median"] for row in rows), rows
        assert modes.pop() == mode and len(rows) == 4
    rows = list(measure_training(ModelCase(NETWORK, 4, "compile"), "cpu", "float32", H100, 0.001))
    assert rows[0]["ms_median"] and rows[1]["provider"] == "torch.compile" and modes == [None]
    for training in (False, True):
        list(models.precompile(ModelCase(NETWORK, 4), "cpu", "float32", training))
    assert modes == [None] * 3


def test_compilers_work_beside_the_parity_tests(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are stopped with them, whatever they are at."""
    monkeypatch.setattr(models, "precompile", time.sleep)
    monkeypatch.setattr(device, "parity", lambda *arguments: time.sleep(3) or PASSED)
    case = ModelCase(NETWORK, 1)
    waiting = replace(plan, precompiled=((case, False),) * 3)
    campaign = Campaign(waiting, tmp_path, 60.0, say=lambda text: None)
    started: list[Any] = []
    run_case = Worker.run

    def note(worker: Worker, function: Any, arguments: Any, *rest: Any) -> str | None:
        if function is time.sleep:
            started.append(arguments)
            arguments = (600,)
        return run_case(worker, function, arguments, *rest)

    monkeypatch.setattr(Worker, "run", note)
    start = time.monotonic()
    assert campaign.run(("parity",)) == 0
    assert started[0] == (case, "cpu", "float32", False) and 2 <= len(started) <= 3
    assert time.monotonic() - start < 60


def test_a_network_that_is_wrong_or_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: torch.nn.Module) -> Any:
        def run(image: Tensor) -> Tensor:
            output = module(image)
            output[1] += 1.0  # neither the first nor the last image
            return output

        return run

    def fails(module: torch.nn.Module) -> Any:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(models.ek, "freeze", wrong)
    monkeypatch.setattr(models.ek, "accelerate", fails)
    case = ModelCase(NETWORK, 3)
    eager, accelerated, frozen, control = measure_inference(case, "cpu", "float32", H100, 0.001)
    assert eager["ms_median"] and accelerated["note"] == "RuntimeError: illegal memory access"
    assert "WRONG" in frozen["note"] and control["control_of"] == "eager"
    eager, accelerated, control = measure_training(case, "cpu", "float32", H100, 0.001)
    assert eager["ms_median"] and "illegal" in accelerated["note"]


class Event:
    """Stands for a CUDA event; time passes with calls."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self) -> None:
        self.at = Event.clock

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_events_bracket_the_call_and_not_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(ms: float) -> None:
        Event.clock += ms

    class Swept:
        def zero_(self) -> None:
            call(100.0)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stopwatch = Stopwatch("cuda")
    stopwatch._swept = Swept()  # type: ignore[assignment]
    assert stopwatch.samples(lambda: call(2.0), 3, cold=True) == pytest.approx([2.0] * 3)
    assert stopwatch.median(lambda: call(3.0), 0.01) == pytest.approx(3.0)
    calls = {"slow": lambda: call(4.0), "quick": lambda: call(2.0)}
    timings = time_in_turns(calls, stopwatch, 0.1, cold=True, per_call=2)
    assert {name: timing.median for name, timing in timings.items()} == pytest.approx(
        {CONTROL: 1.0, "slow": 2.0, "quick": 1.0}
    )
    assert time_in_turns({}, stopwatch, 0.1) == {}


class Graph:
    """Stands for a CUDA graph: a capture notes what is called, a replay calls nothing."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


class Stream:
    """Stands for a CUDA stream."""

    def wait_stream(self, other: Stream) -> None:
        assert other is not self


@pytest.fixture
def _fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())


@pytest.mark.usefixtures("_fake_graphs")
def test_captured_calls_are_replayed() -> None:
    calls: list[int] = []
    replay = captured(lambda: calls.append(0) or len(calls), calls=4)
    assert len(calls) == WARM_UP + 4
    Graph.replays = 0
    assert replay() == len(calls) == WARM_UP + 4 and Graph.replays == 1


@pytest.mark.usefixtures("_fake_graphs")
def test_graphs_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_is_captured", lambda case, device: True)
    case = LayerCase("it", SMALL["conv"], 2)
    rows = list(measure_layer(case, "cpu", "float32", ("reference",), H100, 0.001))
    assert all(row["ms_median"] for row in rows), rows
    monkeypatch.setattr(models, "_variants", lambda device: ("", models.GRAPH))
    rows = list(measure_inference(ModelCase(NETWORK, 2), "cpu", "float32", H100, 0.001))
    names = ["eager", "eager graph", "accelerate", "accelerate graph", "freeze", "freeze graph"]
    assert [row["provider"] for row in rows] == [*names, CONTROL]
    assert all(row["ms_median"] for row in rows) and rows[-1]["control_of"] == "freeze graph"

    def refuse(*arguments: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    for module in (layers, models):
        monkeypatch.setattr(module, "captured", refuse)
    rows = list(measure_layer(case, "cpu", "float32", ("reference",), H100, 0.001))
    assert all("cannot be captured" in row["note"] for row in rows[:2])
    assert rows[-1]["note"] == "no provider could be timed"
    rows = list(measure_inference(ModelCase(NETWORK, 2), "cpu", "float32", H100, 0.001))
    assert [bool(row["ms_median"]) for row in rows] == [True, False] * 3 + [True]
    assert "capturing" in rows[1]["note"]


def test_memory_is_counted_above_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"now": 100, "peak": 900}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: state["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: state["peak"])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: state.update(peak=state["now"])
    )
    memory = Memory("cuda")
    memory.start()
    state.update(now=150, peak=400)
    assert (memory.now(), memory.peak()) == (50, 300)
    assert (Memory("cpu").now(), Memory("cpu").peak()) == (None, None)


def row(task: str, provider: str, ms: float | None, **fields: Any) -> Row:
    return {
        **{"suite": "kernels", "task": task, "case": task, "batch": 256, "provider": provider},
        **{"ms_median": ms, "images_per_s": ms and 256e3 / ms, "bytes": 3e9, "note": ""},
        **{"activation_bytes": None, "floor_ms": 1.0, "control_of": "ours"},
        **fields,
    }


def test_targets_take_the_worst_case_and_the_fastest_provider() -> None:
    target = targets.GpuTarget(
        "kernels", "net: *", 256, "ours*", "times as fast", "eager", "at least", 2
    )
    rows = [
        *(
            row("net: a", "eager", 4.0),
            row("net: a", "ours", 2.0),
            row("net: a", "ours graph", 1.0),
        ),
        *(row("net: b", "eager", 3.0), row("net: b", "ours", 2.0), row("net: b", CONTROL, 0.1)),
        *(row("other: c", "eager", 1.0), row("other: c", "ours", 9.0)),
    ]
    assert target.measured(rows, H100) == (1.5, "net: b")
    (found,) = targets.check([target], {"kernels": rows}, H100)
    assert found["met"] is False and found["failed_cases"] == 0
    (found,) = targets.check([target], {"kernels": rows[:3]}, H100)
    assert found["met"] is True
    failed = [*rows[:3], row("net: d", "eager", 1.0), row("net: d", "ours", None)]
    (found,) = targets.check([target], {"kernels": failed}, H100)
    assert found["met"] is False and found["failed_cases"] == 1
    (found,) = targets.check([target], {}, H100)
    assert found["met"] is None
    copy = replace(target, quantity="share of copy", baseline="", value=0.5)
    assert copy.measured(rows[:2], H100) == (0.5, "net: a")


def test_quantities_of_networks() -> None:
    rows = [
        row("x", "eager", 4.0, activation_bytes=100),
        row("x", "accelerate", 2.0, activation_bytes=40),
    ]
    base = targets.GpuTarget("training", "x", 256, "accelerate", "ms", "", "at most", 2.5)
    assert base.measured(rows, H100) == (2.0, "x") and base.is_met(2.0) and not base.is_met(3.0)
    speed = replace(base, quantity="images/s", bound="at least")
    assert speed.measured(rows, H100) == (128e3, "x")
    memory = replace(base, quantity="activation memory", baseline="eager")
    assert memory.measured(rows, H100) == (0.4, "x")
    assert memory.measured([row("x", "eager", 1.0), row("x", "accelerate", 1.0)], H100) is None


@pytest.mark.parametrize(
    ("line", "column"),
    [
        ("models,x,1,a,ms,,at least,1", "stage"),
        ("kernels,x,1,a,speed,,at least,1", "quantity"),
        ("kernels,x,1,a,ms,,below,1", "bound"),
        ("kernels,x,1,a,ms,eager,at least,1", "baseline"),
        ("kernels,x,1,a,times as fast,,at least,1", "baseline"),
    ],
)
def test_a_bad_target_is_named(line: str, column: str, tmp_path: Path) -> None:
    file = tmp_path / "gpu.csv"
    file.write_text(targets.FILE.read_text().splitlines()[0] + f"\n{line}\n")
    with pytest.raises(ValueError, match=f"gpu.csv, line 2, column {column}"):
        targets.read_gpu_targets(file)


def test_committed_targets_name_cases_that_are_measured() -> None:
    """A target that matches no case, or a provider that no case has, would never be missed."""
    plan = full_plan()
    cases = {
        "kernels": {
            (case.label, case.batch): {EAGER, *layers.ours_by_name(case, plan.backends)}
            for case in plan.kernels
        },
        "inference": {},
        "training": {},
    }
    for stage, kinds, found in (
        ("inference", models.KINDS, plan.inference),
        ("training", models.TRAINING_KINDS, plan.training),
    ):
        for case in found:
            names = [n + graph for n in kinds[case.kind] for graph in models._variants("cuda")]
            cases[stage].setdefault((case.network, case.batch), set()).update(names)
    for target in targets.read_gpu_targets():
        rows = [
            row(case, provider, 1.0, batch=batch, activation_bytes=1)
            for (case, batch), providers in cases[target.stage].items()
            for provider in providers
        ]
        assert target.measured(rows, H100) is not None, target


def test_controls_that_are_off_are_counted() -> None:
    rows = [row("a", "ours", 2.0), row("a", CONTROL, 2.0), row("b", "ours", 2.0)]
    rows += [row("b", CONTROL, 3.0), row("c", "ours", None), row("c", CONTROL, None)]
    assert report.control_ratios(rows) == {"kernels: a": 1.0, "kernels: b": 1.5}


def test_rates_are_measured_or_said_not_to_be() -> None:
    assert device.rates_of([], "NVIDIA H200").bytes_per_s == GPUS["h200"].bytes_per_s
    assert device.rates_of([], "?").source.startswith("not: ")
    rows = [{"name": "copy", "per_s": 2e12}, {"name": "bfloat16", "per_s": 5e14}]
    found = device.rates_of(rows, "NVIDIA H100")
    assert (found.bytes_per_s, found.matrix_flops_per_s) == (2e12, 5e14)


def test_plan_is_the_one_that_was_asked_for() -> None:
    plan = full_plan()
    assert {case.batch for case in plan.kernels} == {1, 256}
    networks = {case.network for case in plan.kernels}
    assert networks == {f"efficientnet_b{i}" for i in (0, 4, 7)} | {"resnet50", "mobilenet_v2"}
    assert {case.network for case in plan.inference} == {
        *(f"efficientnet_b{index}" for index in (0, 2, 4, 7)),
        *("efficientnet_lite0", "resnet50"),
    }
    for cases in (plan.kernels, plan.inference, plan.training, plan.autotune_layers):
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
    distinct = {(case.layer, case.batch, case.backward) for case in plan.kernels}
    assert len(distinct) == len(plan.kernels)
    blocks = {replace(la, count=1, in_block=False) for la in read_layers("efficientnet_b7")}
    assert blocks <= {case.layer for case in plan.kernels}
    assert sum(STAGES.values()) == pytest.approx(1.0)


def test_dry_run_lists_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["campaign", "--dry-run", "--gpu", "b200"]) == 0
    printed = capsys.readouterr().out
    plan = full_plan()
    for case in (*plan.kernels, *plan.inference, *plan.training):
        assert case.name in printed
    counts = "Cases: 1 build, 5 ceilings, 1 parity, 2 sanitizer, "
    assert printed.splitlines()[-1].startswith(counts) and ", 1 counters, " in printed
    sizes = [
        line.split() for line in printed.splitlines() if "efficientnet_b0, batch 256, main" in line
    ]
    assert float(sizes[0][-3]) == pytest.approx(256 * 13.88 + 10.5, rel=0.01)


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(campaign_module, "run", lambda *arguments: started.append(arguments) or 1)
    assert main(["campaign", "--device", "cpu"]) == 2
    assert "--out" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["campaign", "--out", str(tmp_path)]) == 2
        assert "--dry-run" in capsys.readouterr().err
    arguments = ["campaign", "--device", "cpu", "--out", str(tmp_path), "--budget-s", "9"]
    assert main([*arguments, "--only", "kernels", "summary"]) == 1
    assert started == [(rehearsal_plan(), tmp_path, ["kernels", "summary"], 9.0)]
    assert main([*arguments, "--only", "sanitizer", "counters"]) == 1
    assert started[1][2] == ["sanitizer", "counters"]
    with pytest.raises(SystemExit):
        main([*arguments, "--only", "everything"])


def test_a_stage_file_is_never_half_written(tmp_path: Path) -> None:
    file = StageFile(tmp_path / "kernels.json", {"device": "x"}, rows=[{"task": "a"}])
    file.write()
    assert StageFile.load(file.path, {"device": "x"}).done() == {"a"}
    assert not StageFile.load(file.path, {"device": "y"}).rows
    assert list(tmp_path.iterdir()) == [file.path]


def test_tables_of_the_autotuner_are_copied(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cache" / "gpu.json"
    file.parent.mkdir()

    def tune(case: LayerCase, *arguments: Any) -> Iterator[Row]:
        file.write_text('{"conv(a)": {}}')
        tuned = {"conv(a)": {"block": 1}}
        yield {"case": case.name, "seconds": 0.1, "tuned": tuned, "table": str(file)}

    monkeypatch.setattr(layers, "tune_layer", tune)
    out = tmp_path / "out"
    _, said = run(replace(plan, autotune_models=()), out, ("autotune",))
    assert (out / "gpu.json").read_text() == file.read_text()
    assert content(out, "autotune")["content"]["table"] == "gpu.json" and "1 tuned" in said


def test_document_is_up_to_date() -> None:
    text = (device.ROOT / "docs" / "gpu.md").read_text()
    assert table("efficientnet_b0", H100, 256, per="op", markdown=True) in text
    assert report.targets_table() in text
    assert all(f"| `{stage}` |" in text for stage in STAGES)


def test_plain_knows_every_activation_of_the_networks() -> None:
    for activation in ("none", "relu", "relu6", "silu"):
        layer = replace(SMALL["pointwise_conv"], activation=activation)
        assert plain(layer, layer.tensors(1)).shape == (1, 16, 5, 5)


# Of tests/cuda: the fixtures that say where a test of the CUDA kernels runs.
FIXTURES = """
import os, types, pytest
@pytest.fixture
def device(): return types.SimpleNamespace(type="DEVICE")
@pytest.fixture
def kernels(device): yield
@pytest.mark.usefixtures("kernels")
"""
ON_GPU = FIXTURES.replace("DEVICE", "cuda")
BANNER = "========= COMPUTE-SANITIZER\n"
NO_ERROR = f"{BANNER}========= ERROR SUMMARY: 0 errors\n"
NO_HAZARD = f"{BANNER}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
CLEAN = {"memcheck": NO_ERROR, "racecheck": NO_HAZARD}
INVALID = f"""{BANNER}========= Invalid __global__ read of size 4 bytes
=========     at void effkernels::<unnamed>::scale_kernel<float>(Scale<T1>)+0x460 in cuda.cu:124
=========     by thread (65,0,0) in block (1,0,0)
=========     Access to 0x7bd889c03041 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7bd889c00000 of size 12,352 bytes
=========
========= Invalid __global__ read of size 4 bytes
=========     at void effkernels::<unnamed>::scale_kernel<float>(Scale<T1>)+0x460 in cuda.cu:124
=========     by thread (66,0,0) in block (1,0,0)
=========
"""
RACE = f"""{BANNER}========= Error: Race reported between Write access at gate_kernel+0x90 in a.h:41
=========     and Read access at gate_kernel+0x100 in a.h:51 [508 hazards]
=========
========= Warning: Race reported between Write access at pool_kernel+0x10 in cuda.cu:1
=========     and Read access at pool_kernel+0x20 in cuda.cu:2 [2 hazards]
=========
"""


def make_tool(directory: Path, name: str, body: str, patch: pytest.MonkeyPatch) -> None:
    """An executable of this name on PATH."""
    directory.mkdir(exist_ok=True)
    file = directory / name
    file.write_text(f"#!{sys.executable}\n{body}")
    file.chmod(0o755)
    patch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


def make_sanitizer(
    directory: Path,
    patch: pytest.MonkeyPatch,
    said: dict[str, str],
    instead: str = "code = subprocess.run(command).returncode",
) -> None:
    """Runs what it is given, or something instead, and writes what it has to say into its log."""
    body = f"""
import subprocess, sys, time
given = sys.argv[1:]
tool, log = (given[given.index(option) + 1] for option in ("--tool", "--log-file"))
command = given[given.index({sys.executable!r}):]
file = open(log, "w", buffering=1)
said = {said!r}[tool]
{instead}
file.write(said)
found = "SUMMARY: 0" not in said and "SUMMARY" in said and "(0 errors" not in said
sys.exit(code or found * int(given[given.index("--error-exitcode") + 1]))
"""
    make_tool(directory, "compute-sanitizer", body, patch)


PASSES = "print('a.py::test_it PASSED (on the GPU)   [100%]'); code = 0"


def sanitized(plan: Plan, tmp_path: Path, body: str = "def test_it(): pass") -> Plan:
    file = tmp_path / "test_it.py"
    file.write_text(body)
    return replace(plan, sanitized=(str(file),))


def test_kernels_are_clean_under_the_sanitizer(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sanitizer(tmp_path / "bin", monkeypatch, CLEAN)
    test = """def test_it():
    assert os.environ["EFFKERNELS_HYPOTHESIS_PROFILE"] == "first"
    assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
def test_without_kernels(): pass
"""
    plan = sanitized(plan, tmp_path, ON_GPU + test)
    status, said = run(plan, tmp_path / "out", ("sanitizer", "summary"))
    found = content(tmp_path / "out", "sanitizer")
    assert status == 0 and found["complete"] and not found["failures"], said
    for row, tool in zip(found["rows"], ("memcheck", "racecheck"), strict=True):
        assert row["tool"] == tool and row["ok"] and row["errors"] == row["exit_code"] == 0
        assert row["on_gpu"] == 1 and row["counts"]["PASSED"] == 2 and row["seconds"] > 0
        assert "--kernel-name kernel_substring=effkernels" in row["command"]
        log = (tmp_path / "out" / f"sanitizer-{tool}.txt").read_text()
        assert "SUMMARY: 0" in log and "2 passed" in log
    assert "memcheck: ok, 0 errors" in (tmp_path / "out" / "summary.md").read_text()
    _, said = run(plan, tmp_path / "out", ("sanitizer",))
    assert "complete, not run again" in said


@pytest.mark.parametrize(
    ("said", "errors", "warnings", "reason"),
    [
        ({"memcheck": f"{INVALID}========= ERROR SUMMARY: 769 errors\n"}, 769, 0, "769 errors"),
        (
            {
                "racecheck": f"{RACE}========= RACECHECK SUMMARY: 2 hazards displayed "
                "(1 error, 1 warning)\n"
            },
            1,
            1,
            "1 error",
        ),
        ({"memcheck": BANNER}, 0, 0, "no closing line"),
        (
            {
                "memcheck": "========= Error: Target application terminated before first "
                f"instrumented API call\n{NO_ERROR}"
            },
            0,
            0,
            "Target application terminated",
        ),
    ],
)
def test_what_the_sanitizer_finds_is_the_exit_status(
    said: dict[str, str],
    errors: int,
    warnings: int,
    reason: str,
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_sanitizer(tmp_path / "bin", monkeypatch, {**CLEAN, **said}, PASSES)
    out = tmp_path / "out"
    status, printed = run(sanitized(plan, tmp_path), out, ("sanitizer", "ceilings", "summary"))
    found = content(out, "sanitizer")
    (tool,) = said
    assert status == 1 and found["complete"] and list(found["failures"]) == [tool], printed
    assert reason in found["failures"][tool] and "ceilings: copy" in printed
    rows = {row["tool"]: row for row in found["rows"]}
    assert (rows[tool]["errors"], rows[tool]["warnings"]) == (errors, warnings)
    assert sum(row["ok"] for row in rows.values()) == 1
    summary = (out / "summary.md").read_text()
    assert f"sanitizer: {tool}: FAILED: " in summary
    assert ("Reports of the sanitizer" in summary) == (errors > 0)
    make_sanitizer(tmp_path / "bin", monkeypatch, CLEAN, PASSES)
    assert run(sanitized(plan, tmp_path), out, ("sanitizer",), again=True)[0] == 0


def test_warnings_of_the_sanitizer_are_no_errors(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing = "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n"
    said = {**CLEAN, "racecheck": RACE.replace("Error: ", "Warning: ") + closing}
    make_sanitizer(tmp_path / "bin", monkeypatch, said, PASSES)
    assert run(sanitized(plan, tmp_path), tmp_path, ("sanitizer",))[0] == 0
    assert content(tmp_path, "sanitizer")["rows"][1]["warnings"] == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (FIXTURES.replace("DEVICE", "cpu") + "def test_it(): pass", "no test ran on the GPU"),
        (ON_GPU + "def test_it(): pytest.skip()", "no test ran on the GPU"),
        ("def test_it(): pass", "no test ran on the GPU"),
        (ON_GPU + "def test_it(): assert False", "1 tests failed"),
        ("", "exit status 5"),
    ],
)
def test_what_did_not_run_is_not_clean(
    body: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sanitizer(tmp_path / "bin", monkeypatch, CLEAN)
    file = tmp_path / "test_it.py"
    file.write_text(body)
    row = sanitizer.check("memcheck", (str(file),), tmp_path, 120)
    assert row["ok"] is False and reason in row["reason"] and row["errors"] == 0


def test_tests_that_come_too_late_are_left_out(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Incomplete and no failure; the same command again goes on with the tool that is missing."""
    make_sanitizer(tmp_path / "bin", monkeypatch, CLEAN)
    plan = sanitized(plan, tmp_path, ON_GPU + "def test_it(): pass")
    monkeypatch.setattr(sanitizer, "CLOSING_SHARE", 1.0)
    monkeypatch.setattr(sanitizer, "MOST_CLOSING_S", 1e9)
    status, said = run(plan, tmp_path, ("sanitizer",))
    found = content(tmp_path, "sanitizer")
    assert status == 0 and not found["complete"] and not found["failures"], said
    assert found["left_out"] == ["memcheck", "racecheck"] and "out of time for 1 test" in said
    assert found["rows"][0]["counts"]["LATE"] == 1 and found["rows"][0]["ok"] is None
    memcheck = {"task": "memcheck", **found["rows"][0], "ok": True}
    file = tmp_path / "sanitizer.json"
    file.write_text(json.dumps({**found, "rows": [memcheck]}))
    make_sanitizer(tmp_path / "bin", monkeypatch, CLEAN, PASSES)
    _, said = run(plan, tmp_path, ("sanitizer",))
    assert content(tmp_path, "sanitizer")["complete"] and "memcheck" not in said


@pytest.mark.parametrize(
    ("tool", "said", "places"),
    [
        ("memcheck", "", []),
        ("memcheck", INVALID, ["cuda.cu:124", "cuda.cu:124"]),
        ("racecheck", RACE, ["a.h:51 [508 hazards]"]),  # and a warning
    ],
)
def test_a_sanitizer_that_is_stopped_tells_what_it_has(
    tool: str, said: str, places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead = "file.write(said); time.sleep(600)"
    make_sanitizer(tmp_path / "bin", monkeypatch, {tool: said}, instead)
    row = sanitizer.check(tool, (), tmp_path, 1.0)
    assert row["exit_code"] is None and row["errors"] == len(places)
    found = [text.splitlines()[1].rpartition(" in ")[2] for text in row["reports"]]
    assert found == places and row["ok"] is (False if places else None)
    assert ("stopped after" in row["reason"]) == (not places)


def test_a_sanitizer_without_time_is_not_started(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sanitizer(tmp_path / "bin", monkeypatch, CLEAN, PASSES)
    assert run(sanitized(plan, tmp_path), tmp_path, ("sanitizer",), budget_s=0.0)[0] == 0
    found = content(tmp_path, "sanitizer")
    assert not found["rows"] and found["left_out"] == ["memcheck", "racecheck"]


def test_missing_tools_do_not_fail_the_campaign(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setattr(device, "CUDA_TOOLS", tmp_path / "cuda")
    counted = replace(sanitized(plan, tmp_path), counted=COUNTED)
    status, said = run(counted, tmp_path, ("sanitizer", "counters", "summary"))
    assert status == 0
    for stage, tool in (("sanitizer", "compute-sanitizer"), ("counters", "ncu")):
        assert content(tmp_path, stage)["complete"] and f"{stage}: {tool} is not there" in said
        assert f"{stage.capitalize()}: {tool} is not there." in said
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "ncu").touch(mode=0o755)
    assert device.find_tool("ncu") == str(tmp_path / "cuda" / "ncu")


def test_first_cases_are_chosen() -> None:
    """Of every test one, and then one in bfloat16."""
    environment = {**os.environ, "EFFKERNELS_HYPOTHESIS_PROFILE": "first"}
    command = [*device.pytest_command(["tests/cuda/test_silu.py"]), "--collect-only", "-q"]
    command += ["-k", "not mistakes", "-o", "addopts=--import-mode=importlib"]
    command.remove("-v")
    code, printed = device.run_command(command, 120, environment)
    found = [line.partition("::")[2] for line in printed.splitlines() if "::" in line]
    tests = [name.partition("[")[0] for name in found]
    assert code == 0 and len(set(tests)) == 4, printed
    assert tests == [*dict.fromkeys(tests), "test_matches_reference", "test_gradient", tests[3]]
    assert all("bfloat16" in name for name in found[4:])


COUNTED = counters.Counted(NETWORK, 2, forward=1, backward=1)
KERNELS = (
    "void at::native::<unnamed>::distribution_elementwise_grid_stride_kernel<float, (int)4, "
    "void at::native::templates::cuda::cauchy_kernel<at::CUDAGeneratorImpl *>(int)>(long)",
    "void effkernels::<unnamed>::expand_kernel<float, (int)3>(Fused<T1>)",
    "_scale_kernel",
)
STALLED = counters.STALL.format("barrier")
VALUES = {
    counters.TIME: ("1,234.50", "usecond"),
    counters.READ: ("2.5", "Mbyte"),
    counters.WRITTEN: ("1,500,000", "byte"),
    counters.TENSOR: ("n/a", ""),
}
# run() runs the given process; note() writes what it would have noted. Both give the calls.
# results() are the marker and two kernels for each, as ncu prints them, between its own lines.
NCU = f"""
import csv, json, subprocess, sys, time
given = sys.argv[1:]
log, metrics = (given[given.index(option) + 1] for option in ("--log-file", "--metrics"))
metrics = metrics.split(",")
order = given[-1].replace(".job", ".jsonl")
def say(text): open(log, "a").write(text + chr(10))
def run():
    subprocess.run(given[given.index({sys.executable!r}):], check=True)
    return [line for line in map(json.loads, open(order)) if "begun" in line]
def note():
    with open(order, "w") as file:
        file.writelines(json.dumps(dict(begun=call)) + chr(10) for call in CALLS)
    return CALLS
def results(sections, raw=True):
    values = [({VALUES!r}).get(metric, ("12.5", "")) for metric in metrics]
    columns = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context"]
    columns += ["Stream", "Block Size", "Grid Size", "Device", "CC"]
    say("==PROF== Connected to process 1234 (/usr/bin/python3.12)")
    with open(log, "a") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator=chr(10))
        if raw:
            writer.writerow([*columns, *metrics])
            writer.writerow([*("" for _ in columns), *(unit for _, unit in values)])
        else:
            more = ["Section Name", "Metric Name", "Metric Unit", "Metric Value"]
            writer.writerow([*columns, *more])
        names = ({KERNELS!r}[:1] + {KERNELS!r} * (sections - 1))[:sections * 3 - 2]
        for index, name in enumerate(names):
            cells = [str(index), "1234", "python3.12", "127.0.0.1", name, "1", "7"]
            cells += ["(128, 1, 1)", "(1320, 1, 1)", "0", "9.0"]
            if raw:
                writer.writerow([*cells, *(value for value, _ in values)])
            for metric, (value, unit) in zip(metrics, () if raw else values):
                writer.writerow([*cells, "Command line profiler metrics", metric, unit, value])
    say("==PROF== Disconnected from process 1234")
"""


def make_ncu(out: Path, patch: pytest.MonkeyPatch, body: str) -> None:
    """``out``: with the results of the stage kernels."""
    calls = counters.worst_layers(
        COUNTED, rehearsal_plan().kernels, content(out, "kernels")["rows"]
    )
    begun = [["", ""], *([case.name, name] for case, names in calls for name in names)]
    make_tool(out / "bin", "ncu", f"CALLS = {begun!r}\n{NCU}\n{body}", patch)


@pytest.fixture(scope="module")
def timed_layers(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> tuple[Plan, Path]:
    """A campaign whose layers were timed."""
    plan = replace(plan, kernels=rehearsal_plan().kernels, counted=COUNTED)
    out = tmp_path_factory.mktemp("timed")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        run(plan, out, ("build", "kernels"))
    return plan, out


@pytest.fixture
def counted(timed_layers: tuple[Plan, Path], tmp_path: Path) -> tuple[Plan, Path]:
    """The same, of which a test may make what it likes."""
    plan, out = timed_layers
    for stage in ("build", "kernels"):
        (tmp_path / f"{stage}.json").write_text((out / f"{stage}.json").read_text())
    return plan, tmp_path


@pytest.mark.parametrize("raw", [True, False])
def test_layers_that_lose_time_are_looked_into(
    raw: bool, counted: tuple[Plan, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = counted
    make_ncu(out, monkeypatch, f"results(len(note()), {raw})")
    status, said = run(plan, out, ("counters", "summary"))
    found = content(out, "counters")
    assert status == 0 and found["complete"] and not found["failures"], said
    assert found["content"]["unknown"] == [] and not list(out.glob("counters.j[!s]*"))
    forward, backward = list(dict.fromkeys(row["case"] for row in found["rows"]))
    assert "backward of" in backward and "backward" not in forward
    names = ["expand_kernel", "_scale_kernel"]
    assert [row["kernel"] for row in found["rows"]] == names * 2
    for row in found["rows"]:
        assert row["provider"] == OURS and row["must_bytes"] > 0
        metrics = row["metrics"]
        assert metrics[counters.TIME] == pytest.approx(1234.5e-6)
        assert metrics[counters.READ] == 2.5e6 and metrics[counters.WRITTEN] == 1.5e6
        assert metrics[STALLED] == 12.5 and counters.TENSOR not in metrics
    lines = [line for line in said.splitlines() if "backward of" in line and "all 2" in line]
    cells = [cell.strip() for cell in lines[0].split("|")]
    assert cells[5:7] == ["2469.0", "8.0"]
    assert float(cells[7]) == pytest.approx(8e6 / found["rows"][-1]["must_bytes"], rel=0.01)
    _, said = run(plan, out, ("counters",))
    assert "complete, not run again" in said


def test_metrics_that_ncu_does_not_know_are_left_out(
    counted: tuple[Plan, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = counted
    body = """
if "TENSOR" in metrics:
    say("==PROF== Connected to process 1")
    say("==ERROR== Failed to find metric TENSOR")
    say(r"==ERROR== Failed to access the following 1 metrics: HITS")
    sys.exit(9)
results(len(note()))
"""
    body = body.replace("TENSOR", counters.TENSOR).replace("HITS", counters.L2_HITS)
    make_ncu(out, monkeypatch, body)
    assert run(plan, out, ("counters",))[0] == 0
    found = content(out, "counters")
    assert found["complete"] and not found["failures"] and len(found["rows"]) == 4
    assert set(found["content"]["unknown"]) == {counters.TENSOR, counters.L2_HITS}
    assert counters.L2_HITS not in found["rows"][0]["metrics"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("say('==ERROR== ERR_NVGPUCTRPERM - no permission'); sys.exit(1)", "ERR_NVGPUCTRPERM"),
        ("say('==ERROR== no such option: metric'); sys.exit(1)", "no such option"),
        ("note(); say('==WARNING== No kernels were profiled.')", "ncu has 0 of the markers"),
        ("results(len(note()) - 1)", "3 calls were marked, ncu has 2"),
        ("results(len(note()) + 1)", "3 calls were marked, ncu has 4"),
        ("results(len(note()) - 1); sys.exit(11)", "exit status 11"),
    ],
)
def test_ncu_that_fails_does_not_end_the_campaign(
    body: str, why: str, counted: tuple[Plan, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = counted
    make_ncu(out, monkeypatch, body)
    status, said = run(plan, out, ("counters", "ceilings", "summary"))
    found = content(out, "counters")
    assert status == 0 and found["complete"] and why in found["failures"]["ncu"]
    assert "ceilings: copy" in said and "- counters: ncu: FAILED: " in said
    assert len(found["rows"]) == (2 if "11" in why else 0)  # a prefix is in order


def test_ncu_that_is_stopped_leaves_the_rest_for_later(
    counted: tuple[Plan, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = counted
    body = """
note()
try: time.sleep(600)
except KeyboardInterrupt: results(2)
"""
    make_ncu(out, monkeypatch, body)
    monkeypatch.setattr(counters, "LEAST_S", 0.1)
    status, said = run(plan, out, ("counters", "summary"), budget_s=2.0)
    found = content(out, "counters")
    assert status == 0 and not found["complete"] and len(found["rows"]) == 2, said
    (left,) = found["left_out"]
    assert "backward of" in left and f"- counters: out of time for {left}" in said
    make_ncu(out, monkeypatch, "results(len(note()))")
    run(plan, out, ("counters",))
    assert content(out, "counters")["complete"] and len(content(out, "counters")["rows"]) == 4


def test_counters_need_layers_and_time(
    counted: tuple[Plan, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = counted
    make_ncu(out, monkeypatch, "sys.exit('runs')")
    run(plan, out, ("counters",), budget_s=0.0)
    found = content(out, "counters")
    assert not found["complete"] and len(found["left_out"]) == 2 and not found["failures"]
    (out / "kernels.json").unlink()
    _, said = run(plan, out, ("counters",))
    assert not content(out, "counters")["complete"] and "has timed no layer" in said


def test_a_layer_that_fails_is_named_and_the_next_one_runs(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the process that ncu watches."""
    order, path = tmp_path / "order", tmp_path / "job"
    (case,) = plan.kernels[:1]
    job = counters.Job(((case, ("nobody", OURS)),), "cpu", "float32", ("auto",), order, 60.0)
    monkeypatch.setattr(sys, "argv", ["work", str(path)])
    path.write_bytes(counters.pickle.dumps(job))
    counters.work()
    lines = [json.loads(line) for line in order.read_text().splitlines()]
    failed = {"failed": [case.name, "nobody"], "why": "KeyError: 'nobody'"}
    assert lines == [{"begun": ["", ""]}, failed, {"begun": [case.name, OURS]}]
    path.write_bytes(counters.pickle.dumps(replace(job, seconds=0.0)))
    counters.work()
    assert json.loads(order.read_text().splitlines()[-1]) == {"out of time": True}


def test_layers_are_weighed_by_how_often_they_come(plan: Plan) -> None:
    found = layers.layer_counts("efficientnet_b0")
    often = max(found, key=lambda layer: found[layer])
    once = next(layer for layer, count in found.items() if count == 1)
    assert found[often] > 2
    cases = [LayerCase("efficientnet_b0", layer, 256) for layer in (once, often)]
    cases += [replace(cases[0], backward=True), replace(cases[1], batch=1)]
    counted = counters.Counted("efficientnet_b0", 256, forward=1, backward=1)
    rows = [row(case.name, OURS, 3.0) for case in cases]
    rows += [row(case.name, "eager", 1.0) for case in cases]
    rows.append(row(cases[0].name, f"{OURS} native", None))
    rows.append(row(cases[1].name, f"{OURS} native", 2.0))  # faster: 1 ms lost, times its count
    chosen = counters.worst_layers(counted, cases, rows)
    both = (OURS, f"{OURS} native")
    assert chosen == ((cases[1], both), (cases[2], (OURS,)))
    rows[0]["ms_median"] = 1.5 + found[often]
    assert counters.worst_layers(counted, cases, rows)[0] == (cases[0], (OURS,))


def test_kernels_have_short_names() -> None:
    assert counters.short_name(KERNELS[1]) == "expand_kernel"
    assert counters.short_name("void (anonymous namespace)::pool<int>(a<b>)") == "pool"
    assert counters.short_name("triton_poi_fused_0") == "triton_poi_fused_0"
    stall = counters.STALL.format
    metrics = {stall("wait"): 1.0, stall("barrier"): 2.0}
    assert counters.worst_stall(metrics) == ("barrier", 2.0)
    assert counters.worst_stall({}) is None


def test_a_campaign_goes_into_the_readme(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Behind the section that is there already; the second time between its own markers."""
    results, file = finished[0] / "rehearsal.json", tmp_path / "README.md"
    text = (device.ROOT / "README.md").read_text()
    assert readme.BEGIN not in text or "The GPU kernels have not run on a GPU yet" not in text
    file.write_text(text)
    assert main(["report", str(results), "--readme", str(file)]) == 0
    once = file.read_text()
    section = once.partition(readme.BEGIN)[2].partition(readme.END)[0]
    assert "no figure of a GPU" in section and "| mobilenet_v2 32² |       2 |" in section
    assert "Training steps" in section and "Targets: 0 met, 0 missed, 22" in section
    assert once.replace(section, "") != text and len(once) - len(section) - len(text) < 200
    file.write_text(once.replace("Parity tests: 1 passed", "old figures"))
    assert main(["report", str(results), "--readme", str(file)]) == 0
    assert file.read_text() == once
    file.write_text("no markers")
    assert main(["report", str(results), "--readme", str(file)]) == 2
    assert file.read_text() == "no markers"


def test_the_readme_says_what_was_missed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def timed(task: str, provider: str, ms: float | None, **fields: Any) -> Row:
        found = row(task, provider, ms, suite="inference", case="efficientnet_b0", peak_bytes=None)
        return {**found, **fields}

    main_task, compiled = "efficientnet_b0, batch 256, main", "efficientnet_b0, batch 256, compile"
    rows = [
        timed(main_task, "eager", 9.0, peak_bytes=2e9),
        timed(main_task, "eager graph", 8.0),
        timed(main_task, "freeze", 4.0, peak_bytes=5e8),
        timed(main_task, "freeze graph", 2.0),
        timed(main_task, CONTROL, 2.0, control_of="freeze graph"),
        timed(compiled, "eager", 9.5),
        timed(compiled, "torch.compile", 6.0),
        timed(compiled, "freeze graph", 2.5),  # in turns with torch.compile
        timed(compiled, CONTROL, 2.5, control_of="freeze graph"),
    ]
    target = {"stage": "inference", "case": "efficientnet_*", "batch": 256, "failed_cases": 0}
    missed = {**target, "target": "freeze: ms at most 1", "measured": 2.0, "met": False}
    passed = {**target, "target": "freeze: ms at most 3", "measured": 2.0, "met": True}
    environment = {"device": "NVIDIA H200", "nvidia_smi": {"driver_version": "580.1"}}
    build = {"environment": environment, "header": {"versions": {"torch": "2.11"}, "commit": "c0"}}
    parity = {"ok": False, "reason": "3 failed", "counts": {}}
    everything = {
        "build": {"rows": [], "content": build},
        "parity": {"rows": [], "content": parity},
        "inference": {"rows": rows, "content": {}},
        "training": {"rows": [], "content": {}},
        "summary": {"rows": [], "content": {"targets": [missed, passed]}},
    }
    file = tmp_path / "gpu-nvidia-h200.json"
    file.write_text(json.dumps(everything))
    assert main(["report", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "NVIDIA H200" in printed and "torch 2.11, driver 580.1" in printed and "c0" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("| efficientnet_b0"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == ["256", "8.000", "6.000", "2.000", "2.40", "128,000", "2,000", "500"]
    assert "1 met, 1 missed, 0 not measured" in printed and "tests **failed**: 3 failed" in printed
    assert "- **missed**: inference: efficientnet\\_" not in printed
    assert (
        "- **missed**: inference: efficientnet_\\*, batch 256, freeze: ms at most 1: 2" in printed
    )
    rows[-1]["ms_median"] = 3.0
    file.write_text(json.dumps(everything))
    assert main(["report", str(file)]) == 0
    assert "2.40* |" in capsys.readouterr().out
