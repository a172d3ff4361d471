"""Whether gates still open as they did: live gate values against those of a reference, and what to do about it.

Gates read what a block sees, so inputs that are unlike those a model learned from show in them, without labels. For
every method in every block two samples of gate values, one number an example, are compared:

    PSI   Σ over bins of (q − p) ln(q / p), p and q the shares of reference and live values in bins that hold a tenth of
          the reference each (population stability index; in credit scoring below 0.1 is stable, from 0.25 on one acts).
          An empty bin counts as half an example.
    KS    the largest distance between both distribution functions, and the probability of one as large by chance;
          corrected for the number of gates by Benjamini and Hochberg 1995

PSI alone is large by chance where examples are few: its mean without any drift is about 9 (1/n + 1/m). KS alone finds
differences that are too small to matter where they are many. So a gate has moved where both say so.

Tokens of one text are not independent, so token gates are averaged within each example first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import false_discovery_control, ks_2samp

from pelton.errors import AdapterError
from pelton.gates.recording import COLUMNS, GateLog

Level = Literal["stable", "watch", "act", "unknown"]
LEVELS: tuple[Level, ...] = ("stable", "watch", "act")
Place = tuple[int, str, str]
"""A gate: the number in the order in which blocks run, the block's name, the method."""
Samples = Mapping[Place, NDArray[Any]]

BINS = 10
WATCH, ACT = 0.1, 0.25
ALPHA = 0.01
"""A gate moves by chance alone in one of a hundred comparisons."""
ENOUGH = 100
"""Examples on either side, below which the PSI of 10 bins is about 0.1 without any drift."""


@dataclass(frozen=True)
class GateDrift:
    """How far the gates have moved.

    Attributes:
        table: One row a gate: `index`, `block`, `method`, `pruned` (taken away, and `revive` would bring it back), the
            means `reference` and `live`, `psi`, `ks`, `p` (corrected), and `level`.
        level: Of the gate that moved most; `unknown` where examples are too few to say.
        examples: How many there are of reference and live.
        opened: Block and method of gates that moved and are more open now, while their methods are pruned.
        says: What that means and what is due, in a sentence or two.
    """

    table: pd.DataFrame
    level: Level
    examples: tuple[int, int]
    opened: tuple[tuple[str, str], ...]
    says: str


def gate_drift(
    reference: pd.DataFrame | GateLog, live: pd.DataFrame | GateLog, *, pruned: Collection[tuple[str, str]] = ()
) -> GateDrift:
    """Compares gate values of live inputs with those of a reference.

    Example:
        reference = pandas.read_parquet("runs/mine/gates.parquet")
        with record_gates(model) as log:
            model(**batch)
        gate_drift(reference, log).says

    Args:
        reference: What `record_gates` gives, on examples that the model was not trained on; a run's `gates.parquet`.
        live: The same, of the same adapter.
        pruned: Names of blocks with methods that were pruned and can be revived, and so would be worth reviving if
            their gates opened.

    Raises:
        AdapterError: the gates are constant, or those of two adapters.
    """
    return compare(samples_of(reference), samples_of(live), pruned)


def samples_of(values: pd.DataFrame | GateLog) -> Samples:
    """Returns one value for each example and gate, token gates averaged over the example's tokens.

    Raises:
        AdapterError: there are none, they are of several adapters, or constant.
    """
    frame = values.to_frame() if isinstance(values, GateLog) else values
    missing = [name for name in COLUMNS if name not in frame]
    if missing or not len(frame):
        what = f"a table without {', '.join(missing)}" if missing else "no gate values"
        raise AdapterError(f"Expected what record_gates gives, but got {what}.")
    adapters = frame["adapter"].unique()
    if len(adapters) > 1:
        raise AdapterError(f"Expected the gates of one adapter, but got those of {', '.join(map(str, adapters))}.")
    if (frame["example"] < 0).all():
        raise constant()
    means = frame.groupby(["index", "block", "method", "example"], sort=False, observed=True)["value"].mean()
    places = means.groupby(level=["index", "block", "method"], sort=False, observed=True)
    return {cast(Place, place): some.to_numpy(float) for place, some in places}


