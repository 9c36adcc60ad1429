"""The benchmarks' command line, files and checks; figures themselves are never asserted."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import shapes, targets
from benchmarks.__main__ import TARGETS, main
from benchmarks.providers import CONTROL
from benchmarks.records import Record, Results, load
from benchmarks.report import README_BEGIN, README_END, markdown, update_readme
from benchmarks.targets import check, read_targets


def test_peers_end_in_a_table_with_the_control(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    arguments = ["peers", "--models", "mobilenet_v2@32", "--batch", "1,2", "--rounds", "7"]
    arguments += ["--providers", "eager,accelerate,freeze", "--budget-s", "1"]
    assert main([*arguments, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "freeze" in printed and "control" in printed.splitlines()[-1]
    content = json.loads(file.read_text())
    assert content["header"]
    wanted = {field.name for field in fields(Record)}
    found = [Record(**record) for record in content["records"]]
    assert all(set(record) == wanted for record in content["records"])
    assert {(r.provider, r.batch) for r in found} >= {
        (name, batch) for name in ("eager", "accelerate", "freeze", CONTROL) for batch in (1, 2)
    }
    for record in found:
        assert record.ms_median is not None and record.ms_p20 is not None
        assert record.ms_p80 is not None and record.rel_err is not None
        assert record.ms_p20 <= record.ms_median <= record.ms_p80
        assert 0 < record.rel_err < 1e-2 and record.flops > 0 and record.bytes > 0
        assert record.images_per_s == pytest.approx(1e3 * record.batch / record.ms_median)
    assert main([*arguments, "--json", str(file)]) == 0  # continues: nothing is left to measure


def records(**milliseconds: float) -> list[Record]:
    return [
        Record(
            "peers",
            "efficientnet_b0",
            name.replace("_", " "),
            "cpu",
            "float32",
            1,
            1,
            *(value, value, value),
            1e3 / value,
            *(1, 1),
            0.1,
            1e-6,
            control_of="freeze" if name == "control" else "",
        )
        for name, value in milliseconds.items()
    ]


@pytest.mark.parametrize(
    ("milliseconds", "met"),
    [
        ({"eager": 30.0, "freeze": 10.0, "control": 10.2}, True),
        ({"eager": 24.0, "freeze": 10.0, "control": 10.2}, False),
        ({"eager": 30.0, "freeze": 10.0, "control": 11.0}, False),  # unfair
        ({"freeze": 10.0, "control": 10.0}, False),  # not measured
    ],
)
def test_check(milliseconds: dict[str, float], met: bool, tmp_path: Path) -> None:
    file = tmp_path / "targets.csv"
    file.write_text(
        "case,batch,threads,provider,baseline,baseline_threads,ratio\n"
        "efficientnet_b0,1,1,freeze,eager,1,2.5\n"
    )
    results = Results({})
    results.add(records(**milliseconds))
    table, all_met = check(results, read_targets(file))
    assert all_met is met
    assert ("MISSED" in table) is not met


def test_the_fastest_rival_counts(tmp_path: Path) -> None:
    file = tmp_path / "targets.csv"
    file.write_text(
        "case,batch,threads,provider,baseline,baseline_threads,ratio\n"
        "efficientnet_b0,1,1,freeze,fastest rival,1,1.7\n"
    )
    (target,) = read_targets(file)
    results = Results({})
    results.add(records(eager=30.0, OpenVINO=12.0, freeze=10.0, control=10.0, accelerate=1.0))
    assert target.measured(results) == (pytest.approx(1.2), "OpenVINO")


def test_committed_targets_and_shapes_are_read() -> None:
    assert len(read_targets(TARGETS / "cpu.csv")) > 30
    for network in shapes.NETWORKS:
        assert shapes.read_layers(network)


@pytest.mark.parametrize("network", ["efficientnet_b0", "mobilenet_v2", "resnet18"])
def test_shapes_are_those_of_the_networks(network: str) -> None:
    assert shapes.read_layers(network) == shapes.layers_of(network)


@pytest.mark.parametrize(
    ("old", "new", "column"),
    [(",3,", ",three,", "channels"), ("mbconv", "mbcone", "op")],
)
def test_a_bad_row_is_named(old: str, new: str, column: str, tmp_path: Path) -> None:
    lines = (shapes.DIRECTORY / "efficientnet_b0.csv").read_text().splitlines()
    bad = next(i for i, line in enumerate(lines) if i and old in line)
    lines[bad] = lines[bad].replace(old, new, 1)
    file = tmp_path / "bad.csv"
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"bad.csv.*{bad + 1}.*{column}"):
        shapes.read_layers(str(file))


@pytest.mark.parametrize(
    "arguments",
    [
        ["peers", "--models", "efficientnet_b99"],
        ["peers", "--models", "efficientnet_b0", "--providers", "TensorFlow"],
        ["peers", "--models", "efficientnet_b0", "--threads", "0"],
        ["nothing"],
    ],
)
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_report_goes_between_the_markers(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"before\n{README_BEGIN}\nold\n{README_END}\nafter\n")
    update_readme(file, "new figures")
    text = file.read_text()
    assert "new figures" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
    file.write_text("no markers")
    with pytest.raises(ValueError, match="README.md"):
        update_readme(file, "new figures")
    assert file.read_text() == "no markers"


def test_results_of_another_machine_are_not_continued(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    header: dict[str, Any] = {"cpu": "one"}
    Results(header, file).add(records(eager=1.0))
    assert len(Results(header, file).records) == 1
    with pytest.raises(ValueError, match="another cpu"):
        Results({"cpu": "two"}, file)
    file.write_text("{}")
    with pytest.raises(ValueError, match="no results file"):
        Results(header, file)


def test_the_readme_shows_the_faster_of_two_and_marks_what_is_unfair() -> None:
    header = {"cpu": {"name": "a", "cores": 1, "effkernels_isa": "b"}, "versions": {}}
    results = Results({**header, "commit": "c", "date": "d", "malloc": "e"})
    two = {"torch.compile": 30.0, "torch.compile freezing": 20.0}
    results.add(records(**two, OpenVINO=12.0, freeze=10.0, control=10.2))
    assert "`*`" not in markdown(results)
    unfair = records(**two, freeze=10.0, control=11.0)
    results.add(replace(record, batch=8) for record in unfair)
    rows = [line.strip("| ").split("|") for line in markdown(results).splitlines() if "²" in line]
    assert [[cell.strip() for cell in row[1:]] for row in rows] == [
        ["1", "1", "20.00", "12.00", "10.00", "1.20"],
        ["8", "1", "20.00", "-", "10.00", "2.00*"],
    ]
    assert "`*`" in markdown(results)


def test_results_from_before_there_were_limits_are_read() -> None:
    for file in (Path(targets.__file__).parent / "results").glob("*.json"):
        header, found, _ = load(file)
        assert header and found
        assert main(["report", str(file)]) == 0
