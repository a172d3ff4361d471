"""Pictures of a benchmark: score against data size, bars by method, a radar of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pelton.bench.grid import Grid
from pelton.bench.means import CANDIDATE
from pelton.bench.sentences import counted
from pelton.bench.statistics import complete, over_tasks

REDS = (6, 7)
"""Of matplotlib's twenty colours, those like the candidate's."""
FEWEST_SPOKES = 3


def plot(grid: Grid, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws what there is enough data for; returns the files."""
    sizes = {size: complete(table, grid.methods, grid.tasks, size) for size in grid.examples}
    sizes = {size: part for size, part in sizes.items() if len(part)}
    if not sizes:
        return []
    largest = max(sizes)
    drawn = [_bars(grid, sizes[largest], largest, folder / "bench-bars.png")]
    shared = set.intersection(*(set(part["task"]) for part in sizes.values()))
    if len(sizes) > 1 and shared:
        parts = {size: part[part["task"].isin(shared)] for size, part in sorted(sizes.items())}
        drawn.append(_curves(grid, parts, folder / "bench-curves.png"))
    if sizes[largest]["task"].nunique() >= FEWEST_SPOKES:
        drawn.append(_radar(grid, sizes[largest], largest, folder / "bench-radar.png"))
    return drawn


def _bars(grid: Grid, part: pd.DataFrame, size: int, path: Path) -> Path:
    """Draws each method's mean over tasks, with its deviation over seeds."""
    summary = over_tasks(part).sort_values("mean")
    figure, axes = _figure(7.0, 0.4 * len(summary) + 1.2)
    colours = [_colour(grid, name) for name in summary.index]
    axes.barh(summary.index, summary["mean"], xerr=summary["std"], color=colours, capsize=3)
    lowest = float(summary["mean"].min())
    left = lowest - 10.0 if lowest < 0 else max(0.0, lowest - 10.0)
    for place, mean in enumerate(summary["mean"]):  # where no line of a deviation runs through it
        axes.text(left, place, f" {mean:.1f}", va="center", ha="left", fontsize=9)
    axes.set_xlim(left=left, right=0.0 if summary["mean"].max() <= 0 else None)
    axes.set_xlabel(f"mean score over {counted(part['task'].nunique(), 'task')}, {size} examples")
    return _save(figure, path)


def _curves(grid: Grid, sizes: dict[int, pd.DataFrame], path: Path) -> Path:
    """Draws each method's mean over tasks, which are the same at every size, against the number of examples."""
    figure, axes = _figure(7.0, 4.5)
    for method in grid.methods:
        means = {n: over_tasks(part).loc[method] for n, part in sizes.items()}
        style: dict[str, Any] = {"lw": 3, "zorder": 3} if method == CANDIDATE else {"lw": 1.5}
        axes.plot(list(means), [row["mean"] for row in means.values()], "o-", label=method,
                  color=_colour(grid, method), **style)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(list(sizes), labels=[str(n) for n in sizes])
    axes.minorticks_off()
    axes.set_xlabel("training examples")
    axes.set_ylabel(f"mean score over {counted(next(iter(sizes.values()))['task'].nunique(), 'task')}")
    axes.legend(fontsize=8, ncols=2)
    return _save(figure, path)


def _radar(grid: Grid, part: pd.DataFrame, size: int, path: Path) -> Path:
    """Draws each method's distance from the worst method of a task, as a share of the span between worst and best."""
    means = part.pivot_table(index="task", columns="method", values="score")
    means = means.reindex([task for task in grid.tasks if task in means.index])
    low, high = means.min(axis=1), means.max(axis=1)
    shares = means.sub(low, axis=0).div((high - low).replace(0.0, 1.0), axis=0)
    angles = np.linspace(0.0, 2 * np.pi, len(shares), endpoint=False)
    figure, axes = _figure(6.5, 5.5, polar=True)
    for method in [name for name in grid.methods if name in shares]:
        values = shares[method].to_numpy()
        style: dict[str, Any] = {"lw": 3, "zorder": 3} if method == CANDIDATE else {"lw": 1.2}
        closed = np.append(angles, angles[0]), np.append(values, values[0])
        axes.plot(*closed, label=method, color=_colour(grid, method), **style)
    labels = [f"{task}\n{low[task]:.0f}–{high[task]:.0f}" for task in shares.index]
    axes.set_xticks(angles, labels=labels, fontsize=9)
    axes.set_yticks([0.0, 0.5, 1.0], labels=["worst", "", "best"], fontsize=7)
    axes.set_title(f"{size} examples", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.08, 1.05))
    return _save(figure, path)


def _figure(width: float, height: float, polar: bool = False) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot(projection="polar" if polar else None)


def _colour(grid: Grid, method: str) -> Any:
    from matplotlib import colormaps

    others = [shade for shade in range(20) if shade not in REDS]
    return "#c1272d" if method == CANDIDATE else colormaps["tab20"](others[grid.methods.index(method) % len(others)])


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
