"""The exceptions of Pelton: one tree, each message says what came, what was expected and what to do.

PeltonError
├── SpecError          a value in a method, gate or adapter configuration breaks a law
│   ├── UnknownName    a method, gate, site, key, recipe or adapter name that does not exist
│   └── ArgumentError  an argument of a wrong type, or one too many; a TypeError, too
│       └── UnknownArgument  an argument that does not exist; an UnknownName, too
├── AnatomyError       a backbone without blocks, or without a site that was asked for
├── AdapterError       an adapter that cannot be saved, loaded, switched or merged
├── RecipeError        a recipe that cannot be read, or that asks for what does not exist
├── DataError          a data file, with its row and column
├── TrainingError      a run that cannot start, go on or be resumed
└── StudyError         a study that cannot start or go on, or of which nothing came
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeltonError(Exception):
    """The root: catch it to catch everything that Pelton raises on purpose."""


class SpecError(PeltonError, ValueError):
    """A value in a configuration breaks a law."""


class UnknownName(SpecError):  # noqa: N818 - reads as the sentence it prints
    """A name that is not in the list of what exists."""


class ArgumentError(SpecError, TypeError):
    """An argument is of a type that cannot be taken, or is given twice."""


class UnknownArgument(UnknownName, ArgumentError):  # noqa: N818 - likewise
    """An argument that is not in the list of those that exist."""


class AnatomyError(PeltonError, ValueError):
    """A backbone lacks blocks or sites."""


class AdapterError(PeltonError, ValueError):
    """An adapter cannot be saved, loaded, switched or merged."""


class RecipeError(PeltonError, ValueError):
    """A recipe cannot be read or run."""


class DataError(PeltonError, ValueError):
    """A data file does not hold what a task needs."""


class TrainingError(PeltonError, RuntimeError):
    """A run cannot start, go on or be resumed."""


class StudyError(PeltonError, RuntimeError):
    """A study cannot start or go on, or nothing came of it."""


def nearest(name: object, known: Iterable[str], likeness: float = 0.5) -> str | None:
    """Returns the known name that is most like `name`, or None when nothing is alike (0 not at all, 1 equal)."""
    found = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=likeness)
    return found[0] if found else None


def unknown(
    what: str, name: object, known: Iterable[str], hint: str | None = None, error: type[UnknownName] = UnknownName
) -> UnknownName:
    """Builds the error for an unknown name.

    Args:
        what: what it is the name of.
        name: what was given.
        known: the names that exist, all of which are listed.
        hint: sentences that say what to write instead; the nearest known name when not given.
        error: the class of the error.
    """
    names = sorted(known)
    if hint is None:
        guess = nearest(name, names)
        hint = f"Did you mean {guess!r}?" if guess else ""
    said = f" {hint}" if hint else ""
    return error(f"Unknown {what} {name!r}.{said} Known: {', '.join(names) or 'none'}.")
