"""Few examples a class or in all; validation rows held back from training: seeded, the same on every machine."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from random import Random

from pelton.errors import DataError


def few_shot(classes: Sequence[Hashable], shots: int, seed: int, names: Sequence[str] | None = None) -> list[int]:
    """Returns the rows of `shots` random examples of each class.

    Raises:
        DataError: a class has fewer examples; `names` says what classes are called, by their number.
    """
    taken: dict[Hashable, list[int]] = {}
    for row in _shuffled(len(classes), seed):
        taken.setdefault(classes[row], []).append(row)
    for key, rows in sorted(taken.items(), key=lambda item: str(item[0])):
        if len(rows) < shots:
            # names come with numbers
            name = f"stratum {key!r}" if names is None else f"class {names[key]!r}"  # type: ignore[call-overload]
            raise DataError(
                f"task.shots asks for {shots} training examples of each {name.split()[0]}, but {name} has {len(rows)}. "
                "Lower task.shots, or hold fewer rows back."
            )
    return sorted(row for rows in taken.values() for row in rows[:shots])


def stratified(classes: Sequence[Hashable], count: int, seed: int) -> list[int]:
    """Returns `count` random rows in the proportions of the classes.

    Systematic sampling: rows are shuffled, grouped by class, and taken at even distances.

    Raises:
        DataError: there are fewer rows.
    """
    if count > len(classes):
        raise DataError(f"Expected at least {count} rows to draw from, but got {len(classes)}. Ask for fewer.")
    rows = sorted(_shuffled(len(classes), seed), key=lambda row: str(classes[row]))
    places = {(2 * i + 1) * len(rows) // (2 * count) for i in range(count)}
    return sorted(rows[place] for place in places)


def hold_back(classes: Sequence[Hashable], count: int, seed: int) -> tuple[list[int], list[int]]:
    """Splits rows into those that stay and `count` that are held back, in the same proportions of classes."""
    held = set(stratified(classes, count, seed)) if count else set()
    return [row for row in range(len(classes)) if row not in held], sorted(held)


def spread(count: int, most: int) -> list[int]:
    """Returns at most so many of `count` rows, at equal distances: files are often sorted by class."""
    kept = min(count, most)
    return [row * count // kept for row in range(kept)]


def _shuffled(count: int, seed: int) -> list[int]:
    rows = list(range(count))
    Random(seed).shuffle(rows)
    return rows
