"""From tokens to examples: the one place where gates pool, and the one where they learn what is padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Averages over tokens, padding left out.

    Args:
        x: [B, T, F].
        mask: 1 for tokens and 0 for padding, [B, T]; None when nothing is padded.

    Returns:
        float32, [B, 1, F].
    """
    x = x.float()
    if mask is None:
        return x.mean(dim=1, keepdim=True)
    weights = mask.to(x.dtype).expand(x.shape[:2])
    total = weights.sum(dim=1).clamp_min(1.0)
    return (weights[:, None] @ x) / total[:, None, None]  # a product: no masked copy of x


def padding_of(attention_mask: Tensor | BlockMask | None, tokens: int) -> Tensor | None:
    """Reads off an attention mask which tokens are real, [B or 1, T], 1 or 0.

    A token that is not padding may attend to itself under every pattern in use (full, causal, sliding window), so the
    diagonal of a [B, 1, T, T] mask tells. Boolean and integer masks hold 1 for what is visible; additive masks hold 0.

    Args:
        attention_mask: [B, T], [B, 1, 1, T] or [B, 1, T, T]; a block mask from flex attention; None when nothing is
            padded.
        tokens: T. A mask over more keys than tokens comes from decoding with a cache, one unpadded token at a time.
    """
    if attention_mask is None or not reads_padding(attention_mask, tokens):
        return None
    if isinstance(attention_mask, BlockMask):
        device = attention_mask.kv_num_blocks.device
        row, token = torch.arange(attention_mask.shape[0], device=device)[:, None], torch.arange(tokens, device=device)
        return attention_mask.mask_mod(row, row.new_zeros(()), token, token).expand(len(row), tokens)
    if attention_mask.dim() == 2:
        seen = attention_mask
    elif attention_mask.shape[-2] == 1:
        seen = attention_mask[:, 0, 0]
    else:
        seen = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)
    if not seen.is_floating_point():
        return seen != 0
    if attention_mask.dim() == 4:
        return seen > -1
    return torch.where((seen < 0).any(), seen > -1, seen != 0)  # [B, T] may be either


def reads_padding(attention_mask: Tensor | BlockMask, tokens: int) -> bool:
    """Tells whether a mask has a form that `padding_of` knows, for as many keys as tokens."""
    known = isinstance(attention_mask, BlockMask) or attention_mask.dim() in (2, 4)
    return known and attention_mask.shape[-1] == tokens
