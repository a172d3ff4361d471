"""`pelton freeze`, `prune` and `revive`: a run's adapter becomes smaller, and whole again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]


def freeze(
    run: RunPath,
    statistic: Annotated[
        Literal["mean", "median", "fit"],
        typer.Option(help="Of the gate values on training examples; fit minimises the change of each block's output."),
    ] = "mean",
) -> None:
    """Make a run's gates constant, measured on data; says what that costs."""
    from pelton.cli import show
    from pelton.compress.runs import freeze_run

    show.change(freeze_run(run, statistic))


def prune(
    run: RunPath,
    by: Annotated[
        Literal["gate", "taylor", "leave-one-out"],
        typer.Option(help="What methods are weighed by: open gates (constant ones), gradients, or the score without."),
    ] = "taylor",
    threshold: Annotated[float | None, typer.Option(help="What weighs less goes; 0.05 if nothing is said.")] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="So many methods stay, over all blocks.")] = None,
    budget_params: Annotated[int | None, typer.Option(min=1, help="So many parameters of methods may stay.")] = None,
) -> None:
    """Take the methods that help least out of a run's blocks; says what that costs."""
    from pelton.cli import show
    from pelton.compress.runs import prune_run

    show.change(prune_run(run, by=by, threshold=threshold, keep=keep, budget_params=budget_params))


def revive(
    run: RunPath,
    last: Annotated[bool, typer.Option("--last", help="Undo the last pass only.")] = False,
) -> None:
    """Bring back what passes took from a run's adapter, bit for bit."""
    from pelton.cli import show
    from pelton.compress.runs import revive_run

    show.change(revive_run(run, last=last))
