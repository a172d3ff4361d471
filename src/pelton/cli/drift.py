"""`pelton drift`: whether new inputs are like those that a run learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def drift(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file with the task's columns; labels are not needed.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text; may be repeated, and a hundred are needed.")] = None,
    pair: Annotated[list[str] | None, typer.Option(help="Goes with each --text: a pair's second text.")] = None,
    fail_on: Annotated[
        Literal["watch", "act"] | None,
        typer.Option(help="Exit with 1 from this level on, or where examples are too few to say; for CI."),
    ] = None,
) -> None:
    """Compare a run's gates on new examples with those it was trained for; says whether anything is due."""
    if (text is None) == (data is None):
        raise typer.BadParameter("give either --text or --data")
    if len(pair or text or []) != len(text or []):
        raise typer.BadParameter("give one --pair for each --text")
    from pelton.cli import show
    from pelton.compress.drift import drift_run

    found = drift_run(run, data, texts=text or [], pairs=pair)
    show.drift(found)
    failing = {None: (), "watch": ("watch", "act", "unknown"), "act": ("act", "unknown")}[fail_on]
    if found.level in failing:
        raise typer.Exit(1)
