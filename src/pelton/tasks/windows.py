"""A question with its context, cut into overlapping windows that a model can read; answers placed in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np

from pelton.errors import DataError
from pelton.tasks.questions import Gold, Question

OWN = ("example", "begins", "ends", "null", "asked")
"""Columns that are read after the model, and not by it."""
CHUNK = 500
OUTSIDE = -1


class Cut(NamedTuple):
    """How a context is cut.

    Attributes:
        max_length: Tokens of a window, question and marks included.
        max_question_length: Tokens that are kept of a question.
        stride: Tokens of the context that two neighbours have in common.
    """

    max_length: int
    max_question_length: int
    stride: int


def require_room(tokenizer: Any, cut: Cut) -> None:
    """Raises DataError where a tokenizer cannot make these windows."""
    if not tokenizer.is_fast:
        raise DataError("Question answering needs a fast tokenizer, which knows the characters of each token.")
    if cut.max_length > tokenizer.model_max_length:
        longest = tokenizer.model_max_length
        raise DataError(f"task.max_length is {cut.max_length}, but the backbone reads {longest} tokens. Lower it.")
    marks = tokenizer.num_special_tokens_to_add(pair=True)
    room = cut.max_length - cut.max_question_length - marks
    if room <= cut.stride:
        raise DataError(
            f"Windows of task.max_length {cut.max_length} tokens have room for {room} of the context beside {marks} "
            f"marks and a question of task.max_question_length {cut.max_question_length}. Expected more than "
            f"task.doc_stride {cut.stride}, or they would not advance: raise max_length or lower doc_stride."
        )


def encode_windows(inputs: Sequence[Question], targets: Sequence[Gold] | None, tokenizer: Any, cut: Cut) -> Any:
    """Returns a `datasets.Dataset` with one row a window.

    Beside what the model reads: `example` (the place of the question in `inputs`), `begins` and `ends` (of each token
    in the context, -1 for tokens of the question), `null` (the token that stands for no answer) and `asked` (how many
    characters the question lost). With targets also `start_positions` and `end_positions`; a window that lacks the
    answer points at `null` twice.
    """
    parts = []
    for first in range(0, len(inputs), CHUNK):  # lists of numbers take much more memory than a data set's columns
        some = inputs[first : first + CHUNK]
        columns = _windows(some, tokenizer, cut)
        if targets is not None:
            columns |= _positions(columns, targets[first : first + CHUNK])
        columns["example"] = [place + first for place in columns["example"]]
        parts.append(datasets.Dataset.from_dict(columns))
    return datasets.concatenate_datasets(parts)


def _windows(inputs: Sequence[Question], tokenizer: Any, cut: Cut) -> dict[str, Any]:
    first = tokenizer.padding_side == "right"  # where padding stands in front, the question goes behind
    questions, contexts = _shorten(inputs, tokenizer, cut.max_question_length), [one.context for one in inputs]
    encoded = tokenizer(
        *((questions, contexts) if first else (contexts, questions)),
        truncation="only_second" if first else "only_first",
        max_length=cut.max_length,
        stride=cut.stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    examples, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    begins, ends = [], []
    for row, pairs in enumerate(offsets):
        inside = np.array([part == int(first) for part in encoded.sequence_ids(row)])
        both = np.where(inside[:, None], np.array(pairs), OUTSIDE)
        begins.append(both[:, 0])
        ends.append(both[:, 1])
    null = [_null(ids, tokenizer.cls_token_id) for ids in encoded["input_ids"]]
    lost = [len(one.question.strip()) - len(kept) for one, kept in zip(inputs, questions, strict=True)]
    asked = [lost[example] for example in examples]
    return {**encoded, "example": examples, "begins": begins, "ends": ends, "null": null, "asked": asked}


def _shorten(inputs: Sequence[Question], tokenizer: Any, longest: int) -> list[str]:
    """Cuts questions, so that windows always have room for the context."""
    questions = [one.question.strip() for one in inputs]
    encoded = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)
    return [
        text if len(offsets) <= longest else text[: offsets[longest - 1][1]]
        for text, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]


def _null(ids: Sequence[int], mark: int | None) -> int:
    """Returns the place of the token for the whole text (XLNet's is the last), else the first."""
    return list(ids).index(mark) if mark is not None and mark in ids else 0


def _positions(columns: dict[str, Any], targets: Sequence[Gold]) -> dict[str, list[int]]:
    placed = [
        _place(begins, ends, targets[example]) or (null, null)
        for begins, ends, null, example in zip(
            *(columns[name] for name in ("begins", "ends", "null", "example")), strict=True
        )
    ]
    return {"start_positions": [start for start, _ in placed], "end_positions": [end for _, end in placed]}


def _place(begins: Any, ends: Any, gold: Gold) -> tuple[int, int] | None:
    """Returns the first and the last token of the first right answer, where the window holds it whole."""
    inside = np.flatnonzero(begins >= 0)
    if not gold.texts or not inside.size:
        return None
    text, start = gold.texts[0], gold.starts[0]
    start, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    if begins[inside].min() > start or ends[inside].max() < end:
        return None
    touched = inside[(begins[inside] < end) & (ends[inside] > start)]
    return (int(touched[0]), int(touched[-1])) if touched.size else None
