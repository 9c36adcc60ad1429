"""The reproduced tables: every figure is its source's, or a remark says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
from effkernels.models import report
from effkernels.models.report import Figure, check, main


@pytest.fixture(scope="module")
def made() -> tuple[str, list[Figure]]:
    return report.report()


def test_check(
    made: tuple[str, list[Figure]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The file of this repository is what the networks give now."""
    monkeypatch.setattr(report, "report", lambda: made)
    assert main(["--check"]) == 0
    assert ", 0 problems" in capsys.readouterr().out


def test_what_agrees(made: tuple[str, list[Figure]]) -> None:
    page, figures = made
    by_name = {figure.what: figure for figure in figures}
    stages = [figure for figure in figures if figure.what.startswith("EfficientNet-B0, stage")]
    assert len(stages) == 9 * 4 and all(figure.agrees for figure in stages)
    assert [by_name[f"B{index}, resolution"].ours for index in range(8)] == [
        *(224, 240, 260, 300, 380, 456, 528, 600)
    ]
    for name in ("parameters (M)", "MB", "multiply-adds (G)"):
        assert by_name[f"ResNet-18, 10 classes, {name}"].agrees
    differing = {figure.what for figure in figures if not figure.agrees}
    assert "B4, multiply-adds (G)" in differing and "B0, multiply-adds (G)" not in differing
    assert all(figure.remark in page for figure in figures)


def test_rounding() -> None:
    assert Figure("x", 5.2885, "5.3").agrees and Figure("x", 5.25, "5.3").agrees
    assert not Figure("x", 5.2885, "5.30").agrees
    assert Figure("x", 12.23, "12").agrees and not Figure("x", 37.7, "37").agrees


def test_problems_are_found(made: tuple[str, list[Figure]], tmp_path: Path) -> None:
    page, figures = made
    file = tmp_path / "tables.md"
    assert "is missing" in check(page, figures, file)[0]
    file.write_text(page)
    assert check(page, figures, file) == []
    file.write_text(page.replace("5.29", "5.28"))
    assert "is out of date" in check(page, figures, file)[0]
    file.write_text(page)
    bare, needless = Figure("a", 2.0, "3"), Figure("b", 3.0, "3", "because")
    problems = check(page, [*figures, bare, needless], file)
    assert problems == [
        "a: 2 differs from 3 without a remark",
        "b: 3 agrees with 3, yet has a remark",
    ]


def test_a_changed_network_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong coefficient: no second count explains what comes of it."""
    rows = report.efficientnet.COEFFICIENTS
    name = "efficientnet_b1"
    wrong = rows[name]._replace(width=1.1).of(report.efficientnet.BASE)
    monkeypatch.setitem(report.efficientnet.VARIANTS, name, wrong)
    monkeypatch.setitem(report.registry._EFFICIENTNETS, name, wrong)
    problems = [figure.problem for figure in report.family().figures if figure.problem]
    assert len(problems) == 2 and all(problem.startswith("B1") for problem in problems)


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "nowhere" / "tables.md")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
