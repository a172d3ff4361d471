"""The arguments of specs and configs: whether each is known by its name, and is of its declared type.

A dataclass checks neither. `Strict` refuses a name that does not exist before the dataclass does, and says what to
write instead; `check_types` holds values against the annotations before any law compares them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import numbers
import typing
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union

from pelton.errors import ArgumentError, UnknownArgument, nearest, unknown

ALIASES = {
    "r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "sites",
    "attn_matrices": "sites",
    "layers_to_transform": "layers",
    "adapter_layers": "layers",
    "num_virtual_tokens": "prefix_length",
    "adapter_len": "prefix_length",
    "prefix_projection": "parametrisation",
    "encoder_hidden_size": "mlp_size",
    "reduction_factor": "bottleneck_size",
    "adapter_size": "bottleneck_size",
    "bottleneck_dim": "bottleneck_size",
    "non_linearity": "activation",
    "tau": "temperature",
}
"""What PEFT and AdapterHub call our arguments."""

_CONFIG = "It is an argument of PeltonConfig"
ADVICE = {
    "reduction_factor": "bottleneck_size is the width of the block, divided by reduction_factor.",
    "prefix_projection": "prefix_projection=True is parametrisation='mlp'.",
    "bias": "Biases are a method of their own: put BitFit() into the methods.",
    "fan_in_fan_out": "Leave it out: Pelton sees every weight as [out, in].",
    "use_dora": "DoRA is a method of its own: Peft(config=peft.LoraConfig(use_dora=True)).",
    "use_rslora": "Multiply alpha by rank ** 0.5 instead.",
    "init_lora_weights": "B starts at zero; pelton.initialize_from_gradients gives A values from data.",
    "modules_to_save": f"{_CONFIG}: PeltonConfig(modules_to_save=…).",
    "task_type": f"{_CONFIG}: PeltonConfig(task_type=…).",
    "inference_mode": f"{_CONFIG}: PeltonConfig(inference_mode=…).",
}
"""What is to be known of arguments that exist elsewhere."""


class Strict:
    """What refuses unknown arguments, each with the right name; a base of dataclasses."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Makes the object, once its arguments are known and none is given twice.

        Raises:
            UnknownArgument: a name that does not exist.
            ArgumentError: too many arguments.
        """
        try:  # pickle and copy give none, so that some may be missing
            inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs)
        except TypeError as error:
            names = parameters(cls)
            strangers = [name for name in kwargs if name not in names]
            if strangers:
                raise cls.refusal(strangers) from None
            raise ArgumentError(
                f"{cls.__name__} takes each of {', '.join(names)} once, but got {error}. "
                f"Name them: {cls.__name__}({', '.join(f'{name}=…' for name in names[:2])})."
            ) from None
        return super().__new__(cls)

    @classmethod
    def refusal(cls, names: Sequence[str]) -> UnknownArgument:
        """Builds the error for arguments that do not exist; it speaks of the first."""
        return unknown_argument(cls, names[0], cls.advice(names[0]))

    @classmethod
    def advice(cls, name: str) -> str:
        """Returns what to write instead of an argument that does not exist; empty where nothing is alike."""
        return " ".join(s for s in (did_you_mean(name, parameters(cls)), ADVICE.get(name)) if s)


def unknown_argument(cls: type, name: str, hint: str) -> UnknownArgument:
    """Builds the error for one argument that does not exist."""
    error = unknown(f"argument of {cls.__name__}", name, parameters(cls), hint, UnknownArgument)
    return typing.cast(UnknownArgument, error)


def parameters(cls: type) -> list[str]:
    """Returns the names of a class's arguments, in order."""
    return list(inspect.signature(cls.__init__).parameters)[1:]  # type: ignore[misc]  # of the class that is given


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Asks for the known name of what has another name elsewhere, or for the nearest one; empty where none is alike."""
    guess = ALIASES.get(name)
    if guess not in known:
        guess = None if name in ADVICE else nearest(name, known)
    return f"Did you mean {guess!r}?" if guess else ""


def check_types(owner: Any) -> None:
    """Holds the fields of a dataclass against their annotations, and makes tuples of lists where tuples are declared.

    Whole numbers, numbers (which are finite), true and false, names, choices (`Literal`), tuples of these, and unions
    are checked. Fields of other types are left to their class.

    Raises:
        ArgumentError: a value of another type.
        UnknownName: a choice that does not exist.
    """
    hints = _hints(typing.cast(Any, type(owner)))
    for field in dataclasses.fields(owner):
        hint, value = hints.get(field.name, Any), getattr(owner, field.name)
        if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
            raise unknown(field.name, value, typing.get_args(hint))
        plain = _plain(value, hint)
        if value is not field.default and not _fits(plain, hint):
            raise _mistyped(field, value, hint)
        if plain is not value:
            object.__setattr__(owner, field.name, plain)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Returns the types of a class's fields; none where an annotation names what its module does not have."""
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return {}


def _members(hint: Any) -> tuple[Any, ...]:
    """Returns the types of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else (hint,)


def _is_list(hint: Any) -> bool:
    """Returns whether a type is that of tuples of any length."""
    return typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,)


def _plain(value: Any, hint: Any) -> Any:
    """Makes Python's numbers of NumPy's, and tuples of lists where the type has tuples."""
    if isinstance(value, numbers.Real) and type(value).__module__ != "builtins":
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    items = [typing.get_args(one)[0] for one in _members(hint) if _is_list(one)]
    if items and isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        return tuple(_plain(item, items[0]) for item in value)
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value is of a type; of a type that is not known here everything is."""
    inner = typing.get_args(hint)
    if len(_members(hint)) > 1:
        return any(_fits(value, one) for one in inner)
    if typing.get_origin(hint) is Literal:
        return value in inner
    if _is_list(hint):
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return math.isfinite(value) if isinstance(value, float) else _fits(value, int)
    return isinstance(value, hint) if hint in (bool, str, NoneType) else True


def _mistyped(field: dataclasses.Field[Any], value: Any, hint: Any) -> ArgumentError:
    """Builds the error for a value of a wrong type: the law, the value, and what was meant perhaps."""
    law = " or ".join(_noun(one, field.name) for one in _members(hint))
    meant = [one for one in (_unquoted(value), [_unquoted(value)]) if _fits(_plain(one, hint), hint)]
    if meant:
        advice = f" Write {field.name}={meant[0]!r}."
    elif field.default is not dataclasses.MISSING:
        advice = f" The default is {field.name}={field.default!r}."
    else:
        advice = ""
    return ArgumentError(f"`{field.name} is {law}` must hold, but got {field.name}={value!r}.{advice}")


_ONE: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a name",
    NoneType: "None",
}
_MANY: dict[Any, str] = {int: "whole numbers", float: "finite numbers"}


def _noun(hint: Any, name: str) -> str:
    """Says what a value of a type is; a tuple of names is a list of what the field is called."""
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    return f"a list of {_MANY.get(typing.get_args(hint)[0], name)}" if _is_list(hint) else _ONE[hint]


def _unquoted(value: Any) -> Any:
    """Returns the number that a text stands for, also inside a list; anything else as it is."""
    if isinstance(value, list | tuple):
        return [_unquoted(item) for item in value]
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
