"""Questions about a context, and their right answers, in the format of SQuAD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pelton.errors import DataError
from pelton.tasks.tables import Table
from pelton.tasks.texts import check_texts

ID = "id"
IMPOSSIBLE = "is_impossible"


class Question(NamedTuple):
    """A question, the text that holds the answer, and what the data call the question."""

    question: str
    context: str
    id: str = ""


class Gold(NamedTuple):
    """The right answers and the characters of the context at which they start; none where there is no answer."""

    texts: tuple[str, ...]
    starts: tuple[int, ...]


def read_questions(table: Table, question: str, context: str) -> list[Question]:
    """Reads questions; without a column `id` they are called by their row.

    Raises:
        DataError: a column is missing, or a text is empty.
    """
    texts = check_texts(table, (question, context))
    ids = table.columns.get(ID, range(1, len(table) + 1))
    return [Question(asked, text, str(name)) for (asked, text), name in zip(texts, ids, strict=True)]


def read_answers(table: Table, column: str, questions: Sequence[Question]) -> list[Gold]:
    """Reads the right answers: `{"text": […], "answer_start": […]}`, or a list of `{"text": …, "answer_start": …}`.

    Where there is a column `is_impossible`, questions that it is true of have none, whatever the cell holds.

    Raises:
        DataError: the column is missing, a cell has another form, or an answer is not where it is said to be.
    """
    golds = []
    impossible = table.columns.get(IMPOSSIBLE, [False] * len(table))
    for row, cell in enumerate(table.column(column)):
        where = table.where(row, column)
        gold = Gold((), ()) if _is_impossible(impossible[row], table.where(row, IMPOSSIBLE)) else _read(cell, where)
        for text, start in zip(gold.texts, gold.starts, strict=True):
            if not questions[row].context.startswith(text, start):
                raise DataError(f"{where}: {_misplaced(text, start, questions[row].context)}")
        golds.append(gold)
    return golds


def _is_impossible(value: Any, where: str) -> bool:
    if value is None or isinstance(value, bool | np.bool_):
        return bool(value)
    raise DataError(f"{where}: expected true or false, but got {value!r}.")


def _read(cell: Any, where: str) -> Gold:
    if isinstance(cell, list) and all(isinstance(one, dict) for one in cell):
        cell = {key: [one.get(key) for one in cell] for key in ("text", "answer_start")}
    texts, starts = (cell.get("text"), cell.get("answer_start")) if isinstance(cell, dict) else (None, None)
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise DataError(
            f'{where}: expected {{"text": […], "answer_start": […]}} with as many texts as starts (none where the '
            f"question has no answer), but got {cell!r}."
        )
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: an answer is empty. A question without an answer has empty lists.")
        if not isinstance(start, int) or isinstance(start, bool) or start < 0:
            raise DataError(f"{where}: answer_start must be a whole number from 0, but got {start!r} for {text!r}.")
    return Gold(tuple(texts), tuple(starts))


def _misplaced(text: str, start: int, context: str) -> str:
    """Says what stands where an answer should, and where the answer does."""
    there = repr(context[start : start + len(text)]) if start < len(context) else f"nothing ({len(context)} in all)"
    found = [place for place in range(len(context)) if context.startswith(text, place)]
    if found:
        hint = f"It is at {', '.join(map(str, found[:5]))}: correct answer_start."
    elif text.lower() in context.lower():
        hint = f"It is there in other letter case, at {context.lower().index(text.lower())}: correct the text."
    else:
        hint = "It is nowhere in the context: correct or remove the row."
    return f"the answer {text!r} is not at character {start} of the context, where there is {there}. {hint}"
