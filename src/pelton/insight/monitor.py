"""Gate values of a model at work, in bounded memory, for comparison with a reference."""

from __future__ import annotations

import random
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import pandas as pd
import torch
from torch import Tensor, nn

from pelton.errors import AdapterError
from pelton.gates.base import Gate
from pelton.gates.recording import GateLog, listening
from pelton.insight.drift import GateDrift, Place, Samples, compare, constant, samples_of
from pelton.registry import require
from pelton.tuner.block import gate_of
from pelton.tuner.config import PeltonConfig
from pelton.tuner.controls import gated_blocks, tuners
from pelton.tuner.model import PeltonModel

CAPACITY = 4096


class DriftMonitor:
    """Watches the gates of a model while it serves, and says how far they have moved from a reference.

    It keeps a fair sample of bounded size (reservoir sampling, Vitter 1985, algorithm R) on the gates' own devices;
    nothing is copied to the host before `report`. For a view of now rather than of always, `reset` it now and then.
    Steps of decoding with a cache are left out: their example was seen when its prompt was read.

    Example:
        with pelton.DriftMonitor(model, pandas.read_parquet("runs/mine/gates.parquet")) as monitor:
            serve(model)
        print(monitor.report().says)

    Attributes:
        seen: How many examples its gates have read.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: pd.DataFrame | GateLog,
        *,
        adapter: str | None = None,
        capacity: int = CAPACITY,
    ) -> None:
        """Takes the reference; nothing is watched before the context is entered.

        Args:
            model: A model with an adapter.
            reference: As `gate_drift` takes it.
            adapter: Its name; the active one when not given.
            capacity: Examples of which values are kept.

        Raises:
            AdapterError: there is no such adapter, or its gates are constant.
        """
        require(capacity >= 1, "capacity >= 1", capacity=capacity)
        blocks = gated_blocks(model)
        name = blocks[0].adapters_at_work[0] if adapter is None else adapter
        mine = [block for block in blocks if name in block.wirings]
        if not mine:
            raise AdapterError(f"There is no adapter {name!r} to watch. There are: {', '.join(blocks[0].wirings)}.")
        if all(gate_of(block, name).granularity == "static" for block in mine):
            raise constant()
        self.model, self.adapter, self.capacity = model, name, capacity
        self.reference = samples_of(reference)
        self._stack = ExitStack()
        self.reset()

    def __enter__(self) -> Self:
        """Begins to watch."""
        self._stack.enter_context(listening(self.model, self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops watching; what was seen stays until `reset`."""
        self._stack.close()

    def reset(self) -> None:
        """Forgets what was seen."""
        self._order: dict[tuple[str, int], int] = {}
        self._kept: dict[tuple[int, str, tuple[str, ...]], Reservoir] = {}

    @property
    def seen(self) -> int:
        """How many examples the gates have read."""
        return min((kept.count for kept in self._kept.values()), default=0)

    def add(self, name: str, call: int, gate: Gate, values: Tensor, mask: Tensor | None) -> None:
        """Takes in the values of one gate in one forward; called by hooks, as `GateLog.add` is."""
        block, _, adapter = name.partition(".pelton.gates.")
        if adapter != self.adapter or (gate.granularity == "token" and values.shape[1] == 1):
            return
        place = (self._order.setdefault((block, call), len(self._order)), block, gate.methods)
        if place not in self._kept:
            self._kept[place] = Reservoir(self.capacity)
        with torch.inference_mode(False), torch.no_grad():
            self._kept[place].add(_by_example(values.detach(), mask))

    def report(self) -> GateDrift:
        """Compares what was seen so far with the reference.

        Raises:
            AdapterError: nothing was seen, or the gates are not those of the reference.
        """
        if not self._kept:
            raise AdapterError("No gate was seen to open: run the model inside `with monitor:` first.")
        live: dict[Place, Tensor] = {}
        for (index, block, methods), kept in self._kept.items():
            for number, method in enumerate(methods):
                live[index, block, method] = kept.values()[:, number]
        samples: Samples = {place: values.double().cpu().numpy() for place, values in live.items()}
        tuner = tuners(self.model)[0]
        return compare(self.reference, samples, names_of(tuner, revivable(tuner.peft_config[self.adapter])))


class Reservoir:
    """A fair sample of rows, [capacity, M]: after n rows each of them is in it with the same probability."""

    def __init__(self, capacity: int, seed: int = 0) -> None:
        """Is empty; with one seed, several of them keep the same rows."""
        self.capacity, self.count = capacity, 0
        self.rows: Tensor | None = None
        self.random = random.Random(seed)

    def add(self, rows: Tensor) -> None:
        """Offers rows, [n, M]."""
        if self.rows is None:
            self.rows = rows.new_zeros((self.capacity, rows.shape[1]))
        slots: dict[int, int] = {}
        for row in range(len(rows)):
            place = self.count + row
            slot = place if place < self.capacity else self.random.randrange(place + 1)
            if slot < self.capacity:
                slots[slot] = row
        self.count += len(rows)
        if slots:
            to, of = (torch.tensor(list(some)).to(rows.device, non_blocking=True) for some in (slots, slots.values()))
            self.rows[to] = rows[of]

    def values(self) -> Tensor:
        """Returns the rows that are in it."""
        assert self.rows is not None
        return self.rows[: min(self.count, self.capacity)]


def revivable(config: PeltonConfig) -> set[tuple[int, str]]:
    """Returns block numbers and kinds of the methods that passes took from an adapter, and `revive` brings back."""
    if not config.steps:
        return set()
    before = config.steps[0].shape["pruned"]
    return {
        (int(block), kind)
        for block, kinds in config.pruned.items()
        for kind in kinds
        if kind not in before.get(block, ())
    }


def names_of(tuner: PeltonModel, methods: set[tuple[int, str]]) -> list[tuple[str, str]]:
    """Returns methods with the names of their blocks, of those that have gates."""
    return [(b.block.name, kind) for b in tuner.blocks() for index, kind in sorted(methods) if index == b.block.index]


def _by_example(values: Tensor, mask: Tensor | None) -> Tensor:
    """Averages gate values [B, 1 or T, M] over tokens, padding left out: [B, M]."""
    if values.shape[1] == 1 or mask is None:
        return values.float().mean(dim=1)
    weights = mask.expand(values.shape[:2]).to(torch.float32)[..., None]
    return (values.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1.0)
