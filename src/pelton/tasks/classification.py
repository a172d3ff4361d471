"""Text and text-pair classification: examples that were checked before any training starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from pelton.errors import DataError
from pelton.tasks.columns import Columns, find_columns
from pelton.tasks.labels import Labels, find_labels
from pelton.tasks.sampling import few_shot, hold_back
from pelton.tasks.settings import TaskSettings
from pelton.tasks.splits import load_splits
from pelton.tasks.tables import Table, read_table


@dataclass(frozen=True)
class Examples:
    """Checked rows: one or two texts each, and the ids of their classes."""

    texts: list[tuple[str, ...]]
    labels: list[int]

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Examples:
        """Returns some of the examples."""
        return Examples([self.texts[row] for row in rows], [self.labels[row] for row in rows])


@dataclass(frozen=True)
class TextClassification:
    """A task without its rows: enough to read, check and encode more of them."""

    columns: Columns
    labels: Labels
    max_length: int

    def read(self, path: Path) -> Examples:
        """Reads labelled examples from a file with the task's columns and classes."""
        return self.check(read_table(path))

    def read_texts(self, path: Path) -> list[tuple[str, ...]]:
        """Reads texts alone, for prediction."""
        return check_texts(read_table(path), self.columns.texts)

    def check(self, table: Table) -> Examples:
        """Turns a table into examples.

        Raises:
            DataError: a column is missing, a text is empty, a label is unseen, or there are no rows.
        """
        return Examples(check_texts(table, self.columns.texts), self.labels.encode(table, self.columns.label))

    def encode(self, texts: Sequence[tuple[str, ...]], tokenizer: Any, labels: Sequence[int] | None = None) -> Any:
        """Tokenises texts into a `datasets.Dataset`; padding is left to the collator."""
        fields = [list(field) for field in zip(*texts, strict=True)]
        encoded = dict(tokenizer(*fields, truncation=True, max_length=self.max_length))
        if labels is not None:
            encoded["labels"] = list(labels)
        return datasets.Dataset.from_dict(encoded)


def load_task(settings: TaskSettings, seed: int) -> tuple[TextClassification, dict[str, Examples]]:
    """Reads and checks all splits; holds validation rows back, then draws the few shots from what stays.

    Args:
        settings: What the recipe says.
        seed: Chooses the held-back rows and the shots.

    Returns:
        The task, and the examples of `train`, of `validation` where there is one, and of `test` where there is one.
    """
    tables = load_splits(settings)
    columns = find_columns(tables["train"], settings.text_columns, settings.label_column)
    task = TextClassification(columns, find_labels(tables["train"], columns.label), settings.max_length)
    splits = {split: task.check(table) for split, table in tables.items()}
    if "validation" not in splits:
        kept, held = hold_back(splits["train"].labels, settings.validation_fraction, seed)
        if held:
            splits["validation"] = splits["train"].take(held)
            splits["train"] = splits["train"].take(kept)
    if settings.shots is not None:
        splits["train"] = splits["train"].take(few_shot(splits["train"].labels, settings.shots, seed))
    return task, splits


def check_texts(table: Table, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the texts of a table; one that is empty or no text is an error that names its cell."""
    if not len(table):
        raise DataError(f"{table.name} is empty: expected at least one row.")
    for column in columns:
        for row, text in enumerate(table.column(column)):
            if not isinstance(text, str):
                what = "nothing" if text is None else f"{type(text).__name__} {text!r}"
                raise DataError(f"{table.where(row, column)}: expected a text, but got {what}.")
            if not text.strip():
                raise DataError(f"{table.where(row, column)}: the text is empty. Remove the row or fill it in.")
    return list(zip(*(table.columns[column] for column in columns), strict=True))
