"""(IA)³: learned rescaling of keys, values and activations (Liu et al. 2022, arXiv 2205.05638, section 3.3).

    y = h ⊙ (1 + g · (l − 1))

At `attn.*` and `ffn.in` the vector l rescales the layer's output. At `ffn.out` it rescales the layer's input, which is
the activation γ(W₁x) of the paper.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from pelton.methods.base import LINEAR_SITES, METHODS, MethodSpec, Part, Shape


@METHODS.register
@dataclasses.dataclass(frozen=True)
class IA3(MethodSpec):
    """Rescaling vectors; the default sites are the paper's.

    Attributes:
        sites: the linear sites it goes to.
        layers: block indices; None means all.
    """

    kind: ClassVar[str] = "ia3"
    allowed: ClassVar[tuple[str, ...]] = LINEAR_SITES
    foldable: ClassVar[bool] = True

    sites: tuple[str, ...] = ("attn.k", "attn.v", "ffn.out")
    layers: tuple[int, ...] | None = None

    def build(self, shape: Shape) -> IA3Part:
        """Makes the vector for one linear layer."""
        return IA3Part(shape)


class IA3Part(Part):
    """One rescaling vector l, [O] or at `ffn.out` [I], of ones at the start."""

    order: ClassVar[int] = 1

    def __init__(self, shape: Shape) -> None:
        """Makes l for the output, or at `ffn.out` for the input, of the layer."""
        super().__init__()
        self.edits = "input" if shape.site == "ffn.out" else "output"
        self.l = nn.Parameter(torch.ones(shape.in_features if self.edits == "input" else shape.out_features))

    def forward(self, y: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Returns y ⊙ (1 + g · (l − 1))."""
        return y * (1 + gate * (self.l.float() - 1)).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the weight with its rows (and the bias), or for an input its columns, rescaled."""
        scale = 1 + gate * (self.l - 1)
        if self.edits == "input":
            return weight * scale, bias
        return weight * scale[:, None], None if bias is None else bias * scale
