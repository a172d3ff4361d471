"""One table per family of specs: a kind's name and the frozen dataclass that configures it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

from pelton.arguments import Strict, check_types, parameters
from pelton.errors import ArgumentError, SpecError, unknown


@dataclasses.dataclass(frozen=True)
class Spec(Strict):
    """The frozen hyperparameters of one method or gate; serialises to plain JSON with its `kind`."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        """Checks that every value is of its field's type; subclasses that check more call this first."""
        check_types(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values, `kind` first; tuples become lists."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"kind": self.kind} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds the spec from JSON values; an unknown key is an error that names the nearest one.

        Raises:
            SpecError: a key is unknown, or a value is of a type that the spec cannot take.
        """
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "kind"}
        names = parameters(cls)
        for key in given:
            if key not in names:
                raise unknown(f"key of {cls.kind!r}", key, names, cls.advice(key))
        try:
            return cls(**given)
        except TypeError as error:
            reason = str(error).removesuffix(".")
            raise ArgumentError(f"{cls.kind!r} cannot be made from {given!r}: {reason}.") from error


S = TypeVar("S", bound=Spec)


class Registry(Generic[S]):
    """Kinds by name. Outsiders add their own with one call of `register`."""

    def __init__(self, what: str, base: type[S]) -> None:
        """Makes an empty table of `what` ("method", "gate"), whose entries subclass `base`."""
        self.what = what
        self.base = base
        self._kinds: dict[str, type[S]] = {}

    def register(self, spec: type[S]) -> type[S]:
        """Adds a spec class under its `kind`; usable as a decorator.

        Raises:
            SpecError: the class is not a frozen dataclass of this family, has no `kind`, or its kind is taken.
        """
        kind = getattr(spec, "kind", None)
        if not (isinstance(spec, type) and issubclass(spec, self.base)):
            raise SpecError(f"A {self.what} must subclass {self.base.__name__}, but got {spec!r}.")
        if not isinstance(kind, str) or not kind.isidentifier():
            raise SpecError(
                f"{spec.__name__}.kind must be a name such as 'lora', but got {kind!r}. Set it in the class."
            )
        if not dataclasses.is_dataclass(spec) or "__dataclass_fields__" not in vars(spec):
            raise SpecError(f"{spec.__name__} must be decorated with @dataclass(frozen=True).")
        if kind in self._kinds:
            taken = self._kinds[kind]
            raise SpecError(
                f"A {self.what} named {kind!r} exists already ({taken.__module__}.{taken.__qualname__}). "
                "Choose another kind."
            )
        self._kinds[kind] = spec
        return spec

    def unregister(self, kind: str) -> None:
        """Takes a kind out again (plugins that are unloaded, tests)."""
        self[kind]
        del self._kinds[kind]

    def __getitem__(self, kind: str) -> type[S]:
        """Returns the spec class of a kind; an unknown kind is an error with the nearest one."""
        if kind not in self._kinds:
            raise unknown(self.what, kind, self._kinds)
        return self._kinds[kind]

    def __iter__(self) -> Iterator[str]:
        """Iterates over the kinds in the order of registration."""
        return iter(self._kinds)

    def parse(self, value: S | str | Mapping[str, Any]) -> S:
        """Turns a spec, a kind's name or a `{"kind": …}` mapping into a spec.

        Raises:
            SpecError: the value is none of these, or no spec can be made of it.
        """
        if isinstance(value, self.base):
            return value
        if isinstance(value, str):
            return self[value]()
        if isinstance(value, Mapping):
            if "kind" not in value:
                raise SpecError(f"A {self.what} needs a 'kind', but got {dict(value)!r}. Known: {', '.join(self)}.")
            return self[str(value["kind"])].from_dict(value)
        other: object = value  # what is here is none of what the annotation says
        advice = f" Write {other.__name__}()." if isinstance(other, type) and issubclass(other, self.base) else ""
        raise SpecError(f"A {self.what} is a spec, a name or a mapping with a 'kind', but got {value!r}.{advice}")


def require(condition: bool, law: str, **values: object) -> None:
    """Raises SpecError with the law and the values that broke it, unless `condition` holds."""
    if not condition:
        got = ", ".join(f"{k}={v!r}" for k, v in values.items())
        raise SpecError(f"`{law}` must hold, but got {got}.")


def require_size(**values: object) -> None:
    """Raises SpecError unless every value is a whole number above 0."""
    for name, value in values.items():
        require(isinstance(value, int) and not isinstance(value, bool), f"{name} is a whole number", **{name: value})
        require(cast(int, value) > 0, f"{name} > 0", **{name: value})
