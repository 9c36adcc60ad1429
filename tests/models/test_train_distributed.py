"""Two processes under torchrun on a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from effkernels.models import create_model
from effkernels.models.training import TrainConfig, checkpoint, loop, train
from effkernels.models.training.distributed import choose_device, ranks_from_environment
from effkernels.models.training.run import CHECKPOINT, HISTORY

from tests.models import tiny_training
from tests.models.test_train import arguments, losses, perturbed, wait_until

SECONDS = 120


class Killed(NamedTuple):
    """What is left of a run one of whose processes was killed."""

    config: TrainConfig
    status: int
    errors: str


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_training.register(monkeypatch)


def child(parent: int, rank: int) -> int | None:
    """The process of ``rank`` that torchrun has started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            if f"\0RANK={rank}\0".encode() in (stat.parent / "environ").read_bytes():
                return int(stat.parent.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return None


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """Both processes train; after two epochs the second one is killed."""
    folder = tmp_path_factory.mktemp("killed")
    config = tiny_training.tiny_config(
        tiny_training.write_blobs(folder / "pictures.npz"),
        folder / "run",
        epochs=10**6,
        batch_size=4,
        sync_bn=True,
        schedule="constant",
        # every process draws its own
        model_options={"drop_rate": 0.0, "drop_path_rate": 0.0},
    )
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            **tiny_training.two_processes(tiny_training.__file__, *arguments(config)),
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            written = folder / "run" / HISTORY

            def two_epochs() -> bool:
                done = written.exists() and len(json.loads(written.read_text())["epochs"]) >= 2
                return done or process.poll() is not None

            wait_until(two_epochs)
            worker = child(process.pid, 1)
            assert worker is not None, (folder / "errors").read_text()
            os.kill(worker, signal.SIGKILL)
            status = process.wait(timeout=SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return Killed(config, status, (folder / "errors").read_text())


def test_a_killed_process_ends_the_run_and_the_checkpoint_loads(killed: Killed) -> None:
    assert killed.status != 0
    assert "SIGKILL" in killed.errors
    out = Path(killed.config.out)
    state = checkpoint.load(out / CHECKPOINT)
    assert state["step"] >= 6 and len(state["rng"]) == 2
    model = create_model("tiny", num_classes=tiny_training.CLASSES, weights=out / CHECKPOINT).eval()
    assert model(torch.randn(1, 3, 16, 16)).isfinite().all()
    assert not list(out.glob(".*.pt*"))
    with pytest.raises(ValueError, match="number of processes was 2, is 1"):
        train(replace(killed.config, resume=True, epochs=10**6))


def test_two_processes_are_one_with_the_double_batch(
    killed: Killed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = json.loads((Path(killed.config.out) / HISTORY).read_text())
    config = replace(
        killed.config, batch_size=8, sync_bn=False, limit_steps=6, out=str(tmp_path / "one")
    )
    one = train(config)
    # how far rounding alone takes one process
    monkeypatch.setattr(loop, "create_model", perturbed)
    rounded = losses(train(replace(config, out=str(tmp_path / "rounded"))))
    expected, found = losses(one), [record["loss"] for record in two["steps"][:6]]
    allowed = 10 * max(abs(a - b) for a, b in zip(expected, rounded, strict=True))
    assert 0 < allowed < 1e-2
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) <= allowed
    for record, other in zip(one.epochs, two["epochs"], strict=False):
        assert other["val_accuracy"] == record.val_accuracy
        assert other["val_loss"] == pytest.approx(record.val_loss, abs=allowed)


def test_what_torchrun_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert ranks_from_environment() == (0, 1, 0)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    ranks = ranks_from_environment()
    assert ranks == (3, 4, 1) and not ranks.first
    assert choose_device("cpu", ranks) == torch.device("cpu")
    with pytest.raises(ValueError, match="cuda is accepted in 4 processes"):
        choose_device("cuda:0", ranks)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE is 'many'"):
        ranks_from_environment()
