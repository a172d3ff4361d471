"""How many tokens a backbone has positions for, and whether a task asks for more."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from pelton.errors import DataError
from pelton.tasks.base import Task
from pelton.tasks.settings import TextSettings
from pelton.tasks.tokens import TokenSettings

PADDING = 4
"""Rows of a table of positions, at most, that are no positions: OPT and BART leave out two, RoBERTa the padding's."""
TaskT = TypeVar("TaskT", bound=Task[Any])


def room(model: Any) -> int | None:
    """Returns how many tokens a model reads at most; None where its positions are relative and any number goes."""
    config = model.config.get_text_config()
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None or not getattr(config, "position_biased_input", True):  # DeBERTa may have relative ones alone
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return limit - module.padding_idx - 1  # RoBERTa counts from behind the padding's position
    return limit


def require_positions(model: Any, key: str, length: int | None, more: str = "") -> None:
    """Raises DataError where the setting `key` asks for more tokens than the model reads."""
    limit = room(model)
    if limit is not None and length is not None and length > limit:
        raise DataError(f"task.{key} is {length}, but the backbone has {limit} positions. Lower it{more}.")


def within(task: TaskT, model: Any) -> TaskT:
    """Returns a task that cuts its texts where the backbone's positions end, if not before.

    Where positions are computed, such as rotary ones, a recipe may ask for more than the backbone was trained on.

    Raises:
        DataError: the recipe itself asks for a larger `max_length` than there are learned positions.
    """
    settings, limit = task.settings, room(model)
    if not isinstance(settings, TextSettings | TokenSettings) or limit is None or settings.max_length <= limit:
        return task
    if "max_length" in settings.model_fields_set:
        if _tabled(model, limit):
            require_positions(model, "max_length", settings.max_length)
        return task
    return replace(task, settings=settings.model_copy(update={"max_length": limit}))


def _tabled(model: Any, limit: int) -> bool:
    """Tells whether positions are looked up in a table, which ends."""
    tables = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and re.search("pos|wpe", name)]
    return any(limit <= table.num_embeddings <= limit + PADDING for table in tables)
