"""Means over seeds, ranks over methods, and a paired comparison of two methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t

from pelton.bench.journal import Record
from pelton.bench.protocol import METHODS

RESAMPLES = 10_000
LEVEL = 0.95
DIGITS = 6
"""Of points: scores that differ by less are the same, added up in another order."""


def score_table(records: Sequence[Record]) -> pd.DataFrame:
    """Returns one row a result: examples, task, method, seed, score in points (100 × test score) and cost."""
    columns = ["examples", "task", "method", "seed", "rate", "score", "validation", "trainable", "train_seconds"]
    rows = [{**record, "score": 100 * record["test"], "validation": 100 * record["validation"]} for record in records]
    return pd.DataFrame(rows, columns=columns)


def complete(table: pd.DataFrame, methods: Sequence[str], tasks: Sequence[str], examples: int) -> pd.DataFrame:
    """Returns the results at one data size of the seeds and tasks that every method has finished.

    Methods can be compared only on the same tasks and seeds; what some lack is left out for all.
    """
    wanted = (table["examples"] == examples) & table["method"].isin(methods) & table["task"].isin(tasks)
    part = table[wanted & table["score"].notna()]
    counts = part.groupby(["task", "seed"])["method"].nunique()
    whole = counts[counts == len(methods)].index
    return part.set_index(["task", "seed"]).loc[lambda frame: frame.index.isin(whole)].reset_index()


@dataclass(frozen=True)
class Score:
    """A mean over seeds, its standard deviation (NaN of one seed), and how many there are."""

    mean: float
    std: float
    seeds: int


def cells(table: pd.DataFrame) -> dict[tuple[str, str], Score]:
    """Returns the scores by task and method."""
    grouped = cast(Any, table.groupby(["task", "method"])["score"])
    found = {}
    for (task, method), scores in grouped:
        found[str(task), str(method)] = Score(float(scores.mean()), float(scores.std()), len(scores))
    return found


def over_tasks(table: pd.DataFrame) -> pd.DataFrame:
    """Returns each method's mean over tasks of its task means, the deviation of that over seeds, and its mean rank.

    Only seeds that have every task count for the deviation, which is NaN where fewer than two do: means over different
    tasks differ by their tasks. Rank 1 is the best method of a task; methods with the same score share the mean of
    their ranks.
    """
    means = table.pivot_table(index="task", columns="method", values="score")
    seeds = table.pivot_table(index="seed", columns="method", values="score")
    seeds = seeds.where(
        table.pivot_table(index="seed", columns="method", values="task", aggfunc="nunique") == len(means)
    )
    ranks = task_ranks(table)
    return pd.DataFrame({"mean": means.mean(), "std": seeds.std(), "rank": ranks.mean()})


def task_ranks(table: pd.DataFrame) -> pd.DataFrame:
    """Returns each method's rank on each task: 1 is the best mean over seeds; the same scores share a mean rank."""
    means = table.pivot_table(index="task", columns="method", values="score")
    return means.round(DIGITS).rank(axis=1, ascending=False)


def time_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Returns each method's training time on each task, as a multiple of full fine-tuning's; NaN where it is not known.

    Medians over seeds, since machines have other work too.
    """
    times = table.pivot_table(index="task", columns="method", values="train_seconds", aggfunc="median")
    whole = times["full"].where(times["full"] > 0) if "full" in times else pd.Series(np.nan, index=times.index)
    return times.div(whole, axis=0)


@dataclass(frozen=True)
class Comparison:
    """How much better one method is than another, in points.

    Attributes:
        left: The one.
        right: The other.
        difference: Mean over tasks of the mean difference over seeds.
        low: Of the 95 % interval; NaN of a single pair of runs, which tells nothing of others.
        high: Likewise.
        better: Share of the resamples in which the first is better, ties half; NaN where nothing was resampled.
        pairs: Pairs of runs.
    """

    left: str
    right: str
    difference: float
    low: float
    high: float
    better: float
    pairs: int


def compare(table: pd.DataFrame, left: str, right: str) -> Comparison:
    """Compares two methods by pairs of runs: same task, same rows, same seed.

    The interval is a bootstrap's over tasks and seeds; on one task, whose few seeds a bootstrap takes for all there are
    and so gives too narrow an interval, Student's t of the differences.
    """
    wide = table.pivot_table(index=["task", "seed"], columns="method", values="score")
    pairs = (wide[left] - wide[right]).dropna()
    by_task = [group.to_numpy() for _, group in pairs.groupby(level="task")]
    low, high, better = _bootstrap(by_task) if len(by_task) > 1 else (*_t_interval(pairs.to_numpy()), math.nan)
    difference = float(np.mean([group.mean() for group in by_task]))
    return Comparison(left, right, difference, low, high, better, len(pairs))


def _t_interval(differences: NDArray[np.floating]) -> tuple[float, float]:
    count = len(differences)
    if count < 2:
        return math.nan, math.nan
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * float(differences.std(ddof=1)) / math.sqrt(count)
    return float(differences.mean()) - half, float(differences.mean()) + half


def _bootstrap(by_task: list[NDArray[np.floating]], seed: int = 0) -> tuple[float, float, float]:
    """Returns an interval of the mean over tasks of the mean difference, and the share of resamples above 0.

    Each of the resamples draws tasks with replacement, and within a task seeds with replacement (Efron and Tibshirani
    1993, section 8).
    """
    random = np.random.default_rng(seed)
    which = random.integers(len(by_task), size=(len(by_task), RESAMPLES))
    drawn = np.empty(which.shape)  # a task that is drawn twice draws its seeds twice
    for task, group in enumerate(by_task):
        drawn[which == task] = random.choice(group, size=(int((which == task).sum()), len(group))).mean(axis=1)
    means = drawn.mean(axis=0).round(DIGITS)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high), float((means > 0).mean() + (means >= 0).mean()) / 2


def best_single(table: pd.DataFrame) -> str | None:
    """Returns the single method with the best mean over tasks, or None where there is none."""
    means = over_tasks(table)["mean"]
    singles = [name for name in means.index if name not in METHODS or METHODS[name].single]
    return str(means[singles].idxmax()) if singles else None
