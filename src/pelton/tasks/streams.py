"""Training rows that are read, checked and encoded while training lasts, and never all held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets

from pelton.errors import DataError
from pelton.tasks.base import Examples, Task
from pelton.tasks.files import read_chunks
from pelton.tasks.settings import TaskSettings
from pelton.tasks.splits import training_file
from pelton.tasks.tables import Table, class_names

CHUNK = 1000
"""Rows that are read, checked and encoded together; the scale of a regression is that of the first so many."""


@dataclass(frozen=True)
class TrainingStream:
    """The training rows of a task whose columns and classes are known.

    Attributes:
        task: Checks and encodes them.
        chunks: Starts a pass over the rows.
    """

    task: Task[Any]
    chunks: Callable[[], Iterator[Table]]

    def examples(self) -> Iterator[Examples]:
        """Yields the examples of one pass, some at a time.

        Raises:
            DataError: what is wrong with a row, when it is reached.
        """
        for table in self.chunks():
            examples = self.task.check(table)
            rows, _ = self.task.learned(examples)
            if rows:
                yield examples.take(rows)

    def encoded(self, processor: Any) -> Iterator[dict[str, Any]]:
        """Yields the features of one pass."""
        for examples in self.examples():
            yield from self.task.encode(examples.inputs, processor, examples.targets)

    def features(self, processor: Any, seed: int) -> Any:
        """Returns a `datasets.IterableDataset` of features that begins anew where the rows end.

        It has no end, so that a resumed run skips to its place in whichever pass that is; `shuffle_buffer` rows are
        held, of which one is drawn at random.
        """

        def endless() -> Iterator[dict[str, Any]]:
            while True:
                empty = True
                for row in self.encoded(processor):
                    empty = False
                    yield row
                if empty:
                    raise DataError(f"{self.task.settings.data}: nothing is left of the rows to train on.")

        rows = datasets.IterableDataset.from_generator(endless)
        return rows.shuffle(seed=seed, buffer_size=self.task.settings.shuffle_buffer)

    def notes(self, processor: Any) -> tuple[str, ...]:
        """Says what is changed or left out of the first rows; of the others nobody knows before they are read."""
        examples = self.task.check(next(self.chunks()))
        rows, reason = self.task.learned(examples)
        kept = examples.take(rows)
        found = [*examples.notes, *self.task.left_out(kept, self.task.encode(kept.inputs, processor, kept.targets))]
        if len(rows) < len(examples):
            found.append(f"{len(examples) - len(rows)} rows are left out of training, since {reason}.")
        return tuple(f"Of the first {len(examples)} rows that are streamed: {note}" for note in found)


def open_stream(settings: TaskSettings, kind: type[Task[Any]]) -> TrainingStream:
    """Finds the training rows, and plans the task on the first of them.

    Raises:
        DataError: the kind cannot be streamed, there are no rows, or the first are broken.
    """
    if not kind.streams:
        raise DataError(
            f"task.streaming: {settings.kind} cannot be streamed, since it needs all of its training rows before the "
            "first step. Set task.streaming=false; task.memory_map=true keeps encoded rows out of memory."
        )
    chunks = _chunks(settings)
    first = next(chunks(), None)
    if first is None:
        raise DataError(f"{settings.data} is empty: the train split needs at least one row.")
    return TrainingStream(kind.plan(settings, first), chunks)


def _chunks(settings: TaskSettings) -> Callable[[], Iterator[Table]]:
    found = training_file(settings)
    if found is None:
        return _hub_chunks(str(settings.data), settings.subset, settings.train or "train")
    path, names = found

    def read() -> Iterator[Table]:
        for table in read_chunks(path, CHUNK):
            yield replace(table, class_names=dict.fromkeys(table.columns, names)) if names else table

    return read


def _hub_chunks(name: str, subset: str | None, split: str) -> Callable[[], Iterator[Table]]:
    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name!r}, split {split!r}, cannot be streamed from the hub ({reason}).") from error
    classes = class_names(rows.features or {})

    def read() -> Iterator[Table]:
        before = 0
        for columns in rows.iter(CHUNK):
            table = Table(f"{name}[{split}]", columns, class_names=classes, before=before)
            before += len(table)
            yield table

    return read
