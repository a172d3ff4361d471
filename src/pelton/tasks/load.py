"""A task's settings become the task and its splits: read, checked, held back, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from pelton.errors import DataError
from pelton.tasks.base import Examples, Task
from pelton.tasks.classification import ClassificationSettings, TextClassification
from pelton.tasks.glue import GlueSettings
from pelton.tasks.regression import RegressionSettings, TextRegression
from pelton.tasks.sampling import few_shot, hold_back, stratified
from pelton.tasks.settings import TaskSettings
from pelton.tasks.splits import load_splits
from pelton.tasks.tokens import TokenClassification, TokenSettings

KINDS: dict[type[TaskSettings], type[Task[Any]]] = {
    ClassificationSettings: TextClassification,
    RegressionSettings: TextRegression,
    TokenSettings: TokenClassification,
}
"""The task that each kind of settings describes. GLUE's settings turn into one of these."""

AnySettings = Annotated[
    ClassificationSettings | RegressionSettings | TokenSettings | GlueSettings, Field(discriminator="kind")
]
"""What a recipe may hold under `task`, told apart by `kind`."""

_SETTINGS: tuple[type[TaskSettings], ...] = (*KINDS, GlueSettings)
TASK_KINDS = {str(settings.model_fields["kind"].default): settings for settings in _SETTINGS}
"""Settings by what a recipe calls them."""


@dataclass(frozen=True)
class Loaded:
    """A task with its examples.

    Attributes:
        task: What is known of it beside the rows.
        splits: Examples of `train`, and of `validation`, `test` and `test_mismatched` where there are such.
        rows: For training and held-back validation, the 0-based rows of the training data they were drawn from.
    """

    task: Task[Any]
    splits: dict[str, Examples]
    rows: Mapping[str, Sequence[int]]

    @property
    def notes(self) -> list[str]:
        """What was changed or left out, in sentences."""
        return list(dict.fromkeys(note for examples in self.splits.values() for note in examples.notes))

    def describe(self) -> dict[str, Any]:
        """Returns the sizes, the rows that were drawn and the notes, as JSON."""
        sizes = {split: len(examples) for split, examples in self.splits.items()}
        return {
            "examples": sizes,
            "rows": {split: list(rows) for split, rows in self.rows.items()},
            "notes": self.notes,
        }


def load_task(settings: TaskSettings, seed: int) -> Loaded:
    """Reads and checks all splits; holds validation rows back, then draws the few examples from what stays.

    Args:
        settings: What the recipe says.
        seed: Chooses the held-back rows and the examples.

    Raises:
        DataError: what is wrong with the data, by file, row and column; or fewer rows than were asked for.
    """
    settings = plain(settings)
    tables = load_splits(settings)
    task = KINDS[type(settings)].plan(settings, tables["train"])
    task.require_metrics()
    splits = {split: task.check(table) for split, table in tables.items()}
    everything, rows = splits["train"], list(range(len(splits["train"])))
    drawn: dict[str, Sequence[int]] = {}
    strata = task.strata(everything)
    if "validation" not in splits:
        wanted = settings.validation_examples
        count = int(len(everything) * settings.validation_fraction) if wanted is None else wanted
        rows, held = hold_back(strata, _leaving_some(count, len(everything)), seed)
        if held:
            drawn["validation"] = held
            splits["validation"] = everything.take(held)
    elif settings.validation_examples:
        given = splits["validation"]
        splits["validation"] = given.take(stratified(task.strata(given), settings.validation_examples, seed))
    chosen = _draw(settings, [strata[row] for row in rows], seed, getattr(task, "labels", None))
    drawn["train"] = [rows[place] for place in chosen]
    splits["train"] = everything.take(drawn["train"])
    return Loaded(task, splits, drawn)


def restore_task(settings: TaskSettings, stored: Mapping[str, Any]) -> Task[Any]:
    """Rebuilds a run's task from its resolved settings and its classes, without reading data."""
    settings = plain(settings)
    return KINDS[type(settings)].restore(settings, stored)


def plain(settings: TaskSettings) -> TaskSettings:
    """Returns the kind of task that a named benchmark's settings stand for; others as they are."""
    return settings.plain() if isinstance(settings, GlueSettings) else settings


def _draw(settings: TaskSettings, classes: Sequence[Any], seed: int, labels: Any) -> Sequence[int]:
    if settings.shots is not None:
        return few_shot(classes, settings.shots, seed, None if labels is None else labels.names)
    if settings.examples is not None:
        return stratified(classes, settings.examples, seed)
    return range(len(classes))


def _leaving_some(count: int, available: int) -> int:
    if count >= available:
        raise DataError(f"task.validation_examples asks for {count} of {available} training rows: none would be left.")
    return count
