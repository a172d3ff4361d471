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
from pelton.errors import PeltonError, TrainingError
from pelton.tasks.glue import GLUE, glue_score
from pelton.version import __version__

WAIT_SECONDS = 10.0
NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
"""What errors say that are no classes of their own: CUDA's and PyTorch's, on a GPU and without."""


@dataclass
class Worked:
    """What one worker did.

    Attributes:
        trained: Cells that it finished, those that diverged among them.
        failed: Those that it could not train, with the reason; whoever works on the journal next tries them again.
    """

    trained: int = 0
    failed: dict[Cell, str] = field(default_factory=dict)


def work(grid: Grid, journal: Journal, tell: Callable[[str], None], *, limit: int | None = None) -> Worked:
    """Trains until every cell is finished, or others train what is left.

    A training that diverges is a result, the worst one, and is written down. A cell that cannot be trained (too few
    rows, too little memory) is told of and left; the others go on.

    Args:
        grid: The cells.
        journal: Where finished ones are.
        tell: Takes one line about each.
        limit: Trains at most so many.

    Raises:
        DataError: a task's folder is missing, or the journal cannot be written.
    """
    if limit != 0:
        grid.protocol.require_data(grid.tasks)
        journal.require_writable()
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
            if not mine or any(record.get("fingerprint") == key for record in journal.records()):
                continue
            try:
                record, came = _train_or_diverge(grid, cell)
            except (PeltonError, RuntimeError, MemoryError) as error:
                if not isinstance(error, PeltonError) and not _lacks_memory(error):
                    raise
                failed[cell] = _one_line(error)
                tell(f"{_name(cell)} failed: {failed[cell]}")
                continue
            journal.append(record)
            tell(f"{_name(cell)}{came}")
            return True
    return False


def _train_or_diverge(grid: Grid, cell: Cell) -> tuple[Record, str]:
    """Returns what the journal keeps of a cell, and how to tell of it."""
    try:
        record = train(grid, cell)
    except TrainingError as error:
        why = str(error).partition(". ")[0]  # the rest says what to try, and names a folder that is gone
        lost = {"validation": None, "test": None, "failed": why}
        return {**_names(cell), **lost, **_origin(grid, cell)}, f" has no score: {why}"
    return record, f": {record['test']:.4f} ({record['seconds']} s)"


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


def _one_line(error: BaseException) -> str:
    """Returns a message's first line; CUDA's go on about its allocator."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _name(cell: Cell) -> str:
    return f"{cell.task} {cell.examples} {cell.method} {cell.rate:g} seed {cell.seed}"


def train(grid: Grid, cell: Cell) -> Record:
    """Trains and judges one cell; its run folder is not kept."""
    from pelton.training.fit import fit

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pelton-bench-") as folder:
        metrics = fit(grid.protocol.recipe(cell, folder)).folder.read("metrics")
    return {
        **_names(cell),
        "validation": _round(metrics["validation"]["score"]),
        "test": _round(glue_score(cell.task, metrics) if cell.task in GLUE else metrics["test"]["score"]),
        "metrics": {name: _round(value) for name, value in metrics["test"].items() if name != "score"},
        "trainable": metrics["parameters"]["trainable"],
        "steps": metrics["steps"],
        "best_step": metrics["best_step"],
        "train_seconds": metrics["train_seconds"],
        "seconds": round(time.perf_counter() - started, 1),
        **_origin(grid, cell),
    }


def _names(cell: Cell) -> Record:
    return {name: getattr(cell, name) for name in ("task", "examples", "method", "rate", "seed")}


def _origin(grid: Grid, cell: Cell) -> Record:
    return {"protocol": grid.protocol.describe(), "pelton": __version__, "fingerprint": grid.key(cell)}


def _round(value: Any) -> float:
    return round(float(value), 5)


def progress(grid: Grid, records: Sequence[Record]) -> tuple[int, int]:
    """Returns how many cells are finished, and how many there are in all."""
    done = len(grid.finished(records))
    return done, done + sum(1 for _ in grid.open(records)) + grid.waiting(records)
