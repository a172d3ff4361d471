"""A recipe with other values: what a trial trains, and whether every value of a space can be trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pelton.errors import PeltonError, StudyError, nearest
from pelton.search.space import Range, Space
from pelton.training.backbone import adapter_config
from pelton.training.loading import parse_recipe, set_value
from pelton.training.prepare import Prepared
from pelton.training.recipe import Recipe
from pelton.tuner.controls import tuners

METHODS = ("adapter", "methods")


def explicit(prepared: Prepared) -> Recipe:
    """Returns a recipe that lists its methods and its gate instead of naming a preset, so that keys reach them."""
    found = tuners(prepared.model)
    if not found or prepared.recipe.adapter is None:
        return prepared.recipe
    config = found[0].peft_config["default"]
    adapter = prepared.recipe.adapter.model_copy(
        update={
            "preset": None,
            "methods": [spec.to_dict() for spec in config.specs],
            "gate": config.gate_spec.to_dict(),
        }
    )
    return prepared.recipe.model_copy(update={"adapter": adapter})


def variant(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Returns a recipe with other values.

    Args:
        recipe: One that `explicit` gave.
        values: By key, where `adapter.methods.lora.rank` names a method by its kind.

    Raises:
        PeltonError: a key that does not exist, or values that break a law.
    """
    changed = copy.deepcopy(recipe.model_dump(mode="json"))
    for key, value in values.items():
        set_value(changed, _by_position(key, recipe), value, f"{key}={value}")
    found = parse_recipe(changed, recipe.name)
    if found.adapter is not None:
        adapter_config(found.adapter)
    return found


def value_at(recipe: Recipe, key: str) -> Any:
    """Returns a recipe's value at a key; None where a section on the way is absent."""
    value: Any = recipe.model_dump(mode="json")
    for part in _by_position(key, recipe).split("."):
        if isinstance(value, list):
            value = value[int(part)] if part.isdecimal() and int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def require_space(recipe: Recipe, space: Space) -> None:
    """Checks each value of a space alone: fixed ones, ends of ranges, choices.

    Raises:
        StudyError: a key that does not exist, or a value that breaks a law.
    """
    for key, value in space.fixed.items():
        _require(recipe, key, value)
    for key, dimension in space.searched.items():
        for value in dimension.corners:
            _require(recipe, key, value)
        if isinstance(dimension, Range) and not dimension.whole and type(value_at(recipe, key)) is int:
            raise StudyError(
                f"Space, key {key!r}: expected whole numbers, but got {dimension.written()}. Write its ends without a "
                "point."
            )


def typed(recipe: Recipe, space: Space) -> Space:
    """Returns a space whose whole ends, such as `{low: 0, high: 1}`, are real numbers where the recipe's value is."""
    searched = {
        key: Range(float(one.low), float(one.high), one.log)
        if isinstance(one, Range) and isinstance(value_at(recipe, key), float)
        else one
        for key, one in space.searched.items()
    }
    return Space(searched, space.fixed, space.notes)


def _require(recipe: Recipe, key: str, value: Any) -> None:
    try:
        variant(recipe, {key: value})
    except PeltonError as error:
        text = str(error).removeprefix(f"Recipe {recipe.name}: ")
        raise StudyError(f"Space, key {key!r} with value {value!r}: {text}") from error


def _by_position(key: str, recipe: Recipe) -> str:
    """Writes `adapter.methods.lora.rank` with the position of the method."""
    parts = key.split(".")
    if tuple(parts[:2]) != METHODS or len(parts) < 3 or parts[2].isdecimal():
        return key
    kinds = kinds_of(recipe)
    if parts[2] not in kinds:
        guess = nearest(parts[2], kinds)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise StudyError(f"the adapter has no {parts[2]!r}.{hint} It has: {', '.join(kinds) or 'no methods'}.")
    return ".".join([*METHODS, str(kinds.index(parts[2])), *parts[3:]])


def kinds_of(recipe: Recipe) -> list[str]:
    """Returns the kinds of the methods that a recipe lists."""
    methods = [] if recipe.adapter is None else recipe.adapter.methods or []
    return [str(method["kind"]) for method in methods]
