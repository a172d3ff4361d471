"""BitFit: training bias terms only (Ben Zaken et al. 2021, arXiv 2106.10199).

    y = h + g · Δb

The backbone's own biases stay as they are; what is trained is their change, so that a gate can close it. Layers without
a bias get one. The biases of norms are not touched.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from pelton.errors import AdapterError
from pelton.methods.base import LINEAR_SITES, METHODS, MethodSpec, Part, Shape


@METHODS.register
@dataclasses.dataclass(frozen=True)
class BitFit(MethodSpec):
    """Trained bias changes of linear layers.

    Attributes:
        sites: the linear sites it goes to.
        layers: block indices; None means all.
    """

    kind: ClassVar[str] = "bitfit"
    allowed: ClassVar[tuple[str, ...]] = LINEAR_SITES
    foldable: ClassVar[bool] = True

    sites: tuple[str, ...] = LINEAR_SITES
    layers: tuple[int, ...] | None = None

    def build(self, shape: Shape) -> BitFitPart:
        """Makes the bias change of one linear layer."""
        return BitFitPart(shape)


class BitFitPart(Part):
    """The change of one bias, [O], zero at the start."""

    def __init__(self, shape: Shape) -> None:
        """Makes Δb for the output of the layer."""
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(shape.out_features))

    def forward(self, y: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Returns y + g · Δb."""
        return y + (gate * self.delta.float()).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the bias plus g · Δb; a layer without a bias has nowhere to put it."""
        if bias is None:
            raise AdapterError(
                "BitFit folds into a bias, but this layer has none. Keep the adapter attached, or leave the site out."
            )
        return weight, bias + gate * self.delta
