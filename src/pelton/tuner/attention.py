"""What methods do inside the attention, through transformers' attention interface.

The attention module of a block with a prefix or dilated attention gets a copy of its config that names the attention
function below; masks are made from the model's own config, which stays as it is. The function calls the one that the
model's config names, SDPA or the module's own eager attention, with the prefixes in front (`prefixes.py`), and mixes
the dilated attention in (`dilations.py`). Flash and flex kernels cannot carry an additive mask: there those blocks, and
only they, use SDPA.

Letters: B batch, H heads, H_kv key / value heads, T queries, S keys, K head dim.
"""

from __future__ import annotations

import copy
import sys
import warnings
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pelton.methods import DilatedPart, PrefixPart
from pelton.tuner.dilations import with_dilations
from pelton.tuner.masks import visible
from pelton.tuner.prefixes import Attend, with_prefixes

if TYPE_CHECKING:
    from pelton.tuner.block import GatedBlock

NAME = "pelton"


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
            name = config._attn_implementation
            warnings.warn(
                f"{name!r} attention cannot carry a prefix or dilation: blocks with one use 'sdpa'.", stacklevel=2
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
        """The attention implementation that carries the methods: "eager" or "sdpa"."""
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
        attention_mask = visible(module, query, key, attention_mask, kwargs)
    assert attention_mask is None or isinstance(attention_mask, Tensor)
    if attention_mask is None and key.shape[2] != query.shape[2] and query.shape[2] > 1:
        # The first tokens in a cache of fixed size: what is behind them is empty, and no mask says so.
        key, value, kwargs = _filled(query.shape[2], key, value, kwargs)
    routes = list(tap.gated.routed())
    inputs = (query, key, value)
    if not tap.gated.mixed:
        return _attend(tap, module, [name for name, _ in routes], inputs, attention_mask, **kwargs)
    output, weights = _attend(tap, module, [], inputs, attention_mask, **kwargs)
    for name, rows in routes:
        assert rows is not None
        if tap.gated.attends(name):
            at = tap.gated.rows_in(rows, query)
            some, seen = _attend(tap, module, [name], *_of_rows(at, inputs, attention_mask), **_of_kwargs(at, kwargs))
            output = output.index_copy(0, at, some)
            weights = None if weights is None or seen is None else weights.index_copy(0, at, seen)
    return output, weights


def _attend(
    tap: AttentionTap,
    module: nn.Module,
    adapters: list[str],
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Runs the attention with what some adapters do in it; the weights are the original attention's."""
    prefixes = [found for name in adapters for found in tap.gated.inside(PrefixPart, name, inputs[0])]
    dilations = [found for name in adapters for found in tap.gated.inside(DilatedPart, name, inputs[0])]
    original = with_prefixes(tap.base(module), tap.gated, prefixes, tap.implementation)
    output, weights = original(module, *inputs, mask, **kwargs)
    return with_dilations(output, dilations, module, inputs, mask, **kwargs), weights


def _filled(tokens: int, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    bias = kwargs.get("position_bias")
    if isinstance(bias, Tensor):
        kwargs = kwargs | {"position_bias": bias[..., :tokens]}
    return key[:, :, :tokens], value[:, :, :tokens], kwargs


def _of_rows(
    at: Tensor, inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    query, key, value = inputs
    shared = mask is None or mask.shape[0] == 1
    return (query[at], key[at], value[at]), mask if mask is None or shared else mask[at]


def _of_kwargs(at: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes rows of what has one value for each of them."""
    rows = dict(kwargs)
    for name, dims in (("position_bias", 4), ("position_ids", 2)):
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.dim() == dims and value.shape[0] > 1:
            rows[name] = value[at]
    return rows


ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
