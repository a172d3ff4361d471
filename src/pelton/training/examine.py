"""A recipe, a data file, a folder or a hub name, read as a run would read it, and measured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import yaml

from pelton.errors import RecipeError
from pelton.tasks.check import check_data, guess_kind
from pelton.tasks.classification import ClassificationSettings
from pelton.tasks.files import READERS, extension
from pelton.tasks.findings import DataReport
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
    if _is_data(source):
        settings = _describe(source, overrides)
    else:
        recipe = load_recipe(source, overrides)
        settings, backbone = recipe.task, backbone or recipe.backbone
    with quiet():
        words = backbone is None or is_new(backbone)  # a new backbone has no tokenizer yet
        return check_data(settings, None if words else partial(load_processor, str(backbone)))


def _is_data(source: str) -> bool:
    if source in shipped_recipes() or source.endswith((".yaml", ".yml")):
        return False
    path = Path(source).expanduser()
    return path.exists() or source.startswith(PREFIX) or extension(path) in READERS or "/" in source


def _describe(source: str, overrides: Sequence[str]) -> TaskSettings:
    """Makes settings of a data source; the backbone of the recipe that they are checked as is never loaded."""
    values = {"data": source}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.startswith("task."):
            raise RecipeError(f"An override of data looks like task.label_column=topic, but got {override!r}.")
        values[key.removeprefix("task.")] = yaml.safe_load(text)
    if "kind" not in values:
        where = {key: value for key, value in values.items() if key in TaskSettings.model_fields}
        values["kind"] = guess_kind(load_splits(ClassificationSettings.model_validate(where))["train"])
    return parse_recipe({"backbone": "none", "task": values}, source).task
