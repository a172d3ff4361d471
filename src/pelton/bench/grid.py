"""The cells of a benchmark, in the order of training, and what is still to do.

A method's rate is chosen at the first seed: the one whose best score on held-back rows is highest. The other seeds
train at that rate only. A rate at which training diverged is the worst: it is finished, and never chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pelton.bench.journal import Record
from pelton.bench.protocol import Cell, Protocol, require_known
from pelton.errors import RecipeError


@dataclass(frozen=True)
class Grid:
    """Every method on every task at every data size, with every seed."""

    protocol: Protocol
    tasks: list[str]
    examples: list[int]
    methods: list[str]
    seeds: Sequence[int]
    fingerprints: dict[Cell, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuses names that do not exist and an empty grid; drops what is named twice."""
        require_known(self.tasks, self.methods)
        for name in ("tasks", "examples", "methods", "seeds"):
            if not getattr(self, name):
                raise RecipeError(f"A benchmark needs at least one of {name}.")
            object.__setattr__(self, name, list(dict.fromkeys(getattr(self, name))))

    def key(self, cell: Cell) -> str:
        """Returns the fingerprint of a cell: what its result depends on."""
        if cell not in self.fingerprints:
            self.fingerprints[cell] = self.protocol.fingerprint(cell)
        return self.fingerprints[cell]

    def finished(self, records: Sequence[Record]) -> dict[Cell, Record]:
        """Returns what came of this grid's cells, diverged ones too; lines of other settings are left out."""
        by_key = {record.get("fingerprint"): record for record in records}
        return {cell: by_key[self.key(cell)] for cell in self._possible() if self.key(cell) in by_key}

    def open(self, records: Sequence[Record]) -> Iterator[Cell]:
        """Yields the cells that can be trained now: all rates at the first seed, and then the chosen ones."""
        done = self.finished(records)
        for cell in self._possible():
            if cell in done:
                continue
            if cell.seed == self.seeds[0] or cell.rate == self.chosen(cell, done):
                yield cell

    def waiting(self, records: Sequence[Record]) -> int:
        """Returns the number of cells whose rate is not chosen yet, one for each seed."""
        done = self.finished(records)
        rows = {(c.task, c.examples, c.method) for c in self._possible() if not self._tried(c, done)}
        return len(rows) * (len(self.seeds) - 1)

    def chosen(self, cell: Cell, done: dict[Cell, Record]) -> float | None:
        """Returns the rate of a cell's method on its task and size.

        None while one is still to be tried, and where all of them failed.
        """
        good = {rate: record for rate, record in self._tried(cell, done).items() if not failed(record)}
        return max(good, key=lambda rate: float(good[rate]["validation"]), default=None)

    def results(self, records: Sequence[Record]) -> list[Record]:
        """Returns one result for each task, size, method and seed: at the chosen rate, where it is chosen."""
        done = self.finished(records)
        return [r for cell, r in done.items() if cell.rate == self.chosen(cell, done) and not failed(r)]

    def hopeless(self, records: Sequence[Record]) -> list[Cell]:
        """Returns the first cell of each task, size and method of which every rate failed."""
        done, found = self.finished(records), dict[tuple[str, int, str], Cell]()
        for cell in done:
            tried = self._tried(cell, done)
            if tried and all(map(failed, tried.values())):
                found.setdefault((cell.task, cell.examples, cell.method), cell)
        return list(found.values())

    def lost(self, records: Sequence[Record]) -> list[Cell]:
        """Returns the cells of later seeds that failed at the chosen rate."""
        done = self.finished(records)
        return [cell for cell, record in done.items() if cell.rate == self.chosen(cell, done) and failed(record)]

    def _tried(self, cell: Cell, done: dict[Cell, Record]) -> dict[float, Record]:
        """Returns what came of each rate at the first seed; nothing while one is still to be tried."""
        rates = self.protocol.rates(cell.method)
        first = {rate: Cell(cell.task, cell.examples, cell.method, rate, self.seeds[0]) for rate in rates}
        return {rate: done[one] for rate, one in first.items()} if all(one in done for one in first.values()) else {}

    def _possible(self) -> Iterator[Cell]:
        """Yields every cell, seed by seed, small data first, so that an unfinished benchmark is a smaller one."""
        for examples in self.examples:
            for seed in self.seeds:
                for task in self.tasks:
                    for method in self.methods:
                        for rate in self.protocol.rates(method):
                            yield Cell(task, examples, method, rate, seed)


def failed(record: Record) -> bool:
    """Tells whether a finished cell has no score: its training diverged."""
    return "failed" in record or math.isnan(float(record["validation"]))
