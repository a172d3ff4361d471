"""L2-SP: a trained backbone is held near its pretrained weights (Li et al. 2018, arXiv 1802.01483, equation 2).

    λ ‖θ − θ₀‖² + β ‖head‖²

θ are the backbone's trained parameters, θ₀ what they were pretrained to. The term is part of the loss, so that what is
logged and what is clipped includes it; weight decay is left out where it applies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Anchor:
    """The L2-SP term, and the pretrained weights that it holds to."""

    def __init__(self, backbone: Sequence[Tensor], head: Sequence[Tensor], strength: float, head_strength: float):
        """Keeps a copy of the backbone's weights, which must be the pretrained ones: before a checkpoint is loaded."""
        self.backbone = list(backbone) if strength else []
        self.start = [parameter.detach().clone() for parameter in self.backbone]
        self.head = list(head) if head_strength else []
        self.strength, self.head_strength = strength, head_strength

    def __call__(self) -> Tensor:
        """Returns the term, a scalar."""
        moved = [(now - then).square().sum() for now, then in zip(self.backbone, self.start, strict=True)]
        head = [parameter.square().sum() for parameter in self.head]
        total = [self.strength * term for term in moved] + [self.head_strength * term for term in head]
        return torch.stack(total).sum() if total else torch.zeros(())


def make_anchor(groups: dict[str, list[tuple[str, nn.Parameter]]], l2_sp: float, l2_head: float) -> Anchor | None:
    """Makes the term for a model's trained groups; None where both weights are 0."""
    if not (l2_sp or l2_head):
        return None
    backbone, head = ([parameter for _, parameter in groups[name]] for name in ("backbone", "head"))
    return Anchor(backbone, head, l2_sp, l2_head)
