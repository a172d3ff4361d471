"""Names of classes and their ids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from pelton.errors import DataError, nearest
from pelton.tasks.tables import Table


@dataclass(frozen=True)
class Labels:
    """The classes of a task, in the order of their ids.

    Attributes:
        names: One name a class.
        ids: True when numbers in the data are ids, in whatever form a file has them; False when a number is itself a
            name (a rating of 1 to 5).
        given: Whether the recipe named them; only errors tell.
    """

    names: tuple[str, ...]
    ids: bool
    given: bool = field(default=False, compare=False)

    @classmethod
    def restored(cls, stored: Mapping[str, Any]) -> Self:
        """Takes what `stored` gave; further keys are left alone."""
        return cls(tuple(stored["names"]), stored["ids"])

    def stored(self) -> dict[str, Any]:
        """Returns the classes as JSON."""
        return {"names": self.names, "ids": self.ids}

    def __len__(self) -> int:
        """Returns the number of classes."""
        return len(self.names)

    @property
    def bio(self) -> bool:
        """Whether the classes are tags of entities: O, B-TYPE and I-TYPE."""
        marked = [name for name in self.names if name != "O"]
        return bool(marked) and all(name[:2] in ("B-", "I-") and len(name) > 2 for name in marked)

    def model_options(self) -> dict[str, Any]:
        """Returns what a model's config says about its classes."""
        names = dict(enumerate(self.names))
        return {"num_labels": len(self), "id2label": names, "label2id": {name: i for i, name in names.items()}}

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def find(self, value: Any) -> int | None:
        """Returns the id of a value from the data, or None when it is not one of the classes."""
        key = _key(value)
        if key is None:
            return None
        if self.ids and _is_id(key, len(self)):
            return int(key)
        if self.ids and key.isdecimal() and self._misplaced:
            return None  # of the classes 1 and 2, 1 is the second's id and 2 its name
        return self._index.get(key)

    @cached_property
    def _misplaced(self) -> bool:
        return _are_misplaced(self.names)

    def encode(self, table: Table, column: str) -> list[int]:
        """Turns a column into ids; an unseen value is an error that names its cell and the nearest class."""
        found = []
        for row, value in enumerate(table.column(column)):
            index = self.find(value)
            if index is None:
                raise DataError(f"{table.where(row, column)}: {self.explain(value)}")
            found.append(index)
        return found

    def explain(self, value: Any) -> str:
        """Says why a value is none of the classes, and which it may have meant."""
        if value is None or value == "":
            return "the label is missing."
        if value == -1:
            return "label -1 marks hidden labels. Name a split with labels, such as task.test=validation."
        guess = nearest(value, self.names)
        hint = f" Did you mean {guess!r}?" if guess else ""
        known = ", ".join(self.names[:10]) + (f", … ({len(self)} in all)" if len(self) > 10 else "")
        return (
            f"unseen label {value!r}.{hint} Classes of {'task.labels' if self.given else 'the training data'}: {known}."
        )


def find_labels(table: Table, column: str, given: Sequence[str] | None = None, partial: bool = False) -> Labels:
    """Takes the classes that are given, else the source's own list, else the distinct values of `column`.

    Args:
        table: The training rows.
        column: Their labels.
        given: The classes, where the recipe says them; if one is a number, numbers in the data are names, not ids.
        partial: Whether the table has only the first rows, in which some classes may not occur.

    Raises:
        DataError: a label is missing, is neither a name nor a whole number, there are fewer than two classes, or they
            cannot be known; or numbers may be both ids and names.
    """
    if given is not None:
        if len(set(given)) != len(given) or len(given) < 2:
            raise DataError(f"task.labels: expected two or more different classes, but got {list(given)}.")
        return Labels(tuple(given), ids=not any(math.isfinite(_order(name)[0]) for name in given), given=True)
    if partial and column not in table.class_names:
        raise DataError(
            f"{table.name}, column {column!r}: the classes must be known before rows are streamed. Set "
            "task.labels=[name, …], or write label_names.json beside the training file."
        )
    if column in table.class_names:
        return Labels(table.class_names[column], ids=_has_ids(table, column))
    keys = set()
    for row, value in enumerate(table.column(column)):
        key = _key(value)
        if key is None:
            raise DataError(f"{table.where(row, column)}: a label is a name or a whole number, but got {value!r}.")
        keys.add(key)
    if len(keys) < 2:
        raise DataError(f"{table.name}, column {column!r}: expected two or more classes, but got {sorted(keys)}.")
    return Labels(tuple(sorted(keys, key=_order)), ids=False)


def _has_ids(table: Table, column: str) -> bool:
    """Says whether numbers in a column are ids; where the source's own names are other numbers, the rows decide."""
    names = table.class_names[column]
    if not _are_misplaced(names):
        return True
    keys = {key for key in map(_key, table.column(column)) if key is not None}
    named, ids = keys <= set(names), all(_is_id(key, len(names)) for key in keys)
    if named and ids:
        raise DataError(
            f"{table.name}, column {column!r}: the numbers {', '.join(sorted(keys, key=_order))} may be ids or names, "
            f"as the classes are named {', '.join(names[:10])}. Name the classes in words, or set task.labels to their "
            "names, which says (of texts) that the numbers are no ids."
        )
    return not named


def _are_misplaced(names: Sequence[str]) -> bool:
    """Says whether a class is named by a number that is the id of another."""
    values = [_order(name)[0] for name in names]
    return any(v.is_integer() and 0 <= v < len(names) and v != place for place, v in enumerate(values))


def _is_id(key: str, count: int) -> bool:
    return key.isdecimal() and int(key) < count


def _key(value: Any) -> str | None:
    """Returns a label's name: "1" for 1 and 1.0 and " 1 ", None for what cannot be a label."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool | int | str):
        return str(value).strip() or None
    return None


def _order(key: str) -> tuple[float, str]:
    """Sorts numbers by value, and before words."""
    try:
        return (float(key), key)
    except ValueError:
        return (float("inf"), key)
