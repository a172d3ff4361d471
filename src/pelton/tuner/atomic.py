"""All or nothing: whatever fails inside a pass, Ctrl-C included, the model is to the bit what it was before.

A pass changes attributes of modules: children, parameters, hooks, modes, configs. They are noted before it and put back
when it fails, containers in place and in their order. No tensor is copied for that; what writes into the values of
weights does so by `as_before.write`.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, Self, TypeVar

from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

BESIDE = ("taps", "config")
"""Attributes of modules that are objects with attributes of their own."""


class Write(Protocol):
    """A weight that changes: see `merge.Change`."""

    def kept(self) -> Tensor:
        """Returns what is there now."""

    def write(self) -> None:
        """Puts the new value in its place."""

    def put_back(self, kept: Tensor) -> None:
        """Puts back what `kept` gave."""


def atomic(change: Callable[P, R]) -> Callable[P, R]:
    """Makes a function leave the model, its first argument, as it was before when it fails."""
    first = next(iter(inspect.signature(change).parameters))

    @functools.wraps(change)
    def whole(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get(first)
        if not isinstance(model, nn.Module):
            return change(*args, **kwargs)  # which says what it expected
        with as_before(model):
            return change(*args, **kwargs)

    return whole


class as_before:  # noqa: N801 - reads as the statement it is used in
    """A context manager that puts everything back as it is now when what is inside fails.

    It is no generator: one that an exception leaves on the way out would still be closed, and undo what is done.
    """

    def __init__(self, model: nn.Module) -> None:
        """Takes note of a model."""
        modules = list(model.modules())
        beside = {id(found): found for module in modules for name in BESIDE if (found := vars(module).get(name))}
        self.notes = [_Note(thing) for thing in (*modules, *beside.values())]
        self.learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.values: list[tuple[Write, Tensor]] = []

    def __enter__(self) -> Self:
        """Begins what may fail."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Puts everything back after a failure."""
        if kind is not None:
            self.put_back()

    def write(self, changes: Sequence[Write]) -> None:
        """Changes the values of weights, and keeps what they were."""
        for change in changes:
            self.values.append((change, change.kept()))
            change.write()

    def put_back(self) -> None:
        """Makes everything what it was."""
        for change, kept in reversed(self.values):
            change.put_back(kept)
        for note in self.notes:
            note.put_back()
        for parameter, learns in self.learning:
            parameter.requires_grad = learns


class _Note:
    """The attributes of one object, and what its containers hold."""

    def __init__(self, thing: Any) -> None:
        """Takes note; containers are those of Python itself."""
        self.thing, self.attributes = thing, dict(vars(thing))
        self.containers = [
            (value, value.copy()) for value in self.attributes.values() if type(value) in (dict, OrderedDict, list, set)
        ]

    def put_back(self) -> None:
        """Gives the object its attributes back; hooks and others may hold the containers, so those stay the same."""
        for container, content in self.containers:
            container.clear()
            container.extend(content) if type(container) is list else container.update(content)
        vars(self.thing).clear()
        vars(self.thing).update(self.attributes)
