"""LoRA: a low-rank update beside a linear layer (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    y = W x + b + g · (alpha / rank) · B A x

The gate multiplies `alpha / rank` in rank space, [B, T, R], the cheapest place there is. UniPELT and AdapterHub replace
`alpha / rank` by the gate; `alpha = rank` gives their behaviour.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pelton.methods.base import LINEAR_SITES, METHODS, MethodSpec, Part, Shape, add_product
from pelton.registry import require, require_size


@METHODS.register
@dataclasses.dataclass(frozen=True)
class LoRA(MethodSpec):
    """Low-rank updates of linear layers.

    Attributes:
        rank: R, the width of the bottleneck between A and B.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of dropping an input feature of A in training.
        sites: the linear sites it goes to.
        layers: block indices; None means all.
    """

    kind: ClassVar[str] = "lora"
    allowed: ClassVar[tuple[str, ...]] = LINEAR_SITES
    foldable: ClassVar[bool] = True
    up: ClassVar[str | None] = "B"
    size: ClassVar[str | None] = "rank"
    gates_units: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    sites: tuple[str, ...] = ("attn.q", "attn.v")
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks types, sizes and ranges."""
        super().__post_init__()
        require_size(rank=self.rank)
        require(self.alpha > 0, "alpha > 0", alpha=self.alpha)
        require(0 <= self.dropout < 1, "0 <= dropout < 1", dropout=self.dropout)

    def resized(self, size: int) -> LoRA:
        """Returns the spec with another rank; alpha / rank stays."""
        return dataclasses.replace(self, rank=size, alpha=self.alpha * size / self.rank)

    def build(self, shape: Shape) -> LoRAPart:
        """Makes A and B for one linear layer."""
        return LoRAPart(self, shape)


class LoRAPart(Part):
    """A [R, I] and B [O, R] of one linear layer; B starts at zero, so the update does too."""

    def __init__(self, spec: LoRA, shape: Shape) -> None:
        """Makes A (Kaiming uniform, as PEFT does) and B (zero)."""
        super().__init__()
        self.scaling = spec.alpha / spec.rank
        self.dropout = spec.dropout
        self.A = nn.Parameter(torch.empty(spec.rank, shape.in_features))
        self.B = nn.Parameter(torch.zeros(shape.out_features, spec.rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def first(self) -> Tensor | None:
        """A, where no dropout of its own stands before it."""
        return None if self.dropout else self.A

    def forward(self, y: Tensor, x: Tensor, gate: Tensor, z: Tensor | None = None) -> Tensor:
        """Returns y + g · scaling · B A x, [B, T, O]; `z` is A x, [B, T, R], where that is there already."""
        if z is None:
            x = F.dropout(x, self.dropout, self.training) if self.dropout else x
            z = F.linear(x, self.A.to(x.dtype))
        return add_product(y, z * (gate * self.scaling).to(z.dtype), self.B.to(z.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns W + g · scaling · B A."""
        return weight + gate * self.scaling * (self.B @ self.A), bias
