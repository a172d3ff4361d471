"""Prefixes in the attention: keys and values in front of the block's own, their mass scaled by `log g` in the mask.

The key / value cache never sees them. Letters: B batch, H heads, T queries, S keys, P prefix length, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pelton.methods import PrefixPart
from pelton.tuner.masks import visible

if TYPE_CHECKING:
    from pelton.tuner.block import GatedBlock

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""An attention function of transformers' interface: module, query, key, value, mask, … → output and weights."""


def with_prefixes(
    base: Attend, gated: GatedBlock, prefixes: list[tuple[PrefixPart, Tensor]], implementation: str
) -> Attend:
    """Returns the attention function that puts prefixes in front of what `base` attends to.

    Args:
        base: the backbone's function.
        gated: the block.
        prefixes: each with its gate values, [B or 1, T or 1, 1].
        implementation: which function `base` is, "sdpa" or "eager".
    """
    if not prefixes:
        return base

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        mask = _additive(module, query, key, mask, implementation, kwargs)
        rows = max(mask.shape[0], *(gate.shape[0] for _, gate in prefixes))
        keys, values, biases, length = [], [], [], 0
        for part, gate in prefixes:
            pk, pv = (t.to(key.dtype) for t in part(Projection(module, gated)))
            bias = torch.zeros_like(gate) if part.gating == "scale" else _log(gate)
            if part.gating == "scale":
                pk, pv = pk * gate[:, None].to(key.dtype), pv * gate[:, None].to(key.dtype)
            keys.append(pk.expand(key.shape[0], -1, -1, -1))
            values.append(pv.expand(key.shape[0], -1, -1, -1))
            biases.append(bias[:, None].to(query.dtype).expand(rows, *mask.shape[1:3], part.length))
            length += part.length
        keys, values, biases = [*keys, key], [*values, value], [*biases, mask.expand(rows, -1, -1, -1)]
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = F.pad(kwargs["position_bias"], (length, 0))
        kwargs.pop("is_causal", None)
        output, weights = base(
            module, query, torch.cat(keys, 2), torch.cat(values, 2), torch.cat(biases, 3), is_causal=False, **kwargs
        )
        return output, None if weights is None else weights[..., length:]

    return attend


def _log(gate: Tensor) -> Tensor:
    """Log g, −∞ at 0, with a gradient of 0 there."""
    return torch.where(gate > 0, gate.clamp_min(torch.finfo(gate.dtype).tiny).log(), -torch.inf)


def _additive(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, implementation: str, kwargs: dict[str, Any]
) -> Tensor:
    """Returns the mask as one to add to the scores, [B or 1, 1, T, S]; causality that was implied is spelled out."""
    if mask is None and implementation == "sdpa" and query.shape[2] > 1:
        mask = visible(module, query, key, None, {**kwargs, "position_ids": None})  # packed ones come with a mask
    if mask is None:
        return query.new_zeros(1, 1, query.shape[2], key.shape[2])
    if mask.dtype == torch.bool:
        return torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    return mask.to(query.dtype)


class Projection:
    """The key and value projections of one block, for prefixes that are hidden states."""

    def __init__(self, module: nn.Module, gated: GatedBlock) -> None:
        """Keeps the attention module, and the gated block that knows its layers."""
        self.module, self.gated = module, gated

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values [P, H_kv · K] of hidden states [P, D]; hooks are passed by."""
        keys, values = self._apply("attn.k", hidden), self._apply("attn.v", hidden)
        norm = getattr(self.module, "k_norm", None)
        if norm is not None:
            keys = norm(keys.view(len(keys), -1, self.gated.block.head_dim)).flatten(-2)
        return keys, values

    def _apply(self, site: str, hidden: Tensor) -> Tensor:
        place = self.gated.block.sites[site][0]
        layer = self.module.get_submodule(place.path.removeprefix(self.gated.block.attention + "."))
        dtype = next(layer.parameters()).dtype
        output: Tensor = layer.forward(hidden.to(dtype if dtype.is_floating_point else hidden.dtype)[None])[0]
        return output if place.start is None else output[:, place.start : place.stop]
