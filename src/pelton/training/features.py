"""What the trainer learns from: encoded rows in memory, in a file that is mapped into memory, or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.compute

from pelton.errors import RecipeError
from pelton.tasks.base import Examples, Task
from pelton.tasks.load import Loaded
from pelton.training.recipe import TrainingSettings

CHUNK = 1000


def training_features(data: Loaded, processor: Any, folder: Path, seed: int) -> tuple[Any, tuple[str, ...]]:
    """Encodes the training rows as the task's settings ask for.

    Args:
        data: The task and its rows.
        processor: The tokenizer or image processor.
        folder: Where a file of features goes.
        seed: Of the order in which streamed rows come.

    Returns:
        The features, and what encoding left out, in sentences.
    """
    if data.stream is not None:
        return data.stream.features(processor, seed), data.stream.notes(processor)
    task, examples = data.task, data.splits["train"]
    if task.settings.memory_map:
        features = write_features(task, examples, processor, folder / "train.arrow")
    else:
        features = task.encode(examples.inputs, processor, examples.targets)
    return features, task.left_out(examples, features)


def streamed(settings: TrainingSettings) -> TrainingSettings:
    """Returns the settings of a streamed training, which has no epochs: it is looked at ten times in all."""
    every = settings.evaluate_every or max(1, (settings.max_steps or 1) // 10)
    return settings.model_copy(update={"evaluate_every": every})


def require_streamable(settings: TrainingSettings) -> None:
    """Raises RecipeError where training asks for what rows that are read as they come do not tell."""
    if settings.max_steps is None:
        raise RecipeError("task.streaming needs training.max_steps: nobody counts the rows before they are read.")
    asked = {
        "training.group_by_length": settings.group_by_length,
        "training.batching.tokens": settings.batching.tokens is not None,
        "training.batching.oversample": settings.batching.oversample,
        "training.loss.class_weights": settings.loss.class_weights != "none",
    }
    for key, wanted in asked.items():
        if wanted:
            raise RecipeError(f"{key} needs all training rows, which task.streaming never holds: leave one out.")


def write_features(task: Task[Any], examples: Examples, processor: Any, path: Path) -> Any:
    """Encodes some examples at a time into an Arrow file, and returns the `datasets.Dataset` that is mapped from it.

    Raises:
        RecipeError: the kind's features are no Arrow columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as file:
        tables = _encoded(task, examples, processor)
        first = next(tables)
        with pyarrow.ipc.new_stream(file, first.schema) as writer:
            for table in chain([first], tables):
                writer.write_table(table.cast(first.schema))
    return datasets.Dataset.from_file(str(path))


def _encoded(task: Task[Any], examples: Examples, processor: Any) -> Iterator[pyarrow.Table]:
    """Yields the features of the examples, all at once where several examples share a feature."""
    size = len(examples) if task.packs else CHUNK
    for start in range(0, len(examples), size):
        part = examples.take(range(start, min(start + size, len(examples))))
        features = task.encode(part.inputs, processor, part.targets)
        if not isinstance(features, datasets.Dataset):
            raise RecipeError(f"task.memory_map: {task.settings.kind} decodes its inputs when they are used already.")
        table = features.data.table
        if "example" in table.column_names:  # counts the examples of one call
            place = table.column_names.index("example")
            counted = pyarrow.compute.add(table.column(place), start)
            table = table.set_column(place, table.schema.field(place), counted.cast(table.schema.field(place).type))
        yield table
