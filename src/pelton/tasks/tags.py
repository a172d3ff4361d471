"""BIO tags: found, checked and, where asked for, repaired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pelton.errors import DataError
from pelton.tasks.labels import Labels
from pelton.tasks.tables import Table

OUTSIDE = "O"


def find_tags(table: Table, column: str) -> Labels:
    """Takes the tags from the source's own list where it has one, else from the rows; outside comes first.

    Of BIO tags both B- and I- exist for every type, also where the rows have one of them only.

    Raises:
        DataError: a cell is no list of tags, or there are fewer than two tags.
    """
    if column in table.class_names:
        return Labels(table.class_names[column], ids=True)
    seen: set[str] = set()
    for row, tags in enumerate(table.column(column)):
        if not isinstance(tags, list) or not all(isinstance(tag, str | int) for tag in tags):
            raise DataError(f"{table.where(row, column)}: expected a list of tags, but got {tags!r}.")
        seen.update(str(tag) for tag in tags)
    if Labels(tuple(seen), ids=False).bio:
        types = sorted({tag[2:] for tag in seen if tag != OUTSIDE})
        seen_in_order = [OUTSIDE, *(f"{mark}-{kind}" for kind in types for mark in "BI")]
    else:
        seen_in_order = sorted(seen, key=lambda tag: (tag != OUTSIDE, tag))
    if len(seen_in_order) < 2:
        raise DataError(f"{table.name}, column {column!r}: expected two or more tags, but got {seen_in_order}.")
    return Labels(tuple(seen_in_order), ids=False)


def check_tags(
    table: Table, column: str, words: Sequence[Sequence[str]], labels: Labels, repair: bool
) -> tuple[list[list[int]], tuple[str, ...]]:
    """Returns the ids of tags, and what was repaired.

    Raises:
        DataError: as many tags as words are expected; a tag is unseen; an entity starts with I- and `repair` is off.
    """
    found, repaired = [], 0
    for row, tags in enumerate(table.column(column)):
        if not isinstance(tags, list) or len(tags) != len(words[row]):
            count = len(tags) if isinstance(tags, list) else repr(tags)
            raise DataError(
                f"{table.where(row, column)}: expected {len(words[row])} tags, one a word, but got {count}."
            )
        ids = [_find(table, row, column, place, tag, labels) for place, tag in enumerate(tags)]
        if labels.bio:
            repaired += _check_starts(table, row, column, ids, labels, repair)
        found.append(ids)
    note = f"{table.name}: {repaired} entities that start with I- were read as if they started with B-"
    return found, ((note,) if repaired else ())


def _find(table: Table, row: int, column: str, place: int, tag: Any, labels: Labels) -> int:
    index = labels.find(tag)
    if index is None:
        raise DataError(f"{table.where(row, column)}, word {place + 1}: {labels.explain(tag)}")
    return index


def _check_starts(table: Table, row: int, column: str, ids: list[int], labels: Labels, repair: bool) -> int:
    """Turns I- at the start of an entity into B- in place, or refuses it; returns how many there were."""
    names, repaired, before = labels.names, 0, OUTSIDE
    for place, index in enumerate(ids):
        name = names[index]
        if name.startswith("I-") and before[2:] != name[2:]:
            expected = labels.find(f"B-{name[2:]}")
            if not repair or expected is None:
                where = f"{table.where(row, column)}, word {place + 1}"
                hint = "Convert the file to BIO (IOB2), or set task.bio=repair to read it as B-."
                raise DataError(f"{where}: the entity starts with {name}, but BIO tags start with B-{name[2:]}. {hint}")
            ids[place], repaired = expected, repaired + 1
        before = name
    return repaired
