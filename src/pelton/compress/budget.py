"""What has to go to meet a budget of time.

Time is measured, never counted. A method costs about the same in like blocks, so each kind is left out of all blocks of
a stack at once, and all these models are timed in the same rounds. The costs that explain the times best, none below 0,

    time ÷ time of the backbone − 1  =  Σ_methods cost(stack, kind)  +  blocks with a method · cost(gate)

say what to take: the least importance for the time it saves. What is left is then timed itself; where that is over the
budget, more goes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from pelton.errors import AdapterError
from pelton.insight.latency import Ratio
from pelton.tuner.cut import Entry

TRIES = 5
"""How often what is left is timed before giving up."""

Measure = Callable[[Sequence[Sequence[Entry]]], list[Ratio]]
"""Gives the time without some methods as a ratio to that of the plain backbone, for several such sets."""


@dataclass(frozen=True)
class Latency:
    """The inference time of an adapted model as a ratio to that of the plain backbone.

    Attributes:
        before: As it was.
        after: As it is.
    """

    before: Ratio
    after: Ratio


class Pruned(list[Entry]):
    """What went, the least important first; with the times, where a time was to be met."""

    def __init__(self, gone: Iterable[Entry], latency: Latency | None = None) -> None:
        """Keeps what went."""
        super().__init__(gone)
        self.latency = latency


def within_latency(
    entries: list[Entry], stacks: Mapping[int, str], budget: float, measure: Measure
) -> tuple[list[Entry], Latency]:
    """Returns the methods without which the model takes at most `budget` times the plain backbone's time.

    Args:
        entries: All methods, the least important first.
        stacks: The stack of each block; blocks of a stack are alike.
        budget: A ratio, such as 1.05.
        measure: Times what is left.

    Raises:
        AdapterError: no choice that was tried meets the budget; says the nearest.
    """
    whole, costs = measured_costs(entries, stacks, measure)
    if whole.ratio <= budget and budget > 1:
        return [], Latency(whole, whole)
    target, nearest, left = budget, whole, len(entries)
    for _ in range(TRIES):
        kept = choose(entries, costs, target)
        gone = [entry for entry in entries if entry not in kept]
        after = measure([gone])[0]
        if after.ratio <= budget and budget > 1:  # nothing that is attached is free: at 1 only noise says so
            return gone, Latency(whole, after)
        if after.ratio < nearest.ratio:
            nearest, left = after, len(kept)
        if len(kept) == 1:
            break
        target = costs.of(kept) - (after.ratio - budget)
    least = max(math.ceil(nearest.ratio * 1000) / 1000, 1.001)
    raise AdapterError(
        f"budget_latency={budget:g} cannot be met: the nearest was {nearest} times the plain backbone's time, with "
        f"{left} of {len(entries)} methods left; nothing is changed. Give at least {least:.3f}, or freeze the gates "
        "and fold first."
    )


@dataclass(frozen=True)
class Costs:
    """What methods and gates add to the time of the backbone, as shares of it.

    Attributes:
        stacks: The stack of each block.
        methods: The cost of one method by stack and kind.
        gate: The cost of a block's gate.
    """

    stacks: Mapping[int, str]
    methods: Mapping[tuple[str, str], float]
    gate: float

    def one(self, entry: Entry) -> float:
        """Returns the cost of a method, without its gate."""
        return self.methods[self.stacks[entry.block], entry.kind]

    def of(self, kept: Collection[Entry]) -> float:
        """Returns the time of a model with these methods as a ratio to the backbone's."""
        return 1 + sum(map(self.one, kept)) + self.gate * len({entry.block for entry in kept})


def measured_costs(entries: Sequence[Entry], stacks: Mapping[int, str], measure: Measure) -> tuple[Ratio, Costs]:
    """Measures the model as it is, and without each kind in each stack.

    Returns:
        The time of the model as it is, and the costs.
    """
    groups = list(dict.fromkeys((stacks[entry.block], entry.kind) for entry in entries))
    leave_out: list[list[Entry]] = [[]]
    if len(groups) > 1:
        leave_out += [[e for e in entries if (stacks[e.block], e.kind) == group] for group in groups]
    found = measure(leave_out)
    rows = []
    for gone in leave_out:
        kept = [entry for entry in entries if entry not in gone]
        counts = Counter((stacks[entry.block], entry.kind) for entry in kept)
        rows.append([*(counts[group] for group in groups), len({entry.block for entry in kept})])
    values, _ = nnls(np.array(rows, dtype=float), np.array([max(0.0, some.ratio - 1) for some in found]))
    *methods, gate = map(float, values)
    return found[0], Costs(stacks, dict(zip(groups, methods, strict=True)), gate)


def choose(entries: Sequence[Entry], costs: Costs, target: float) -> list[Entry]:
    """Chooses what stays: as much importance as goes into a time, by importance per time.

    Args:
        entries: All methods.
        costs: What they cost.
        target: The time, as a ratio to the backbone's.

    Returns:
        What stays, one method at least: the cheapest where nothing meets the target.
    """
    kept = list(entries)
    while costs.of(kept) > target:
        options = [some for some in _options(kept) if len(some) < len(kept) and _saved(kept, some, costs) > 0]
        if not options:
            break
        least = min(options, key=lambda some: _worth(some, _saved(kept, some, costs)))
        kept = [entry for entry in kept if entry not in least]
    if costs.of(kept) > target:
        return [min(entries, key=costs.one)]
    for entry in sorted(entries, key=lambda entry: -entry.importance):
        if entry not in kept and entry.importance > 0 and costs.of([*kept, entry]) <= target:
            kept.append(entry)
    return kept


def _options(kept: Sequence[Entry]) -> Iterable[list[Entry]]:
    """Yields what can go next: a method, or all that a block has, with its gate."""
    blocks: dict[int, list[Entry]] = {}
    for entry in kept:
        blocks.setdefault(entry.block, []).append(entry)
        yield [entry]
    yield from (some for some in blocks.values() if len(some) > 1)


def _saved(kept: Sequence[Entry], some: Sequence[Entry], costs: Costs) -> float:
    last = sum(entry.block == some[0].block for entry in kept) == len(some)
    return sum(map(costs.one, some)) + (costs.gate if last else 0.0)


def _worth(some: Sequence[Entry], saved: float) -> tuple[float, float]:
    return sum(entry.importance for entry in some) / saved, -saved
