"""SQuAD's own files, which nest questions in paragraphs in articles, as the rows of the flat layout.

    {"version": …, "data": [{"title": …, "paragraphs": [{"context": …, "qas": [
        {"id": …, "question": …, "answers": [{"text": …, "answer_start": …}], "is_impossible": false}]}]}]}

A row has the columns `id`, `title`, `context`, `question` and `answers` `{"text": […], "answer_start": […]}`, as the
hub has them. Version 2.0 marks questions without an answer (`is_impossible`); they become rows with empty lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from pelton.errors import DataError
from pelton.tasks.tables import Row, Table

COLUMNS = ("id", "title", "context", "question", "answers")
BEGINNING = re.compile(r'\{\s*"(version|data)"\s*:')
"""How a file begins that may be one object over many lines."""
PEEK = 200
KINDS: dict[type, str] = {str: "a text", list: "a list"}

Nested = Mapping[str, Any]


@dataclass(frozen=True)
class NestedTable(Table):
    """Questions that stand on no line of their own: errors name article, paragraph and question.

    Attributes:
        places: Where each row stands, in words.
    """

    places: tuple[str, ...] = ()

    def where(self, row: int, column: str) -> str:
        """Names a cell: the file, the article, the paragraph, the question and the column."""
        return f"{self.name}, {self.places[row]}, column {column!r}"


def find_nested(path: Path, file: TextIO) -> Nested | None:
    """Returns the object that a whole file is, where it has SQuAD's layout; None for JSON lines.

    Of JSON lines no more than the first two are read.

    Raises:
        DataError: the file begins as one object over many lines, and is malformed.
    """
    first = next((line for line in file if line.strip()), "")
    try:
        value = json.loads(first)
    except json.JSONDecodeError:
        return _over_lines(path, first, file)
    alone = next((False for line in file if line.strip()), True)
    return value if alone and _is_nested(value) else None


def read_nested(path: Path, nested: Nested) -> Table:
    """Returns all questions of a file.

    Raises:
        DataError: a part is missing or of another kind; the message names article, paragraph and question.
    """
    return _table(path, list(_questions(path, nested)), 0)


def nested_chunks(path: Path, nested: Nested, size: int) -> Iterator[Table]:
    """Yields the questions of a file, `size` at a time; the file itself is held in memory.

    Raises:
        DataError: as `read_nested`, when the broken question is reached.
    """
    questions, before = _questions(path, nested), 0
    while part := list(islice(questions, size)):
        yield _table(path, part, before)
        before += len(part)


def _over_lines(path: Path, first: str, file: TextIO) -> Nested | None:
    """Reads a file whose first line is no JSON by itself; None where it does not begin as SQuAD's do."""
    head = first + "".join(islice(file, 2)) if len(first) < PEEK else first
    if not BEGINNING.match(head.lstrip()):
        return None
    try:
        value = json.loads(head + file.read())
    except json.JSONDecodeError as error:
        text = f"{path}: malformed JSON ({error.msg} at line {error.lineno}, character {error.colno})."
        raise DataError(f"{text} Expected one JSON object a line, or one object in the layout of SQuAD.") from error
    return value if _is_nested(value) else None


def _is_nested(value: Any) -> bool:
    data = value.get("data") if isinstance(value, dict) else None
    return isinstance(data, list) and any(isinstance(one, dict) and "paragraphs" in one for one in data)


def _table(path: Path, found: list[tuple[str, Row]], before: int) -> Table:
    columns = {name: [row[name] for _, row in found] for name in COLUMNS}
    return NestedTable(str(path), columns, before=before, places=tuple(place for place, _ in found))


def _questions(path: Path, nested: Nested) -> Iterator[tuple[str, Row]]:
    """Yields each question's place and its row."""
    count = 0
    for number, article in enumerate(nested["data"], 1):
        where = f"article {number}"
        paragraphs, title = _part(path, where, article, "paragraphs", list), article.get("title")
        where += f" ({title})" if isinstance(title, str) else ""
        for place, paragraph in enumerate(paragraphs, 1):
            of = f"{where}, paragraph {place}"
            context = _part(path, of, paragraph, "context", str)
            for asked, one in enumerate(_part(path, of, paragraph, "qas", list), 1):
                count += 1
                at = f"{of}, question {asked}"
                question = _part(path, at, one, "question", str)
                name = one.get("id", count)
                yield f"{at} ({name})", dict(zip(COLUMNS, (name, title, context, question, _answers(one)), strict=True))


def _part(path: Path, where: str, holder: Any, key: str, kind: type) -> Any:
    """Returns what an object has under a key."""
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, kind):
        got = f"got {type(holder).__name__}"
        if isinstance(holder, dict):
            got = f"that is {type(value).__name__}" if key in holder else f"it has {', '.join(holder) or 'nothing'}"
        text = f"{path}, {where}: expected an object with {KINDS[kind]} {key!r}, but {got}."
        raise DataError(f"{text} Correct or remove it, or fetch the file again.")
    if isinstance(value, str) and not value.isascii():
        _require_utf8(value, f"{path}, {where}, {key!r}")
    return value


def _require_utf8(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: broken UTF-8 at character {error.start + 1}. Save the file as UTF-8.") from error


def _answers(question: Mapping[str, Any]) -> Any:
    """Returns the answers by column; as they are where they have another form, which the task tells by its place."""
    found = [] if question.get("is_impossible") is True else question.get("answers")
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        return found
    return {key: [one.get(key) for one in found] for key in ("text", "answer_start")}
