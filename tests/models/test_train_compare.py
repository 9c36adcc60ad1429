"""Curves of several runs in one picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from effkernels.models.training import train
from effkernels.models.training.compare import load_history, main
from effkernels.models.training.run import HISTORY

from tests.models import tiny_training


def test_two_runs_in_one_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_training.register(monkeypatch)
    blobs = tiny_training.write_blobs(tmp_path / "pictures.npz")
    runs = [tmp_path / "with kernels", tmp_path / "without"]
    for run in runs:
        made = train(tiny_training.tiny_config(blobs, run, accelerate=run is runs[0]))
        assert load_history(run) == made
    picture = tmp_path / "curves.png"
    assert main([*map(str, runs), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")

    picture.unlink()
    for text, message in ((None, "does not exist"), ("{}", "no history of a run")):
        file = runs[1] / HISTORY
        file.unlink() if text is None else file.write_text(text)
        assert main([*map(str, runs), "--out", str(picture)]) == 2
        assert message in capsys.readouterr().err
        assert not picture.exists()
    assert json.loads((runs[0] / HISTORY).read_text())["finished"]
