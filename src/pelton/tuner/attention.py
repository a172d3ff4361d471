"""Prefixes inside the attention, through transformers' attention interface.

The attention module of a block with a prefix gets a copy of its config that names the attention function below; masks
are made from the model's own config, which stays as it is. The function puts the prefix in front of keys and values,
extends the mask by `log g`, and calls the function that the model's config names: SDPA or the module's own eager
attention. The key / value cache never sees the prefix. Flash and flex kernels cannot carry an additive mask: there the
blocks with a prefix, and only they, use SDPA.

Letters: B batch, H heads, H_kv key / value heads, T queries, S keys, P prefix length, K head dim.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pelton.methods import PrefixPart

if TYPE_CHECKING:
    from pelton.tuner.block import GatedBlock

NAME = "pelton"

Attend = Callable[..., tuple[Tensor, Tensor | None]]


class AttentionTap:
    """What the attention function finds on a module: the gated block, and the config that the module had."""

    def __init__(self, gated: GatedBlock, config: Any) -> None:
        """Keeps both."""
        self.gated, self.config = gated, config

    @staticmethod
    def attach(gated: GatedBlock, attention: nn.Module) -> None:
        """Points an attention module at the function of this file, once."""
        if hasattr(attention, "pelton_tap"):
            return
        config = cast(Any, attention).config
        tap = AttentionTap(gated, config)
        if config._attn_implementation not in ("sdpa", "eager", None):
            warnings.warn(
                f"{config._attn_implementation!r} attention cannot carry a prefix: blocks with one use 'sdpa'.",
                stacklevel=2,
            )
        attention.pelton_tap = tap  # type: ignore[assignment]
        attention.config = copy.copy(config)
        cast(Any, attention).config._attn_implementation_internal = NAME

    @staticmethod
    def detach(attention: nn.Module) -> None:
        """Gives the module its own config back."""
        tap = attention.__dict__.pop("pelton_tap", None)
        if tap is not None:
            attention.config = tap.config

    @property
    def implementation(self) -> str:
        """The attention implementation that carries the prefix: "eager" or "sdpa"."""
        return "eager" if self.config._attn_implementation == "eager" else "sdpa"

    def base(self, module: nn.Module) -> Attend:
        """Returns the backbone's attention function."""
        if self.implementation == "eager":
            return cast(Attend, sys.modules[type(module).__module__].eager_attention_forward)
        return cast(Attend, ALL_ATTENTION_FUNCTIONS["sdpa"])


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Runs the backbone's attention with the prefixes of the adapters at work.

    Args:
        module: the attention module, with its tap.
        query: [B, H, T, K].
        key: [B, H_kv, S, K].
        value: [B, H_kv, S, K].
        attention_mask: boolean or additive, [B, 1, T, S]; [B, S] for flash kernels; a block mask for flex; or None.
        **kwargs: what the backbone's function takes: scaling, dropout, position_bias, …

    Returns:
        The output [B, T, H, K] and, from eager, the weights [B, H, T, S] without the prefix's columns.
    """
    tap = cast(AttentionTap, module.pelton_tap)
    if tap.config._attn_implementation not in ("sdpa", "eager", None):
        attention_mask = _visible(module, query, key, attention_mask, kwargs)
    assert attention_mask is None or isinstance(attention_mask, Tensor)
    base, gated = tap.base(module), tap.gated
    routes = list(gated.routed())
    if gated.routes is None:
        prefixes = [p for name, _ in routes for p in gated.prefixes(name, query)]
        return _with_prefixes(base, prefixes, module, query, key, value, attention_mask, **kwargs)
    output, weights = _with_prefixes(base, [], module, query, key, value, attention_mask, **kwargs)
    for name, rows in routes:
        assert rows is not None
        at = gated.window_rows(rows, query)
        prefixes = gated.prefixes(name, query[at])
        if prefixes:
            mask = attention_mask if attention_mask is None or attention_mask.shape[0] == 1 else attention_mask[at]
            some, seen = _with_prefixes(base, prefixes, module, query[at], key[at], value[at], mask, **kwargs)
            output = output.index_copy(0, at, some)
            weights = None if weights is None or seen is None else weights.index_copy(0, at, seen)
    return output, weights


def _with_prefixes(
    base: Attend,
    prefixes: list[tuple[PrefixPart, Tensor]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if not prefixes:
        return base(module, query, key, value, attention_mask, **kwargs)
    tap = cast(AttentionTap, module.pelton_tap)
    mask = _additive(module, query, key, attention_mask, tap.implementation, kwargs)
    rows = max(mask.shape[0], *(gate.shape[0] for _, gate in prefixes))
    keys, values, biases, length = [], [], [], 0
    for part, gate in prefixes:
        pk, pv = (t.to(key.dtype) for t in part(Projection(module, tap.gated)))
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


def _log(gate: Tensor) -> Tensor:
    """Log g, −∞ at 0, with a gradient of 0 there."""
    return torch.where(gate > 0, gate.clamp_min(torch.finfo(gate.dtype).tiny).log(), -torch.inf)


def _additive(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, implementation: str, kwargs: dict[str, Any]
) -> Tensor:
    """Returns the mask as one to add to the scores, [B or 1, 1, T, S]; causality that was implied is spelled out."""
    if mask is None and implementation == "sdpa" and query.shape[2] > 1:
        mask = _visible(module, query, key, None, {**kwargs, "position_ids": None})  # packed ones come with a mask
    if mask is None:
        return query.new_zeros(1, 1, query.shape[2], key.shape[2])
    if mask.dtype == torch.bool:
        return torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    return mask.to(query.dtype)


def _visible(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | BlockMask | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """Spells out which keys each query sees, from the flags and the [B, S] mask that kernels without masks get."""
    if isinstance(mask, BlockMask):
        return create_mask(mask.mask_mod, query.shape[0], 1, query.shape[2], key.shape[2], query.device)
    if mask is not None and mask.dim() == 4:
        return mask
    padding = None if mask is None else mask[:, None, None].bool()
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", False) if causal is None else causal):
        return padding
    last = torch.arange(key.shape[2], device=key.device)
    now = torch.arange(query.shape[2], device=key.device)[:, None] + key.shape[2] - query.shape[2]
    seen = last <= now
    if kwargs.get("sliding_window"):
        seen = seen & (last > now - kwargs["sliding_window"])
    if padding is not None:
        return seen[None, None] & padding
    return seen[None, None] & _same_example(key.shape[2], kwargs)


def _same_example(length: int, kwargs: dict[str, Any]) -> Tensor | bool:
    """Tells which keys belong to the query's example in a packed sequence, [B, 1, T, T]; True where nothing is packed.

    Flash kernels get no mask for packed sequences: positions that begin anew say where examples meet.
    """
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != length:  # decoding
        return True
    example = find_packed_sequence_indices(positions)
    return True if example is None else example[:, None, :, None] == example[:, None, None, :]


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


ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
