"""`pelton search` and `pelton recommend`: which configuration."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from pelton.search.census import Lineage
    from pelton.search.plan import Budget, StudyPlan

Stopping = Literal["hyperband", "halving", "none"]

SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
TRIALS = 20


def search(
    recipe: Annotated[str | None, typer.Argument(help="A shipped recipe or a YAML file.", show_default=False)] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Of the study in all; 20 if neither this nor --time is given.")
    ] = None,
    time: Annotated[str | None, typer.Option(metavar="2h", help="After which no trial begins: 2h, 90m, 1h30m.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe, such as training.epochs=3."),
    ] = None,
    space: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML over the default space: KEY: {low, high, log} and so on.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the study; the recipe's if not given. The same goes on.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the study's folder is made; studies if not given.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="A database for many workers; a SQLite file if not given.")
    ] = None,
    objectives: Annotated[
        str | None, typer.Option(help="By comma: quality, latency, parameters; quality if not given.")
    ] = None,
    stopping: Annotated[
        Stopping | None,
        typer.Option(help="How trials that fall behind end early; hyperband if not given."),
    ] = None,
    budget_params: Annotated[
        int | None, typer.Option(min=1, help="Trainable parameters at most; dearer trials are not trained.")
    ] = None,
    budget_latency: Annotated[
        float | None, typer.Option(help="So many times the plain backbone's inference time at most, such as 1.1.")
    ] = None,
    fresh_seeds: Annotated[
        int, typer.Option(min=0, help="In the end the best recipe is trained again with so many.")
    ] = 3,
    resume: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Go on with a study.")] = None,
) -> None:
    """Search hyperparameters of a recipe; can be killed and goes on, alone or together with others on one storage."""
    if (recipe is None) == (resume is None):
        raise typer.BadParameter("give either a recipe or --resume FOLDER")
    budgets = (budget_params, budget_latency)
    if resume is not None and (overrides or space or name or output or objectives or stopping or any(budgets)):
        raise typer.BadParameter(
            "--resume goes on as the study began: of the other options only --trials, --time, --storage and "
            "--fresh-seeds go with it"
        )
    seconds = math.inf if time is None else duration(time)
    from pelton.cli import show
    from pelton.search.final import confirm
    from pelton.search.plan import Budget
    from pelton.search.report import describe, write_report
    from pelton.search.study import Study

    if resume is not None:
        study = Study.open(resume, storage=storage)
    else:
        plan = _plan(str(recipe), overrides or [], space, objectives, stopping, Budget(budget_params, budget_latency))
        called = name or plan.recipe.name
        study = Study.start((output or Path("studies")) / called, plan, name=called, storage=storage)
        for note in plan.remarks:
            print(f"· {note}", file=sys.stderr)
    if trials is None and time is None and study.wanted is None:
        trials = TRIALS

    def tell(lineage: Lineage) -> None:
        print(describe(study, lineage), file=sys.stderr, flush=True)

    try:
        study.run(trials, seconds, told=tell)
        write_report(study)
        final = None
        if fresh_seeds:
            print(f"training the best recipe with {fresh_seeds} fresh seeds", file=sys.stderr, flush=True)
            final = confirm(study, fresh_seeds)
    except KeyboardInterrupt as error:
        print(f"pelton: Interrupted. Go on with: pelton search --resume {study.folder}", file=sys.stderr)
        raise typer.Exit(130) from error
    show.study(study, final)


def _plan(
    recipe: str,
    overrides: list[str],
    space: Path | None,
    objectives: str | None,
    stopping: Stopping | None,
    budget: Budget,
) -> StudyPlan:
    from pelton.search.plan import StudyPlan
    from pelton.search.space import Space, load_space
    from pelton.training.loading import load_recipe

    base = load_recipe(recipe, overrides)
    wanted, usual = (Space({}), True) if space is None else load_space(space)
    named = tuple(one.strip() for one in (objectives or "quality").split(",") if one.strip())
    return StudyPlan.of(
        base,
        wanted,
        usual=usual,
        objectives=named,  # type: ignore[arg-type]  # checked there
        stopping=stopping or "hyperband",
        budget=budget,
    )


def duration(text: str) -> float:
    """Returns the seconds of `2h`, `90m`, `1h30m` or `45s`."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if not parts or "".join(f"{number}{unit}" for number, unit in parts) != text or not any(float(n) for n, _ in parts):
        raise typer.BadParameter(f"expected a time such as 2h, 90m or 1h30m, but got {text!r}")
    return sum(float(number) * SECONDS[unit] for number, unit in parts)


def recommend(
    task: Annotated[
        str, typer.Option(help="One that `pelton bench` knows, such as sst2, or a kind such as text-classification.")
    ],
    examples: Annotated[int, typer.Option(min=1, help="How many there are to train on.")],
    backbone: Annotated[str | None, typer.Option(help="As in a recipe; all-MiniLM-L6-v2 if not given.")] = None,
    data: Annotated[str | None, typer.Option(help="As task.data in a recipe.")] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The recipe, a new file.")] = Path("recommended.yaml"),
) -> None:
    """Write a recipe to start from, by what the benchmark found on tasks like it; prints the rule and its rows."""
    from pelton.bench.protocol import MINILM
    from pelton.cli import show
    from pelton.search.recommend import recommend as find
    from pelton.search.recommend import write_recommendation

    found = find(task, examples, backbone or MINILM, data)
    write_recommendation(found, output)
    show.recommendation(found)
    missing = "" if found.recipe.task.data is not None else " --set task.data=DIR"
    print(f"pelton fit {output}{missing}")
