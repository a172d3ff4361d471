"""A recipe to start from: what the benchmark found best on what is most like a task.

The rule, which is printed with the rows it went by:

1. Rows of the task itself count, where two methods can be compared on it; else those of all tasks of its kind; else
   all rows. Two pairs of task and seed go before one, which has no error to doubt it by.
2. Of the measured data sizes the nearest (in its logarithm) counts at which two methods can be compared, likewise.
3. Methods are compared on the pairs of task and seed that all of them have finished; those that have finished fewer
   than half of all pairs are left out.
4. The method with the highest mean over tasks of its mean over seeds is taken, with the learning rate that it chose
   most often on held-back rows, at the steps and with the head of the benchmark.

It is a start and no promise: differences below one standard error of the pairs are noise, and those methods are named.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import pandas as pd

from pelton.bench.protocol import ELSEWHERE, MEAN_HEAD, METHODS, MINILM, TASKS, Cell, Protocol
from pelton.errors import StudyError, unknown
from pelton.tasks.glue import GLUE
from pelton.tasks.load import TASK_KINDS
from pelton.training.loading import parse_recipe
from pelton.training.recipe import Recipe

FEWEST_PAIRS = (2, 1)
"""What is looked for first, and what has to do."""
REGRESSION, CLASSIFICATION = "text-regression", "text-classification"


@dataclass(frozen=True)
class Recommendation:
    """A recipe, and why.

    Attributes:
        recipe: For `pelton fit`; `task.data` is still to be named where nothing is known of it.
        rule: How it was chosen, in sentences.
        rows: What each compared method gave: mean score in points, difference from the chosen one and the standard
            error of that (NaN of a single pair), the rate, trainable parameters.
    """

    recipe: Recipe
    rule: tuple[str, ...]
    rows: pd.DataFrame


def recommend(task: str, examples: int, backbone: str = MINILM, data: str | None = None) -> Recommendation:
    """Recommends a recipe.

    Args:
        task: One that the benchmark knows (`sst2`, `conll2003` …), or a kind (`text-classification` …).
        examples: How many there are to train on.
        backbone: As in a recipe.
        data: As a recipe's `task.data`.

    Raises:
        UnknownName: there is no such task and no such kind.
        StudyError: fewer examples than one.
    """
    if examples < 1:
        raise StudyError(f"`examples >= 1` must hold, but got {examples}.")
    if task not in TASKS and (task not in TASK_KINDS or task == "glue"):
        raise unknown("task", task, [*TASKS, *(kind for kind in TASK_KINDS if kind != "glue")])
    rows, why = _alike(evidence(), task)
    size, compared = _nearest(rows, examples)
    table = _compare(compared)
    method = str(table.index[0])
    rate = float(table["rate"].iloc[0])
    tasks = ", ".join(sorted(compared["task"].unique()))
    pairs = len(compared[["task", "seed"]].drop_duplicates())
    rule = (
        why,
        f"Nearest measured size to {examples:,} examples: {size:,}, on {tasks} "
        f"({pairs} {'pair' if pairs == 1 else 'pairs'} of task and seed that every method below has).",
        f"Highest mean: {method}, with the learning rate it chose most often, {rate:g}.",
        *_doubts(table, backbone),
    )
    return Recommendation(_recipe(Cell(_stand_in(task), examples, method, rate, 0), task, backbone, data), rule, table)


def evidence() -> pd.DataFrame:
    """Returns the benchmark's results that ship with Pelton: task, examples, method, seed, rate, score, trainable."""
    with resources.as_file(resources.files("pelton") / "data" / "recommend" / "bench.csv") as path:
        return pd.read_csv(path)


def kind_of(task: str) -> str:
    """Returns the kind of a benchmark's task; GLUE's are what their rows are."""
    if task not in TASKS:
        return task
    if task in GLUE:
        return REGRESSION if task == "stsb" else CLASSIFICATION
    return str(TASKS[task]["kind"])


def _alike(rows: pd.DataFrame, task: str) -> tuple[pd.DataFrame, str]:
    """Returns the rows that say something about a task, and says which these are."""
    own = rows[rows["task"] == task], f"Rows of {task} itself."
    same = rows[rows["task"].map(kind_of) == kind_of(task)], f"Rows of all {kind_of(task)} tasks, which {task} is like."
    for fewest in FEWEST_PAIRS:
        for part, why in (own, same):
            if any(len(_comparable(at_size, fewest)) for _, at_size in part.groupby("examples")):
                return part, why
    return rows, f"No {kind_of(task)} task was measured, so rows of all tasks: take it as a guess."


