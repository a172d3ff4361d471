"""What methods cost on one machine and one backbone: measured, kept on disk, and estimated where nothing was measured.

The time of an adapted model as a ratio to the plain backbone's is taken to be additive over blocks and methods:

    ratio = 1 + Σ_blocks ( Σ_methods (cost − d) + d )

`cost` is what a method adds to a block that has nothing else, d what having anything costs (see `flops.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pelton.anatomy import Anatomy, Block
from pelton.errors import AdapterError, TrainingError
from pelton.methods import METHODS, MethodSpec
from pelton.search.flops import TimeModel, Work, backbone_flops, fit_times, leave_one_out_errors, work_of

CACHE = "PELTON_CACHE"
"""The environment variable that names the cache folder."""
FEWEST = 6
"""Measurements below which nothing is fitted."""


@dataclass(frozen=True)
class Entry:
    """What one method in all blocks cost, at one shape of inputs.

    Attributes:
        spec: The method as JSON, without `layers`.
        rows: B.
        tokens: T.
        ratio: Time with it in all blocks ÷ time of the plain backbone: a median over rounds.
        spread: The distance between the quartiles.
        reference: Seconds of the plain backbone.
        blocks: How many blocks it was in.
        parameters: Of the method, in all of them.
        kept: Bytes that a training step keeps for its backward pass beyond the plain backbone's, in all of them.
    """

    spec: dict[str, Any]
    rows: int
    tokens: int
    ratio: float
    spread: float
    reference: float
    blocks: int
    parameters: int
    kept: int

    @property
    def seconds(self) -> float:
        """What the method adds to one block."""
        return (self.ratio - 1) * self.reference / self.blocks


@dataclass(frozen=True)
class LatencyTable:
    """Measurements that belong together: of one backbone, on one device, with the same versions.

    Attributes:
        machine: The backbone, the device and the versions; see `profile.machine_of`.
        blocks: The backbone's.
        entries: What was measured.
    """

    machine: dict[str, Any]
    blocks: tuple[Block, ...] = field(repr=False)
    entries: tuple[Entry, ...] = ()

    @cached_property
    def model(self) -> TimeModel:
        """The times as a function of work, fitted on all entries.

        Raises:
            TrainingError: there are too few entries.
        """
        if len(self.entries) < FEWEST:
            raise TrainingError(
                f"A model of times needs {FEWEST} measurements, and the table has {len(self.entries)}. "
                "Measure more: pelton profile BACKBONE."
            )
        return fit_times(*self._columns)

    @property
    def _columns(self) -> tuple[list[str], list[Work], list[float], list[float]]:
        kinds = [str(entry.spec["kind"]) for entry in self.entries]
        works = [self.work(METHODS.parse(entry.spec), entry.rows, entry.tokens) for entry in self.entries]
        weights = [entry.blocks / entry.reference for entry in self.entries]  # residuals are shares of the backbone
        return kinds, works, [entry.seconds for entry in self.entries], weights

    def work(self, spec: MethodSpec, rows: int, tokens: int) -> Work:
        """Returns what a method does in a block of this backbone, in the mean over its blocks."""
        each = [work_of(spec, block, rows, tokens) for block in self.blocks]
        count = len(each)
        return Work(
            round(sum(w.parts for w in each) / count),
            sum(w.flops for w in each) / count,
            sum(w.elements for w in each) / count,
        )

    def errors(self) -> list[float]:
        """Returns the model's error for each entry, fitted without it: a difference of ratios; none for too few."""
        return leave_one_out_errors(*self._columns) if len(self.entries) > FEWEST else []

    def measured(self, spec: MethodSpec, rows: int, tokens: int) -> Entry | None:
        """Returns the entry of a method at a shape, if there is one."""
        wanted = plain_spec(spec)
        return next((e for e in self.entries if (e.rows, e.tokens) == (rows, tokens) and e.spec == wanted), None)

    def reference(self, rows: int, tokens: int) -> float:
        """Returns the seconds of the plain backbone: measured at this shape, or in proportion to its FLOPs.

        Raises:
            TrainingError: nothing was measured.
        """
        here = [e.reference for e in self.entries if (e.rows, e.tokens) == (rows, tokens)]
        if here:
            return statistics.median(here)
        if not self.entries:
            raise TrainingError("The table is empty. Measure: pelton profile BACKBONE.")
        rates = {}
        for entry in self.entries:
            rates[entry.rows, entry.tokens] = entry.reference / backbone_flops(self.blocks, entry.rows, entry.tokens)
        near = min(rates, key=lambda shape: abs(shape[0] * shape[1] - rows * tokens))
        return rates[near] * backbone_flops(self.blocks, rows, tokens)

    def cost(self, spec: MethodSpec, rows: int, tokens: int) -> float:
        """Returns what a method adds to one block that has nothing else, as a share of the backbone's time.

        What was measured is taken as it is, noise below 0 as 0; the rest comes from the model.
        """
        entry = self.measured(spec, rows, tokens)
        if entry is not None:
            return max(0.0, entry.ratio - 1) / entry.blocks
        return self.model.seconds(spec.kind, self.work(spec, rows, tokens)) / self.reference(rows, tokens)

    def overhead(self, rows: int, tokens: int) -> float:
        """Returns d, what having anything in a block costs, as a share of the backbone's time."""
        return self.model.block / self.reference(rows, tokens)

    def ratio(self, blocks: Sequence[Sequence[MethodSpec]], rows: int, tokens: int) -> float:
        """Returns the time of a model with these methods in its blocks, as a ratio to the plain backbone's."""
        d = self.overhead(rows, tokens) if any(len(specs) > 1 for specs in blocks) else 0.0
        costs = [[self.cost(spec, rows, tokens) for spec in specs] for specs in blocks if specs]
        return 1.0 + sum(max(max(some), sum(some) - d * (len(some) - 1)) for some in costs)

    def added(self, entries: Sequence[Entry]) -> LatencyTable:
        """Returns the table with more entries; they take the place of older ones of the same method and shape."""
        new = {(json.dumps(e.spec, sort_keys=True), e.rows, e.tokens): e for e in (*self.entries, *entries)}
        return dataclasses.replace(self, entries=tuple(new.values()))

    def save(self, path: Path) -> None:
        """Writes the table, at once or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        values = {"machine": self.machine, "entries": [dataclasses.asdict(entry) for entry in self.entries]}
        draft.write_text(json.dumps(values, indent=1), encoding="utf-8")
        draft.replace(path)


def load_table(path: Path, machine: Mapping[str, Any], anatomy: Anatomy) -> LatencyTable:
    """Reads a table.

    Args:
        path: The file.
        machine: What it must have been measured on.
        anatomy: Of the backbone.

    Raises:
        TrainingError: the file cannot be read.
        AdapterError: it belongs to another backbone, device or version; says which.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        entries = tuple(Entry(**entry) for entry in values["entries"])
        found = dict(values["machine"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} is no latency table ({error}). Delete it and run pelton profile again.") from error
    for key, value in machine.items():
        if found.get(key) != value:
            raise AdapterError(
                f"{path} was measured with {key} {_brief(found.get(key))}, but here it is {_brief(value)}: times do "
                "not carry over. Measure here: pelton profile BACKBONE."
            )
    return LatencyTable(found, anatomy.blocks, entries)


def table_path(machine: Mapping[str, Any]) -> Path:
    """Returns where the cache keeps the table of a machine."""
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / "latency" / f"{machine['model_type']}-{digest}.json"


def cache_folder() -> Path:
    """Returns Pelton's cache: `$PELTON_CACHE`, or `pelton` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pelton"


def plain_spec(spec: MethodSpec) -> dict[str, Any]:
    """Returns a method as JSON, without the blocks that it goes to."""
    values: dict[str, Any] = json.loads(json.dumps(spec.to_dict()))
    del values["layers"]
    return values


def _brief(value: object) -> str:
    text = str(value)
    return repr(text if len(text) < 60 else f"{text[:57]}…")
