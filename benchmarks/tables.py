"""CSV files as lists of dataclasses; a bad cell is an error that names file, line and column."""

from __future__ import annotations

import csv
import dataclasses
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")


class CellError(ValueError):
    """Raised by a row's ``__post_init__``: what is wrong in which column."""

    def __init__(self, column: str, message: str) -> None:
        super().__init__(message)
        self.column = column


def read_rows(path: Path, row_type: type[Row]) -> list[Row]:
    """The rows of ``path``, whose columns are the fields of the dataclass ``row_type``.

    Fields are ``str``, ``int``, ``float`` or ``bool`` (0 or 1).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file, line and column of the first cell that is not accepted.
    """
    types = typing.get_type_hints(row_type)
    columns = [field.name for field in dataclasses.fields(row_type)]  # type: ignore[arg-type]
    rows = []
    with path.open(newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if header != columns:
            raise ValueError(f"{path}, line 1: columns are {header}, {columns} are accepted")
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if len(cells) != len(columns):
                raise ValueError(f"{where}: {len(cells)} columns, {len(columns)} are accepted")
            values = {}
            for column, cell in zip(columns, cells, strict=True):
                try:
                    values[column] = _PARSERS[types[column]](cell)
                except ValueError as error:
                    raise ValueError(f"{where}, column {column}: {error}") from None
            try:
                rows.append(row_type(**values))
            except CellError as error:
                raise ValueError(f"{where}, column {error.column}: {error}") from None
    return rows


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write dataclass instances so that :func:`read_rows` gives them back."""
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(rows[0]))
        for row in rows:
            values = dataclasses.astuple(row)
            writer.writerow(int(value) if isinstance(value, bool) else value for value in values)


def _number(kind: Callable[[str], Any], accepted: str) -> Callable[[str], Any]:
    def parse(cell: str) -> Any:
        try:
            return kind(cell)
        except ValueError:
            raise ValueError(f"{cell!r} is given, {accepted} is accepted") from None

    return parse


def _flag(cell: str) -> bool:
    if cell not in ("0", "1"):
        raise ValueError(f"{cell!r} is given, 0 or 1 is accepted")
    return cell == "1"


_PARSERS: dict[type, Callable[[str], Any]] = {
    str: str,
    int: _number(int, "an integer"),
    float: _number(float, "a number"),
    bool: _flag,
}
