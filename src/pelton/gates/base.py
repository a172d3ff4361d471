"""What a gate is: a frozen spec, and a module that gives the gate values of one block.

Letters: B batch, T tokens, D hidden, M methods. Gate values are float32 in [0, 1], shaped [B, 1, M] (granularity
`example`), [B, T, M] (`token`) or [1, 1, M] (`static`), so that one method's slice broadcasts over [B, T, features].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from pelton.errors import SpecError
from pelton.registry import Registry, Spec, require

Granularity = Literal["example", "token", "static"]


@dataclasses.dataclass(frozen=True)
class Place:
    """What a gate is built for: the methods of one block, the block's width, whether it is causal, and its number."""

    methods: tuple[str, ...]
    hidden_size: int
    causal: bool
    index: int = 0


class Gate(nn.Module):
    """The gate of one block: one value for each method, example or token.

    A gate that chooses sizes gives more than that: behind the values of the methods stand those of single units, and
    `units` says from where to where for each method that has them.
    """

    granularity: Granularity
    units: dict[str, tuple[int, int]]

    def __init__(self, methods: Sequence[str], granularity: Granularity) -> None:
        """Keeps the kinds of the methods, in the order of the values, and the granularity."""
        super().__init__()
        self.methods = tuple(methods)
        self.granularity = granularity
        self.units = {}

    def span(self, kind: str) -> tuple[int, int]:
        """Returns from where to where the values stand that a method's parts are given."""
        number = self.methods.index(kind)
        return self.units.get(kind, (number, number + 1))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns gate values, float32.

        Args:
            x: the block's input, [B, T, D].
            mask: 1 for tokens and 0 for padding, [B, T]; None when nothing is padded.
        """
        raise NotImplementedError


class StaticGate(Gate):
    """A gate whose values do not depend on the input."""

    def values(self) -> Tensor:
        """Returns the values, [M]."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the values, [1, 1, M]."""
        return self.values().float()[None, None]


@dataclasses.dataclass(frozen=True)
class GateSpec(Spec):
    """Hyperparameters of a gate. Subclasses set `kind` and build modules."""

    static: ClassVar[bool] = False

    def build(self, place: Place) -> Gate:
        """Makes the gate of one block."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class DynamicGateSpec(GateSpec):
    """What gates that read the input share.

    Attributes:
        granularity: "example" (one value per row), "token" (one per token) or "auto": token in causal blocks, where a
            pooled gate would see the future, example elsewhere.
        entropy: weight of the entropy penalty (winner takes all).
        l1: weight of the L1 penalty (closed gates).
        balance: weight of the balance penalty (against collapse on one method).
    """

    granularity: Literal["auto", "example", "token"] = dataclasses.field(default="auto", kw_only=True)
    entropy: float = dataclasses.field(default=0.0, kw_only=True)
    l1: float = dataclasses.field(default=0.0, kw_only=True)
    balance: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        """Checks types, names and ranges."""
        super().__post_init__()
        for name in ("entropy", "l1", "balance"):
            require(getattr(self, name) >= 0, f"{name} >= 0", **{name: getattr(self, name)})

    def resolve(self, place: Place) -> Granularity:
        """Returns the granularity for one block; a pooled gate in a causal block is refused."""
        if self.granularity == "auto":
            return "token" if place.causal else "example"
        if self.granularity == "example" and place.causal:
            raise SpecError(
                "`granularity != 'example'` must hold in causal blocks, but got granularity='example', causal=True: "
                "a gate pooled over the sequence sees later tokens. Use granularity='token' (or 'auto')."
            )
        return self.granularity


GATES: Registry[GateSpec] = Registry("gate", GateSpec)
"""Every known gate by kind."""

register_gate = GATES.register
