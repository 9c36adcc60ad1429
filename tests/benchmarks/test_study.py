"""The study and the search, on a network and pictures so small that a run takes a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from effkernels.models import CompoundScaling
from effkernels.models.training import Interrupted, NonFiniteLoss, TrainConfig

from benchmarks.__main__ import main
from benchmarks.study import plan as plans
from benchmarks.study import runs, search
from benchmarks.study.plan import GROUPS, Settings, chosen, plan
from tests.models import tiny_training

WIDE = CompoundScaling(1.0, 1.4, 1.0)
DEEP = CompoundScaling(2.0, 1.0, 1.0)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole study, on the tiny network and with fewer runs."""
    tiny_training.register(monkeypatch)
    monkeypatch.setattr(plans, "BASE", "tiny")
    monkeypatch.setattr(plans, "LEARNING_RATES", {"adam": (1e-3, 1e-2), "sgd": (5e-2,)})
    monkeypatch.setattr(plans, "MOMENTA", (0.0, 0.9))
    monkeypatch.setattr(plans, "PHIS", (0,))


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_training.write_blobs(tmp_path_factory.mktemp("data") / "pictures.npz")


@pytest.fixture
def words(blobs: Path, tmp_path: Path) -> list[str]:
    """Of the command."""
    return [
        *("study", "--out", str(tmp_path / "runs"), "--dataset", "npz", "--data", str(blobs)),
        *("--epochs", "2", "--sweep-epochs", "1", "--models", "tiny"),
        *("--batch-size", "8", "--device", "cpu"),
        *("--only", "optimizers", "lr", "momentum", "networks", "phi"),
    ]


def settings_of(blobs: Path, **options: Any) -> Settings:
    return Settings(dataset="npz", data=str(blobs), batch_size=8, device="cpu", **options)


def test_a_run_that_two_parts_share_is_there_once(blobs: Path) -> None:
    jobs = plan(settings_of(blobs, fraction=0.5, sweep_epochs=3, models=("tiny", "resnet34")))
    by_name = {job.name: job for job in jobs}
    assert len(by_name) == len(jobs)
    assert set(by_name["lr-adam-0.001"].groups) == {"lr", "networks", "phi"}
    assert by_name["lr-sgd-0.05"].groups == ("lr", "momentum")
    assert by_name["network-resnet34"].options["model"] == "resnet34"
    assert {group for job in jobs for group in job.groups} == set(GROUPS)
    # four fine-tuning runs: with and without weights are not the same
    assert [job.pretrained for job in chosen(jobs, ["transfer"])] == [False, True, True, True]
    # with everything at full length, the sweeps contain the optimizer comparison
    whole = plan(settings_of(blobs, models=("tiny",)))
    assert next(job for job in whole if job.name == "optimizer-adam").groups == (
        "optimizers",
        *("lr", "phi", "networks"),
    )


def test_a_dry_run_writes_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "optimizer-adam" in printed and "epochs=2" in printed and "to do" in printed
    assert not list(tmp_path.iterdir())


