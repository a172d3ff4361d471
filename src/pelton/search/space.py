"""What a study searches: recipe keys, each with a range or a list of choices, beside keys that are fixed.

In YAML a key is written as after `--set`; methods may be named by kind instead of by position:

    adapter.methods.lora.rank: {low: 2, high: 64, log: true}
    training.schedule: {choices: [linear, cosine]}
    training.batch_size: 16
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pelton.errors import StudyError, nearest

if TYPE_CHECKING:
    import optuna

DEFAULT = "default"
"""The key of a space's file that leaves the default space out: `default: false`."""

Primitive = str | int | float | bool | None


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones where both ends are."""

    low: float
    high: float
    log: bool = False

    def suggest(self, trial: optuna.Trial, key: str) -> float:
        """Draws a number for a trial."""
        if self.whole:
            return trial.suggest_int(key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)

    def read(self, stored: Any) -> Any:
        """Returns the value of what a storage holds."""
        return stored

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def corners(self) -> tuple[float, ...]:
        """The values that stand for all when a space is checked."""
        return (self.low, self.high)

    def written(self) -> dict[str, Any]:
        """Returns what a space's file says."""
        return {"low": self.low, "high": self.high} | ({"log": True} if self.log else {})


@dataclass(frozen=True)
class Choices:
    """Some values, of any kind that YAML has."""

    values: tuple[Any, ...]

    def suggest(self, trial: optuna.Trial, key: str) -> Any:
        """Chooses a value for a trial."""
        stored = self.values if self.plain else [json.dumps(value) for value in self.values]
        return self.read(trial.suggest_categorical(key, stored))

    @property
    def plain(self) -> bool:
        """Whether a storage holds the values as they are; lists and mappings are stored as JSON."""
        return all(isinstance(value, Primitive) for value in self.values)

    def read(self, stored: Any) -> Any:
        """Returns the value of what a storage holds."""
        return stored if self.plain else json.loads(stored)

    @property
    def corners(self) -> tuple[Any, ...]:
        """The values that stand for all when a space is checked."""
        return self.values

    def written(self) -> dict[str, Any]:
        """Returns what a space's file says."""
        return {"choices": list(self.values)}


Dimension = Range | Choices


@dataclass(frozen=True)
class Space:
    """What is searched, and what is fixed beside it.

    Attributes:
        searched: By recipe key.
        fixed: By recipe key; takes the place of what the recipe says.
        notes: What the default space left out, and why, in sentences.
    """

    searched: Mapping[str, Dimension]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Returns the values of a trial by recipe key."""
        return {**self.fixed, **{key: one.suggest(trial, key) for key, one in self.searched.items()}}

    def values(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the values by recipe key of a trial that a storage holds."""
        return {**self.fixed, **{key: self.searched[key].read(value) for key, value in stored.items()}}

    def over(self, other: Space) -> Space:
        """Returns the union of both; where both name a key, this one counts."""
        mine = {*self.searched, *self.fixed}
        return Space(
            {**{key: one for key, one in other.searched.items() if key not in mine}, **self.searched},
            {**{key: value for key, value in other.fixed.items() if key not in mine}, **self.fixed},
            (*other.notes, *self.notes),
        )

    def written(self) -> dict[str, Any]:
        """Returns what a space's file says."""
        return {**{key: one.written() for key, one in self.searched.items()}, **self.fixed}


def parse_space(values: Mapping[str, Any], source: str) -> Space:
    """Reads a space.

    Args:
        values: By recipe key: a value, which is fixed, or `{low, high}`, `{low, high, log: true}` or `{choices}`.
        source: What errors call it.

    Raises:
        StudyError: a range without an end, that is empty, or with a key that a range does not have.
    """
    searched: dict[str, Dimension] = {}
    fixed: dict[str, Any] = {}
    for key, value in values.items():
        found = _dimension(f"{source}: {key}", value) if isinstance(value, Mapping) else None
        if found is None:
            fixed[str(key)] = value
        else:
            searched[str(key)] = found
    return Space(searched, fixed)


def load_space(path: Path) -> tuple[Space, bool]:
    """Reads a space's file.

    Returns:
        The space, and whether it goes over the default one (unless it says `default: false`).

    Raises:
        StudyError: as `parse_space`, or the file cannot be read.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyError(f"Space {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise StudyError(
            f"Space {path} must hold recipe keys with values, such as `training.learning_rate: {{low: 1.0e-4, "
            f"high: 1.0e-2, log: true}}`, but got {type(values).__name__}."
        )
    usual = values.pop(DEFAULT, True)
    if not isinstance(usual, bool):
        raise StudyError(f"Space {path}: {DEFAULT} says whether the default space is under this one: true or false.")
    return parse_space(values, str(path)), usual


def _dimension(name: str, value: Mapping[str, Any]) -> Dimension | None:
    """Reads a range or choices; None where a mapping is neither, and so a value."""
    keys = set(value)
    if not keys & {"low", "high", "choices"}:
        return None
    for key in keys - {"low", "high", "log", "choices"}:
        guess = nearest(key, ("low", "high", "log", "choices"))
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise StudyError(f"{name} has a key {key!r}.{hint} Expected {{low, high, log}} or {{choices}}.")
    if "choices" in keys:
        if keys != {"choices"} or not isinstance(value["choices"], list) or not value["choices"]:
            raise StudyError(f"{name}: expected {{choices: [a, b, …]}}, but got {dict(value)!r}.")
        return Choices(tuple(value["choices"]))
    return _range(name, value)


def _range(name: str, value: Mapping[str, Any]) -> Range:
    low, high, log = value.get("low"), value.get("high"), value.get("log", False)
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) and isfinite(end) for end in (low, high))
    if low is None or high is None or not numbers or not isinstance(log, bool):
        raise StudyError(f"{name}: expected numbers as in {{low: 1.0e-4, high: 1.0e-2, log: true}}, but got {value!r}.")
    if low >= high:
        raise StudyError(f"{name}: `low < high` must hold, but got (low={low}, high={high}). One value is fixed so.")
    if log and low <= 0:
        raise StudyError(f"{name}: `low > 0` must hold where log is true, but got low={low}. Leave log out.")
    return Range(low, high, log)
