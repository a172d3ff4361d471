"""Trains the open cells of a benchmark, one after another."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from pelton.bench.grid import Grid
from pelton.bench.journal import Journal, Record
from pelton.bench.protocol import Cell
from pelton.tasks.glue import GLUE, glue_score
from pelton.version import __version__

WAIT_SECONDS = 10.0


def work(grid: Grid, journal: Journal, tell: Callable[[str], None], *, limit: int | None = None) -> int:
    """Trains until every cell is finished, or others train what is left; returns how many it trained.

    Args:
        grid: The cells.
        journal: Where finished ones are.
        tell: Takes one line about each.
        limit: Trains at most so many.

    Raises:
        DataError: a task's folder is missing, or its data is broken; what is finished stays in the journal.
    """
    if limit != 0:
        grid.protocol.require_data(grid.tasks)
    trained = 0
    while limit is None or trained < limit:
        cell = _next(grid, journal, tell)
        if cell is None:
            if not any(True for _ in grid.open(journal.records())):
                break
            time.sleep(WAIT_SECONDS)  # others hold every open cell; the rates they choose open further ones
        else:
            trained += 1
    return trained


def _next(grid: Grid, journal: Journal, tell: Callable[[str], None]) -> Cell | None:
    """Trains the first open cell that nobody holds."""
    for cell in grid.open(journal.records()):
        key = grid.key(cell)
        with journal.claim(key) as mine:
            if not mine or any(record["fingerprint"] == key for record in journal.records()):
                continue
            record = train(grid, cell)
            journal.append(record)
            score, seconds = record["test"], record["seconds"]
            tell(f"{cell.task} {cell.examples} {cell.method} {cell.rate:g} seed {cell.seed}: {score:.4f} ({seconds} s)")
            return cell
    return None


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
