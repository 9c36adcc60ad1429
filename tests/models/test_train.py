"""Training runs from end to end: what they write, resuming, interruptions, errors."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from effkernels.models import create_model, train
from effkernels.models.training import (
    History,
    Interrupted,
    NonFiniteLoss,
    TrainConfig,
    checkpoint,
    data,
    loop,
)
from effkernels.models.training import train as run
from effkernels.models.training.run import CHECKPOINT, HISTORY, READ_EVERY
from torch import Tensor, nn

import effkernels as ek
from tests.models import tiny_training
from tests.models.tiny_training import CLASSES, tiny_config


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_training.register(monkeypatch)


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_training.write_blobs(tmp_path_factory.mktemp("data") / "pictures.npz")


def same(one: Any, other: Any) -> bool:
    """Equal bits, all the way down; wall-clock times apart."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            same(value, other[key]) for key, value in one.items() if "seconds" not in str(key)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def final(out: Path) -> dict[str, Any]:
    """What a finished run's checkpoint holds, without the arguments it was started with."""
    state = checkpoint.load(out / CHECKPOINT)
    del state["config"]
    return state


def losses(history: History) -> list[float]:
    return [record.loss for record in history.steps]


def test_a_run_learns_and_writes_its_files(blobs: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    lines: list[str] = []
    history = run(tiny_config(blobs, out, epochs=12, lr=0.1, ema_decay=0.5), lines.append)
    assert history.finished and len(history.epochs) == 12
    assert history.epochs[-1].train_loss < history.epochs[0].train_loss
    best = history.best()
    assert best is not None and best.accuracy >= 0.9  # classes are colours
    assert len([line for line in lines if line.startswith("epoch")]) == 12
    assert [record.step for record in history.steps] == list(range(1, 37))

    written = json.loads((out / "history.json").read_text())
    assert [record["val_accuracy"] for record in written["epochs"]] == [
        record.val_accuracy for record in history.epochs
    ]
    assert written["finished"] and written["config"]["num_classes"] == CLASSES
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob(".*"))  # no temporary file is left

    # the best epoch's averaged weights, as they are saved, are that accurate
    model = create_model("tiny", num_classes=CLASSES, weights=out / "best.pt").eval()
    config = tiny_config(blobs, out)
    source = data.open_source(config)
    transform = data.evaluation_transform(config, source, model.data_config)
    correct = 0
    with torch.no_grad():
        for image, label in source.val:
            correct += int(model(transform(image)[None]).argmax()) == label
    assert correct / len(source.val) == best.accuracy


EVERYTHING = {
    "optimizer": "rmsprop",
    "lr": 0.01,
    "mixup": 0.2,
    "ema_decay": 0.9,
    "warmup_epochs": 0.5,
    "augment": "randaugment",
    "weight_decay": 1e-4,
}


