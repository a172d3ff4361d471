"""Prompts and responses out of rows: columns with their usual names, conversations, plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pelton.errors import DataError
from pelton.tasks.columns import pick_column
from pelton.tasks.tables import Table
from pelton.tasks.texts import check_texts

Message = tuple[str, str]
"""A role and what it says."""

ROLES = ("system", "user", "assistant")
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
"""Names in use on the hub; they come before `text`, which Alpaca's files have beside them."""
MESSAGES, TEXT, CONTEXT = "messages", "text", "input"


@dataclass(frozen=True)
class Prompt:
    """What the model answers, or goes on with.

    Attributes:
        text: The instruction, or the beginning of a text; empty where a whole text is learned.
        context: What the instruction is about, where rows have it.
        messages: A conversation before its last reply, instead of the two.
    """

    text: str = ""
    context: str = ""
    messages: tuple[Message, ...] = ()

    def chat(self) -> list[dict[str, str]]:
        """Returns the messages that a chat template takes; an instruction and its context are one of the user."""
        said = "\n\n".join(part for part in (self.text, self.context) if part)
        return [{"role": role, "content": text} for role, text in self.messages or (("user", said),)]


@dataclass(frozen=True)
class Fields:
    """The columns of one of three forms: prompt and response (and context), messages, or text."""

    prompt: str | None = None
    response: str | None = None
    context: str | None = None
    messages: str | None = None
    text: str | None = None

    @property
    def forms(self) -> tuple[bool, bool, bool]:
        """Tells which of the forms has a column."""
        pair = (self.prompt, self.response, self.context)
        return any(pair), self.messages is not None, self.text is not None


def find_fields(table: Table, named: Fields) -> Fields:
    """Takes the columns that were named, and finds those that were not.

    Raises:
        DataError: a named column does not exist, or none of the usual names does.
    """
    if named.messages or named.text:
        table.column(str(named.messages or named.text))
        return named
    if any(named.forms):
        prompts, responses = (tuple(dict.fromkeys(names)) for names in zip(*PAIRS, strict=True))
        prompt = pick_column(table, named.prompt, prompts, "task.prompt_column", "the prompt")
        response = pick_column(table, named.response, responses, "task.response_column", "the response")
        return Fields(prompt, response, _context(table, named.context, prompt))
    if MESSAGES in table.columns:
        return Fields(messages=MESSAGES)
    for prompt, response in PAIRS:
        if prompt in table.columns and response in table.columns:
            return Fields(prompt, response, _context(table, None, prompt))
    if TEXT in table.columns:
        return Fields(text=TEXT)
    raise DataError(
        f"{table.name}: which columns hold the prompt and the response? Set task.prompt_column and "
        f"task.response_column (or task.messages_column for conversations, or task.text_column for plain text) to "
        f"some of {', '.join(table.columns) or 'none'}."
    )


def _context(table: Table, named: str | None, prompt: str) -> str | None:
    if named is not None:
        table.column(named)
        return named
    return CONTEXT if prompt == "instruction" and CONTEXT in table.columns else None


def read_examples(table: Table, fields: Fields) -> tuple[list[Prompt], list[str]]:
    """Returns the prompts and the responses of a table.

    Raises:
        DataError: a cell is empty or no text, or a conversation has an unknown role or does not end with the assistant.
    """
    if fields.messages is not None:
        talks = [_conversation(table, row, fields.messages) for row in _rows(table)]
        for row, talk in enumerate(talks):
            _require_reply(table, row, fields.messages, talk)
        return [Prompt(messages=talk[:-1]) for talk in talks], [talk[-1][1] for talk in talks]
    if fields.text is not None:
        return [Prompt() for _ in _rows(table)], [text for (text,) in check_texts(table, (fields.text,))]
    cells = check_texts(table, (str(fields.prompt), str(fields.response)))
    contexts = _contexts(table, fields.context)
    prompts = [Prompt(text, context) for (text, _), context in zip(cells, contexts, strict=True)]
    return prompts, [response for _, response in cells]


def read_prompts(table: Table, fields: Fields) -> list[Prompt]:
    """Returns prompts alone, for prediction; a conversation's last reply is left out, a plain text is gone on with."""
    if fields.messages is not None:
        talks = [_conversation(table, row, fields.messages) for row in _rows(table)]
        asked = [talk[:-1] if talk[-1][0] == "assistant" else talk for talk in talks]
        for row, talk in enumerate(asked):
            if not talk:
                where = table.where(row, fields.messages)
                raise DataError(f"{where}: there is nothing to answer. Expected a message of the user.")
        return [Prompt(messages=talk) for talk in asked]
    texts = check_texts(table, (str(fields.text or fields.prompt),))
    contexts = _contexts(table, fields.context)
    return [Prompt(text, context) for (text,), context in zip(texts, contexts, strict=True)]


def _rows(table: Table) -> range:
    if not len(table):
        raise DataError(f"{table.name} is empty: expected at least one row.")
    return range(len(table))


def _contexts(table: Table, column: str | None) -> Sequence[str]:
    """Returns the contexts, of which some or all may be empty."""
    if column is None or column not in table.columns:
        return [""] * len(table)
    for row, cell in enumerate(table.columns[column]):
        if cell is not None and not isinstance(cell, str):
            raise DataError(
                f"{table.where(row, column)}: expected a text or nothing, but got {type(cell).__name__} {cell!r}."
            )
    return [cell if cell and cell.strip() else "" for cell in table.columns[column]]


def _conversation(table: Table, row: int, column: str) -> tuple[Message, ...]:
    cell, where = table.column(column)[row], table.where(row, column)
    if not isinstance(cell, list) or not cell:
        what = "an empty list" if cell == [] else f"{type(cell).__name__} {cell!r}"
        raise DataError(f"{where}: expected a list of messages, but got {what}.")
    return tuple(_message(f"{where}, message {place}", message) for place, message in enumerate(cell, 1))


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise DataError(f"{where}: expected an object with role and content, but got {message!r}.")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r}. Known: {', '.join(ROLES)}.")
    if not isinstance(content, str) or not content.strip():
        what = "is empty" if content is None or isinstance(content, str) else f"is {content!r}"
        raise DataError(f"{where}: the content {what}. Expected a text: fill it in or remove the row.")
    return role, content


def _require_reply(table: Table, row: int, column: str, talk: tuple[Message, ...]) -> None:
    where = table.where(row, column)
    if talk[-1][0] != "assistant":
        raise DataError(
            f"{where}: the last message is of {talk[-1][0]!r}, but it is the one that is learned: expected "
            "'assistant'. Add the reply or remove the row."
        )
    if len(talk) == 1:
        raise DataError(f"{where}: the reply has no message before it. Expected one of the user.")
