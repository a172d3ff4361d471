"""Texts and pairs of texts: checked, then tokenised and cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pelton.errors import DataError
from pelton.tasks.base import Collator
from pelton.tasks.columns import Columns, find_columns
from pelton.tasks.settings import TextSettings
from pelton.tasks.tables import Table

Texts = tuple[str, ...]
SettingsT = TypeVar("SettingsT", bound=TextSettings)

SHORTEN = {"longest": "longest_first", "first": "only_first", "second": "only_second"}


def resolve_columns(settings: SettingsT, table: Table) -> SettingsT:
    """Writes into settings the columns that were found."""
    columns = find_columns(table, settings.text_columns, settings.label_column)
    return settings.model_copy(update={"text_columns": columns.texts, "label_column": columns.label})


def columns_of(settings: TextSettings) -> Columns:
    """Returns the columns of resolved settings."""
    if settings.text_columns is None or settings.label_column is None:
        raise DataError("The run's recipe.yaml lacks task.text_columns or task.label_column. Was it edited?")
    return Columns(settings.text_columns, settings.label_column)


def check_texts(table: Table, columns: Sequence[str]) -> list[Texts]:
    """Returns the texts of a table; one that is empty or no text is an error that names its cell."""
    if not len(table):
        raise DataError(f"{table.name} is empty: expected at least one row.")
    for column in columns:
        for row, text in enumerate(table.column(column)):
            if not isinstance(text, str):
                what = "nothing" if text is None else f"{type(text).__name__} {text!r}"
                raise DataError(f"{table.where(row, column)}: expected a text, but got {what}.")
            if not text.strip():
                raise DataError(f"{table.where(row, column)}: the text is empty. Remove the row or fill it in.")
    return list(zip(*(table.columns[column] for column in columns), strict=True))


def typed_texts(settings: TextSettings, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Texts]:
    """Makes inputs of what was typed; as many texts an example as the task has columns."""
    columns = columns_of(settings).texts
    given = [texts] if pairs is None else [texts, pairs]
    if len(given) != len(columns):
        raise DataError(
            f"An example of this task has {len(columns)} text(s) ({', '.join(columns)}), but got {len(given)}."
        )
    for field in given:
        require_texts(field)
    return list(zip(*given, strict=True))


def require_texts(texts: Sequence[str]) -> list[str]:
    """Returns what was typed, where each is a text; one that is empty or no text is an error that counts to it."""
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise DataError(f"Text {number}: expected a text, but got {type(text).__name__} {text!r}.")
        if not text.strip():
            raise DataError(f"Text {number} is empty. Leave it out or fill it in.")
        require_unicode(text, f"Text {number}")
    return list(texts)


def require_unicode(text: str, name: str) -> None:
    """Raises DataError where a text holds bytes that no character stands for, as a terminal passes them on."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} is not UTF-8, from character {error.start + 1} on: {text!r}. Encode it as UTF-8."
        ) from error


def tokenise(texts: Sequence[Texts], tokenizer: Any, settings: TextSettings) -> dict[str, Any]:
    """Tokenises texts or pairs and cuts what is longer than `max_length`; nothing is padded."""
    side = tokenizer.truncation_side
    tokenizer.truncation_side = "right" if settings.keep == "head" else "left"
    try:
        if settings.shorten != "longest" and texts and len(texts[0]) == 2:
            return _cut_one(texts, tokenizer, settings)
        return _cut(texts, tokenizer, settings.max_length, SHORTEN["longest"])
    finally:
        tokenizer.truncation_side = side


def _cut(texts: Sequence[Texts], tokenizer: Any, length: int, strategy: str) -> dict[str, Any]:
    fields = [list(field) for field in zip(*texts, strict=True)]
    return dict(tokenizer(*fields, truncation=strategy, max_length=length))


def _cut_one(texts: Sequence[Texts], tokenizer: Any, settings: TextSettings) -> dict[str, Any]:
    """Cuts one text of each pair; both of a pair whose other text leaves no room for it."""
    whole = [pair[1 if settings.shorten == "first" else 0] for pair in texts]
    room = settings.max_length - tokenizer.num_special_tokens_to_add(pair=True)
    sizes = [len(ids) for ids in tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]]
    strategies = [SHORTEN["longest" if size >= room else settings.shorten] for size in sizes]
    columns: dict[str, Any] = {}
    for strategy in dict.fromkeys(strategies):
        rows = [row for row, wanted in enumerate(strategies) if wanted == strategy]
        for name, values in _cut([texts[row] for row in rows], tokenizer, settings.max_length, strategy).items():
            column = columns.setdefault(name, [None] * len(texts))
            for row, value in zip(rows, values, strict=True):
                column[row] = value
    return columns


def full_texts(features: Any, settings: TextSettings, split: str) -> tuple[str, ...]:
    """Counts, in a sentence, the texts of a split that are as long as they may be."""
    full = sum(len(ids) >= settings.max_length for ids in features["input_ids"])
    note = f"{full} of {len(features)} {split} texts fill task.max_length; what is longer was cut"
    return (note,) if full else ()


def sequence_model(head: Literal["pooler", "mean"]) -> Any:
    """Returns the class that loads a backbone with one vector a text: transformers' own, or mean pooling."""
    from transformers import AutoModelForSequenceClassification

    from pelton.tasks.heads import MeanPoolingClassifier

    return MeanPoolingClassifier if head == "mean" else AutoModelForSequenceClassification


def pad_texts(tokenizer: Any) -> Collator:
    """Returns what pads to the longest text of a batch."""
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)  # type: ignore[no-any-return]
