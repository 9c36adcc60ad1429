"""FSDP in two processes on a CPU: what it trains is what one process trains."""

from __future__ import annotations

import subprocess

import pytest
import torch

import effkernels as ek
from tests.models import sharded, tiny_training
from tests.models.sharded import Trained
from tests.networks import assert_pooled_close

SECONDS = 120


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_training.register(monkeypatch)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Trained]]:
    """What both processes saw, by how their weights were sharded."""
    folder = tmp_path_factory.mktemp("sharded")
    command = tiny_training.two_processes(sharded.__file__, str(folder))
    done = subprocess.run(**command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return [
        {way: Trained(*seen) for way, seen in torch.load(folder / f"{rank}.pt").items()}
        for rank in range(2)
    ]


@pytest.mark.parametrize("way", sharded.WAYS)
def test_two_processes_are_one(processes: list[dict[str, Trained]], way: str) -> None:
    """Losses and, after each step, evaluation: no weights but the gathered ones are used."""
    name, _ = sharded.WAYS[way]
    exact = sharded.train_alone(name, torch.float64, torch.contiguous_format)
    layouts = (torch.contiguous_format, torch.channels_last)
    stock = [sharded.train_alone(name, torch.float32, layout) for layout in layouts]
    for kind in ("losses", "logits"):
        assert_pooled_close(
            [getattr(seen, kind) for seen in exact],
            [getattr(process[way], kind) for process in processes],
            [[getattr(seen, kind) for seen in run] for run in stock],
            name=kind,
        )


@pytest.mark.parametrize("way", sharded.WAYS)
def test_blocks_train_as_one_op(processes: list[dict[str, Trained]], way: str) -> None:
    whole = ek.backends()["native"].available and "layer" not in way  # those are called
    for process in processes:
        assert process[way].whole_blocks == (sharded.FROZEN * sharded.BLOCKS if whole else 0)
