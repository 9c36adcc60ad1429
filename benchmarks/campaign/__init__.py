"""``python -m benchmarks campaign``: everything that one GPU can show, in ten minutes.

Stages run in the order of ``plan.STAGES``; each writes ``<stage>.json`` and ``<stage>.png`` into
one directory as soon as it ends. A stage whose file is complete is not run again, one that ran out
of time goes on where it stopped.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .. import machine
from ..gpus import Rates
from . import counters, device, layers, models, report, sanitizer
from .plan import STAGES, Plan
from .worker import InProcess, Row, Worker

__all__ = ["STAGES", "Campaign", "Task", "run"]

TIMING_S = {"kernels": 0.15, "inference": 3.0, "training": 3.0}  # of one case
LIMIT_S = {"ceilings": 60, "autotune": 60, "kernels": 45, "inference": 180, "training": 180}
WRITE_EVERY_S = 2.0
PRECOMPILERS = 2  # processes


@dataclass(frozen=True)
class Task:
    """One case of a stage."""

    name: str  # unique in the stage
    function: Callable[..., Iterable[Row]]
    arguments: tuple[Any, ...]


@dataclass
class StageFile:
    """What a stage found so far, in memory and in its file."""

    path: Path
    fingerprint: dict[str, Any]
    complete: bool = False
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)  # each names its task
    failures: dict[str, str] = field(default_factory=dict)  # by task
    left_out: list[str] = field(default_factory=list)
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, fingerprint: dict[str, Any]) -> StageFile:
        """The file's content if it is there and was measured with the same ``fingerprint``."""
        try:
            found = json.loads(path.read_text())
            found.pop("date")
            loaded = cls(path, **found)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return cls(path, fingerprint)  # not there, cut short, or another version's
        return loaded if loaded.fingerprint == fingerprint else cls(path, fingerprint)

    def done(self) -> set[str]:
        """Tasks that were run, whatever came out."""
        return {row["task"] for row in self.rows} | self.failures.keys()

    def write(self) -> None:
        """Replace the file at once: it is never half a file."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        content = {"date": now, **vars(self)}
        del content["path"]
        partial_path = self.path.with_name(self.path.name + ".part")
        partial_path.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial_path, self.path)


class Campaign:
    """One run of the stages.

    Args:
        plan: what to measure.
        out: directory of the results.
        budget_s: seconds until no case is started any more.
        worker: runs the cases; None: a process of its own.
        say: gets a line for every case; None: prints it.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        budget_s: float,
        worker: Worker | InProcess | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.plan = plan
        self.out = out
        self.out.mkdir(parents=True, exist_ok=True)
        self._start = time.monotonic()
        self._deadline = self._start + budget_s
        environment: dict[str, str | None] = {"TRITON_INTERPRET": None}
        if plan.device == "cpu":
            # A rehearsal leaves the user's tables alone, and other work on the machine.
            environment = {"EFFKERNELS_CACHE_DIR": str(out / "cache"), "OMP_NUM_THREADS": "1"}
        self._environment = environment
        self._built: dict[str, Any] = {}
        self._worker = worker or Worker(out / "log.txt", environment)
        self._write = say or partial(print, flush=True)
        self.fingerprint: dict[str, Any] = {}

    def run(self, stages: Sequence[str] = tuple(STAGES), again: bool = False) -> int:
        """Run ``stages``, in their order.

        Args:
            stages: of STAGES.
            again: also those whose results are complete.

        Returns:
            1 if the parity tests are known to fail, or could not be run to their end, or if they
            failed under a sanitizer; else 0.
        """
        try:
            if "build" in stages:
                self._build(again)
            self._identify()
            wanted = [stage for stage in STAGES if stage in stages and stage != "build"]
            for index, stage in enumerate(wanted):
                left = sum(STAGES[later] for later in wanted[index:])
                allowed = max(0.0, self._deadline - time.monotonic()) * STAGES[stage] / left
                self._stage(stage, allowed, again)
        finally:
            self._worker.close()
        parity = self.load("parity")
        failed = parity.content and not parity.content["ok"]
        return 1 if failed or self.load("sanitizer").failures else 0

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        self._write(f"[{time.monotonic() - self._start:5.0f} s] {text}")

    def load(self, stage: str) -> StageFile:
        """A stage's results, empty if there are none of this device and code."""
        return StageFile.load(self.out / f"{stage}.json", self.fingerprint)

    def _build(self, again: bool) -> None:
        """Before the worker starts: it should see what was built."""
        path = self.out / "build.json"
        if not self.plan.install or (path.exists() and not again):
            return
        self.say("build: compiling this checkout")
        left = self._deadline - time.monotonic()
        self._built = device.build(left * STAGES["build"] * 3)
        if self._built["exit_code"] != 0:
            self.say(f"build: FAILED, going on without: {self._built['output'][-300:]}")

    def _identify(self) -> None:
        """Start the worker and ask what it runs on; the stage ``build`` ends here."""
        rows: list[Row] = []
        error = self._worker.run(device.environment, (self.plan.device,), 120, rows.append)
        if error is not None:
            raise RuntimeError(f"the device does not answer: {error}")
        found = machine.header()
        self.fingerprint = {
            "device": rows[0]["device"],
            "torch": found["versions"]["torch"],
            "triton": rows[0]["triton"],
            "commit": found["commit"],
        }
        file = self.load("build")
        built = self._built
        if not file.complete or built:
            file.content = {**file.content, "build": built or file.content.get("build", {})}
            file.content |= {"header": found, "environment": rows[0]}
            file.complete = True
            file.seconds = built.get("seconds", 0.0)
            file.write()
        self.say(f"on {rows[0]['device']}, torch {self.fingerprint['torch']}")

    def _stage(self, stage: str, allowed_s: float, again: bool) -> None:
        file = self.load(stage)
        if file.complete and not again and stage != "summary":
            self.say(f"{stage}: complete, not run again")
            return
        if again:
            file = StageFile(self.out / f"{stage}.json", self.fingerprint)
        start = time.monotonic()
        if stage == "parity":
            self._parity(file, allowed_s)
        elif stage == "sanitizer":
            self._sanitizer(file, allowed_s)
        elif stage == "counters":
            self._counters(file, allowed_s)
        elif stage == "summary":
            self._summary(file)
        else:
            self._cases(stage, file, allowed_s)
        file.seconds += time.monotonic() - start
        file.write()
        try:
            from . import plots

            plots.draw(stage, file, self.out, self.rates())
        except Exception as error:  # figures are there; a picture is not worth a campaign
            self.say(f"{stage}: no picture: {type(error).__name__}: {error}")

    def _cases(self, stage: str, file: StageFile, allowed_s: float) -> None:
        tasks = self.tasks(stage)
        done = file.done()
        todo = [task for task in tasks if task.name not in done]
        start = written = time.monotonic()
        end = min(start + allowed_s, self._deadline)
        file.left_out = [task.name for task in todo]
        self.say(f"{stage}: {len(todo)} of {len(tasks)} cases, {allowed_s:.0f} s")
        for task in todo:
            now = time.monotonic()
            if now >= end:
                break
            # A case may overrun the stage's share by half of it, the campaign's end by nothing.
            limit = min(LIMIT_S[stage], end + allowed_s / 2 - now, self._deadline - now)
            before = len(file.rows)
            error = self._worker.run(
                task.function, task.arguments, limit, partial(_keep, file.rows, task.name)
            )
            file.left_out.remove(task.name)
            if error is not None:
                file.failures[task.name] = error
            self._say_result(stage, task.name, file.rows[before:], error)
            if time.monotonic() - written > WRITE_EVERY_S:
                file.write()
                written = time.monotonic()
        file.complete = not file.left_out
        if file.left_out:
            self.say(f"{stage}: out of time, {len(file.left_out)} of {len(tasks)} cases left out")
        if stage == "autotune":
            self._copy_table(file)

    def _say_result(self, stage: str, task: str, rows: list[Row], error: str | None) -> None:
        self.say(f"{stage}: {task}: {report.in_short(rows)}")
        for row in rows:
            if row.get("note"):
                self.say(f"    {row['provider']}: {row['note']}")
        if error is not None:
            self.say(f"    FAILED: {error}")

    def tasks(self, stage: str) -> list[Task]:
        """A stage's cases, the most important ones first."""
        plan = self.plan
        where = (plan.device, plan.dtype)
        if stage == "ceilings":
            return [
                Task("copy", device.measure_copy, (plan.device, plan.copy_bytes)),
                *(
                    Task(f"product, {dtype}", device.measure_product, (plan.device, dtype, side))
                    for dtype, side in plan.product_sides.items()
                ),
            ]
        if stage == "autotune":
            return [
                *(
                    Task(case.name, layers.tune_layer, (case, *where, plan.backends[0]))
                    for case in plan.autotune_layers
                ),
                *(
                    Task(
                        f"{case.network}, batch {case.batch}, {'training' if train else 'freeze'}",
                        *(models.tune_model, (case, *where, train)),
                    )
                    for case, train in plan.autotune_models
                ),
            ]
        rates, seconds = self.rates(), TIMING_S[stage]
        if stage == "kernels":
            return [
                Task(case.name, layers.measure_layer, (case, *where, plan.backends, rates, seconds))
                for case in plan.kernels
            ]
        if stage == "inference":
            return [
                Task(case.name, models.measure_inference, (case, *where, rates, seconds))
                for case in plan.inference
            ]
        return [
            Task(case.name, models.measure_training, (case, *where, rates, seconds))
            for case in plan.training
        ]

    def rates(self) -> Rates:
        """What this device was measured to do, as far as it was."""
        return device.rates_of(self.load("ceilings").rows, str(self.fingerprint.get("device")))

    def _parity(self, file: StageFile, allowed_s: float) -> None:
        existing = tuple(
            argument
            for argument in self.plan.parity
            if not argument.startswith("tests/") or (device.ROOT / argument).exists()
        )
        self.say(f"parity: pytest {' '.join(existing)}, {allowed_s:.0f} s")
        with self._precompiling():
            file.content = device.parity(
                existing, self.plan.device == "cuda", self.out / "parity.txt", allowed_s
            )
        file.complete = file.content["exit_code"] is not None
        counts = ", ".join(f"{n} {what.lower()}" for what, n in file.content["counts"].items() if n)
        self.say(f"parity: {counts or 'nothing ran'} {file.content['reason'] or 'all right'}")
        for test in file.content["failed"][:20]:
            self.say(f"    {test}")

    def _sanitizer(self, file: StageFile, allowed_s: float) -> None:
        wanted = bool(self.plan.sanitized)
        if not self._has_tool("sanitizer", sanitizer.TOOL, wanted, file):
            return
        found = {row["task"]: row for row in file.rows if row["ok"] is not None}
        end = time.monotonic() + allowed_s
        todo = [tool for tool in sanitizer.TOOLS if tool not in found]
        self.say(f"sanitizer: {' and '.join(todo)}, {allowed_s:.0f} s")
        for index, tool in enumerate(todo):
            limit = (end - time.monotonic()) / (len(todo) - index)
            if limit < sanitizer.LEAST_S:
                break
            row = sanitizer.check(tool, self.plan.sanitized, self.out, limit, self._variables())
            found[tool] = {"task": tool, **row}
            self.say(f"sanitizer: {tool}: {sanitizer.in_short(row)}")
            for text in row["reports"]:
                self.say(f"    {text.splitlines()[0]}")
        file.rows = [found[tool] for tool in sanitizer.TOOLS if tool in found]
        file.failures = {row["task"]: row["reason"] for row in file.rows if row["ok"] is False}
        ended = {row["task"] for row in file.rows if row["ok"] is not None}
        file.left_out = [tool for tool in sanitizer.TOOLS if tool not in ended]
        file.complete = not file.left_out

    def _counters(self, file: StageFile, allowed_s: float) -> None:
        counted = self.plan.counted
        if not self._has_tool("counters", counters.TOOL, counted is not None, file):
            return
        assert counted is not None
        calls = counters.worst_layers(counted, self.plan.kernels, self.load("kernels").rows)
        if not calls:
            file.content["reason"] = "no layer was timed"
            self.say("counters: the stage kernels has timed no layer")
            return
        self.say(f"counters: {len(calls)} layers, {allowed_s:.0f} s")
        if allowed_s < counters.LEAST_S:
            file.left_out = [case.name for case, _ in calls]
            return
        plan = self.plan
        job = counters.Job(calls, plan.device, plan.dtype, plan.backends)
        found = counters.measure(job, self.out, allowed_s, self._variables())
        file.rows, file.failures = found.pop("rows"), found.pop("failures")
        file.left_out = found.pop("left_out")
        file.content |= found
        file.complete = not file.left_out
        self.say(f"counters: {len(file.rows)} kernels")
        for what, why in file.failures.items():
            self.say(f"    {what}: FAILED: {why}")

    def _has_tool(self, stage: str, tool: str, wanted: bool, file: StageFile) -> bool:
        """Whether a stage can run; otherwise it is complete, and says why."""
        path = device.find_tool(tool)
        reason = "needs a GPU" if not wanted else "" if path else f"{tool} is not there"
        file.content = {"tool": path, "reason": reason}
        file.complete = bool(reason)
        if reason:
            self.say(f"{stage}: {reason}")
        return not reason

    def _variables(self) -> dict[str, str]:
        """The environment of processes that the campaign starts."""
        changed = {**os.environ, **self._environment}
        return {name: value for name, value in changed.items() if value is not None}

    @contextmanager
    def _precompiling(self) -> Any:
        """While nothing is timed, torch.compile fills its cache in processes of their own."""
        cases = list(self.plan.precompiled)
        if not cases or isinstance(self._worker, InProcess):
            yield
            return
        workers = [Worker(self.out / "log.txt", self._environment) for _ in range(PRECOMPILERS)]
        stop = threading.Event()

        def work(worker: Worker) -> None:
            while cases and not stop.is_set():
                case, training = cases.pop(0)
                arguments = (case, self.plan.device, self.plan.dtype, training)
                worker.run(models.precompile, arguments, 180, lambda row: None, stop.is_set)
            worker.close()

        threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _copy_table(self, file: StageFile) -> None:
        """The device's table, as the library keeps it, next to the results."""
        paths = [Path(row["table"]) for row in file.rows if "table" in row]
        if paths and paths[-1].exists():
            target = self.out / paths[-1].name
            target.write_bytes(paths[-1].read_bytes())
            file.content["table"] = target.name

    def _summary(self, file: StageFile) -> None:
        stages = {stage: self.load(stage) for stage in STAGES if stage != "summary"}
        text, content = report.summarize(stages, self.rates(), self.plan)
        file.content, file.complete = content, True
        (self.out / "summary.md").write_text(text + "\n")
        everything = {
            stage: {k: v for k, v in vars(found).items() if k != "path"}
            for stage, found in {**stages, "summary": file}.items()
        }
        name = report.file_name(str(self.fingerprint["device"]))
        (self.out / name).write_text(json.dumps(everything, indent=1) + "\n")
        self._write(f"\n{text}\n")


def _keep(rows: list[Row], task: str, row: Row) -> None:
    rows.append({"task": task, **row})


def run(plan: Plan, out: Path, only: Sequence[str] = (), budget_s: float = 570.0) -> int:
    """Run a campaign; its exit status.

    Args:
        plan: what to measure.
        out: directory of the results; what is there is continued.
        only: stages to run again, whatever is there; none: all that are not complete.
        budget_s: seconds until no case is started any more.
    """
    campaign = Campaign(plan, out, budget_s)
    return campaign.run(only or tuple(STAGES), again=bool(only))
