"""What a benchmark found, as Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pelton.bench.grid import Grid
from pelton.bench.journal import Record
from pelton.bench.means import CANDIDATE, mean_table
from pelton.bench.sentences import compared, counted, diverged, means_over, nothing
from pelton.bench.statistics import (
    Comparison,
    Score,
    best_single,
    cells,
    compare,
    complete,
    over_tasks,
    score_table,
    time_ratios,
)
from pelton.tasks.glue import GLUE

FEWEST_GLUE = 2


def markdown(grid: Grid, records: Sequence[Record]) -> str:
    """Returns one section for each data size: scores by task, means, ranks, costs, and the comparison."""
    table = score_table(grid.results(records))
    sizes = [size for size in grid.examples if (table["examples"] == size).any()]
    parts = [_section(grid, table, size) for size in sizes] or [nothing(grid, records)]
    missing = [str(size) for size in grid.examples if size not in sizes]
    if sizes and missing:
        parts.append(f"No result yet at {', '.join(missing)} training examples.")
    return "\n\n".join([*parts, *diverged(grid, records)])


def write(grid: Grid, records: Sequence[Record], folder: Path) -> list[Path]:
    """Writes `bench.md`, `bench.csv` (a row a result), `bench-summary.csv` and the plots; returns their paths."""
    from pelton.bench.plots import plot

    folder.mkdir(parents=True, exist_ok=True)
    table = score_table(grid.results(records))
    text, rows, means = folder / "bench.md", folder / "bench.csv", folder / "bench-summary.csv"
    text.write_text(markdown(grid, records) + "\n", encoding="utf-8")
    table.to_csv(rows, index=False, float_format="%.6g")
    mean_table(grid, table).to_csv(means, index=False, float_format="%.6g")
    return [text, rows, means, *plot(grid, table, folder)]


def _section(grid: Grid, table: pd.DataFrame, size: int) -> str:
    every = complete(table, grid.methods, grid.tasks, size)
    here = table[table["examples"] == size]
    tasks = [task for task in grid.tasks if task in set(every["task"])]
    lines = [f"### {size} training examples", ""]
    lines += _scores(grid, here, every)
    missing = [task for task in grid.tasks if task not in tasks]
    if missing:
        lines += ["", f"Not finished with every method, and so not in the means: {', '.join(missing)}."]
    if len(every) < len(here):
        lines += ["", "Cells are over all finished seeds of their task, means over those that every method has."]
    if tasks:
        lines += ["", means_over(every, tasks), *map(compared, comparisons(every))]
    return "\n".join(lines)


def comparisons(table: pd.DataFrame) -> list[Comparison]:
    """Compares Pelton with the best single method and with full fine-tuning, where they are there."""
    present = set(table["method"])
    if CANDIDATE not in present:
        return []
    rivals = [best_single(table), "full" if "full" in present else None]
    return [compare(table, CANDIDATE, rival) for rival in rivals if rival is not None]


def _scores(grid: Grid, here: pd.DataFrame, every: pd.DataFrame) -> list[str]:
    by_cell = cells(here)
    summary = over_tasks(every).to_dict("index") if len(every) else {}
    trainable = every.groupby("method")["trainable"].median().to_dict()
    ratio = time_ratios(every).median().dropna().to_dict()
    glue = set(every["task"]) & set(GLUE)
    of_glue = over_tasks(every[every["task"].isin(glue)])["mean"].to_dict() if len(glue) >= FEWEST_GLUE else None
    heading = [] if of_glue is None else [f"GLUE ({len(glue)} of {len(GLUE)})"]
    columns = ["mean", "rank", *heading, "trainable", "training time"]
    head = ["method", *grid.tasks, *columns]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for method in grid.methods:
        row = [_cell(by_cell.get((task, method)), len(grid.seeds)) for task in grid.tasks]
        known = summary.get(method)
        row += [f"**{known['mean']:.2f}**{_spread(known['std'], 2)}", f"{known['rank']:.1f}"] if known else ["–", "–"]
        if of_glue is not None:
            row += [f"{of_glue[method]:.2f}" if method in of_glue else "–"]
        row += [f"{int(trainable[method]):,}" if method in trainable else "–"]
        row += [f"{ratio[method]:.2f}×" if method in ratio else "–"]
        lines.append(f"| {method} | {' | '.join(row)} |")
    return lines


def _cell(score: Score | None, seeds: int) -> str:
    if score is None or math.isnan(score.mean):
        return "–"
    few = f" ({counted(score.seeds, 'seed')})" if score.seeds < seeds else ""
    return f"{score.mean:.1f}{_spread(score.std, 1)}{few}"


def _spread(std: float, digits: int) -> str:
    """Returns a deviation as it stands behind its mean; nothing of a single seed, of which there is none."""
    return "" if math.isnan(std) else f" ± {std:.{digits}f}"
