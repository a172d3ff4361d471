"""A shipped name or a YAML file, with overrides, becomes a recipe; every mistake is one line that says what to type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pelton.errors import RecipeError, nearest, unknown
from pelton.tasks.load import TASK_KINDS
from pelton.training.recipe import Recipe


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that come with Pelton, by name."""
    folder = Path(str(resources.files("pelton") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a recipe.

    Args:
        source: The name of a shipped recipe, or the path of a YAML file.
        overrides: `a.b.c=value` with the value in YAML, applied in order.

    Raises:
        RecipeError: the recipe cannot be read, or has an unknown key or a value that breaks a law.
    """
    path = _find(source)
    values = _read(path)
    for override in overrides:
        _apply(values, override)
    return parse_recipe(values, str(path if _is_path(source) else source))


def parse_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """Checks values against the laws of a recipe; `source` is what errors call them."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"Recipe {source}: {_explain(error)}") from error


def dump_recipe(recipe: Recipe) -> str:
    """Returns a recipe as YAML, with every value that was left to its default."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _is_path(source: str | Path) -> bool:
    return isinstance(source, Path) or source.endswith((".yaml", ".yml")) or "/" in source


def _find(source: str | Path) -> Path:
    known = shipped_recipes()
    if not _is_path(source) and source not in known:
        raise RecipeError(str(unknown("recipe", source, known)))
    path = Path(source).expanduser() if _is_path(source) else known[str(source)]
    if not path.is_file():
        raise RecipeError(f"Recipe {path} does not exist. Shipped recipes: {', '.join(known)}.")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"Recipe {path} is not UTF-8 YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"Recipe {path} must hold keys and values, but got {type(values).__name__}.")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Sets one `a.b.c=value`."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"An override looks like training.epochs=3, but got {override!r}.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"The value of {override!r} is not YAML: {' '.join(str(error).split())}") from error
    set_value(values, key.strip(), value, override)


def set_value(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Sets one value of a recipe's values in place; sections that are absent or null are made.

    Args:
        values: A recipe's.
        key: `a.b.c`, where a position indexes a list.
        value: Any that YAML has.
        source: What errors call what asked for it.
    """
    *sections, last = key.split(".")
    target: Any = values
    for section in sections:
        target = _step(target, section, source)
    if isinstance(target, list):
        target[_position(target, last, source)] = value
    else:
        target[last] = value


def _step(target: Any, section: str, override: str) -> Any:
    if isinstance(target, list):
        return target[_position(target, section, override)]
    if target.get(section) is None:
        target[section] = {}
    if not isinstance(target[section], dict | list):
        raise RecipeError(f"{override!r} asks for keys inside {section!r}, which is {target[section]!r}.")
    return target[section]


def _position(target: list[Any], text: str, override: str) -> int:
    if not text.isdecimal() or int(text) >= len(target):
        raise RecipeError(f"{override!r}: expected a position from 0 to {len(target) - 1}, but got {text!r}.")
    return int(text)


def _explain(error: ValidationError) -> str:
    """Returns the first mistake in one line: the key, what came, what was expected or the nearest known key."""
    first = error.errors()[0]
    path = _keys(first["loc"])
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = list(_section(first["loc"][:-1]).model_fields)
        guess = nearest(path[-1], known)
        hint = f" Did you mean {'.'.join([*path[:-1], guess])!r}?" if guess else ""
        return f"unknown key {key!r}.{hint} Known: {', '.join(known)}."
    if first["type"] == "union_tag_invalid":
        return str(unknown("task.kind", first["ctx"]["tag"], TASK_KINDS))
    if first["type"] == "missing":
        return f"{key!r} is missing. Set it in the file or with --set {key}=VALUE."
    law = first["msg"].removeprefix("Value error, ")
    law = f"{law[0].lower()}{law[1:]}"
    if isinstance(first["input"], Mapping):  # a law between keys, which it names itself
        return f"{key}: {law}." if key else f"{law}."
    return f"{key}: {law}, but got {first['input']!r}."


def _keys(places: Sequence[int | str]) -> list[str]:
    """Returns the keys as they are written; pydantic puts the kind of a task between `task` and its keys."""
    return [str(part) for place, part in enumerate(places) if not (place == 1 and part in TASK_KINDS)]


def _section(places: Sequence[int | str]) -> type[BaseModel]:
    """Returns the model of a section such as `training`."""
    model: type[BaseModel] = Recipe
    for part in places:
        if part in TASK_KINDS:
            model = TASK_KINDS[str(part)]
            continue
        options = _options(model.model_fields[str(part)].annotation)
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return model


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
