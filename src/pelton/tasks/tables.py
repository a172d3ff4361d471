"""The rows of one split, each with the line it came from, so that an error can name it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pelton.errors import DataError, nearest

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Columns of one split.

    Attributes:
        name: What errors call it: a path, or a hub name with its split.
        columns: Values by column, all of one length.
        lines: The 1-based line of every row; None where rows have no lines (Parquet, the hub).
        class_names: The classes' names by column, where the source states them.
        before: Rows of the source that come before the first.
    """

    name: str
    columns: dict[str, list[Any]]
    lines: Sequence[int] | None = None
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    before: int = 0

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(next(iter(self.columns.values()), []))

    def where(self, row: int, column: str) -> str:
        """Names a cell: the file, the 1-based line (or row) and the column."""
        place = f"row {self.before + row + 1}" if self.lines is None else f"line {self.lines[row]}"
        return f"{self.name}, {place}, column {column!r}"

    def column(self, name: str) -> list[Any]:
        """Returns a column's values; a missing one is an error that lists what exists."""
        if name not in self.columns:
            guess = nearest(name, self.columns)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise DataError(f"{self.name} has no column {name!r}.{hint} Columns: {', '.join(self.columns) or 'none'}.")
        return self.columns[name]


def from_dataset(name: str, rows: Any) -> Table:
    """Turns a `datasets.Dataset`, or an iterable one, into a table with the names of its classes."""
    columns = rows.to_dict() if hasattr(rows, "to_dict") else next(rows.iter(sys.maxsize), {})
    return Table(name, columns, class_names=class_names(rows.features or {}))


def class_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Returns the names of each column of classes, or of lists of classes, by the features of `datasets`."""
    found = {}
    for column, kind in features.items():
        while hasattr(kind, "feature"):
            kind = kind.feature  # of a list
        if type(kind).__name__ == "ClassLabel":
            found[column] = tuple(kind.names)
    return found


def collect(path: Path, rows: Iterator[tuple[int, Row]]) -> Table:
    """Gathers rows into columns; a value that a row lacks is None."""
    columns: dict[str, list[Any]] = {}
    lines: list[int] = []
    for number, row in rows:
        for key, value in row.items():
            if isinstance(value, str) and not value.isascii():
                require_utf8(value, f"{path}, line {number}, column {key!r}")
            if key not in columns:
                require_utf8(key, f"{path}, line {number}, the column's name {key!r}")
                columns[key] = [None] * len(lines)
            columns[key].append(value)
        lines.append(number)
        for values in columns.values():
            if len(values) < len(lines):
                values.append(None)
    return Table(str(path), columns, lines)


def require_utf8(text: str, where: str) -> None:
    """Refuses text that was no UTF-8, whose bytes became lone surrogates; `where` is what the error calls it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: broken UTF-8 at character {error.start + 1}. Save the file as UTF-8.") from error
