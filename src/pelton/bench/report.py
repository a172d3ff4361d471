"""What a benchmark found, as Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pelton.bench.grid import Grid
from pelton.bench.journal import Record
from pelton.bench.statistics import (
    Comparison,
    Score,
    best_single,
    cells,
    complete,
    over_tasks,
    paired_bootstrap,
    score_table,
)
from pelton.tasks.glue import GLUE

CANDIDATE = "pelton"


def markdown(grid: Grid, records: Sequence[Record]) -> str:
    """Returns one section for each data size: scores by task, means, ranks, costs, and the comparison."""
    table = score_table(grid.results(records))
    sections = [section for size in grid.examples if (section := _section(grid, table, size))]
    return "\n\n".join(sections) or "No method has a result yet: its learning rate is chosen when all were tried."


def write(grid: Grid, records: Sequence[Record], folder: Path) -> list[Path]:
    """Writes `bench.md`, `bench.csv` (one row a result) and the plots; returns their paths."""
    from pelton.bench.plots import plot

    folder.mkdir(parents=True, exist_ok=True)
    table = score_table(grid.results(records))
    text, rows = folder / "bench.md", folder / "bench.csv"
    text.write_text(markdown(grid, records) + "\n", encoding="utf-8")
    table.to_csv(rows, index=False, float_format="%.3f")
    return [text, rows, *plot(grid, table, folder)]


def _section(grid: Grid, table: pd.DataFrame, size: int) -> str:
    every = complete(table, grid.methods, grid.tasks, size)
    here = table[table["examples"] == size]
    if here.empty:
        return ""
    seeds = sorted(every["seed"].unique().tolist())
    tasks = [task for task in grid.tasks if task in set(every["task"])]
    lines = [f"### {size} training examples", ""]
    lines += _scores(grid, here, every)
    missing = [task for task in grid.tasks if task not in tasks]
    if missing:
        lines += ["", f"Not finished with every method, and so not in the means: {', '.join(missing)}."]
    if len(every) < len(here):
        lines += ["", "Cells are over all finished seeds of their task, means over those that every method has."]
    if len(tasks) > 0:
        lines += ["", f"Means over {_count(tasks, 'task')}, {_count(seeds, 'seed')} ({', '.join(map(str, seeds))})."]
        lines += [_sentence(comparison) for comparison in comparisons(every)]
    return "\n".join(lines)


def comparisons(table: pd.DataFrame) -> list[Comparison]:
    """Compares Pelton with the best single method and with full fine-tuning, where they are there."""
    present = set(table["method"])
    if CANDIDATE not in present:
        return []
    rivals = [best_single(table), "full" if "full" in present else None]
    return [paired_bootstrap(table, CANDIDATE, rival) for rival in rivals if rival is not None]


def _scores(grid: Grid, here: pd.DataFrame, every: pd.DataFrame) -> list[str]:
    by_cell = cells(here)
    summary = over_tasks(every).to_dict("index") if len(every) else {}
    trainable = here.groupby("method")["trainable"].median().to_dict()
    time = here.groupby(["task", "method"])["train_seconds"].median().unstack("method")
    ratio = time.div(time["full"], axis=0).median().to_dict() if "full" in time else {}  # machines have other work too
    glue = [task for task in grid.tasks if task in GLUE]
    of_glue = over_tasks(every[every["task"].isin(glue)])["mean"].to_dict() if len(glue) > 1 else None
    columns = ["mean", "rank", *(["GLUE"] if of_glue is not None else []), "trainable", "training time"]
    head = ["method", *grid.tasks, *columns]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for method in grid.methods:
        row = [_cell(by_cell.get((task, method))) for task in grid.tasks]
        known = summary.get(method)
        row += [f"**{known['mean']:.2f}**{_spread(known['std'], 2)}", f"{known['rank']:.1f}"] if known else ["–", "–"]
        if of_glue is not None:
            row += [f"{of_glue[method]:.2f}" if method in of_glue else "–"]
        row += [f"{int(trainable[method]):,}" if method in trainable else "–"]
        row += [f"{ratio[method]:.2f}×" if method in ratio else "–"]
        lines.append(f"| {method} | {' | '.join(row)} |")
    return lines


def _cell(score: Score | None) -> str:
    if score is None:
        return "–"
    return f"{score.mean:.1f}{_spread(score.std, 1) if score.seeds > 1 else ' (1 seed)'}"


def _spread(std: float, digits: int) -> str:
    """Returns a deviation as it stands behind its mean; nothing of a single seed, of which there is none."""
    return "" if math.isnan(std) else f" ± {std:.{digits}f}"


def _sentence(found: Comparison) -> str:
    kind = "" if found.right == "full" else ", the best single method,"
    return (
        f"{found.left} − {found.right}{kind} is {found.difference:+.2f} points "
        f"(95 % interval {found.low:+.2f} to {found.high:+.2f}, better in {found.better:.0%} of the resamples)."
    )


def _count(things: Sequence[object], what: str) -> str:
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"
