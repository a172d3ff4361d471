"""Bottleneck adapters: a small residual network behind a sub-layer.

Houlsby et al. 2019 (arXiv 1902.00751, section 2.1), Pfeiffer et al. 2020 (arXiv 2005.00247); the parallel form is He et
al. 2022 (arXiv 2110.04366, section 3.2).

    sequential:  y = h + g · scaling · U act(D h)
    parallel:    y = h + g · scaling · U act(D x),  x the input of the sub-layer

It stands before dropout, residual and norm. U starts at zero and has no bias (BitFit trains those).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pelton.errors import unknown
from pelton.methods.base import METHODS, MethodSpec, Part, Shape, add_product
from pelton.registry import require, require_size

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}

_INPUT_OF = {"ffn.out": "ffn.in", "attn.out": "attn.q"}


@METHODS.register
@dataclasses.dataclass(frozen=True)
class Bottleneck(MethodSpec):
    """Two small linear layers with an activation between, behind the feed-forward and / or attention sub-layer.

    Attributes:
        bottleneck_size: the width between the two layers.
        activation: relu, gelu, silu or tanh.
        mode: "sequential" reads the sub-layer's output, "parallel" its input.
        scaling: a constant factor beside the gate (He et al. use 4 for the parallel form).
        dropout: probability of dropping a unit of the bottleneck in training.
        sites: `ffn.out` (Pfeiffer) and / or `attn.out` (with both: Houlsby).
        layers: block indices; None means all.
    """

    kind: ClassVar[str] = "bottleneck"
    allowed: ClassVar[tuple[str, ...]] = ("attn.out", "ffn.out")
    up: ClassVar[str | None] = "up"
    size: ClassVar[str | None] = "bottleneck_size"
    gates_units: ClassVar[bool] = True

    bottleneck_size: int = 48
    activation: str = "relu"
    mode: Literal["sequential", "parallel"] = "sequential"
    scaling: float = 1.0
    dropout: float = 0.0
    sites: tuple[str, ...] = ("ffn.out",)
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks types, sizes, ranges and names."""
        super().__post_init__()
        require_size(bottleneck_size=self.bottleneck_size)
        require(self.scaling > 0, "scaling > 0", scaling=self.scaling)
        require(0 <= self.dropout < 1, "0 <= dropout < 1", dropout=self.dropout)
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)

    def build(self, shape: Shape) -> BottleneckPart:
        """Makes both layers for one place."""
        return BottleneckPart(self, shape)


class BottleneckPart(Part):
    """Down-projection with bias, activation, up-projection that starts at zero."""

    order: ClassVar[int] = 2

    def __init__(self, spec: Bottleneck, shape: Shape) -> None:
        """Makes `down` [S, D], its bias [S] and `up` [D, S], S the bottleneck size."""
        super().__init__()
        self.origin = _INPUT_OF[shape.site] if spec.mode == "parallel" else None
        self.spec = spec
        self.down = nn.Linear(shape.out_features, spec.bottleneck_size)
        self.up = nn.Parameter(torch.zeros(shape.out_features, spec.bottleneck_size))

    def forward(self, y: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Returns y + g · scaling · U act(D source), [B, T, D]."""
        source = x if self.origin else y
        z = F.linear(source, self.down.weight.to(source.dtype), self.down.bias.to(source.dtype))
        z = ACTIVATIONS[self.spec.activation](z)
        if self.spec.dropout:
            z = F.dropout(z, self.spec.dropout, self.training)
        return add_product(y, z * (gate * self.spec.scaling).to(z.dtype), self.up.to(z.dtype))
