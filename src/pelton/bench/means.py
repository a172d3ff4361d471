"""A benchmark's means as a table: one row for each size, task and method, and one for the mean over tasks."""

from __future__ import annotations

import math

import pandas as pd

from pelton.bench.grid import Grid
from pelton.bench.statistics import cells, compare, complete, over_tasks, task_ranks, time_ratios

CANDIDATE = "pelton"
MEAN = "mean"
"""Stands for a task in the rows of means over tasks."""
OWN = ("mean", "std", "seeds")
SHARED = ("rank", "trainable", "time_ratio", "lead", "low", "high")
Row = dict[str, object]


def mean_table(grid: Grid, table: pd.DataFrame) -> pd.DataFrame:
    """Returns each method's mean, deviation and number of seeds, and how it compares with the others.

    Rank (on the task, or its mean over tasks), trainable parameters, time as a multiple of full fine-tuning's, and the
    candidate's lead over the method with its 95 % interval, low to high, are of what every method has finished. They
    are empty where that is nothing, as is the interval of a single run. The mean over tasks is of these results, too.

    Args:
        grid: What was asked for.
        table: Results, as `score_table` gives them.
    """
    rows: list[Row] = []
    for size in grid.examples:
        every = complete(table, grid.methods, grid.tasks, size)
        for row in [*_task_rows(grid, table[table["examples"] == size], every), *_mean_rows(grid, every)]:
            rows.append({"examples": size, **row})
    found = pd.DataFrame(rows, columns=["examples", "task", "method", *OWN, *SHARED])
    return found.astype({"trainable": "Float64"}).round({"trainable": 0}).astype({"trainable": "Int64"})


def _task_rows(grid: Grid, here: pd.DataFrame, every: pd.DataFrame) -> list[Row]:
    by_cell, rows = cells(here), list[Row]()
    for task in grid.tasks:
        shared = _shared(grid, every[every["task"] == task])
        for method in grid.methods:
            if score := by_cell.get((task, method)):
                own = dict(zip(OWN, (score.mean, score.std, score.seeds), strict=True))
                rows.append({"task": task, "method": method, **own, **shared.get(method, {})})
    return rows


def _mean_rows(grid: Grid, every: pd.DataFrame) -> list[Row]:
    means, tasks = over_tasks(every), every["task"].nunique()
    seeds = int((every.groupby("seed")["task"].nunique() == tasks).sum())
    rows = list[Row]()
    for method, shared in _shared(grid, every).items():
        own = dict(zip(OWN, (means.loc[method, "mean"], means.loc[method, "std"], seeds), strict=True))
        rows.append({"task": MEAN, "method": method, **own, **shared})
    return rows


def _shared(grid: Grid, part: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Returns what compares each method with the others, of results that every method has."""
    if part.empty:
        return {}
    ranks, ratios = task_ranks(part).mean(), time_ratios(part).median()
    trainable = part.groupby("method")["trainable"].median()
    found = {}
    for method in grid.methods:
        lead = _lead(grid, part, method)
        values = (ranks[method], trainable[method], ratios[method], *lead)
        found[method] = dict(zip(SHARED, map(float, values), strict=True))
    return found


def _lead(grid: Grid, part: pd.DataFrame, method: str) -> tuple[float, float, float]:
    if CANDIDATE not in grid.methods or method == CANDIDATE:
        return math.nan, math.nan, math.nan
    found = compare(part, CANDIDATE, method)
    return found.difference, found.low, found.high
