"""What a supernet costs in expectation, and what that adds to the loss.

With p the probabilities of candidates (without noise), everything is expected over independent groups:

    parameters = Σ_blocks Σ_candidates p · parameters(candidate)
    latency    = 1 + Σ_blocks ( Σ_candidates p · (cost − d) + d · (1 − Π_groups p(nothing)) )

as a ratio to the plain backbone (`latency_table.py`). The loss gets α · (latency − 1) + β · parameters / all, and for a
budget the augmented Lagrangian of g = expected / budget − 1 ≤ 0 (Nocedal and Wright 2006, section 17.4):

    ( max(0, λ + ρ g)² − λ² ) / 2ρ,      λ ← max(0, λ + η g) after every step

so that the price of what is too much rises until the budget holds, and no weight has to be found by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pelton.anatomy import Anatomy, Block
from pelton.errors import AnatomyError
from pelton.gates.gumbel import Candidate, GumbelGate
from pelton.methods import MethodSpec
from pelton.registry import require
from pelton.search.architecture import Architecture, sized
from pelton.search.flops import parameters_of
from pelton.search.latency_table import LatencyTable

RHO = 2.0
ETA = 0.05
"""How fast a multiplier grows, a step."""


@dataclass(frozen=True)
class BlockCosts:
    """What the candidates of one block cost, by group, nothing first.

    Attributes:
        groups: The candidates.
        parameters: [G, C + 1].
        latency: cost − d, [G, C + 1], as shares of the backbone's time.
        overhead: d.
    """

    groups: list[list[Candidate]]
    parameters: Tensor
    latency: Tensor
    overhead: float


@dataclass(frozen=True)
class Space:
    """All architectures that some methods make under a gate on one backbone, with their costs.

    Attributes:
        methods: The methods at their largest sizes.
        gate: Says the sizes, and whether a block has one method at most.
        anatomy: The backbone's.
        blocks: The costs by block number.
        timed: Whether there is a latency table; else all times are 0.
    """

    methods: tuple[MethodSpec, ...]
    gate: GumbelGate
    anatomy: Anatomy
    blocks: Mapping[int, BlockCosts]
    timed: bool

    @classmethod
    def of(
        cls,
        methods: Sequence[MethodSpec],
        gate: GumbelGate,
        anatomy: Anatomy,
        table: LatencyTable | None = None,
        shape: tuple[int, int] = (1, 32),
    ) -> Space:
        """Counts and looks up what every candidate costs.

        Args:
            methods: At their largest sizes.
            gate: Of the supernet.
            anatomy: Of the backbone.
            table: Where times come from.
            shape: Of the inputs whose time counts: examples and tokens.
        """
        found = {}
        for block in anatomy.blocks:
            here = [m for m in methods if _goes_to(m, block)]
            if here:
                found[block.index] = _costs(here, gate, block, table, shape)
        if not found:
            raise AnatomyError("None of the methods has a place in the backbone. See pelton anatomy.")
        return cls(tuple(methods), gate, anatomy, found, table is not None)

    def parameters(self, probabilities: Mapping[int, Tensor]) -> Tensor:
        """Returns the expected number of parameters, a scalar."""
        return torch.stack(
            [(p * self.blocks[block].parameters.to(p)).sum() for block, p in probabilities.items()]
        ).sum()

    def latency(self, probabilities: Mapping[int, Tensor]) -> Tensor:
        """Returns the expected time as a ratio to the plain backbone's, a scalar."""
        each = []
        for block, p in probabilities.items():
            costs = self.blocks[block]
            each.append((p * costs.latency.to(p)).sum() + costs.overhead * (1 - p[:, 0].prod()))
        return 1.0 + torch.stack(each).sum()

    def cost(self, architecture: Architecture) -> tuple[int, float]:
        """Returns the parameters of an architecture, and its time as a ratio to the plain backbone's."""
        hot = {block: self._one_hot(block, architecture) for block in self.blocks}
        return round(float(self.parameters(hot))), float(self.latency(hot))

    def _one_hot(self, block: int, architecture: Architecture) -> Tensor:
        costs, here = self.blocks[block], architecture.blocks.get(block, {})
        hot = torch.zeros_like(costs.parameters)
        for row, group in enumerate(costs.groups):
            picked = [n for n, one in enumerate(group, start=1) if one.kind in here and here[one.kind] == one.size]
            hot[row, picked[0] if picked else 0] = 1.0
        return hot

    @property
    def full(self) -> Architecture:
        """Everything that can be had at once, at its largest; of one method a block, the one with most parameters."""
        blocks = {}
        for block, costs in self.blocks.items():
            best = costs.parameters.argmax(dim=-1).tolist()
            picked = [group[number - 1] for group, number in zip(costs.groups, best, strict=True)]
            blocks[block] = {one.kind: one.size for one in picked}
        return Architecture(self.methods, blocks)

    @property
    def range(self) -> dict[str, tuple[float, float]]:
        """What budgets can be: from the cheapest candidate of all to everything, by "parameters" and "latency"."""
        rows = [b.parameters[:, 1:][b.parameters[:, 1:] > 0] for b in self.blocks.values()]
        least = min(float(row.min()) for row in rows if len(row)) if any(map(len, rows)) else 0.0
        times = [
            float(b.latency[row, 1 : len(group) + 1].min()) + b.overhead
            for b in self.blocks.values()
            for row, group in enumerate(b.groups)
        ]
        parameters, latency = self.cost(self.full)
        return {"parameters": (least, parameters), "latency": (1.0 + min(times), latency)}


