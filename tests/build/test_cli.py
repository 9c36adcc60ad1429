"""The `effkernels` command: what it prints, and that an error is one line."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from effkernels import build_info, cli, info


def test_info_as_json_and_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    collected = json.loads(capsys.readouterr().out)
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for value in (*collected["versions"].values(), collected["cpu"]["name"]):
        assert value in text
    for name, backend in collected["backends"].items():
        state = "available" if backend["available"] else "not available"
        assert any(
            line.split()[0] == name and f"{state}: {backend['reason']}" in line
            for line in text.splitlines()
            if line.strip()
        )


def test_info_of_a_copy_that_was_never_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_info, "BUILD_INFO", tmp_path / "_build_info.json")
    assert info.collect()["build"] is None
    assert "_build_info.json is missing; run pip install -e ." in info.render(info.collect())
    assert "nothing was built here" in build_info.why_not_built("cpu")


def test_info_names_why_a_module_was_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "_build_info.json"
    modules = {
        "cpu": {"built": False, "reason": "no compiler here"},
        "cuda": {"built": False, "reason": "no nvcc there"},
    }
    record.write_text(json.dumps({"requested": "auto", "torch": "2.15.0", "modules": modules}))
    monkeypatch.setattr(build_info, "BUILD_INFO", record)
    text = info.render(info.collect())
    assert "cpu kernels   not built: no compiler here" in text
    assert "cuda kernels  not built: no nvcc there" in text
    assert build_info.why_not_built("cuda") == "no nvcc there"


def test_info_names_what_the_modules_were_compiled_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "_build_info.json"
    built = {"built": True, "reason": "", "flags": "-O3"}
    modules = {
        "cpu": {**built, "compiler": "g++ 12", "isa_flags": {"portable": "", "avx2": "-mavx2"}},
        "cuda": {**built, "compiler": "nvcc 13", "architectures": ["8.0", "9.0+PTX"]},
    }
    record.write_text(json.dumps({"requested": "auto", "torch": "2.15.0", "modules": modules}))
    monkeypatch.setattr(build_info, "BUILD_INFO", record)
    lines = [line.split() for line in info.render(info.collect()).splitlines()]
    assert ["flags", "avx2", "-mavx2"] in lines
    assert ["flags", "portable", "none", "more"] in lines
    assert ["architectures", "8.0,", "9.0+PTX"] in lines


def test_thread_and_library_settings_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("EFFKERNELS_SOMETHING", "set here")
    text = info.render(info.collect())
    assert [line for line in text.splitlines() if line.split() == ["OMP_NUM_THREADS", "7"]]
    assert "set here" in text


def classify_module(error: Exception | None, calls: list[tuple[object, ...]]) -> types.ModuleType:
    def classify(photos: list[str], model: str, weights: str | None, top: int) -> None:
        calls.append((photos, model, weights, top))
        if error is not None:
            raise error

    module = types.ModuleType("effkernels.classify")
    module.classify = classify  # type: ignore[attr-defined]
    return module


def test_classify_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setitem(sys.modules, "effkernels.classify", classify_module(None, calls))
    assert cli.main(["classify", "a.jpg", "b.png"]) == 0
    words = ["classify", "c.jpg", "--model", "efficientnet_b0", "--weights", "w.pt", "--top", "3"]
    assert cli.main(words) == 0
    assert calls == [
        (["a.jpg", "b.png"], "efficientnet_lite0", None, 5),
        (["c.jpg"], "efficientnet_b0", "w.pt", 3),
    ]


@pytest.mark.parametrize(
    "error", [ValueError("v"), TypeError("t"), RuntimeError("r"), FileNotFoundError("f")]
)
def test_an_error_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "effkernels.classify", classify_module(error, []))
    assert cli.main(["classify", "a.jpg"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"effkernels: error: {error}\n"


@pytest.mark.parametrize("words", [[], ["classify"], ["unknown"], ["classify", "x", "--top", "a"]])
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "usage: effkernels" in capsys.readouterr().err
