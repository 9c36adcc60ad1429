"""``effkernels scale``: its table, JSON and plot, and what it does not accept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from effkernels.models import ScaledNetwork
from effkernels.models import budget as budget_module

from effkernels import scale
from effkernels.cli import main

CIFAR = ["--base", "resnet18", "--stem", "cifar", "--num-classes", "10"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", *CIFAR, "--phi", "0", "1", "--batch", "2"]) == 0
    printed = capsys.readouterr().out
    head, _, zero, one = printed.splitlines()[1:5]
    for column in ("resolution", "depth", "width", "parameters", "MACs", "FLOPs", "activations"):
        assert column in head
    assert zero.split()[:6] == ["0", "32", "1.00", "(8)", "1.00", "(512)"]
    assert one.split()[:6] == ["1", "36", "1.20", "(12)", "1.10", "(560)"]
    assert "0.555 G" in zero and "1.111 G" in zero  # multiply-adds, FLOPs
    assert zero.endswith(" ms") and one.endswith(" ms")
    assert "FLOPs: 2 per MAC" in printed and "1 thread" in printed


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", *CIFAR, "--phi", "0", "--json", "--optimizer", "adam"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["networks"]
    network = ScaledNetwork(
        "resnet18", 0, optimizer="adam", options={"stem": "cifar", "num_classes": 10}
    )
    assert row.pop("latency_ms") > 0
    assert row == json.loads(json.dumps(network.to_dict()))
    assert row["flops"] == 2 * row["macs"]
    assert found["coefficients"] == {"alpha": 1.2, "beta": 1.1, "gamma": 1.15}


def test_budget(capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--flops", "3G", "--memory", "1GiB", "--params", "30M", "--latency", "10s"]
    assert main(["scale", *CIFAR, *limits, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["networks"]
    assert row["flops"] <= 3e9 and row["parameters"] <= 30e6 and row["latency_ms"] <= 1e4
    assert row["inference_memory"]["total"] <= 2**30
    assert [item["name"] for item in found["binding"]] == ["FLOPs"]
    assert main(["scale", *CIFAR, "--macs", "1.5G", "--no-measure"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[3].split()[0] == f"{row['phi']:g}"
    assert "The next larger network breaks FLOPs: " in printed and " ms" not in printed


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for measure in ([], ["--no-measure"]):
        file = tmp_path / f"costs{len(measure)}.png"
        assert main(["scale", *CIFAR, "--phi", "0", "1", "--plot", str(file), *measure]) == 0
        assert file.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"costs0.png", "costs1.png"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("4G", 4e9), ("1.5e9", 1.5e9), ("300 m", 3e8), ("2B", 2e9), (".5T", 5e11)],
)
def test_counts(text: str, value: float) -> None:
    assert scale._quantity("--flops", text, scale._COUNT) == value


@pytest.mark.parametrize(
    ("text", "value"), [("8GB", 8e9), ("8GiB", 2**33), ("512 mib", 2**29), ("1B", 1)]
)
def test_bytes(text: str, value: float) -> None:
    assert scale._quantity("--memory", text, scale._BYTES) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "resnet81"], "no model is called 'resnet81'; nearest are resnet18"),
        (["--base", "resnet18", "--flops=-4G"], "--flops: '-4G' is given, a positive number"),
        (["--base", "resnet18", "--flops", "0"], "--flops: '0' is given"),
        (["--base", "resnet18", "--flops", "nan"], "--flops: 'nan' is given"),
        (["--base", "resnet18", "--flops", "1e40"], "flops is 1e+40, at most 1e+15"),
        (["--base", "resnet18", "--memory", "8"], "--memory: '8' is given"),
        (["--base", "resnet18", "--memory", "8G"], "with one of b, kb, mb, gb"),
        (["--base", "resnet18", "--memory", "900TB"], "more than this machine's"),
        (["--base", "resnet18", "--latency", "20"], "--latency: '20' is given"),
        (["--base", "resnet18", "--latency", "2h"], "with one of us, ms, s is accepted"),
        (
            ["--base", "resnet18", "--params", "1M"],
            "parameters: 11.69 of at most 1 M (11.690 times",
        ),
        (["--base", "resnet18", "--phi", "0", "--flops", "4G"], "--phi and --flops are given"),
        (["--base", "resnet18", "--macs", "1G", "--flops", "4G"], "--flops and --macs are given"),
        (["--base", "resnet18", "--latency", "1s", "--no-measure"], "--latency and --no-measure"),
        (["--base", "resnet18", "--phi", "-15"], "images 28 pixels wide; 32 or more are accepted"),
        (["--base", "resnet18", "--phi", "nan"], "phi is nan"),
        (["--base", "resnet18", "--phi", "99"], "phi is 99.0, a number from -20 to 20"),
        (["--base", "resnet18", "--alpha", "0.5"], "alpha is 0.5, a number of at least 1"),
        (["--base", "resnet18", "--batch", "0"], "batch is 0"),
        (["--base", "resnet18", "--num-classes", "-2", "--no-measure"], "num_classes is -2"),
        (["--base", "resnet18", "--stem", "mnist"], "stem is 'mnist'"),
        (["--base", "efficientnet_b0", "--stem", "cifar"], "--stem: efficientnet_b0 has one stem"),
        (["--base", "resnet81", "--stem", "cifar"], "no model is called 'resnet81'"),
        (["--base", "resnet18", "--optimizer", "lion"], "optimizer is 'lion'"),
        (["--base", "resnet18", "--mode", "both"], "--mode: 'both' is given"),
        (["--base", "resnet18", "--plot", "costs.doc"], "a file ending in .png"),
        (["--base", "resnet18", "--plot", "nowhere/costs.png"], "--plot: 'nowhere' is no folder"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One clear error; nothing is run and nothing is written."""

    def never(*_: object) -> float:
        raise AssertionError("measured")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget_module, "measure_latency", never)
    if "--plot" not in arguments:
        arguments = [*arguments, "--plot", "costs.png"]
    assert main(["scale", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_more_than_the_machine_has(
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ScaledNetwork("resnet18", 0, options={"stem": "cifar", "num_classes": 10})
    needed = getattr(base, f"{mode}_memory").total
    monkeypatch.setattr(budget_module, "machine_memory", lambda: needed - 1)
    monkeypatch.chdir(tmp_path)
    arguments = ["scale", *CIFAR, "--phi", "0", "--mode", mode, "--plot", "costs.png"]
    assert main(arguments) == 2
    assert "resnet18 at 0 needs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*arguments, "--no-measure"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["costs.png"]


def test_a_plot_that_fails_leaves_nothing(tmp_path: Path) -> None:
    draw = scale._plotter(tmp_path / "costs.png")
    with pytest.raises(KeyError):
        draw("resnet18", [{"phi": 0}])
    assert list(tmp_path.iterdir()) == []
