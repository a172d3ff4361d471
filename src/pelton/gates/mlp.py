"""The default gate: one small network per block decides for all methods of the block.

    g = softmax(W₂ relu(W₁ pool(x)) / τ)     or     sigmoid(…)

It goes past UniPELT (Mao et al., ACL 2022, section 3.2), whose gates are one linear layer per method that average over
padding: here the methods of a block share what was read of the input, and can compete (softmax) or not (sigmoid).
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pelton.gates.base import GATES, DynamicGateSpec, Gate, Granularity, Place
from pelton.gates.pooling import masked_mean
from pelton.registry import require, require_size


@GATES.register
@dataclasses.dataclass(frozen=True)
class MLPGate(DynamicGateSpec):
    """A two-layer network per block over the pooled input.

    Attributes:
        hidden_size: width of the hidden layer.
        activation: "softmax" (the values of a block sum to 1) or "sigmoid" (each for itself).
        temperature: τ > 0; smaller is sharper.
        init: gate value at the start, for sigmoid; softmax starts at 1 / M.
        init_std: standard deviation of W₂ at the start.
    """

    kind: ClassVar[str] = "mlp"

    hidden_size: int = 64
    activation: Literal["softmax", "sigmoid"] = "softmax"
    temperature: float = 1.0
    init: float = 0.5
    init_std: float = 0.01

    def __post_init__(self) -> None:
        """Checks types, names, sizes and ranges."""
        super().__post_init__()
        require_size(hidden_size=self.hidden_size)
        require(self.temperature > 0, "temperature > 0", temperature=self.temperature)
        require(0 < self.init < 1, "0 < init < 1", init=self.init)
        require(self.init_std >= 0, "init_std >= 0", init_std=self.init_std)
        require(
            self.l1 == 0 or self.activation == "sigmoid",
            "l1 == 0 or activation == 'sigmoid' (softmax values always sum to 1)",
            l1=self.l1,
            activation=self.activation,
        )

    def build(self, place: Place) -> MLPGateModule:
        """Makes the gate of one block."""
        return MLPGateModule(self, place)


class MLPGateModule(Gate):
    """W₁ [H, D], W₂ [M, H] and their biases: D·H + H + H·M + M parameters."""

    granularity: Granularity

    def __init__(self, spec: MLPGate, place: Place) -> None:
        """Makes both layers; the second starts so that all gates are about equally open."""
        super().__init__(place.methods, spec.resolve(place))
        self.temperature = spec.temperature
        self.softmax = spec.activation == "softmax"
        self.hidden = nn.Linear(place.hidden_size, spec.hidden_size)
        self.out = nn.Linear(spec.hidden_size, len(place.methods))
        nn.init.normal_(self.out.weight, std=spec.init_std)
        nn.init.constant_(self.out.bias, 0.0 if self.softmax else _logit(spec.init) * spec.temperature)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns gate values, [B, 1, M] or [B, T, M]."""
        pooled = masked_mean(x, mask) if self.granularity == "example" else x.float()
        hidden = torch.relu(F.linear(pooled, self.hidden.weight.float(), self.hidden.bias.float()))
        logits = F.linear(hidden, self.out.weight.float(), self.out.bias.float()) / self.temperature
        return logits.softmax(dim=-1) if self.softmax else logits.sigmoid()


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
