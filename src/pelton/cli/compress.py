"""`pelton freeze`, `prune`, `shrink`, `revive`, `fold`, `combine` and `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pelton.errors import TrainingError

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
        Literal["gate", "taylor", "leave-one-out", "contribution"],
        typer.Option(
            help="What methods are weighed by: open gates, gradients, the score without, or training's notes."
        ),
    ] = "taylor",
    threshold: Annotated[
        float | None,
        typer.Option(help="What weighs less goes; if nothing is said 0.05, of importances 0.05 of the largest."),
    ] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="So many methods stay, over all blocks.")] = None,
    budget_params: Annotated[int | None, typer.Option(min=1, help="So many parameters of methods may stay.")] = None,
    budget_latency: Annotated[
        float | None,
        typer.Option(
            min=1.0, help="So many times the plain backbone's inference time may be taken, such as 1.05; measured."
        ),
    ] = None,
) -> None:
    """Take the methods that help least out of a run's blocks; says what that costs."""
    from pelton.cli import show
    from pelton.compress.runs import prune_run

    show.change(
        prune_run(
            run, by=by, threshold=threshold, keep=keep, budget_params=budget_params, budget_latency=budget_latency
        )
    )


def shrink(
    run: RunPath,
    energy: Annotated[float | None, typer.Option(help="Each part keeps this share of what its units do.")] = None,
    share: Annotated[float | None, typer.Option(help="Each part keeps this share of its units.")] = None,
) -> None:
    """Take ranks, bottleneck units and prefix positions out of a run's methods; says what that costs."""
    from pelton.cli import show
    from pelton.compress.runs import shrink_run

    show.change(shrink_run(run, energy=energy, share=share))


def revive(
    run: RunPath,
    last: Annotated[bool, typer.Option("--last", help="Undo the last pass only.")] = False,
) -> None:
    """Bring back what passes took from a run's adapter, bit for bit."""
    from pelton.cli import show
    from pelton.compress.runs import revive_run

    show.change(revive_run(run, last=last))


def fold(
    run: RunPath,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="A new folder; RUN/folded if not given.")] = None,
) -> None:
    """Fold a run's adapter into its backbone and write an ordinary model; the run stays."""
    from pelton.cli import show
    from pelton.compress.runs import fold_run

    place = run / "folded" if output is None else output
    change, whole = fold_run(run, place)
    show.change(change)
    print(place if whole else f"{place / 'model'} and what does not fold, {place / 'adapter'}")
    if "MeanPoolingClassifier" in (place / ("" if whole else "model") / "config.json").read_text(encoding="utf-8"):
        print("Its mean-pooling head is pelton.tasks.heads.MeanPoolingClassifier; load it with that.")


def combine(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Two or more runs.", show_default=False)],
    output: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the adapter.", show_default=False)],
    weights: Annotated[str | None, typer.Option(help="One for each run, by comma; all the same if not given.")] = None,
    how: Annotated[
        Literal["average", "arithmetic", "ties", "dare"], typer.Option(help="Task arithmetic, TIES and DARE add up.")
    ] = "average",
    density: Annotated[float, typer.Option(help="The share of entries that ties and dare keep.")] = 0.5,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the new LoRA; the largest of theirs if not given.")
    ] = None,
) -> None:
    """Make one adapter of several runs on one backbone; the runs stay."""
    from pelton.cli import show
    from pelton.compress.together import combine_runs

    try:
        shares = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"expected numbers such as 0.5,0.5, but got {weights!r}") from error
    found, values = combine_runs(runs, output, weights=shares, how=how, density=density, rank=rank)
    if found.lost:
        print(f"{found.lost_in_all:.2%} of the energy of LoRA's products was cut off by its rank")
    show.metrics(values)
    print(output)


def convert(
    run: RunPath,
    to: Annotated[
        Literal["peft", "onnx"], typer.Option(help="A PEFT LoRA folder, or a folder with model.onnx for ONNX Runtime.")
    ] = "peft",
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new folder; RUN/peft or RUN/onnx if not given.")
    ] = None,
) -> None:
    """Write a run in another format: its frozen LoRA as a standard PEFT folder, or its whole model as ONNX."""
    place = run / to if output is None else output
    if to == "onnx":
        from pelton.export.onnx import run_to_onnx

        print(run_to_onnx(run, place))
        return
    if place.exists():
        raise TrainingError(f"{place} exists. Name a new folder with --output.")
    from pelton.export.peft import to_peft
    from pelton.training.run import Run

    print(to_peft(Run.load(run).model, place))