def _nearest(rows: pd.DataFrame, examples: int) -> tuple[int, pd.DataFrame]:
    """Returns the nearest size at which methods can be compared, and its comparable rows."""
    by_size = {int(size): rows[rows["examples"] == size] for size in rows["examples"].unique()}
    for fewest in FEWEST_PAIRS:
        sizes = {size: _comparable(part, fewest) for size, part in by_size.items()}
        known = [size for size, part in sizes.items() if len(part)]
        if known:
            break
    size = min(known, key=lambda one: (abs(math.log(one / examples)), one))
    return size, sizes[size]


def _comparable(rows: pd.DataFrame, fewest: int) -> pd.DataFrame:
    """Returns the results of methods with half of the pairs at least, on the pairs that all these have.

    Nothing where that is one method, or fewer pairs than `fewest`.
    """
    pairs = rows.groupby(["task", "seed"])["method"].nunique()
    counts = rows.groupby("method")["score"].count()
    methods = list(counts[2 * counts >= len(pairs)].index)
    part = rows[rows["method"].isin(methods)]
    part = part[part.groupby(["task", "seed"])["method"].transform("nunique") == len(methods)]
    return part if len(methods) > 1 and len(part) >= fewest * len(methods) else part[:0]


def _compare(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns one row a method, the best first."""
    wide = rows.pivot_table(index=["task", "seed"], columns="method", values="score")
    means = wide.groupby(level="task").mean().mean().sort_values(ascending=False, kind="stable")
    behind = wide.sub(wide[means.index[0]], axis=0)
    grouped = rows.groupby("method")
    table = pd.DataFrame(
        {
            "score": means,
            "difference": means - means.iloc[0],
            "error": behind.std() / math.sqrt(len(wide)),
            "rate": grouped["rate"].agg(lambda rates: rates.mode().min()),
            "trainable": grouped["trainable"].median(),
        }
    )
    return table.loc[means.index]


def _doubts(table: pd.DataFrame, backbone: str) -> list[str]:
    if len(table) > 1 and table["error"].isna().all():
        said = ["One run each tells no methods apart: take the highest as a guess."]
    else:
        said = _close(table)
    if backbone != MINILM:
        said.append(
            "All rows were measured on all-MiniLM-L6-v2 (22 million parameters). For another backbone search the rates "
            "first: pelton search FILE."
        )
    return said


def _close(table: pd.DataFrame) -> list[str]:
    close = table.iloc[1:][-table["difference"].iloc[1:] <= table["error"].iloc[1:]]
    return [f"Not told apart from it by one standard error: {', '.join(close.index)}."] if len(close) else []


def _stand_in(task: str) -> str:
    """Returns a benchmark's task whose cell says how a kind is trained; the recipe's own task takes its place."""
    if task in TASKS:
        return task
    return next((name for name in TASKS if kind_of(name) == task), "banking77")


def _recipe(cell: Cell, task: str, backbone: str, data: str | None) -> Recipe:
    protocol = Protocol(None, backbone)
    values = protocol.recipe(cell, "runs").model_dump(mode="json", exclude_unset=True)
    settings = {**TASKS[task], "examples": cell.examples} if task in TASKS else {"kind": task}
    if task == CLASSIFICATION:
        settings |= MEAN_HEAD
    if task == "stsb":
        settings.pop("head_init")
    values |= {
        "name": task,
        "description": f"recommended for {task} with {cell.examples} examples: {cell.method}",
        "task": {**settings, "data": ELSEWHERE.get(task) if data is None else data},
    }
    if METHODS[cell.method].adapter is None:
        values["adapter"] = None
    return parse_recipe(values, task)


def write_recommendation(found: Recommendation, path: Path) -> None:
    """Writes the recipe, with the rule in comments; `pelton fit` runs it."""
    import yaml

    if path.exists():
        raise StudyError(f"{path} exists. Name another file with --output.")
    head = "".join(f"# {line}\n" for line in found.rule)
    values = found.recipe.model_dump(mode="json", exclude_unset=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
