"""Penalties on gate values, each a scalar, averaged over blocks, examples and tokens; padding does not count.

entropy: −Σ p log p of the shares p = g / Σg of each example. Small when one method takes all.
l1:      mean gate value. Pushes gates shut; for sigmoid gates only, as softmax values always sum to 1.
balance: Σ p̄ log(M p̄) of the mean shares p̄ of the batch, the divergence from using all methods alike. Keeps a gate from
         collapsing on one method, as in mixture-of-experts models (Fedus et al. 2021, arXiv 2101.03961, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pelton.gates.base import DynamicGateSpec

_TINY = 1e-9


def penalty(spec: DynamicGateSpec, observed: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Returns the weighted sum of the penalties that a spec asks for, a scalar.

    Args:
        spec: the gate, with the weights.
        observed: for each block its gate values [B, 1 or T, M] and the mask [B, T] or None.
    """
    return torch.stack([_of_block(spec, values, mask) for values, mask in observed]).mean()


def _of_block(spec: DynamicGateSpec, values: Tensor, mask: Tensor | None) -> Tensor:
    weights = torch.ones_like(values[..., 0])  # [B, 1 or T]
    if mask is not None and values.shape[1] > 1:
        weights = mask.to(values.dtype).expand_as(weights)
    weights = weights / weights.sum().clamp_min(1.0)
    shares = values / values.sum(dim=-1, keepdim=True).clamp_min(_TINY)
    mean = (shares * weights[..., None]).sum(dim=(0, 1))
    entropy = -(shares * shares.clamp_min(_TINY).log()).sum(dim=-1)
    balance = (mean * (mean * mean.numel()).clamp_min(_TINY).log()).sum()
    l1 = (values.mean(dim=-1) * weights).sum()
    return spec.entropy * (entropy * weights).sum() + spec.l1 * l1 + spec.balance * balance


def wanted(spec: object) -> bool:
    """Tells whether a gate asks for any penalty."""
    return isinstance(spec, DynamicGateSpec) and bool(spec.entropy or spec.l1 or spec.balance)