@pytest.mark.parametrize(
    "options",
    [
        {**EVERYTHING, "schedule": "cosine"},
        {"optimizer": "adamw", "dtype": "bfloat16", "accumulate": 2, "batch_size": 4, "mixup": 1.0},
        {"nesterov": True, "fraction": 0.7, "batch_size": 5, "accelerate": False},
    ],
    ids=["everything", "accumulate", "nesterov"],
)
def test_resuming_in_mid_epoch_gives_the_same_bits(
    blobs: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    config = tiny_config(blobs, tmp_path / "straight", epochs=4, **options)
    straight = run(config)
    config = replace(config, out=str(tmp_path / "parts"))
    per_epoch = straight.epochs[0].step
    for limit in (1, per_epoch, per_epoch + 1, None):
        torch.manual_seed(limit or 99)  # whatever has happened in the process meanwhile
        history = run(replace(config, limit_steps=limit, resume=limit != 1))
        assert history.finished == (limit is None)
    assert same(final(tmp_path / "parts"), final(tmp_path / "straight"))
    assert losses(history) == losses(straight)


def test_two_epochs_and_two_more_are_four(blobs: Path, tmp_path: Path) -> None:
    options = {**EVERYTHING, "schedule": "step", "decay_rate": 0.5, "decay_epochs": 1.5}
    straight = run(tiny_config(blobs, tmp_path / "straight", epochs=4, **options))
    config = tiny_config(blobs, tmp_path / "parts", epochs=2, **options)
    run(config)
    history = run(replace(config, epochs=4, resume=True))
    assert same(final(tmp_path / "parts"), final(tmp_path / "straight"))
    assert losses(history) == losses(straight) and len(history.epochs) == 4


def test_a_run_does_not_depend_on_who_loads_its_pictures(blobs: Path, tmp_path: Path) -> None:
    config = tiny_config(blobs, tmp_path / "0", epochs=1, augment="autoaugment")
    run(config)
    run(replace(config, out=str(tmp_path / "1"), workers=1))
    assert same(final(tmp_path / "0"), final(tmp_path / "1"))


def test_the_caller_keeps_its_random_numbers_and_handlers(blobs: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected, handler = torch.rand(1), signal.getsignal(signal.SIGTERM)
    torch.manual_seed(5)
    run(tiny_config(blobs, tmp_path / "run", limit_steps=1))
    assert torch.equal(torch.rand(1), expected)
    assert signal.getsignal(signal.SIGTERM) is handler


class _Signals:
    """A picture source that sends this process a signal when its n-th picture is asked for."""

    def __init__(self, source: Any, count: int, number: int) -> None:
        self.source, self.count, self.number = source, count, number

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        self.count -= 1
        if self.count == 0:
            os.kill(os.getpid(), self.number)
        return self.source[index]


@pytest.mark.parametrize(
    ("part", "count", "number", "step"),
    [
        ("train", 33, signal.SIGINT, 5),  # the first picture of step 5 is number 33
        ("train", 24, signal.SIGTERM, 3),  # the last one of an epoch
        ("val", 25, signal.SIGINT, 6),  # the second epoch's evaluation (10 pictures, 2 networks)
    ],
)
def test_a_signal_saves_and_the_run_goes_on_with_the_same_bits(
    blobs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: str,
    count: int,
    number: int,
    step: int,
) -> None:
    config = tiny_config(blobs, tmp_path / "parts", mixup=0.5, ema_decay=0.9)
    run(replace(config, out=str(tmp_path / "straight")))
    with monkeypatch.context() as patch:
        opened = data.open_source(config)
        signalling = _Signals(getattr(opened, part), count, number)
        patch.setattr(data, "open_source", lambda config: opened._replace(**{part: signalling}))
        with pytest.raises(Interrupted, match=f"after step {step}, .*checkpoint.pt is saved"):
            run(config)
    assert final(tmp_path / "parts")["step"] == step
    assert len(json.loads((tmp_path / "parts" / HISTORY).read_text())["steps"]) == step
    run(replace(config, resume=True))
    assert same(final(tmp_path / "parts"), final(tmp_path / "straight"))


def arguments(config: TrainConfig) -> list[str]:
    """``config`` as words for the command."""
    words = [config.model]
    for name, value in vars(config).items():
        if name == "model_options":
            words += [f"--model-option={key}={item}" for key, item in value.items()]
        elif isinstance(value, bool):
            words += [f"--{name.replace('_', '-')}"] if value else []
        elif name != "model" and value is not None:
            words += [f"--{name.replace('_', '-')}={value}"]
    return words


def test_ctrl_c_in_a_terminal(blobs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny_config(blobs, out, epochs=10**6, workers=1, schedule="constant", lr=0.01)
    process = subprocess.Popen(
        [sys.executable, tiny_training.__file__, *arguments(config)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(lambda: (out / HISTORY).exists() or process.poll() is not None)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.startswith("train: interrupted after step ") and errors.count("\n") == 1
    assert checkpoint.load(out / CHECKPOINT)["step"] >= 3


def wait_until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


@pytest.mark.parametrize("read_every", [1, 20])  # as on a CPU, and as on a GPU
def test_a_loss_that_is_not_finite_stops_the_run(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_every: int
) -> None:
    monkeypatch.setitem(READ_EVERY, "cpu", read_every)
    # step 4, the first of the second epoch, throws the weights away; step 5 notices
    monkeypatch.setattr(
        loop, "schedule", lambda config, steps: lambda step: 1e30 if step == steps else 1.0
    )
    with pytest.raises(NonFiniteLoss, match=r"loss is (nan|inf) at step 5 \(epoch 2\)") as caught:
        run(tiny_config(blobs, tmp_path / "run", epochs=3))
    assert caught.value.step == 5
    assert "checkpoint.pt is the last good checkpoint" in str(caught.value)
    state = final(tmp_path / "run")
    assert state["step"] == 3
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_last_step_that_throws_the_weights_away_is_not_saved(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(blobs, tmp_path / "run", schedule="constant")
    monkeypatch.setattr(loop, "schedule", lambda *_: lambda step: 1e30 if step == 5 else 1.0)
    with pytest.raises(NonFiniteLoss, match=r"of the evaluation is nan at step 6 \(epoch 2\)"):
        run(config)
    assert final(tmp_path / "run")["step"] == 3
    # by an interruption, before any evaluation
    monkeypatch.setattr(loop, "schedule", lambda *_: lambda step: math.inf)
    with pytest.raises(
        NonFiniteLoss, match=r"a value of .* is (nan|-?inf) at step 1 .*no checkpoint yet"
    ):
        run(replace(config, out=str(tmp_path / "other"), limit_steps=1))
    assert not (tmp_path / "other" / CHECKPOINT).exists()


def test_reading_losses_late_changes_nothing(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(blobs, tmp_path / "0", log_every=2, limit_steps=5)
    run(config)
    monkeypatch.setitem(READ_EVERY, "cpu", 20)
    run(replace(config, out=str(tmp_path / "1")))
    assert same(final(tmp_path / "0"), final(tmp_path / "1"))


def perturbed(name: str, **options: Any) -> nn.Module:
    """The network with weights that are another by as much as rounding changes them."""
    model = create_model(name, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + 2**-23 * torch.randn(parameter.shape, generator=generator)
    return model


def test_with_and_without_kernels_the_losses_agree(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(blobs, tmp_path / "kernels", epochs=3)
    ours = losses(run(config))
    plain = losses(run(replace(config, out=str(tmp_path / "plain"), accelerate=False)))
    # how far rounding alone takes plain PyTorch
    monkeypatch.setattr(loop, "create_model", perturbed)
    rounded = losses(run(replace(config, out=str(tmp_path / "rounded"), accelerate=False)))
    allowed = 10 * max(abs(a - b) for a, b in zip(plain, rounded, strict=True))
    assert 0 < allowed < 1e-2
    assert max(abs(a - b) for a, b in zip(plain, ours, strict=True)) <= allowed
    if ek.backends()["native"].available:
        assert ours != plain  # the switch switches


def test_accumulated_steps_are_steps_over_larger_batches(blobs: Path, tmp_path: Path) -> None:
    # without BatchNorm's batch statistics and dropout the two are the same sum
    options = {"freeze_bn": True, "model_options": {"drop_rate": 0.0, "drop_path_rate": 0.0}}
    config = tiny_config(blobs, tmp_path / "8", epochs=1, **options)
    whole = run(config)
    config = replace(config, out=str(tmp_path / "4"), batch_size=4, accumulate=2)
    assert losses(run(config)) == pytest.approx(losses(whole), rel=1e-5)


def test_frozen_batch_norms_keep_their_statistics(blobs: Path, tmp_path: Path) -> None:
    for name, freeze in (("frozen", True), ("usual", False)):
        run(tiny_config(blobs, tmp_path / name, epochs=1, freeze_bn=freeze))
        model = final(tmp_path / name)["model"]
        mean, variance = model["bn1.running_mean"], model["bn1.running_var"]
        unchanged = torch.equal(mean, torch.zeros(8)) and torch.equal(variance, torch.ones(8))
        assert unchanged == freeze
        assert not torch.equal(model["bn1.weight"], torch.ones(8))  # trains in any case


def test_averaged_weights_are_torchs_lerp(blobs: Path, tmp_path: Path) -> None:
    config = tiny_config(blobs, tmp_path / "run", ema_decay=0.3, limit_steps=1)
    run(config)
    before = final(tmp_path / "run")
    assert same(before["ema"]["module.conv_stem.weight"], before["model"]["conv_stem.weight"])
    run(replace(config, resume=True, limit_steps=2))
    after = final(tmp_path / "run")
    decay = (1 + 2) / (10 + 2)  # below 0.3: the warm-up's
    expected = torch.lerp(
        before["model"]["conv_stem.weight"], after["model"]["conv_stem.weight"], 1 - decay
    )
    torch.testing.assert_close(after["ema"]["module.conv_stem.weight"], expected)


def test_weights_of_another_head_start_a_run(blobs: Path, tmp_path: Path) -> None:
    ten = create_model("tiny", num_classes=10)
    torch.save(ten.state_dict(), tmp_path / "ten.pt")
    lines: list[str] = []
    config = tiny_config(blobs, tmp_path / "ten", weights=str(tmp_path / "ten.pt"), limit_steps=1)
    run(replace(config, lr=1e-30), lines.append)
    model = final(tmp_path / "ten")["model"]
    assert torch.equal(model["conv_stem.weight"], ten.conv_stem.weight)
    assert model["classifier.weight"].shape == (CLASSES, 32)
    assert lines[0].startswith("weights: the head is for other classes")

    # and a run's checkpoint starts another run, with its head
    lines.clear()
    weights = str(tmp_path / "ten" / "checkpoint.pt")
    config = replace(config, out=str(tmp_path / "again"), weights=weights, seed=1)
    run(replace(config, lr=1e-30), lines.append)
    again = final(tmp_path / "again")["model"]
    assert torch.equal(again["classifier.weight"], model["classifier.weight"])
    assert not any(line.startswith("weights") for line in lines)


def test_a_new_head_starts_small(blobs: Path, tmp_path: Path) -> None:
    torch.save(create_model("tiny", num_classes=10).state_dict(), tmp_path / "ten.pt")
    config = tiny_config(blobs, tmp_path / "run", weights=str(tmp_path / "ten.pt"), limit_steps=1)
    run(replace(config, lr=1e-30))
    weight = final(tmp_path / "run")["model"]["classifier.weight"]
    # EfficientNet's own head has ±1 / √CLASSES
    assert 0 < weight.abs().max() <= weight.shape[1] ** -0.5 < CLASSES**-0.5


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_only_a_head_of_another_size_is_replaced(blobs: Path, tmp_path: Path, change: str) -> None:
    state = create_model("tiny", num_classes=CLASSES).state_dict()
    if change == "missing":
        del state["classifier.bias"]
        message = "1 missing: classifier.bias"
    else:
        state["classifier.scale"] = torch.ones(1)
        message = "1 left over: classifier.scale"
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(RuntimeError, match=message):
        run(tiny_config(blobs, tmp_path / "run", weights=str(tmp_path / "odd.pt")))
    assert not (tmp_path / "run").exists()


def test_layer_decay_slows_the_early_layers(blobs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = create_model("tiny", num_classes=CLASSES)
    torch.save(start.state_dict(), tmp_path / "start.pt")
    weights, moved = str(tmp_path / "start.pt"), {}
    for decay in (1.0, 0.1):
        out = tmp_path / str(decay)
        config = tiny_config(blobs, out, weights=weights, limit_steps=1, weight_decay=0.0)
        run(replace(config, layer_decay=decay))
        model = final(out)["model"]
        moved[decay] = [
            (model[name] - start.state_dict()[name]).abs().mean().item()
            for name in ("classifier.weight", "conv_head.weight", "conv_stem.weight")
        ]
    # SGD's first step is proportional to the learning rate; stem, two stages, conv_head, head
    ratios = [slow / usual for slow, usual in zip(moved[0.1], moved[1.0], strict=True)]
    assert ratios == pytest.approx([1.0, 0.1, 1e-4], rel=0.05)


def test_weights_that_fit_nowhere_are_an_error(blobs: Path, tmp_path: Path) -> None:
    state = create_model("tiny", num_classes=CLASSES).state_dict()
    del state["conv_stem.weight"]
    torch.save(state, tmp_path / "part.pt")
    config = tiny_config(blobs, tmp_path / "run", weights=str(tmp_path / "part.pt"))
    with pytest.raises(RuntimeError, match=r"1 missing: conv_stem.weight"):
        run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "tinny"}, ValueError, "no model is called 'tinny'; nearest are tiny"),
        ({"model_options": {"stem": "cifar"}}, TypeError, "stem"),
        ({"num_classes": 3}, ValueError, "num_classes is 3, npz has 4 classes"),
        ({"batch_size": 25}, ValueError, "batch_size is 25, so a step has 25 pictures .* 24 to"),
        ({"device": "gpu"}, ValueError, "device is 'gpu', one of auto, cpu, cuda and cuda:N"),
        ({"device": "cuda:77"}, ValueError, r"device is 'cuda:77' \(GPU 77\), PyTorch sees"),
        ({"weights": "none.pt"}, FileNotFoundError, "none.pt does not exist"),
        ({"resume": True}, FileNotFoundError, "checkpoint.pt does not exist"),
        ({"download": True}, ValueError, "download is not accepted with npz"),
    ],
)
def test_bad_arguments_leave_no_file(
    blobs: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(tiny_config(blobs, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_run_is_neither_overwritten_nor_resumed_as_another(blobs: Path, tmp_path: Path) -> None:
    config = tiny_config(blobs, tmp_path / "run", limit_steps=4)
    run(config)
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    for options, message in (
        ({}, "where a run is already"),
        ({"resume": True, "lr": 0.2}, "lr was 0.05, is 0.2"),
        ({"resume": True, "batch_size": 4}, "batch_size was 8, is 4; steps per epoch was 3, is 6"),
        ({"resume": True, "epochs": 5}, "epochs was 2, is 5"),  # cosine
        ({"resume": True, "limit_steps": 3}, "limit_steps is 3, but 4 are done"),
    ):
        with pytest.raises(ValueError, match=message):
            run(replace(config, **options))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which is a file"):
        run(replace(config, out=str(tmp_path / "file")))
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before
    (tmp_path / "run" / CHECKPOINT).write_bytes(before[:1000])
    with pytest.raises(ValueError, match="checkpoint.pt is damaged or no checkpoint"):
        run(replace(config, resume=True))


def test_files_are_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.write_atomically(path, lambda file: file.write(b"first"))

    def fail(file: Any) -> None:
        file.write(b"sec")
        file.flush()
        assert path.read_bytes() == b"first"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, fail)
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]
    checkpoint.write_atomically(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"second" and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, float, int]]]:
    """What is logged to a TensorBoard that need not be installed."""
    scalars: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            scalars.append((Path(folder).name, 0.0, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.append((name, value, step))

        def close(self) -> None:
            scalars.append(("closed", 0.0, 0))

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: object() if name == "tensorboard" else find(name, *rest),
    )
    yield scalars


def test_tensorboard_gets_the_history(
    blobs: Path, tmp_path: Path, board: list[tuple[str, float, int]]
) -> None:
    config = tiny_config(blobs, tmp_path / "run", limit_steps=4)
    run(config)
    history = run(replace(config, limit_steps=None, resume=True))
    assert [entry for entry in board if entry[0] == "tensorboard"] == [
        ("tensorboard", 0.0, 1),
        ("tensorboard", 0.0, 5),
    ]
    assert [value for name, value, _ in board if name == "step/loss"] == losses(history)
    assert [value for name, value, _ in board if name == "epoch/val_accuracy"] == [
        record.val_accuracy for record in history.epochs
    ]
    assert board[-1][0] == "closed"


def test_the_command(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    config = tiny_config(blobs, out, epochs=1, model_options={"drop_rate": 0.5})
    assert train.main(arguments(config)) == 0
    assert "epoch 1/1  train loss" in capsys.readouterr().out
    written = json.loads((out / "history.json").read_text())["config"]
    assert written == vars(config) | {"num_classes": CLASSES}

    assert train.main([*arguments(config)]) == 2
    assert "error: train: out is" in capsys.readouterr().err
    assert train.main([*arguments(config), "--resume", "--lr=1"]) == 2
    assert "lr was 0.05, is 1.0" in capsys.readouterr().err
    assert train.main(arguments(replace(config, out=str(tmp_path / "no"), lr=1e30))) == 1
    assert "at step 2 (epoch 1); no checkpoint yet" in capsys.readouterr().err
    monkeypatch.setattr(train, "train", lambda config, say: os.kill(os.getpid(), signal.SIGINT))
    # Python raises it unless its parent ignores SIGINT, as a shell's background jobs do.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):  # before the run has started nothing is saved
            train.main(arguments(config))
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(SystemExit, match="2"):
        train.main([*arguments(config), "--model-option=stem"])
    assert "NAME=VALUE is accepted" in capsys.readouterr().err


def test_options_and_config_are_the_same_list() -> None:
    """Every field can be given on the command line, with the same default."""
    parsed = vars(train._parser().parse_args(["resnet18", "--dataset=npz", "--data=d", "--out=o"]))
    assert parsed == vars(TrainConfig(model="resnet18", dataset="npz", data="d", out="o"))
    assert math.isclose(parsed["decay_rate"], 0.97)
