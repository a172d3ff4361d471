"""Which rows are trained on and which are judged: drawn as the settings ask for it, and of classes enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pelton.errors import DataError
from pelton.tasks.base import Examples, Task
from pelton.tasks.sampling import few_shot, stratified
from pelton.tasks.settings import TaskSettings
from pelton.tasks.tables import Table


def fewer(settings: TaskSettings, task: Task[Any], given: Examples, seed: int, name: str) -> Examples:
    """Draws the validation rows that the settings ask for from a validation split."""
    if not settings.validation_examples:
        return given
    _require_rows("validation_examples", settings.validation_examples, len(given), name)
    return given.take(stratified(task.strata(given), settings.validation_examples, seed))


def require_classes(task: Task[Any], everything: Examples, drawn: Examples, name: str) -> None:
    """Refuses training examples that are all of one class: there would be nothing to tell apart."""
    given, chosen = task.classes(everything), task.classes(drawn)
    if given is None or chosen is None or len(chosen[1]) > 1:
        return
    column, classes = given
    if len(classes) < 2:
        raise DataError(
            f"{name}, column {column!r}: all {len(everything)} training rows have one class. Expected two or more: "
            "add rows of another class, or name another file or split with task.train."
        )
    asked = "task.validation_fraction or task.validation_examples"
    if task.settings.shots is not None or task.settings.examples is not None:
        asked = "task.shots" if task.settings.shots is not None else "task.examples"
    raise DataError(
        f"{name}, column {column!r}: the {len(drawn)} training rows that were drawn have one class of "
        f"{len(classes)}. Expected two or more: change {asked}."
    )


def judged_classes(task: Task[Any], splits: Mapping[str, Examples], tables: Mapping[str, Table]) -> dict[str, Examples]:
    """Returns the splits; one that is judged and has one class only says so in its notes."""
    noted = dict(splits)
    for split, examples in splits.items():
        found = None if split == "train" else task.classes(examples)
        if found is not None and len(found[1]) == 1:
            name = tables[split].name if split in tables else "The held-back validation"
            note = (
                f"{name}: all {len(examples)} {split} rows have one class (column {found[0]!r}), so scores on them do "
                f"not tell models apart. Add rows of another class, or name another split with task.{split}."
            )
            noted[split] = replace(examples, notes=(*examples.notes, note))
    return noted


def class_names(task: Task[Any], strata: Sequence[Any]) -> Sequence[str] | None:
    """Returns the names of the classes where each example is of one, and strata are their numbers."""
    numbers = all(type(one) is int for one in strata)  # a truth value says something else
    return task.labels.names if numbers and hasattr(task, "labels") else None


def draw(
    settings: TaskSettings, classes: Sequence[Any], seed: int, names: Sequence[str] | None, source: str
) -> Sequence[int]:
    """Draws the few training examples that the settings ask for from rows of the given classes; all if they do not."""
    if settings.shots is not None:
        try:
            return few_shot(classes, settings.shots, seed, names)
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
    if settings.examples is not None:
        _require_rows("examples", settings.examples, len(classes), source)
        return stratified(classes, settings.examples, seed)
    return range(len(classes))


def _require_rows(key: str, wanted: int, available: int, source: str) -> None:
    if wanted > available:
        raise DataError(
            f"{source}: task.{key} asks for {wanted} rows, but there are {available} to draw from. Lower it."
        )


def leaving_some(count: int, available: int, source: str) -> int:
    """Returns a number of rows to hold back that leaves some to train on."""
    if count >= available:
        raise DataError(
            f"{source}: task.validation_examples asks for {count} of {available} training rows: none would be left."
        )
    return count


def absent_classes(names: Sequence[str] | None, strata: Sequence[Any], source: str) -> list[str]:
    """Says which classes have no training row at all."""
    absent = [name for number, name in enumerate(names or ()) if number not in set(strata)]
    few = ", ".join(map(repr, absent[:5])) + (" …" if len(absent) > 5 else "")
    return [f"{source}: no row is of class {few}, so nothing is learned of it."] if absent else []


def held_back_for_test(settings: TaskSettings, tables: Mapping[str, Table]) -> list[str]:
    """Says that validation rows are taken from the training rows where the usual ones are the test rows."""
    if settings.test is None or settings.validation is not None or "validation" in tables or "test" not in tables:
        return []
    return [f"{tables['test'].name} is tested on, so validation rows are held back from training."]
