"""How long examples are: in the tokens that a backbone would read of them uncut, or in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pelton.tasks.answers import AnswerSettings
from pelton.tasks.base import Examples, Task
from pelton.tasks.causal_settings import CausalSettings
from pelton.tasks.conversations import Prompt
from pelton.tasks.findings import Lengths
from pelton.tasks.questions import Question
from pelton.tasks.seq2seq import Seq2SeqSettings
from pelton.tasks.settings import TextSettings
from pelton.tasks.tokens import TokenSettings

COUNTED = (TextSettings, TokenSettings, AnswerSettings, CausalSettings, Seq2SeqSettings)
"""Settings of the kinds that a tokenizer of their backbone reads."""
LIMITS = ("max_length", "max_source_length", "max_target_length")
UNCUT = 10**6


def texts_of(one: Any) -> tuple[str, ...] | None:
    """Returns the texts that an input is made of; None where it is not made of words."""
    if isinstance(one, str):
        return (one,)
    if isinstance(one, Question):
        return one.question, one.context
    if isinstance(one, Prompt):
        return tuple(text for _, text in one.messages) or tuple(text for text in (one.text, one.context) if text)
    return one if isinstance(one, tuple) and all(isinstance(part, str) for part in one) else None


def measure(task: Task[Any], examples: Examples, processor: Any) -> tuple[Lengths, Lengths | None]:
    """Returns how long inputs are, and targets, where these are texts with a limit of their own.

    Args:
        task: Says what is read together: a language model reads a response behind its prompt.
        examples: Whose inputs `texts_of` takes apart.
        processor: The tokenizer; words are counted without one.
    """
    settings = task.settings
    read, written = _in_words(task, examples) if processor is None else _in_tokens(task, examples, processor)
    unit = "words" if processor is None else "tokens"
    limit, of_sources, own = (getattr(settings, name, None) for name in LIMITS)
    limit = of_sources if limit is None else limit
    return _lengths(unit, read, limit), None if own is None else _lengths(unit, written, own)


def _in_words(task: Task[Any], examples: Examples) -> tuple[list[int], list[int]]:
    read = [_count(texts_of(one) or ()) for one in examples.inputs]
    if not isinstance(task.settings, CausalSettings | Seq2SeqSettings):
        return read, []
    written = [_count([target]) for target in examples.targets]
    if isinstance(task.settings, CausalSettings):
        read = [sum(both) for both in zip(read, written, strict=True)]
    return read, written


def _in_tokens(task: Task[Any], examples: Examples, processor: Any) -> tuple[list[int], list[int]]:
    uncut = {name: UNCUT for name in LIMITS if hasattr(task.settings, name)}
    whole = dataclasses.replace(task, settings=task.settings.model_copy(update=uncut))
    features = whole.judged(examples, processor)
    written = [len(ids) for ids in features["labels"]] if isinstance(task.settings, Seq2SeqSettings) else []
    return [len(ids) for ids in features["input_ids"]], written


def _count(texts: Sequence[str]) -> int:
    return sum(len(text.split()) for text in texts)


def _lengths(unit: str, sizes: Sequence[int], limit: int | None) -> Lengths:
    values = np.asarray(sizes)
    cut = None if limit is None else float((values > limit).mean())
    median, p95 = float(np.median(values)), float(np.percentile(values, 95))
    return Lengths(unit, int(values.min()), median, p95, int(values.max()), limit, cut)
