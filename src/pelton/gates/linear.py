"""The gate of the UniPELT paper: one linear layer per method (Mao et al., ACL 2022, section 3.2).

    g = mean over tokens of sigmoid(w·x + b)

The mean leaves padding out, which the published code does not. The layers of a block's methods are the rows of one.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from pelton.gates.base import GATES, DynamicGateSpec, Gate, Place
from pelton.gates.pooling import masked_mean


@GATES.register
@dataclasses.dataclass(frozen=True)
class LinearGate(DynamicGateSpec):
    """The published gate; it has no hyperparameters of its own."""

    kind: ClassVar[str] = "linear"

    def build(self, place: Place) -> LinearGateModule:
        """Makes the gate of one block."""
        return LinearGateModule(self, place)


class LinearGateModule(Gate):
    """W [M, D] and a bias [M]: M · (D + 1) parameters."""

    def __init__(self, spec: LinearGate, place: Place) -> None:
        """Makes the layer."""
        super().__init__(place.methods, spec.resolve(place))
        self.out = nn.Linear(place.hidden_size, len(place.methods))
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns gate values, [B, 1, M] or [B, T, M]."""
        values = F.linear(x.float(), self.out.weight.float(), self.out.bias.float()).sigmoid()
        return masked_mean(values, mask) if self.granularity == "example" else values
