"""A gate that chooses: which methods a block has, and how large each is, learned by gradients.

Candidates are "nothing" and every method at every size. Each has a logit a; in training a candidate's share is

    p = softmax((a + n) / τ),   n = −log(−log u),  u uniform          (Gumbel-softmax)

(Jang et al. 2017, arXiv 1611.01144; Maddison et al. 2017, arXiv 1611.00712), drawn anew for every example, so that a
batch tries as many architectures as it has rows. As τ falls, the shares become ones and zeros. In evaluation there is
no noise and no share: one candidate is open, all others are shut, so what is evaluated is the architecture that the
search would end with. It is the method (or nothing) whose sizes are likeliest together, at its median size: the largest
one that is at least as likely to be reached as not.

Sizes of one method are nested, as in slimmable networks (Yu et al. 2019, arXiv 1812.08928): the smaller one is made of
the larger one's first units, and shares their weights. Unit u is open by the sum of the shares of all sizes above u:

    g_u = Σ_{size > u} p(method, size)

Letters: B batch, M methods, U units of all methods with several sizes, G groups that choose one candidate each, C the
candidates of a group, M + U the values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pelton.gates.base import GATES, Gate, GateSpec, Place
from pelton.registry import require, require_size

_TINY = torch.finfo(torch.float32).tiny
SHUT = -1e30
"""The logit of a candidate that does not exist."""


class Candidate(NamedTuple):
    """One thing that can be chosen: a method at a size; `size` is None where the method has one size only."""

    kind: str
    size: int | None


@GATES.register
@dataclasses.dataclass(frozen=True)
class GumbelGate(GateSpec):
    """Chooses among methods, their sizes and nothing, by Gumbel-softmax.

    Attributes:
        sizes: the candidate sizes by method, `{"lora": (2, 4, 8)}`; the largest is the method's own. A method that is
            not named has one size.
        choose: "block" lets a block have one method at most; "method" decides over each method by itself.
        temperature: τ > 0; smaller is sharper.
        straight_through: opens one candidate wholly in the forward pass, and takes the gradient of the shares.
        init: the probability, at the start, that a block (or method) has something.
    """

    kind: ClassVar[str] = "gumbel"

    sizes: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    choose: Literal["block", "method"] = "block"
    temperature: float = 1.0
    straight_through: bool = False
    init: float = 0.5

    def __post_init__(self) -> None:
        """Checks types, names and ranges."""
        super().__post_init__()
        require(isinstance(self.sizes, Mapping), "sizes are by method", sizes=self.sizes)
        for kind, sizes in self.sizes.items():
            require(isinstance(sizes, Sequence) and len(sizes) > 0, "sizes is a list", kind=kind, sizes=sizes)
            for size in sizes:
                require_size(size=size)
            require(list(sizes) == sorted(set(sizes)), "sizes rise", kind=kind, sizes=tuple(sizes))
        object.__setattr__(self, "sizes", {kind: tuple(sizes) for kind, sizes in self.sizes.items()})
        require(self.temperature > 0, "temperature > 0", temperature=self.temperature)
        require(0 < self.init < 1, "0 < init < 1", init=self.init)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return super().to_dict() | {"sizes": {kind: list(sizes) for kind, sizes in self.sizes.items()}}

    def candidates(self, methods: Sequence[str]) -> list[list[Candidate]]:
        """Returns what each group of a block with these methods chooses from, beside nothing."""
        each = [[Candidate(kind, size) for size in self.sizes.get(kind, (None,))] for kind in methods]
        return each if self.choose == "method" else [[candidate for some in each for candidate in some]]

    def build(self, place: Place) -> GumbelGateModule:
        """Makes the gate of one block."""
        return GumbelGateModule(self, place)


class GumbelGateModule(Gate):
    """A logit for every candidate and every group's "nothing": G + the number of candidates.

    `place` [G, C + 1] says which logit stands where, nothing first; `opens` [G · (C + 1), M + U] which values it opens;
    `alike` and `larger` [G, C + 1, C + 1] which candidates are of one method, and which of them at least as large.
    """

    place: Tensor
    opens: Tensor
    alike: Tensor
    larger: Tensor

    def __init__(self, spec: GumbelGate, place: Place) -> None:
        """Makes the logits."""
        super().__init__(place.methods, "static")
        self.temperature = spec.temperature
        self.straight_through = spec.straight_through
        self.groups = spec.candidates(place.methods)
        self.units = _spans(spec, place.methods)
        first = [_start(spec.init, len(group)) for group in self.groups]
        self.logits = nn.Parameter(
            torch.tensor(
                [x for nothing, group in zip(first, self.groups, strict=True) for x in (nothing, *(0.0,) * len(group))]
            )
        )
        where, opens = _tables(self.groups, self.methods, self.units)
        self.register_buffer("place", where, persistent=False)
        self.register_buffer("opens", opens, persistent=False)
        alike, larger = _orders(self.groups, where.shape[1])
        self.register_buffer("alike", alike, persistent=False)
        self.register_buffer("larger", larger, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns gate values: in training [B, 1, M + U], drawn for each example; in evaluation [1, 1, M + U].

        The first M are how open a method is in all; behind them stand the values of units (see `Gate.units`).
        """
        shares = self._drawn(self.table().expand(x.shape[0], -1, -1)) if self.training else self._picked()[None]
        return (shares.flatten(1) @ self.opens)[:, None]

    def table(self) -> Tensor:
        """Returns the logits by group, [G, C + 1], nothing first; float32."""
        every = torch.cat([self.logits.float(), self.logits.new_full((1,), SHUT, dtype=torch.float32)])
        return every[self.place]

    def probabilities(self) -> Tensor:
        """Returns how likely each candidate is to be chosen, [G, C + 1], nothing first; without noise, at τ = 1."""
        return self.table().softmax(dim=-1)

    def picks(self) -> Tensor:
        """Returns which candidate each group chooses now, [G]; 0 is nothing."""
        return self._picked().argmax(dim=-1)

    def _picked(self) -> Tensor:
        """Returns 1 for the candidates that are chosen, [G, C + 1]."""
        p = self.probabilities()[:, None]
        total, reached = (p @ self.alike)[:, 0], (p @ self.larger)[:, 0]
        first = total.argmax(dim=-1)[:, None, None].expand(-1, 1, total.shape[1])
        method = self.alike.gather(1, first)[:, 0]
        rank = torch.arange(1, total.shape[1] + 1, device=total.device) * method * (reached >= total / 2)
        return _one_hot(rank)

    def _drawn(self, logits: Tensor) -> Tensor:
        """Returns shares of candidates under fresh noise, [B, G, C + 1]."""
        noise = -torch.empty_like(logits).exponential_().clamp_min(_TINY).log()
        shares = ((logits + noise) / self.temperature).softmax(dim=-1)
        return (_one_hot(shares) - shares.detach()) + shares if self.straight_through else shares


