"""A recipe, a data file, a folder or a hub name, read as a run would read it, and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pelton.errors import RecipeError
from pelton.tasks.check import check_data
from pelton.tasks.files import READERS
from pelton.tasks.findings import DataReport
from pelton.tasks.guess import guess
from pelton.tasks.opening import extension
from pelton.tasks.settings import TaskSettings
from pelton.tasks.splits import PREFIX, load_splits
from pelton.training.backbone import load_processor, quiet
from pelton.training.loading import load_recipe, parse_recipe, shipped_recipes
from pelton.training.scratch import is_new


def examine(source: str, overrides: Sequence[str] = (), backbone: str | None = None) -> DataReport:
    """Measures what a recipe would train on, or data of which no recipe exists yet.

    Args:
        source: A shipped recipe, a YAML file, a data file or folder, or a hub name.
        overrides: `task.key=value`; for data, `task.kind` is guessed from the columns when it is not among them.
        backbone: Whose tokens are counted; a recipe's own backbone when not given, words for data.

    Raises:
        PeltonError: the recipe or the data are broken.
    """
    said: tuple[str, ...] = ()
    if _is_data(source):
        settings, said = _describe(source, overrides)
    else:
        recipe = load_recipe(source, overrides)
        settings, backbone = recipe.task, backbone or recipe.backbone
    with quiet():
        words = backbone is None or is_new(backbone)  # a new backbone has no tokenizer yet
        report = check_data(settings, None if words else partial(load_processor, str(backbone)))
    return replace(report, notes=(*said, *report.notes))


def _is_data(source: str) -> bool:
    if source in shipped_recipes() or source.endswith((".yaml", ".yml")):
        return False
    path = Path(source).expanduser()
    return path.exists() or source.startswith(PREFIX) or extension(path) in READERS or "/" in source


def _describe(source: str, overrides: Sequence[str]) -> tuple[TaskSettings, tuple[str, ...]]:
    """Makes settings of a data source; the backbone of the recipe that they are checked as is never loaded.

    Returns:
        The settings, and what was guessed of them beside the kind, in sentences.
    """
    values = {"data": source, **dict(_read(override) for override in overrides)}
    guessed = {} if "kind" in values else _guess(source, values)
    said = tuple(
        f"Read with task.{key}={value}, which a recipe has to say as well."
        for key, value in guessed.items()
        if key != "kind" and key not in values
    )
    return _task(source, {**guessed, **values}), said


def _guess(source: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Looks at the training rows."""
    places = {key: value for key, value in values.items() if key in TaskSettings.model_fields and key != "streaming"}
    label = values.get("label_column")
    return guess(load_splits(_task(source, places))["train"], label if isinstance(label, str) else None)


def _task(source: str, values: Mapping[str, Any]) -> TaskSettings:
    return parse_recipe({"backbone": "none", "task": values}, source).task


def _read(override: str) -> tuple[str, Any]:
    """Takes `task.key=value` apart."""
    key, separator, text = override.partition("=")
    if not separator or not key.startswith("task."):
        raise RecipeError(f"An override of data looks like task.label_column=topic, but got {override!r}.")
    try:
        return key.removeprefix("task."), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"The value of {override!r} is not YAML: {' '.join(str(error).split())}") from error
