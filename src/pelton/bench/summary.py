"""What a benchmark's journal says in few rows: one for each task, data size and method, for `pelton recommend`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pelton.bench.grid import Grid
from pelton.bench.journal import Record
from pelton.bench.protocol import METHODS, TASKS, Protocol
from pelton.bench.statistics import score_table

COLUMNS = ("task", "examples", "method", "seed", "rate", "score", "trainable")


def summarise(records: Sequence[Record], seeds: int = 5) -> pd.DataFrame:
    """Returns one row a result at the chosen rate, under the protocol of most of a journal's results.

    A row's score is in points (100 × test score). Methods whose rate is not chosen yet have none, nor have results of
    older default adapters.

    Args:
        records: A journal's.
        seeds: Those from 0 to this, without it.
    """
    records = [record for record in records if "protocol" in record]
    if not records:
        return pd.DataFrame(columns=list(COLUMNS))
    settings = pd.Series([str(sorted(record["protocol"].items())) for record in records])
    usual = records[int((settings == settings.mode()[0]).to_numpy().argmax())]["protocol"]
    sizes = sorted({int(record["examples"]) for record in records})
    grid = Grid(Protocol(None, **usual), list(TASKS), sizes, list(METHODS), range(seeds))
    table = score_table(grid.results(records)).sort_values(["task", "examples", "method", "seed"])
    return table[list(COLUMNS)].reset_index(drop=True)


def write_summary(records: Sequence[Record], path: Path) -> None:
    """Writes a summary as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    summarise(records).to_csv(path, index=False, float_format="%.6g")