def constant() -> AdapterError:
    """Makes the error for gates that cannot drift."""
    return AdapterError(
        "These gates are constant: they do not read the input, so nothing can drift. Where they were frozen, revive "
        "the adapter first (pelton drift RUN does so without changing the run)."
    )


def compare(reference: Samples, live: Samples, pruned: Collection[tuple[str, str]] = ()) -> GateDrift:
    """Compares samples of gate values; see `gate_drift`.

    Raises:
        AdapterError: they are not of the same gates.
    """
    here = {(index, method): values for (index, _, method), values in live.items()}
    if {(index, method) for index, _, method in reference} != set(here):
        raise AdapterError(
            f"The reference has {len(reference)} gates and the live values {len(here)}, not the same ones. Record both "
            "with the same adapter, as it is now."
        )
    tests = {place: ks_2samp(before, here[place[0], place[2]], method="asymp") for place, before in reference.items()}
    corrected = false_discovery_control([float(test.pvalue) for test in tests.values()])
    rows = []
    for (place, test), p in zip(tests.items(), corrected, strict=True):
        (index, block, method), before, now = place, reference[place], here[place[0], place[2]]
        gone = any(method == kind and f".{block}".endswith(f".{name}") for name, kind in pruned)
        moved, means = psi(before, now), (float(before.mean()), float(now.mean()))
        rows.append(_Row(index, block, method, gone, *means, moved, float(test.statistic), float(p), _level(moved, p)))
    examples = min(map(len, reference.values())), min(map(len, live.values()))
    level = max((row.level for row in rows), key=LEVELS.index) if min(examples) >= ENOUGH else "unknown"
    opened = tuple((r.block, r.method) for r in rows if r.pruned and r.level != "stable" and r.live > r.reference)
    opened = opened if level != "unknown" else ()
    return GateDrift(pd.DataFrame(map(asdict, rows)), level, examples, opened, _say(rows, level, examples, opened))


@dataclass(frozen=True)
class _Row:
    """What is known of one gate: a row of `GateDrift.table`."""

    index: int
    block: str
    method: str
    pruned: bool
    reference: float
    live: float
    psi: float
    ks: float
    p: float
    level: Level


def psi(reference: ArrayLike, live: ArrayLike, bins: int = BINS) -> float:
    """Returns the population stability index of two samples, in bins between the quantiles of the first."""
    first, second = np.asarray(reference, float), np.asarray(live, float)
    edges = np.unique(np.quantile(first, np.linspace(0, 1, bins + 1)[1:-1]))
    shares = []
    for values in (first, second):
        counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
        shares.append(np.maximum(counts, 0.5) / len(values))
    p, q = shares
    return float(((q - p) * np.log(q / p)).sum())


def _level(index: float, p: float) -> Level:
    if p >= ALPHA or index < WATCH:
        return "stable"
    return "act" if index >= ACT else "watch"


def _say(rows: Sequence[_Row], level: Level, examples: tuple[int, int], opened: Sequence[tuple[str, str]]) -> str:
    if level == "unknown":
        return (
            f"Too few examples to say: {examples[1]:,} live ones and {examples[0]:,} of reference, where {ENOUGH} of "
            "each are needed."
        )
    if level == "stable":
        return "The gates open as they did: nothing is due."
    moved = [row for row in rows if row.level != "stable"]
    most = max(moved, key=lambda row: row.psi)
    found = f"{len(moved)} of {len(rows)} gates have moved, most of all {most.method} in {most.block}"
    found = f"{found} (PSI {most.psi:.2f})."
    if level == "watch":
        return f"{found} That is little: compare again with more, or newer, examples before acting."
    if opened:
        names = ", ".join(f"{method} in {block}" for block, method in opened)
        return f"{found} Methods that were pruned would open now: {names}. Reviving them is due."
    return f"{found} The inputs are unlike those of training: re-training with such examples is due."
