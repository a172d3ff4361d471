"""Which columns hold the texts and the label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pelton.errors import DataError
from pelton.tasks.tables import Table

# Names in use on the hub; pairs come first, since `sentence` is also half of `question, sentence`.
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
SINGLES = ("text", "sentence", "content", "sms", "utterance", "question", "query", "title")
LABELS = ("label", "labels", "intent", "class", "category", "target")


@dataclass(frozen=True)
class Columns:
    """The one or two text columns and the label column of a task."""

    texts: tuple[str, ...]
    label: str


def find_columns(table: Table, texts: tuple[str, ...] | None, label: str | None) -> Columns:
    """Takes the columns that were named, and finds those that were not.

    Raises:
        DataError: a named column does not exist, or none of the usual names does.
    """
    for name in texts or ():
        table.column(name)
    label = pick_column(table, label, LABELS, "task.label_column", "the label")
    return Columns(texts or find_texts(table, label), label)


def find_texts(table: Table, label: str | None) -> tuple[str, ...]:
    """Finds a known pair, a known single column, or the only column that holds text."""
    for names in (*PAIRS, *((name,) for name in SINGLES)):
        if label not in names and all(name in table.columns for name in names):
            return names
    strings = [n for n, values in table.columns.items() if n != label and values and isinstance(values[0], str)]
    if len(strings) == 1:
        return (strings[0],)
    raise DataError(f"{table.name}: which column is the text? Set task.text_columns to one or two of {_list(table)}.")


def pick_column(table: Table, named: str | None, usual: Sequence[str], key: str, what: str) -> str:
    """Takes the column that was named, else the first of the usual names that exists.

    Raises:
        DataError: the column does not exist; `key` is what to set, `what` what the column holds.
    """
    if named is not None:
        table.column(named)
        return named
    for name in usual:
        if name in table.columns:
            return name
    raise DataError(f"{table.name}: which column holds {what}? Set {key} to one of {_list(table)}.")


def _list(table: Table) -> str:
    return ", ".join(table.columns) or "none"
