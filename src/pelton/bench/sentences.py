"""What a report says in sentences: comparisons, what is missing, what diverged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from pelton.bench.grid import Grid
from pelton.bench.journal import Record
from pelton.bench.protocol import Cell
from pelton.bench.statistics import Comparison

NOTHING = "No method has a result yet"


def counted(number: int, what: str) -> str:
    """Returns a number of things: `1 task`, `2 tasks`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def compared(found: Comparison) -> str:
    """Says how much better one method is, and how sure that is."""
    kind = "" if found.right == "full" else ", the best single method,"
    return f"{found.left} − {found.right}{kind} is {found.difference:+.2f} points ({_interval(found)})."


def _interval(found: Comparison) -> str:
    if math.isnan(found.low):
        return "one run: no interval"
    interval = f"95 % interval {found.low:+.2f} to {found.high:+.2f}"
    if math.isnan(found.better):
        return f"{interval}, Student's t of {found.pairs} seeds"
    return f"{interval}, better in {found.better:.0%} of the resamples"


def means_over(every: pd.DataFrame, tasks: Sequence[str]) -> str:
    """Says what means are over: tasks and seeds, and which tasks have only some of these."""
    seeds = sorted(every["seed"].unique().tolist())
    text = f"Means over {counted(len(tasks), 'task')}, {counted(len(seeds), 'seed')} ({_list(seeds)})"
    for task in tasks:
        own = sorted(every.loc[every["task"] == task, "seed"].unique().tolist())
        if own != seeds:
            text += f"; {task} has only {'seed' if len(own) == 1 else 'seeds'} {_list(own)}"
    return f"{text}."


def diverged(grid: Grid, records: Sequence[Record]) -> list[str]:
    """Says which results there will not be: training diverged."""
    hopeless, lost = grid.hopeless(records), grid.lost(records)
    lines = []
    if hopeless:
        lines.append(f"Diverged at every learning rate, and so without a result: {_list(map(_where, hopeless))}.")
    if lost:
        seeds = [f"{_where(cell)}, seed {cell.seed}" for cell in lost]
        lines.append(f"Diverged at the chosen learning rate: {'; '.join(seeds)}.")
    return lines


def nothing(grid: Grid, records: Sequence[Record]) -> str:
    """Says why there is no result."""
    if not records:
        return f"{NOTHING}: no run is finished."
    if grid.finished(records):
        return f"{NOTHING}: its learning rate is chosen when all were tried."
    runs, here = counted(len(records), "run"), grid.protocol.describe()
    others = [record["protocol"] for record in records if record.get("protocol", here) != here]
    if len(others) < len(records):
        return f"{NOTHING}: none of the journal's {runs} is of these tasks, sizes, methods and seeds as they are now."
    usual = pd.Series([str(sorted(other.items())) for other in others])
    other = others[int((usual == usual.mode()[0]).to_numpy().argmax())]
    keys = [key for key in {**here, **other} if here.get(key) != other.get(key)]
    told = _list(f"{key} {_show(other.get(key))} (here {_show(here.get(key))})" for key in keys)
    return f"{NOTHING}: the journal's {runs} {'is' if len(records) == 1 else 'are'} of other settings, such as {told}."


def _show(value: object) -> str:
    return "not given" if value is None else str(value)


def _where(cell: Cell) -> str:
    return f"{cell.method} on {cell.task} at {cell.examples} examples"


def _list(things: Iterable[object]) -> str:
    return ", ".join(map(str, things))