def test_a_study_resumes_and_reports(
    words: list[str],
    blobs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results, page = tmp_path / "runs" / "results", tmp_path / "study.md"
    trained: list[str] = []
    real = runs.train

    def interrupted(config: TrainConfig, say: Callable[[str], object]) -> Any:
        """The second job is stopped after a step of its second epoch."""
        trained.append(Path(config.out).name)
        if len(trained) == 2:
            real(plans.replace(config, limit_steps=4), say)
            raise Interrupted("train: interrupted")
        return real(config, say)

    monkeypatch.setattr(runs, "train", interrupted)
    assert main(words) == 130
    assert trained == ["optimizer-adam", "optimizer-sgd"]
    assert sorted(p.name for p in results.iterdir()) == ["optimizer-adam.json", "study.json"]
    # a part-finished study's report says what is missing, and draws what there is
    assert main(["study-report", str(results), "--out", str(page)]) == 0
    text = page.read_text()
    assert "1 of 10 training runs are done. **Missing: optimizer-sgd, lr-adam-0.001" in text
    assert "**Not run: optimizer-sgd.**" in text
    assert (tmp_path / "study-curves.png").exists() and not (tmp_path / "study-lr.png").exists()

    # what was done is not done again, and the one that was interrupted goes on
    resumed: list[bool] = []

    def noted(config: TrainConfig, say: Callable[[str], object]) -> Any:
        resumed.append(config.resume)
        return real(config, say)

    monkeypatch.setattr(runs, "train", noted)
    assert main(words) == 0
    assert resumed == [True, False, False, False, False]
    uninterrupted = [*words[:2], str(tmp_path / "again"), *words[3:]]
    assert main([*uninterrupted[: uninterrupted.index("--only")], "--only", "optimizer-sgd"]) == 0
    one, other = (
        json.loads((folder / "optimizer-sgd.json").read_text())["epochs"]
        for folder in (results, tmp_path / "again" / "results")
    )
    for ours, theirs in zip(one, other, strict=True):
        assert ours["train_loss"] == theirs["train_loss"]
        assert ours["val_accuracy"] == theirs["val_accuracy"]
    found = runs.read_result(results / "optimizer-sgd.json")
    assert found.config["seed"] == 0 and found.environment["torch"]
    assert found.config["data"] == blobs.name  # and not this machine's path
    assert (found.train_pictures, found.test_pictures, found.resolution) == (24, 10, 16)

    assert main(["study-report", str(results), "--out", str(page)]) == 0
    text = page.read_text()
    assert "6 of 10 training runs are done. **Missing: transfer-from-scratch" in text
    assert f"| {100 * found.epochs[-1]['val_accuracy']:.2f}" in text
    assert "2 epochs of 24 pictures" in text and "1 epoch of 24 pictures" in text
    pictures = {p.name.partition("-")[2] for p in tmp_path.glob("study-*.png")}
    assert pictures == {f"{n}.png" for n in ("curves", "lr", "momentum", "networks", "phi")}

    # more epochs prolong the runs, fewer are refused; so is another seed
    resumed.clear()
    longer = [w if w != "2" else "3" for w in words]
    assert main([*longer[: longer.index("--only")], "--only", "optimizer-adam"]) == 0
    assert resumed == [True]
    assert len(runs.read_result(results / "optimizer-adam.json").epochs) == 3
    capsys.readouterr()
    assert main(words) == 2
    assert "study: epochs is 2, but 3 in" in capsys.readouterr().err
    assert main([*longer, "--seed", "1"]) == 2
    assert "study: seed is 1, but 0 in" in capsys.readouterr().err


def test_a_run_that_diverges_is_a_result(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(config: TrainConfig, say: Callable[[str], object]) -> Any:
        raise NonFiniteLoss("train: loss is nan", 3)

    monkeypatch.setattr(runs, "train", diverging)
    assert main([*words, "optimizer-sgd"]) == 0
    results = tmp_path / "runs" / "results"
    found = runs.read_result(results / "optimizer-sgd.json")
    assert found.diverged == "the loss is not finite at step 3" and found.accuracy is None
    assert main(["study-report", str(results), "--out", str(tmp_path / "study.md")]) == 0
    assert "the loss is not finite at step 3" in (tmp_path / "study.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--data", "none.npz"), "data: none.npz does not exist"),
        (("--epochs", "0"), "study: epochs is 0"),
        (("--fraction", "2"), "fraction is 2.0, a number in"),
        (("--models", "resnet81"), "study: models has 'resnet81'"),
        (("--only", "lrs"), "study: only has 'lrs'; optimizers, lr,"),
    ],
)
def test_bad_input(
    words: list[str],
    tmp_path: Path,
    change: tuple[str, str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*words, *change]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_dataset_leaves_nothing(
    words: list[str], blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(blobs.read_bytes()[:1000])
    assert main([*words, "--data", str(damaged)]) == 2
    assert "damaged.npz is no .npz of JPEGs" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["damaged.npz"]


def test_damaged_results(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, page = tmp_path / "runs" / "results", tmp_path / "study.md"
    report = ["study-report", str(results), "--out", str(page)]
    assert main(report) == 2
    assert "study.json does not exist, there is no study" in capsys.readouterr().err
    assert main([*words, "optimizer-adam"]) == 0
    (results / "optimizer-adam.json").write_text('{"job": 1')
    assert main(report) == 2
    assert "optimizer-adam.json is damaged or no result" in capsys.readouterr().err
    (results / "study.json").write_text('{"epochs": 1}')
    assert main(report) == 2
    assert "study.json is damaged" in capsys.readouterr().err
    assert not page.exists()


def test_the_search_trains_on_and_ranks(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # φ refuses pictures below 32 pixels
    variant = tiny_training.TINY
    larger = plans.replace(variant, data_config=variant.data_config.at(32))
    monkeypatch.setitem(tiny_training.registry._EFFICIENTNETS, "tiny", larger)
    asked: list[tuple[str, int, bool]] = []
    real = search.train

    def noted(config: TrainConfig, say: Callable[[str], object]) -> Any:
        asked.append((Path(config.out).name, config.epochs, config.resume))
        return real(config, say)

    monkeypatch.setattr(search, "train", noted)
    proxy = search.Proxy(
        base="tiny",
        out=tmp_path / "search",
        dataset="npz",
        data=str(blobs),
        fraction=1.0,
        optimizer="adam",
        lr=None,
        batch_size=8,
        workers=0,
        device="cpu",
        accelerate=True,
        seed=0,
    )
    lines: list[str] = []
    budgets = {"least_budget": 1, "reduction": 2, "rungs": 2}
    trials = search.run(proxy, [WIDE, DEEP], **budgets, say=lines.append)
    assert {trial.scaling for trial in trials} == {WIDE, DEEP}
    assert trials[0].budget == 2 and asked[:2] == [("1-1.4-1", 1, False), ("1-1.4-1", 2, True)]
    text = (tmp_path / "search" / search.PAGE).read_text()
    assert text.count("\n| 1 ") == 1 and text.count("\n| 2 ") == 1
    assert (tmp_path / "search" / search.PICTURE).exists()

    # a search that was lost, but not its runs: nothing is trained again
    asked.clear()
    (tmp_path / "search" / search.STUDY).unlink()
    assert search.run(proxy, [WIDE, DEEP], **budgets, say=lines.append) == trials
    assert not asked
    shutil.rmtree(tmp_path / "search")
    with pytest.raises(ValueError, match="fraction is 3.0"):
        search.run(plans.replace(proxy, fraction=3.0), [WIDE, DEEP], **budgets)
    assert not (tmp_path / "search").exists()
