"""Few examples a class, and validation rows held back from training: seeded, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random


def few_shot(labels: Sequence[int], shots: int, seed: int) -> list[int]:
    """Returns the rows of `shots` random examples of each class (all of a class that has fewer)."""
    taken: dict[int, int] = {}
    chosen = []
    for row in _shuffled(len(labels), seed):
        taken[labels[row]] = taken.get(labels[row], 0) + 1
        if taken[labels[row]] <= shots:
            chosen.append(row)
    return sorted(chosen)


def hold_back(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits rows into those that stay and a `fraction` that is held back, in the same proportions of classes.

    Systematic sampling: rows are shuffled, grouped by class, and taken at even distances.
    """
    rows = sorted(_shuffled(len(labels), seed), key=lambda row: labels[row])
    held = {row for place, row in enumerate(rows) if int((place + 1) * fraction) > int(place * fraction)}
    return [row for row in range(len(labels)) if row not in held], sorted(held)


def _shuffled(count: int, seed: int) -> list[int]:
    rows = list(range(count))
    Random(seed).shuffle(rows)
    return rows
