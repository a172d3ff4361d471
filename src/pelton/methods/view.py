"""What a block's own attention sees, for a sparse attention to see no more: masks and biases at the pairs it keeps.

A mask or a bias over all pairs is read only where the model made one; nothing of that size is made here.

Letters: B batch, H heads, T queries, S keys, K head dim, M keys of a query.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class View:
    """The arguments of one attention call, beside queries, keys and values.

    Attributes:
        scaling: what scores are multiplied by.
        dropout: probability of dropping an attention weight.
        causal: whether a token sees only what came before it, where `mask` is None.
        mask: boolean (True is visible) or additive, [B or 1, H or 1, T, S].
        bias: added to the scores, [B or 1, H or 1, T, S].
        real: which tokens are no padding, [B or 1, T]; None where nothing is padded.
        places: the queries' positions, [B or 1, T], where keys of the past may have left the cache.
    """

    scaling: float
    dropout: float = 0.0
    causal: bool = False
    mask: Tensor | None = None
    bias: Tensor | None = None
    real: Tensor | None = None
    places: Tensor | None = None

    def of_heads(self, heads: Sequence[int]) -> View:
        """Returns the view of some query heads."""
        mask, bias = (x if x is None or x.shape[1] == 1 else pick(x, heads) for x in (self.mask, self.bias))
        return dataclasses.replace(self, mask=mask, bias=bias)

    def at(self, queries: Tensor, keys: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Returns which pairs are visible, and what is added to their scores; None where nothing says.

        Args:
            queries: indices of queries, [B or 1, …].
            keys: indices of keys, broadcastable to those.

        Returns:
            Two tensors [B or 1, H or 1, …], boolean and floating point.
        """
        visible = bias = None
        if self.mask is not None and self.mask.dtype == torch.bool:
            visible = _at(self.mask, queries, keys)
        elif self.mask is not None:
            bias = _at(self.mask, queries, keys)
        if self.bias is not None:
            more = _at(self.bias, queries, keys)
            bias = more if bias is None else bias + more
        return visible, None if bias is None else bias.clamp_min(torch.finfo(bias.dtype).min)

    def first(self, count: int) -> tuple[Tensor | None, Tensor | None]:
        """Returns the same as `at` for the first queries and all keys, [B or 1, H or 1, count, S]."""
        mask, bias = (None if x is None else x[:, :, :count] for x in (self.mask, self.bias))
        if mask is None or mask.dtype == torch.bool:
            return mask, bias
        return None, mask if bias is None else mask + bias


def pick(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Returns heads of x [B, H, …], some perhaps several times; no index tensor has to reach the device."""
    if list(heads) == list(range(x.shape[1])):
        return x
    return torch.stack([x[:, head] for head in heads], dim=1)


def _at(x: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    flat = queries * x.shape[3] + keys
    heads, rows = x.shape[1], max(x.shape[0], flat.shape[0])
    index = flat.flatten(1)[:, None].expand(rows, heads, -1)
    return x.flatten(2).expand(rows, -1, -1).gather(2, index).view(rows, heads, *flat.shape[1:])


def weigh(scores: Tensor, visible: Tensor | None, bias: Tensor | None) -> Tensor:
    """Returns scores [B, H, …] in float32 with the bias added, and the smallest number where nothing is visible."""
    scores = scores.float()
    if bias is not None:
        scores = scores + bias.float()
    return scores if visible is None else scores.masked_fill(~visible, torch.finfo(scores.dtype).min)


def shares(scores: Tensor, dropout: float) -> Tensor:
    """Returns the softmax over keys, some of it dropped."""
    weights = scores.softmax(dim=-1)
    return F.dropout(weights, dropout) if dropout else weights  # at 0 it would still copy


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Returns the rows of x [B, H, S, K] that an index [B or 1, T, M] names, [B, H, T, M, K]."""
    batch, heads, _, width = x.shape
    flat = index.flatten(1)[:, None, :, None].expand(batch, heads, -1, width)
    return x.gather(2, flat).view(batch, heads, *index.shape[1:], width)
