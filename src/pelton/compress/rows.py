"""The training rows that a run's constants, importances and times come from, as the model reads them when it learns.

Rows are taken at equal distances, since files are often sorted by class. Where a model's inputs depend on the targets
(a decoder reads the response; a text is cut into blocks), they are what the run is judged on, targets and all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pelton.tasks.base import Task
from pelton.tasks.load import Loaded
from pelton.training.gate_values import spread
from pelton.training.run import Run

ROWS = 512
"""Training rows that are encoded, and features of them that are run, at most."""


def reads_targets(task: Task[Any]) -> bool:
    """Tells whether a task's model reads the targets, so that inputs alone are not what it is judged on."""
    return type(task).judged is not Task.judged


def training_batches(run: Run, data: Loaded, *, labelled: bool) -> Iterator[Mapping[str, Any]]:
    """Yields batches of training rows.

    Args:
        run: Says how rows are encoded, and how many a batch holds.
        data: Has the rows.
        labelled: Batches are to give a loss.
    """
    task, processor, size = run.task, run.processor, run.recipe.training.eval_batch_size
    some = spread(data.splits["train"] if data.stream is None else next(data.stream.examples()), ROWS)
    features = task.encode(some.inputs, processor, some.targets) if labelled else task.judged(some, processor)
    count, collate = min(len(features), ROWS), task.collator(processor)
    rows = [place * len(features) // count for place in range(count)]  # a text may give any number of blocks
    for start in range(0, count, size):
        yield collate([features[row] for row in rows[start : start + size]])
