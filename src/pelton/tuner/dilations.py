"""Dilated attention in the attention: what the backbone's function got, as the plain functions in `methods` take it.

It reads queries, keys and values without the prefixes of the block. Letters: B batch, H heads, T queries, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pelton.errors import AdapterError
from pelton.gates.pooling import padding_of
from pelton.methods import DilatedPart, View

_UNKNOWN = ("softcap", "s_aux", "cache")
"""What some attention functions take that changes scores, or where keys come from."""


def with_dilations(
    output: Tensor,
    parts: Sequence[tuple[DilatedPart, Tensor]],
    module: nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    **kwargs: Any,
) -> Tensor:
    """Mixes the original attention's output with the dilated ones, one adapter after the other.

    Args:
        output: [B, T, H, K].
        parts: each with its gate values, [B or 1, T or 1, 1].
        module: the attention module.
        inputs: queries [B, H, T, K], keys and values [B, H_kv, S, K].
        mask: boolean or additive, [B or 1, 1, T, S]; None where every token sees all, or all before it.
        **kwargs: what the backbone's function takes.

    Raises:
        AdapterError: the backbone's attention does what the dilated one cannot.
    """
    if not parts:
        return output
    query, key, value = inputs
    view = view_of(module, query, key, mask, kwargs)
    for part, gate in parts:
        output = part.mix(output, part(query, key, value, view), gate)
    return output


def view_of(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> View:
    """Returns what the original attention sees."""
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise AdapterError(
                f"{type(module).__name__} attends with {name!r}, which dilated attention does not know. Take 'dilated' "
                "out of the methods, or name other layers."
            )
    causal = kwargs.get("is_causal")
    scaling, whole = kwargs.get("scaling"), query.shape[2] == key.shape[2]
    return View(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=kwargs.get("dropout") or 0.0,
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),  # as in transformers' sdpa
        mask=None if mask is None else mask.expand(-1, -1, query.shape[2], -1),  # some have one row for all queries
        bias=kwargs.get("position_bias"),
        real=padding_of(mask, query.shape[2]) if whole else None,
        places=None if whole else _places(module, key, kwargs),
    )


def _places(module: nn.Module, key: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """Returns the positions of new tokens [B, T] where a cache holds no more than a window of what came before."""
    window, positions = kwargs.get("sliding_window"), kwargs.get("position_ids")
    if not window or key.shape[2] < window:
        return None
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        raise AdapterError(
            f"{type(module).__name__} forgets keys outside its window of {window}, and does not say at which position "
            "a new token stands, so segments cannot be told. Generate with use_cache=False."
        )
    return positions
