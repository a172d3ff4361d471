"""What a study found, in its folder: tables, plots, and recipes that `pelton fit` runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pelton.search.census import Lineage
from pelton.search.plots import plot
from pelton.search.study import Study
from pelton.training.loading import dump_recipe

COSTS = ("parameters", "latency", "latency_spread", "steps", "train_seconds", "run")


def trial_table(study: Study) -> pd.DataFrame:
    """Returns one row a trial: its state, what it is compared by, its values by recipe key, what it cost."""
    table = pd.DataFrame([_row(study, lineage) for lineage in study.trials()])
    return table.drop(columns=[key for key in COSTS if key in table and table[key].isna().all()])


def write_report(study: Study) -> list[Path]:
    """Writes the tables, the plots and the best recipes; returns their paths.

    Raises:
        StudyError: no trial finished; the tables are written.
    """
    table = trial_table(study)
    rows, text = study.folder / "trials.csv", study.folder / "trials.md"
    table.to_csv(rows, index=False)
    text.write_text(markdown(table) + "\n", encoding="utf-8")
    return [rows, text, *write_recipes(study), *plot(study)]


def write_recipes(study: Study) -> list[Path]:
    """Writes the recipe of the best trial, and those of a Pareto front into `front`; returns the best one's path."""
    best = study.best()
    paths = [study.folder / "best.yaml"]
    if len(study.plan.objectives) > 1:
        (study.folder / "front").mkdir(exist_ok=True)
        for old in (study.folder / "front").glob("trial-*.yaml"):
            old.unlink()
        paths += [study.folder / "front" / f"trial-{lineage.root:04d}.yaml" for lineage in best]
    for path, lineage in zip(paths, [best[0], *best], strict=False):
        head = f"# {describe(study, lineage)}: chosen on validation rows, so its score is too good.\n"
        path.write_text(head + dump_recipe(study.recipe_of(lineage.last)), encoding="utf-8")
    return paths[:1]


def describe(study: Study, lineage: Lineage) -> str:
    """Says what a trial is and what it gave, in one line."""
    if lineage.state != "finished":
        return f"trial {lineage.root} {lineage.state}: {lineage.reason}"
    values = zip(study.plan.objectives, lineage.last.values, strict=True)
    return f"trial {lineage.root}: " + ", ".join(f"{_name(study, name)} {value:.5g}" for name, value in values)


def markdown(table: pd.DataFrame) -> str:
    """Returns a table as Markdown; numbers have five digits."""
    lines = [_line(table.columns), _line(["---"] * len(table.columns))]
    return "\n".join([*lines, *(_line(row) for row in table.itertuples(index=False))])


def _line(cells: Any) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.5g}"
    return "–" if value is None else str(value).replace("|", "/")


def _name(study: Study, objective: str) -> str:
    return f"validation {study.plan.metric}" if objective == "quality" else objective


def _row(study: Study, lineage: Lineage) -> dict[str, Any]:
    trial, finished = lineage.last, lineage.state == "finished"
    values: Sequence[float | None] = trial.values if finished else [None] * len(study.plan.objectives)
    costs = {key: trial.user_attrs.get(key) for key in COSTS}
    known = {key: value for key, value in costs.items() if key not in study.plan.objectives}
    reason = lineage.reason if lineage.state in ("failed", "stopped") else ""
    stored = {key: value for key, value in study.plan.space.values(trial.params).items() if key in trial.params}
    begun = {"trial": lineage.root, "state": lineage.state, "tries": len(lineage.tries), "reason": reason}
    return {**begun, **dict(zip(study.plan.objectives, values, strict=True)), **stored, **known}