def _one_hot(scores: Tensor) -> Tensor:
    """Returns 1 at the first of the highest scores of the last dimension, 0 elsewhere."""
    return torch.zeros_like(scores).scatter(-1, scores.argmax(dim=-1, keepdim=True), 1.0)


def _orders(groups: Sequence[Sequence[Candidate]], width: int) -> tuple[Tensor, Tensor]:
    """Returns `alike` and `larger` of `GumbelGateModule`."""
    alike, larger = torch.zeros(len(groups), width, width), torch.zeros(len(groups), width, width)
    for row, group in enumerate(groups):
        every: list[Candidate] = [Candidate("", None), *group]
        for i, one in enumerate(every):
            for j, other in enumerate(every):
                alike[row, i, j] = one.kind == other.kind
                larger[row, i, j] = one.kind == other.kind and (one.size or 0) >= (other.size or 0)
    return alike, larger


def _start(init: float, count: int) -> float:
    """Returns the logit of nothing at which `count` candidates with logit 0 have the probability `init` together."""
    return math.log(count * (1 - init) / init)


def _spans(spec: GumbelGate, methods: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Returns where the units of each method with sizes stand among the values."""
    spans, start = {}, len(methods)
    for kind in methods:
        if kind in spec.sizes:
            spans[kind] = (start, start + max(spec.sizes[kind]))
            start = spans[kind][1]
    return spans


def _tables(
    groups: Sequence[Sequence[Candidate]], methods: Sequence[str], units: Mapping[str, tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Returns `place` and `opens` of `GumbelGateModule`."""
    width, last = 1 + max(map(len, groups)), len(groups) + sum(map(len, groups))
    where = torch.full((len(groups), width), last)
    opens = torch.zeros(len(groups), width, max([len(methods), *(stop for _, stop in units.values())]))
    number = 0
    for row, group in enumerate(groups):
        where[row, : len(group) + 1] = torch.arange(number, number + len(group) + 1)
        number += len(group) + 1
        for column, (kind, size) in enumerate(group, start=1):
            opens[row, column, methods.index(kind)] = 1.0
            if size is not None:
                start = units[kind][0]
                opens[row, column, start : start + size] = 1.0
    return where, opens.flatten(0, 1)
