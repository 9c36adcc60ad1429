"""The grid search for coefficients: its grid, halving, ranking, and that it can be continued."""

from __future__ import annotations

from pathlib import Path

import pytest
from effkernels.models import CompoundScaling
from effkernels.models.search import STUDY, Trial, candidates, grid_search, plot

optuna = pytest.importorskip("optuna")
GRID = [CompoundScaling(1 + index / 10, 1.1, 1.1) for index in range(9)]


class Evaluate:
    """Accuracy grows with α, and with the budget; every call is noted."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.calls: list[tuple[CompoundScaling, int]] = []
        self._dies_after = dies_after

    def __call__(self, scaling: CompoundScaling, budget: int) -> float:
        if len(self.calls) == self._dies_after:
            raise KeyboardInterrupt
        self.calls.append((scaling, budget))
        return scaling.alpha + budget / 100


def test_candidates() -> None:
    found = candidates()
    assert CompoundScaling(1.2, 1.1, 1.15) in found  # the paper's
    assert all(abs(scaling.cost - 2) <= 0.1 for scaling in found)
    assert len(set(found)) == len(found)
    assert CompoundScaling(2.0, 1.0, 1.0) in found and CompoundScaling(1.0, 1.4, 1.0) in found
    for step in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="candidates: step is"):
            candidates(step)
    with pytest.raises(ValueError, match="no coefficients"):
        candidates(0.7, 0.01)


def test_best_first(tmp_path: Path) -> None:
    evaluate = Evaluate()
    trials = grid_search(evaluate, tmp_path / "study.db", GRID[::-1])
    assert {trial.scaling for trial in trials} == set(GRID)
    assert trials[0] == Trial(GRID[-1], pytest.approx(1.8 + 0.09), 9, False)
    assert len(evaluate.calls) < 3 * len(GRID)  # halving: most get no more than the least budget
    assert trials[-1].dropped and trials[-1].budget == 1
    for scaling, budget in evaluate.calls:
        assert budget in (1, 3, 9) and scaling in GRID


def test_continued(tmp_path: Path) -> None:
    whole = grid_search(Evaluate(), tmp_path / "whole.db", GRID)
    first = Evaluate(dies_after=7)
    with pytest.raises(KeyboardInterrupt):
        grid_search(first, tmp_path / "study.db", GRID)
    second = Evaluate()
    trials = grid_search(second, tmp_path / "study.db", GRID)
    assert {trial.scaling for trial in trials} == set(GRID) and len(trials) == len(GRID)
    assert trials[0] == whole[0]
    again = {scaling for scaling, _ in first.calls} & {scaling for scaling, _ in second.calls}
    assert len(again) <= 1  # that which was interrupted
    third = Evaluate()
    assert grid_search(third, tmp_path / "study.db", GRID) == trials
    assert third.calls == []


def test_a_killed_process_leaves_its_candidate_to_the_next(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        grid_search(Evaluate(dies_after=0), tmp_path / "study.db", GRID[:3])
    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{tmp_path / 'study.db'}")
    study.ask()  # running, and nobody will ever tell
    trials = grid_search(Evaluate(), tmp_path / "study.db", GRID[:3])
    assert {trial.scaling for trial in trials} == set(GRID[:3]) and len(trials) == 3


def test_a_failed_candidate_is_tried_again(tmp_path: Path) -> None:
    def broken(scaling: CompoundScaling, budget: int) -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        grid_search(broken, tmp_path / "study.db", GRID[:2])
    assert len(grid_search(Evaluate(), tmp_path / "study.db", GRID[:2])) == 2


def test_bad_input(tmp_path: Path) -> None:
    study = tmp_path / "study.db"
    for options, message in (
        ({"grid": []}, "grid is empty"),
        ({"grid": [GRID[0], GRID[0]]}, "has a candidate twice"),
        ({"least_budget": 0}, "least_budget is 0"),
        ({"reduction": 1}, "reduction is 1, an integer of at least 2"),
        ({"rungs": 0}, "rungs is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            grid_search(Evaluate(), study, **options)
        assert not study.exists()
    with pytest.raises(ValueError, match="whose folder does not exist"):
        grid_search(Evaluate(), tmp_path / "nowhere" / "study.db", GRID)
    with pytest.raises(ValueError, match="evaluate gave nan"):
        grid_search(lambda *_: float("nan"), study, GRID[:1])
    with pytest.raises(ValueError, match="continued with the same ones only"):
        grid_search(Evaluate(), study, GRID[:2])
    text = tmp_path / "notes.txt"
    text.write_text("no database at all, but long enough to be looked at as one " * 10)
    with pytest.raises(ValueError, match="is no study"):
        grid_search(Evaluate(), text, GRID[:1])


def test_plot(tmp_path: Path) -> None:
    trials = [
        Trial(scaling, 0.5, 1 if index else 9, bool(index)) for index, scaling in enumerate(GRID)
    ]
    plot(trials, tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="trials is empty"):
        plot([], tmp_path / "none.png")
    assert [path.name for path in tmp_path.iterdir()] == ["search.png"]
