"""Attention masks spelled out, for implementations that imply them: causal flags, [B, S] padding, packed positions.

Letters: B batch, T queries, S keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.masking_utils import find_packed_sequence_indices


def visible(
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
