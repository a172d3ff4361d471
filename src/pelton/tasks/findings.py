"""What a check of data found, as plain values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Lengths:
    """How long examples are.

    Attributes:
        unit: `tokens` of a tokenizer, special ones included, or `words` between spaces.
        smallest: The shortest.
        median: Half are shorter.
        p95: 95 % are not longer.
        largest: The longest.
        max_length: Where the task cuts, in tokens; a context that holds an answer is cut into windows there.
        cut: Share of the examples that is longer than that; of words, which are fewer than tokens, the least it can be.
    """

    unit: str
    smallest: int
    median: float
    p95: float
    largest: int
    max_length: int | None
    cut: float | None


@dataclass(frozen=True)
class Balance:
    """How often each class occurs; of tags, by words."""

    counts: dict[str, int]
    rarest: tuple[str, float]
    commonest: tuple[str, float]


@dataclass(frozen=True)
class Range:
    """The numbers of a regression."""

    smallest: float
    mean: float
    largest: float
    deviation: float


@dataclass(frozen=True)
class Conflict:
    """One text with different targets, and where its rows are."""

    text: str
    targets: tuple[str, ...]
    places: tuple[str, ...]


@dataclass(frozen=True)
class SplitReport:
    """What one split holds.

    Attributes:
        name: The file, or the hub name.
        rows: How many.
        lengths: Of its inputs, with the response that a language model reads behind each; None where they are not made
            of words.
        target_lengths: Of target texts that have a limit of their own; None where there are none.
        balance: Of its classes; None where it has none.
        values: Of its numbers; None where it has none.
        duplicates: Rows that repeat an earlier input, whatever its target; None where inputs are not made of words.
        conflicts: How many inputs occur with different targets.
        examples: The first of those.
        empty: Columns without a value.
        constant: Columns with one value in all rows.
    """

    name: str
    rows: int
    lengths: Lengths | None
    target_lengths: Lengths | None
    balance: Balance | None
    values: Range | None
    duplicates: int | None
    conflicts: int
    examples: tuple[Conflict, ...]
    empty: tuple[str, ...]
    constant: tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """Rows of a split whose input is also among the training rows.

    Attributes:
        rows: How many.
        share: Of the split.
        places: Where the first of them are.
    """

    rows: int
    share: float
    places: tuple[str, ...]


@dataclass(frozen=True)
class DataReport:
    """What `pelton data check` tells.

    Attributes:
        kind: The kind of task that the data were read as.
        splits: By name.
        overlaps: By the split that shares inputs with `train`.
        notes: What was changed or left out, and what could not be measured.
    """

    kind: str
    splits: dict[str, SplitReport]
    overlaps: dict[str, Overlap]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return dataclasses.asdict(self)
