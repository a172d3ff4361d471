"""What can be told of data before a run: lengths, balance, repeated rows, overlap between splits, useless columns."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pelton.tasks.base import Examples, Task
from pelton.tasks.checked import IMAGES
from pelton.tasks.findings import Balance, Conflict, DataReport, Lengths, Overlap, Range, SplitReport
from pelton.tasks.intents import OUT, IntentSettings
from pelton.tasks.load import KINDS, plain
from pelton.tasks.settings import TaskSettings, TextSettings
from pelton.tasks.splits import load_splits
from pelton.tasks.tables import Table
from pelton.tasks.tokens import TokenSettings

UNCUT = 10**6
SHOWN = 5
"""Conflicts and repeated rows that are listed; all are counted."""


def check_data(settings: TaskSettings, load: Callable[[Task[Any]], Any] | None = None) -> DataReport:
    """Reads all splits of a task as a run would, and measures them; nothing is drawn or held back.

    Args:
        settings: What the recipe says; a guess is in `guess_kind`.
        load: Loads the tokenizer that a task's lengths are counted with; words are counted without one.

    Raises:
        DataError: the data are broken, as a run would find them.
    """
    settings = plain(settings).model_copy(update={"streaming": False})
    tables = load_splits(settings)
    task = KINDS[type(settings)].plan(settings, tables["train"])
    processor = load(task) if load is not None and isinstance(settings, TextSettings | TokenSettings) else None
    splits = {split: task.check(table) for split, table in tables.items()}
    notes = [note for examples in splits.values() for note in examples.notes]
    keys = {split: _keys(tables[split], examples) for split, examples in splits.items()}
    if any(found is None for found in keys.values()):
        notes.append(f"Lengths, repeated rows and overlaps are not measured for {settings.kind}.")
    reports = {s: _report(task, tables[s], examples, keys[s], processor) for s, examples in splits.items()}
    known = set(keys["train"] or ())
    overlaps = {s: _overlap(tables[s], found, known) for s, found in keys.items() if s != "train" and found is not None}
    return DataReport(settings.kind, reports, overlaps, tuple(dict.fromkeys(notes)))


def guess_kind(table: Table) -> str:
    """Returns the kind of task that a table looks like; text classification where nothing else shows."""
    columns = table.columns
    if {"context", "question", "answers"} <= set(columns):
        return "question-answering"
    if {"tokens", "words"} & set(columns) and {"ner_tags", "tags", "labels", "pos_tags"} & set(columns):
        return "token-classification"
    if set(IMAGES[:2]) & set(columns):
        return "semantic-segmentation" if "mask" in columns else "image-classification"
    numbers = [v for name in ("label", "score", "target") for v in columns.get(name, []) if isinstance(v, float)]
    return "text-regression" if any(not number.is_integer() for number in numbers) else "text-classification"


def _report(
    task: Task[Any], table: Table, examples: Examples, keys: Sequence[str] | None, processor: Any
) -> SplitReport:
    conflicts = [] if keys is None else _conflicts(task, table, examples, keys)
    kinds = {name: {_plain_cell(cell) for cell in cells} for name, cells in table.columns.items()}
    return SplitReport(
        name=table.name,
        rows=len(table),
        lengths=None if keys is None else _lengths(task, examples, processor),
        balance=_balance(task, examples),
        values=_range(examples) if task.classes(examples) is None else None,
        duplicates=None if keys is None else len(keys) - len(set(keys)),
        conflicts=len(conflicts),
        examples=tuple(conflicts[:SHOWN]),
        empty=tuple(name for name, found in kinds.items() if found <= {"", "None"}),
        constant=tuple(
            name for name, found in kinds.items() if len(found) == 1 < len(table) and not found <= {"", "None"}
        ),
    )


def _keys(table: Table, examples: Examples) -> list[str] | None:
    """Returns each input without case and runs of spaces; None where an input is not made of words."""
    texts = [_words(one) for one in examples.inputs]
    if len(texts) != len(table) or any(text is None for text in texts):
        return None
    return ["\n".join(" ".join(part.split()).casefold() for part in text or ()) for text in texts]


def _words(one: Any) -> tuple[str, ...] | None:
    if isinstance(one, str):
        return (one,)
    return one if isinstance(one, tuple) and all(isinstance(part, str) for part in one) else None


def _lengths(task: Task[Any], examples: Examples, processor: Any) -> Lengths:
    limit = getattr(task.settings, "max_length", None)
    if processor is None:
        unit, sizes = "words", [sum(len(part.split()) for part in _words(one) or ()) for one in examples.inputs]
    else:
        whole = dataclasses.replace(task, settings=task.settings.model_copy(update={"max_length": UNCUT}))
        unit, sizes = "tokens", [len(ids) for ids in whole.encode(examples.inputs, processor)["input_ids"]]
    values = np.asarray(sizes)
    cut = None if limit is None else float((values > limit).mean())
    median, p95 = float(np.median(values)), float(np.percentile(values, 95))
    return Lengths(unit, int(values.min()), median, p95, int(values.max()), limit, cut)


def _balance(task: Task[Any], examples: Examples) -> Balance | None:
    if task.classes(examples) is None:
        return None
    flat = [one for target in examples.targets for one in (target if isinstance(target, list | tuple) else [target])]
    counts = {_class_name(task, target): count for target, count in Counter(flat).most_common()}
    shares = [(name, count / len(flat)) for name, count in counts.items()]
    return Balance(counts, shares[-1], shares[0])


def _class_name(task: Any, target: int) -> str:
    if target == OUT and isinstance(task.settings, IntentSettings):
        return task.settings.oos_label
    return str(task.labels.names[target])


def _range(examples: Examples) -> Range | None:
    if not all(isinstance(target, float) for target in examples.targets):
        return None
    values = np.asarray(examples.targets)
    return Range(float(values.min()), float(values.mean()), float(values.max()), float(values.std()))


def _conflicts(task: Task[Any], table: Table, examples: Examples, keys: Sequence[str]) -> list[Conflict]:
    rows: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    found = []
    for same in rows.values():
        targets = list(dict.fromkeys(_shown(task, examples.targets[row]) for row in same))
        if len(targets) > 1:
            text = (" " if isinstance(task.settings, TokenSettings) else " | ").join(
                _words(examples.inputs[same[0]]) or ()
            )
            found.append(Conflict(text, tuple(targets), tuple(_place(table, row) for row in same)))
    return found


def _shown(task: Task[Any], target: Any) -> str:
    if isinstance(target, list | tuple):
        return " ".join(_shown(task, one) for one in target)
    return _class_name(task, target) if isinstance(target, int) and hasattr(task, "labels") else str(target)


def _overlap(table: Table, keys: Sequence[str], known: set[str]) -> Overlap:
    rows = [row for row, key in enumerate(keys) if key in known]
    return Overlap(len(rows), len(rows) / len(keys), tuple(_place(table, row) for row in rows[:SHOWN]))


def _place(table: Table, row: int) -> str:
    """Names a row as errors do, without its file."""
    return f"row {row + 1}" if table.lines is None else f"line {table.lines[row]}"


def _plain_cell(cell: Any) -> str:
    return cell.strip() if isinstance(cell, str) else str(cell)
