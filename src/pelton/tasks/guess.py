"""What kind of task a table looks like, where nobody says it: by the names of its columns, and the numbers in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pelton.tasks.checked import IMAGES
from pelton.tasks.columns import LABELS
from pelton.tasks.conversations import MESSAGES, TEXT
from pelton.tasks.conversations import PAIRS as PROMPTS
from pelton.tasks.opening import extension
from pelton.tasks.seq2seq import PAIRS as SOURCES
from pelton.tasks.tables import Table

ANSWERED = ("question", "answer")
"""Beside a label these two are classified; without one the answer is learned."""
SCORES = ("score", "rating", "similarity")
"""Columns that hold the label of a regression, but only by name: a recipe says so."""


def guess(table: Table, label: str | None = None) -> dict[str, str]:
    """Returns the settings of a task that a table looks like; text classification where nothing else shows.

    Args:
        table: Training rows.
        label: The column of the label, where it is known.
    """
    columns = set(table.columns)
    if {"context", "question", "answers"} <= columns:
        return {"kind": "question-answering"}
    if {"tokens", "words"} & columns and {"ner_tags", "tags", "labels", "pos_tags"} & columns:
        return {"kind": "token-classification"}
    if set(IMAGES[:2]) & columns:
        return {"kind": "semantic-segmentation" if "mask" in columns else "image-classification"}
    written = _written(table, columns) if label is None else None
    return {"kind": written} if written is not None else _judged(table, label)


def _written(table: Table, columns: set[str]) -> str | None:
    """Returns the kind of task whose targets are texts; None where the columns are not those of one."""
    labels = set(LABELS) & columns
    prompts = [pair for pair in PROMPTS if columns.issuperset(pair) and not (pair == ANSWERED and labels)]
    if MESSAGES in columns or prompts:
        return "causal-lm"
    if any(columns.issuperset(pair) and pair != ANSWERED and not labels - {*pair} for pair in SOURCES):
        return "seq2seq"
    if columns == {TEXT}:
        return "text-lm" if extension(Path(table.name)) in (".txt", ".txt.gz") else "causal-lm"
    return None


def _judged(table: Table, label: str | None) -> dict[str, str]:
    """Tells classes from numbers."""
    known = [label] if label is not None else [*LABELS, *SCORES]
    column = next((name for name in known if name in table.columns), None)
    if column is None or not _are_numbers(table.columns[column]):
        return {"kind": "text-classification"}
    return {"kind": "text-regression"} | ({} if column in LABELS else {"label_column": column})


def _are_numbers(cells: Sequence[Any]) -> bool:
    """Tells whether most cells are numbers, and not all of these whole; those of a CSV file are texts."""
    numbers = [number for cell in cells if (number := _number(cell)) is not None]
    return 2 * len(numbers) > len(cells) and not all(number.is_integer() for number in numbers)


def _number(cell: Any) -> float | None:
    try:
        number = float(cell) if isinstance(cell, int | float | str) and not isinstance(cell, bool) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
