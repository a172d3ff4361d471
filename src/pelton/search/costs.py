"""What every candidate of a supernet costs, what architectures cost, and what is to be expected of probabilities.

With p the probabilities of candidates (without noise), over groups that choose independently:

    parameters = Σ_blocks Σ_candidates p · parameters(candidate)
    latency    = 1 + Σ_blocks ( Σ_candidates p · (cost − d) + d · (1 − Π_groups p(nothing)) )

as a ratio to the plain backbone's time; `cost` and d are those of `latency_table.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pelton.anatomy import Anatomy, Block
from pelton.errors import AnatomyError
from pelton.gates.gumbel import Candidate, GumbelGate
from pelton.methods import MethodSpec
from pelton.search.architecture import Architecture, sized
from pelton.search.flops import parameters_of
from pelton.search.latency_table import LatencyTable


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
class Choices:
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
    ) -> Choices:
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
