"""From probabilities to one architecture, and the architectures that a search has to beat.

uniform         the same in every block, as much as the budget takes
random          candidates drawn for every block, close to the budget
by importance   everything, without what matters least (first-order: `pelton.taylor`)
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor

from pelton.errors import SpecError
from pelton.gates.gumbel import GumbelGateModule
from pelton.search.architecture import Architecture
from pelton.search.costs import BlockCosts, Choices

Picks = dict[tuple[int, int], int]
"""The number of the candidate that a group chose, 0 for nothing, by block and group."""
TRIES = 2000
"""How many architectures are drawn for one that is within a budget and close to it."""
CLOSE = 0.9
"""The share of a budget that uniform and random architectures use at least, where some do."""


def within(
    choices: Choices, gates: Mapping[int, GumbelGateModule], limits: Mapping[str, float], scarce: Collection[str] = ()
) -> Architecture:
    """Returns what gates choose, made to fit budgets: the likeliest such architecture, nearly.

    The step down that loses least log-probability for what it saves is taken, until the budgets hold. A scarce budget
    is then used up by the steps up that lose least for what they add: gates that paid its price are shut a little too
    much, since they paid for what was expected, and not for what they choose in the end.

    Args:
        choices: The candidates and their costs.
        gates: By block.
        limits: The most "parameters" and "latency".
        scarce: Those of them that had a price at the end.

    Raises:
        SpecError: not even nothing is within the budgets.
    """
    logs = {block: gate.probabilities().detach().cpu().log() for block, gate in gates.items()}
    picks = {(block, row): number for block, gate in gates.items() for row, number in enumerate(gate.picks().tolist())}
    while (over := _most_over(choices, picks, limits)) is not None:
        steps = list(_steps(choices, logs, picks, over, up=False))
        if not steps:
            raise SpecError(
                f"No architecture has {over} within {limits[over]:g}. See the range: pelton autopelt --help."
            )
        _, group, number = min(steps)
        picks[group] = number
    if scarce:
        _fill(choices, logs, picks, limits, max(scarce, key=lambda name: _used(choices, picks, limits)[name]))
    return architecture_of(choices, picks)


def _fill(choices: Choices, logs: Mapping[int, Tensor], picks: Picks, limits: Mapping[str, float], what: str) -> None:
    """Takes steps up while the budgets hold."""
    while True:
        for _, group, number in sorted(_steps(choices, logs, picks, what, up=True)):
            tried = {**picks, group: number}
            if max(_used(choices, tried, limits).values()) <= 1:
                picks[group] = number
                break
        else:
            return


def _most_over(choices: Choices, picks: Picks, limits: Mapping[str, float]) -> str | None:
    """Returns the cost that is furthest above its limit, as a share; None where all hold."""
    over = {name: share for name, share in _used(choices, picks, limits).items() if share > 1}
    return max(over, key=lambda name: over[name]) if over else None


def _used(choices: Choices, picks: Picks, limits: Mapping[str, float]) -> dict[str, float]:
    """Returns the costs as shares of their limits."""
    costs = dict(zip(("parameters", "latency"), choices.cost(architecture_of(choices, picks)), strict=True))
    return {name: costs[name] / limit for name, limit in limits.items()}


def _steps(
    choices: Choices, logs: Mapping[int, Tensor], picks: Picks, what: str, *, up: bool
) -> Iterator[tuple[float, tuple[int, int], int]]:
    """Yields loss of log-probability per cost that is added or saved, with the group and the other candidate."""
    for (block, row), now in picks.items():
        costs, row_logs = choices.blocks[block], logs[block][row]
        price = getattr(costs, what)[row].tolist()
        if what == "latency":
            price = [price[0], *(value + costs.overhead for value in price[1:])]
        for number in range(len(costs.groups[row]) + 1):
            moved = price[number] - price[now] if up else price[now] - price[number]
            if moved > 0:
                yield float(row_logs[now] - row_logs[number]) / moved, (block, row), number


def architecture_of(choices: Choices, picks: Picks) -> Architecture:
    """Returns the architecture of what every group picked."""
    blocks: dict[int, dict[str, int | None]] = {}
    for (block, row), number in picks.items():
        if number:
            kind, size = choices.blocks[block].groups[row][number - 1]
            blocks.setdefault(block, {})[kind] = size
    return Architecture(choices.methods, blocks)


def uniform(choices: Choices, limits: Mapping[str, float]) -> Architecture:
    """Returns an architecture within budgets whose blocks all have the same: as many methods, as large as can be.

    Of those that use most of a budget on parameters, the largest of those with most methods.

    Raises:
        SpecError: the blocks have different candidates, or nothing that is the same everywhere fits.
    """
    first, *others = (costs.groups for costs in choices.blocks.values())
    if any(groups != first for groups in others):
        raise SpecError("Uniform allocation needs the same candidates in every block: leave `layers` out.")
    best: tuple[bool, int, float, Architecture] | None = None
    for numbers in itertools.product(*(range(len(group) + 1) for group in first)):
        picks = {(block, row): number for block in choices.blocks for row, number in enumerate(numbers)}
        found = architecture_of(choices, picks)
        if any(numbers) and fits(choices, found, limits):
            size = choices.cost(found)[0]
            rank = (size >= CLOSE * limits.get("parameters", size), sum(map(bool, numbers)), size)
            if best is None or rank > best[:3]:
                best = (*rank, found)
    if best is None:
        raise SpecError(f"Nothing that is the same in every block is within {dict(limits)}. Raise the budget.")
    return best[3]


def random_architecture(choices: Choices, limits: Mapping[str, float], seed: int) -> Architecture:
    """Returns a random architecture within budgets, and close to the first of them where one is drawn.

    Raises:
        SpecError: none was drawn.
    """
    draw, best = random.Random(seed), None
    for _ in range(TRIES):
        keep = draw.random()  # how full, so that tight and loose budgets are both reached
        found = architecture_of(
            choices, {group: _draw(draw, costs, group[1], keep) for group, costs in _groups(choices)}
        )
        if not any(found.blocks.values()) or not fits(choices, found, limits):
            continue
        used = choices.cost(found)[0] / limits["parameters"] if "parameters" in limits else 1.0
        if best is None or used > best[0]:
            best = (used, found)
        if used >= CLOSE:
            return found
    if best is None:
        raise SpecError(f"None of {TRIES} random architectures is within {dict(limits)}. Raise the budget.")
    return best[1]


def _groups(choices: Choices) -> Iterator[tuple[tuple[int, int], BlockCosts]]:
    for block, costs in choices.blocks.items():
        for row in range(len(costs.groups)):
            yield (block, row), costs


def _draw(draw: random.Random, costs: BlockCosts, row: int, keep: float) -> int:
    return draw.randint(1, len(costs.groups[row])) if draw.random() < keep else 0


def by_importance(
    choices: Choices, importance: Mapping[str, Mapping[str, float]], limits: Mapping[str, float]
) -> Architecture:
    """Returns the methods that matter most for their parameters, at their largest size, within budgets.

    Args:
        choices: The candidates and their costs.
        importance: A number by block number and kind, as `pelton.taylor` gives.
        limits: The most "parameters" and "latency".
    """
    whole, blocks = choices.full, dict[int, dict[str, int | None]]()
    worth = []
    for block, choice in whole.blocks.items():
        for kind, size in choice.items():
            cost, _ = choices.cost(Architecture(choices.methods, {block: {kind: size}}))
            worth.append((importance[str(block)][kind] / max(1, cost), block, kind, size))
    for _, block, kind, size in sorted(worth, key=lambda one: one[:3], reverse=True):
        more = {**blocks, block: {**blocks.get(block, {}), kind: size}}
        if fits(choices, Architecture(choices.methods, more), limits):
            blocks = more
    return Architecture(choices.methods, blocks)


def fits(choices: Choices, architecture: Architecture, limits: Mapping[str, float]) -> bool:
    """Tells whether an architecture is within budgets."""
    costs = dict(zip(("parameters", "latency"), choices.cost(architecture), strict=True))
    return all(costs[name] <= limit for name, limit in limits.items())


def default_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns the candidate sizes of a method whose parts have at most so many units: a quarter, half, all."""
    largest = max(sizes)
    return tuple(sorted({max(1, largest // 4), max(1, largest // 2), largest}))
