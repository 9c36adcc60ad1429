"""What a plan compares before a call: by the library and by Python, every change is seen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from effkernels.modules import snapshot
from effkernels.modules.snapshot import Snapshot

COUNT = 100  # dicts; more than are asked for ahead


@pytest.fixture(params=["native", "python"], autouse=True)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who compares."""
    if request.param == "python":
        monkeypatch.setattr(snapshot, "_library", None)
    elif snapshot._library is None:
        pytest.skip("the CPU library is not there")
    return request.param


class Subjects:
    """Dicts and tensors as modules have them."""

    def __init__(self) -> None:
        self.tables = [{"a": object(), "b": None, "c": (i, i)} for i in range(COUNT)]
        self.sized: list[dict[Any, Any]] = [OrderedDict(x=1) if i % 2 else {} for i in range(COUNT)]
        self.tensors = [torch.randn(i + 1) for i in range(COUNT)]
        names = ("a", "b", "c", "forward")
        entries = [(table, name, table.get(name)) for table in self.tables for name in names]
        self.snapshot = Snapshot(entries, self.sized, self.tensors)


CHANGES: dict[str, Callable[[Subjects, int], Any]] = {
    "equal value": lambda s, i: s.tables[i].update(c=(i, i, i)[:2]),
    "value": lambda s, i: s.tables[i].update(a=object()),
    "None": lambda s, i: s.tables[i].update(a=None),
    "no longer None": lambda s, i: s.tables[i].update(b=0),
    "taken out": lambda s, i: s.tables[i].pop("a"),
    "added": lambda s, i: s.tables[i].update(forward=print),
    "longer": lambda s, i: s.sized[i].update(y=2),
    "other length": lambda s, i: s.sized[i].clear() if s.sized[i] else s.sized[i].update(x=1),
    "written": lambda s, i: s.tensors[i].add_(1),
    "moved": lambda s, i: setattr(s.tensors[i], "data", s.tensors[i].clone()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("at", [0, 1, 31, 32, 33, 67, 68, COUNT - 1])
def test_change_is_seen(change: Callable[[Subjects, int], Any], at: int) -> None:
    subjects = Subjects()
    assert subjects.snapshot.holds()
    change(subjects, at)
    assert not subjects.snapshot.holds()


def test_what_is_not_asked_for_may_change() -> None:
    subjects = Subjects()
    for table, tensor in zip(subjects.tables, subjects.tensors, strict=True):
        table["other"] = 1
        tensor.requires_grad_()
    for sized in subjects.sized:
        sized.update(dict.fromkeys(sized, 2))
    assert subjects.snapshot.holds()


def test_a_name_need_not_be_the_same_string() -> None:
    table = {"weight": 1}
    kept = Snapshot([(table, "".join(["wei", "ght"]), 1)], [], [])
    assert kept.holds()
    table["weight"] = 2
    assert not kept.holds()


def test_what_is_compared_is_kept_alive() -> None:
    table: dict[str, Any] = {"weight": nn.Parameter(torch.randn(3))}
    kept = Snapshot([(table, "weight", table["weight"])], [table], [table["weight"]])
    for _ in range(100):  # a new one gets the place of an old one
        del table["weight"]
        table["weight"] = nn.Parameter(torch.randn(3))
        assert not kept.holds()


def test_nothing_to_compare() -> None:
    assert Snapshot([], [], []).holds()