def _goes_to(spec: MethodSpec, block: Block) -> bool:
    return (spec.layers is None or block.index in spec.layers) and any(site in block.sites for site in spec.sites)


def _costs(
    methods: Sequence[MethodSpec], gate: GumbelGate, block: Block, table: LatencyTable | None, shape: tuple[int, int]
) -> BlockCosts:
    groups = gate.candidates([spec.kind for spec in methods])
    by_kind, width = {spec.kind: spec for spec in methods}, 1 + max(map(len, groups))
    parameters, latency = torch.zeros(len(groups), width), torch.zeros(len(groups), width)
    overhead = 0.0 if table is None else table.overhead(*shape)
    for row, group in enumerate(groups):
        for column, (kind, size) in enumerate(group, start=1):
            spec = sized(by_kind[kind], size)
            parameters[row, column] = parameters_of(spec, block)
            if table is not None:
                latency[row, column] = max(0.0, table.cost(spec, *shape) - overhead)
    return BlockCosts(groups, parameters, latency, overhead)


@dataclass
class Budget:
    """One constraint, with its multiplier.

    Attributes:
        limit: What the expected cost may be at most.
        multiplier: λ.
    """

    limit: float
    multiplier: float = 0.0

    def term(self, expected: Tensor) -> Tensor:
        """Returns what the constraint adds to the loss."""
        push = (self.multiplier + RHO * (expected / self.limit - 1)).clamp_min(0.0)
        return (push.square() - self.multiplier**2) / (2 * RHO)

    def update(self, expected: float) -> None:
        """Moves the multiplier after a step."""
        self.multiplier = max(0.0, self.multiplier + ETA * (expected / self.limit - 1))


class Price:
    """What the cost of a supernet adds to its loss."""

    def __init__(
        self,
        space: Space,
        *,
        alpha: float = 0.0,
        beta: float = 0.0,
        parameters: float | None = None,
        latency: float | None = None,
    ) -> None:
        """Checks the weights and budgets.

        Args:
            space: Says the costs.
            alpha: Weight of the expected time that is added, as a share of the backbone's.
            beta: Weight of the expected parameters, as a share of all.
            parameters: The most parameters that there may be.
            latency: The longest time, as a ratio to the backbone's.

        Raises:
            SpecError: a weight is negative, a budget cannot be met or always holds, or times have no table.
        """
        for name, weight in {"alpha": alpha, "beta": beta}.items():
            require(0 <= weight < math.inf, f"0 <= {name} < inf", **{name: weight})
        timed = alpha > 0 or latency is not None
        require(space.timed or not timed, "alpha and budget_latency have a latency table", table=None)
        limits = {"parameters": parameters, "latency": latency}
        for name, value in limits.items():
            if value is not None:
                low, high = space.range[name]
                shown = f"{math.ceil(low):,} <= budget_{name} <= {math.floor(high):,}"
                if name == "latency":
                    shown = f"{low:.4f} <= budget_{name} <= {high:.4f}"
                require(
                    low <= value <= high, f"{shown} (the cheapest part alone … everything)", **{f"budget_{name}": value}
                )
        self.space, self.alpha, self.beta = space, alpha, beta
        self.full = space.range["parameters"][1]
        self.budgets = {name: Budget(float(limit)) for name, limit in limits.items() if limit is not None}

    @property
    def limits(self) -> dict[str, float]:
        """The budgets, by "parameters" and "latency"."""
        return {name: budget.limit for name, budget in self.budgets.items()}

    def expected(self, probabilities: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Returns the expected costs, by "parameters" and "latency"."""
        return {"parameters": self.space.parameters(probabilities), "latency": self.space.latency(probabilities)}

    def term(self, expected: Mapping[str, Tensor]) -> Tensor:
        """Returns what is added to the loss, a scalar."""
        free = self.beta * expected["parameters"] / self.full + self.alpha * (expected["latency"] - 1)
        return torch.stack([free, *(budget.term(expected[name]) for name, budget in self.budgets.items())]).sum()

    def update(self, expected: Mapping[str, Tensor]) -> None:
        """Moves the multipliers after a step."""
        for name, budget in self.budgets.items():
            budget.update(float(expected[name].detach()))
