"""What can be told of data before a run: lengths, balance, repeated rows, overlap between splits, useless columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pelton.tasks.answers import AnswerSettings
from pelton.tasks.base import Examples, Task
from pelton.tasks.conversations import Prompt
from pelton.tasks.findings import Balance, Conflict, DataReport, Overlap, Range, SplitReport
from pelton.tasks.intents import OUT, IntentSettings
from pelton.tasks.lengths import COUNTED, measure, texts_of
from pelton.tasks.load import KINDS, plain
from pelton.tasks.questions import Gold
from pelton.tasks.settings import TaskSettings
from pelton.tasks.splits import load_splits
from pelton.tasks.squad import normalise
from pelton.tasks.tables import Table
from pelton.tasks.tokens import TokenSettings

SHOWN = 5
"""Conflicts and repeated rows that are listed; all are counted."""
WIDTH = 80
"""Characters that are shown of a target text."""


def check_data(settings: TaskSettings, load: Callable[[Task[Any]], Any] | None = None) -> DataReport:
    """Reads all splits of a task as a run would, and measures them; nothing is drawn or held back.

    Args:
        settings: What the recipe says; a guess is in `tasks/guess.py`.
        load: Loads the tokenizer that a task's lengths are counted with; words are counted without one.

    Raises:
        DataError: the data are broken, as a run would find them.
    """
    settings = plain(settings).model_copy(update={"streaming": False})
    tables = load_splits(settings)
    task = KINDS[type(settings)].plan(settings, tables["train"])
    processor = load(task) if load is not None and isinstance(settings, COUNTED) else None
    splits = {split: task.check(table) for split, table in tables.items()}
    notes = [note for examples in splits.values() for note in examples.notes]
    keys = {split: _keys(tables[split], examples) for split, examples in splits.items()}
    if any(found is None for found in keys.values()):
        notes.append(f"Lengths, repeated rows and overlaps are not measured for {settings.kind}.")
    reports = {s: _report(task, tables[s], examples, keys[s], processor) for s, examples in splits.items()}
    notes += _notes(settings, reports)
    known = set(keys["train"] or ())
    overlaps = {s: _overlap(tables[s], found, known) for s, found in keys.items() if s != "train" and found is not None}
    return DataReport(settings.kind, reports, overlaps, tuple(dict.fromkeys(notes)))


def _report(
    task: Task[Any], table: Table, examples: Examples, keys: Sequence[str] | None, processor: Any
) -> SplitReport:
    conflicts = [] if keys is None else _conflicts(task, table, examples, keys)
    kinds = {name: {_plain_cell(cell) for cell in cells} for name, cells in table.columns.items()}
    lengths, of_targets = (None, None) if keys is None else measure(task, examples, processor)
    return SplitReport(
        name=table.name,
        rows=len(table),
        lengths=lengths,
        target_lengths=of_targets,
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


def _notes(settings: TaskSettings, reports: dict[str, SplitReport]) -> Iterator[str]:
    """Yields what the lengths mean where an input is not simply cut at one limit."""
    for split, report in reports.items():
        of = report.target_lengths
        if of is not None:
            cut = f"{'at least ' if of.unit == 'words' else ''}{of.cut:.1%}"
            yield (
                f"{split}: targets have {of.smallest} to {of.largest} {of.unit} (median {of.median:g}); {cut} are "
                f"longer than task.max_target_length={of.max_length}."
            )
    if isinstance(settings, AnswerSettings) and any(one.lengths and one.lengths.cut for one in reports.values()):
        yield "Contexts beyond task.max_length are read in windows: nothing of them is lost."


def _keys(table: Table, examples: Examples) -> list[str] | None:
    """Returns each input without case and runs of spaces; None where an input is not made of words.

    A text that is learned as a whole has no prompt, and stands for itself.
    """
    texts = [texts_of(target if one == Prompt() else one) for one, target in _pairs(examples)]
    if len(texts) != len(table) or any(text is None for text in texts):
        return None
    return ["\n".join(_folded(part) for part in text or ()) for text in texts]


def _pairs(examples: Examples) -> Iterator[tuple[Any, Any]]:
    return zip(examples.inputs, examples.targets, strict=True)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


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
        targets: dict[str, str] = {}
        for target in (examples.targets[row] for row in same):
            shown = _shown(task, target)
            targets.setdefault(_folded(target) if isinstance(target, str) else shown, shown)
        if len(targets) > 1 and not _agree([examples.targets[row] for row in same]):
            text = (" " if isinstance(task.settings, TokenSettings) else " | ").join(
                texts_of(examples.inputs[same[0]]) or ()
            )
            found.append(Conflict(text, tuple(targets.values()), tuple(_place(table, row) for row in same)))
    return found


def _agree(targets: Sequence[Any]) -> bool:
    """Tells whether one answer is right each time that a question is asked."""
    rights = [{*map(normalise, target.texts)} or {""} for target in targets if isinstance(target, Gold)]
    return bool(rights) and bool(set.intersection(*rights))


def _shown(task: Task[Any], target: Any) -> str:
    if isinstance(target, Gold):
        return _shown(task, target.texts[0]) if target.texts else "no answer"
    if isinstance(target, list | tuple):
        return " ".join(_shown(task, one) for one in target)
    if isinstance(target, str):
        text = " ".join(target.split())
        return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"
    return _class_name(task, target) if isinstance(target, int) and hasattr(task, "labels") else str(target)


def _overlap(table: Table, keys: Sequence[str], known: set[str]) -> Overlap:
    rows = [row for row, key in enumerate(keys) if key in known]
    return Overlap(len(rows), len(rows) / len(keys), tuple(_place(table, row) for row in rows[:SHOWN]))


def _place(table: Table, row: int) -> str:
    """Names a row as errors do, without its file."""
    return f"row {row + 1}" if table.lines is None else f"line {table.lines[row]}"


def _plain_cell(cell: Any) -> str:
    return cell.strip() if isinstance(cell, str) else str(cell)
