"""Trains the open cells of a benchmark, one after another."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pelton.bench.grid import Grid
from pelton.bench.journal import Journal, Record
from pelton.bench.protocol import Cell
from pelton.errors import PeltonError
from pelton.tasks.glue import GLUE, glue_score
from pelton.version import __version__

WAIT_SECONDS = 10.0


@dataclass
class Worked:
    """What one worker did.

    Attributes:
        trained: Cells that it trained.
        failed: Those that it could not train, with the reason; whoever works on the journal next tries them again.
    """

    trained: int = 0
    failed: dict[Cell, str] = field(default_factory=dict)


def work(grid: Grid, journal: Journal, tell: Callable[[str], None], *, limit: int | None = None) -> Worked:
    """Trains until every cell is finished, or others train what is left.

    A cell that cannot be trained (too few rows, a loss that diverged) is told of and left; the others go on.

    Args:
        grid: The cells.
        journal: Where finished ones are.
        tell: Takes one line about each.
        limit: Trains at most so many.

    Raises:
        DataError: a task's folder is missing.
    """
    if limit != 0:
        grid.protocol.require_data(grid.tasks)
    done = Worked()
    while limit is None or done.trained < limit:
        if _next(grid, journal, tell, done.failed):
            done.trained += 1
        elif all(cell in done.failed for cell in grid.open(journal.records())):
            break
        else:
            time.sleep(WAIT_SECONDS)  # others hold every open cell; the rates they choose open further ones
    return done


def _next(grid: Grid, journal: Journal, tell: Callable[[str], None], failed: dict[Cell, str]) -> bool:
    """Trains the first open cell that nobody holds and that did not fail here; tells whether there was one."""
    for cell in grid.open(journal.records()):
        if cell in failed:
            continue
        key = grid.key(cell)
        with journal.claim(key) as mine:
            if not mine or any(record["fingerprint"] == key for record in journal.records()):
                continue
            try:
                record = train(grid, cell)
            except PeltonError as error:
                failed[cell] = str(error)
                tell(f"{_name(cell)} failed: {error}")
                continue
            journal.append(record)
            tell(f"{_name(cell)}: {record['test']:.4f} ({record['seconds']} s)")
            return True
    return False


def _name(cell: Cell) -> str:
    return f"{cell.task} {cell.examples} {cell.method} {cell.rate:g} seed {cell.seed}"


def train(grid: Grid, cell: Cell) -> Record:
    """Trains and judges one cell; its run folder is not kept."""
    from pelton.training.fit import fit

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pelton-bench-") as folder:
        metrics = fit(grid.protocol.recipe(cell, folder)).folder.read("metrics")
    return {
        "task": cell.task,
        "examples": cell.examples,
        "method": cell.method,
        "rate": cell.rate,
        "seed": cell.seed,
        "validation": _round(metrics["validation"]["score"]),
        "test": _round(glue_score(cell.task, metrics) if cell.task in GLUE else metrics["test"]["score"]),
        "metrics": {name: _round(value) for name, value in metrics["test"].items() if name != "score"},
        "trainable": metrics["parameters"]["trainable"],
        "steps": metrics["steps"],
        "best_step": metrics["best_step"],
        "train_seconds": metrics["train_seconds"],
        "seconds": round(time.perf_counter() - started, 1),
        "protocol": grid.protocol.describe(),
        "pelton": __version__,
        "fingerprint": grid.key(cell),
    }


def _round(value: Any) -> float:
    return round(float(value), 5)


def progress(grid: Grid, records: Sequence[Record]) -> tuple[int, int]:
    """Returns how many cells are finished, and how many there are in all."""
    done = len(grid.finished(records))
    return done, done + sum(1 for _ in grid.open(records)) + grid.waiting(records)
