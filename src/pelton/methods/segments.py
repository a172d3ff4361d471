"""Dilated attention on sequences (LongNet, Ding et al. 2023, arXiv 2307.02486, section 3.2).

`segmented` lays a whole sequence out as [segments, residue classes, tokens of a class] and attends inside each class;
`cached` gathers the few keys of new tokens from a cache. Time and memory grow with T · w / r.

Letters: B batch, H heads, T queries, S keys, K head dim; w segment, r dilation, n segments, c = w / r keys of a query.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pelton.methods.view import View, gather, pick, shares, weigh

Rates = Sequence[tuple[int, int]]
"""Pairs (w, r)."""

PIECE = 1 << 20
"""How many scores are made at a time, where they are not fused into a kernel."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """T tokens as n segments of r residue classes of c tokens; the last segment may be filled up."""

    length: int
    n: int
    r: int
    c: int

    @classmethod
    def of(cls, length: int, segment: int, dilation: int) -> Layout:
        """Returns the layout of one pair (w, r)."""
        c = segment // dilation
        if isinstance(length, int) and length < segment:  # not where a length is free, in exported graphs
            c = -(-length // dilation)
        return cls(length, (length + c * dilation - 1) // (c * dilation), dilation, c)

    @property
    def spare(self) -> int:
        """How many slots hold no token."""
        return self.n * self.r * self.c - self.length

    def fold(self, x: Tensor) -> Tensor:
        """Turns [B, H, T, K] into [B · n · r, H, c, K]."""
        batch, heads, _, width = x.shape
        x = F.pad(x, (0, 0, 0, self.spare)).reshape(batch, heads, self.n, self.c, self.r, width)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(batch * self.n * self.r, heads, self.c, width)

    def unfold(self, y: Tensor) -> Tensor:
        """Turns [B · n · r, H, c, K] back into [B, H, T, K]."""
        heads, width = y.shape[1], y.shape[-1]
        y = y.view(-1, self.n, self.r, heads, self.c, width).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(-1, heads, self.n * self.c * self.r, width)[:, :, : self.length]

    def slots(self, device: torch.device) -> Tensor:
        """Returns the number of the token in each slot, [n, r, c]; those from T on hold none."""
        slots = torch.arange(self.n * self.c * self.r, device=device).view(self.n, self.c, self.r)
        return slots.transpose(1, 2).contiguous()  # what is indexed by other strides is traced with wrong ones

    def plain(self, view: View) -> bool:
        """Tells whether tokens of a class see each other, or those before them, and nothing more is to be said."""
        full = isinstance(self.spare, int) and self.spare == 0
        return view.mask is None and view.bias is None and (view.causal or full)  # spare slots come last

    def seen(self, view: View, order: Tensor | None, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns which pairs of a class are visible, and their bias, [B · n · r, H or 1, c or 1, c].

        Args:
            view: what the original attention sees.
            order: the token in each place, [B or 1, T], where tokens were moved; else None.
            query: [B, …].
        """
        batch, slots = query.shape[0], self.slots(query.device)
        visible = (slots < self.length)[None, :, :, None, None]  # [1, n, r, 1, 1, c]
        bias = None
        if view.mask is not None or view.bias is not None:
            tokens = slots.clamp_max(self.length - 1)
            tokens = tokens[None] if order is None else order[:, tokens]
            pairs, bias = view.at(tokens[..., :, None], tokens[..., None, :])  # [B or 1, H or 1, n, r, c, c]
            bias = None if bias is None else bias.permute(0, 2, 3, 1, 4, 5)
            visible = visible if pairs is None else visible & pairs.permute(0, 2, 3, 1, 4, 5)
        if view.mask is None and view.causal:
            visible = visible & torch.ones(self.c, self.c, dtype=torch.bool, device=query.device).tril()
        return _spread(visible, batch), None if bias is None else _spread(bias, batch)


def _spread(x: Tensor, batch: int) -> Tensor:
    return x.expand(batch, *x.shape[1:]).flatten(0, 2)


def segmented(query: Tensor, key: Tensor, value: Tensor, rates: Rates, view: View) -> Tensor:
    """Returns the dilated attention of whole sequences, [B, H, T, K].

    Args:
        query: [B, H, T, K].
        key: [B, H, T, K].
        value: [B, H, T, K].
        rates: pairs (w, r); several are mixed as one softmax over the keys of all.
        view: what the original attention sees; its causality where there is no mask.
    """
    place = order = None
    if view.real is not None:
        place, order = _compacted(view.real)
        query, key, value = (_moved(x, order) for x in (query, key, value))
    layouts = [Layout.of(query.shape[2], segment, dilation) for segment, dilation in rates]
    if len(layouts) == 1:
        out = _fused(query, key, value, layouts[0], order, view)
    else:
        each = [_explicit(query, key, value, layout, order, view) for layout in layouts]
        parts = torch.stack([total for _, total in each]).softmax(dim=0)
        out = sum((part * one.float() for part, (one, _) in zip(parts, each, strict=True)), query.new_zeros(()))
    out = out.to(query.dtype)
    return out if place is None else _moved(out, place)


def _fused(query: Tensor, key: Tensor, value: Tensor, layout: Layout, order: Tensor | None, view: View) -> Tensor:
    """One pair (w, r), by a fused kernel."""
    plain, mask = layout.plain(view), None
    if not plain:
        visible, bias = layout.seen(view, order, query)
        mask = visible | ~visible.any(dim=-1, keepdim=True)  # a row of padding sees anything: no NaN
        if bias is not None:
            mask = bias.to(query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    out = F.scaled_dot_product_attention(
        layout.fold(query),
        layout.fold(key),
        layout.fold(value),
        attn_mask=mask,
        dropout_p=view.dropout,
        is_causal=plain and view.causal,
        scale=view.scaling,
    )
    return layout.unfold(out)


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, order: Tensor | None, view: View
) -> tuple[Tensor, Tensor]:
    """One pair (w, r), and the logarithm of its softmax's denominator, [B, H, T, 1]."""
    visible: Tensor | None
    bias: Tensor | None
    if not layout.plain(view):
        visible, bias = layout.seen(view, order, query)
    else:
        ones = torch.ones(1, 1, layout.c, layout.c, dtype=torch.bool, device=query.device)
        visible, bias = ones.tril() if view.causal else None, None
    query, key, value = layout.fold(query * view.scaling), layout.fold(key), layout.fold(value)
    outs, totals = [], []
    for piece in _pieces(query, layout.c):
        scores = weigh(query[piece] @ key[piece].transpose(-2, -1), _of(visible, piece), _of(bias, piece))
        totals.append(scores.logsumexp(dim=-1, keepdim=True))
        outs.append(shares(scores, view.dropout).to(value.dtype) @ value[piece])
    return layout.unfold(torch.cat(outs)), layout.unfold(torch.cat(totals))


def _pieces(folded: Tensor, c: int) -> list[slice]:
    """Cuts [B · n · r, H, c, K] into pieces whose scores fit a CPU's cache; into one piece elsewhere and in graphs."""
    count = folded.shape[0]
    if torch.compiler.is_compiling() or folded.device.type != "cpu":
        return [slice(None)]
    step = max(1, PIECE // (folded.shape[1] * c * c))
    return [slice(start, start + step) for start in range(0, count, step)]


def _of(x: Tensor | None, piece: slice) -> Tensor | None:
    return x if x is None or x.shape[0] == 1 else x[piece]


def _compacted(real: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each token's place with real tokens first, and the token in each place, both [B or 1, T]."""
    ones = real.long()
    place = torch.where(real, ones.cumsum(-1), ones.sum(-1, keepdim=True) + (1 - ones).cumsum(-1)) - 1
    tokens = torch.arange(real.shape[1], device=real.device).expand_as(place)
    return place, torch.zeros_like(place).scatter(1, place, tokens)


def _moved(x: Tensor, index: Tensor) -> Tensor:
    batch, heads, _, width = x.shape
    return x.gather(2, index[:, None, :, None].expand(batch, heads, -1, width))


def cached(query: Tensor, key: Tensor, value: Tensor, owners: Sequence[int], rates: Rates, view: View) -> Tensor:
    """Returns the dilated attention of new tokens to a cache that holds them too, causal, [B, H, T, K].

    Args:
        query: [B, H, T, K].
        key: [B, H_kv, S, K].
        value: [B, H_kv, S, K].
        owners: the key / value head of each query head.
        rates: pairs (w, r).
        view: what the original attention sees; without a mask the new tokens are the last.
    """
    here, place = _positions(query, key, view)
    index, visible = [], []
    for segment, dilation in rates:
        back = torch.arange(0, segment, dilation, device=query.device)
        index.append((here[..., None] - back).clamp_min(0))
        visible.append((back <= place[..., None] % segment) & (back <= here[..., None]))
    keys, seen = torch.cat(index, -1), torch.cat(visible, -1)  # [B or 1, T, M]
    some, bias = view.at(torch.arange(query.shape[2], device=query.device)[None, :, None], keys)
    near, far = gather(key, keys), gather(value, keys)
    near, far = pick(near, owners), pick(far, owners)
    scores = (near @ query[..., None])[..., 0] * view.scaling
    scores = weigh(scores, seen[:, None] if some is None else seen[:, None] & some, bias)
    weights = shares(scores, view.dropout).to(query.dtype)
    return (weights[..., None, :] @ far)[..., 0, :]


def _positions(query: Tensor, key: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """Returns where the queries stand among the keys, and their positions in their rows, both [B or 1, T]."""
    keys = torch.arange(key.shape[2], device=key.device)
    if view.mask is None:
        here = keys[None, key.shape[2] - query.shape[2] :]
        return here, here if view.places is None else view.places
    mask = view.mask[:, 0]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    here = (seen * keys).amax(dim=-1)  # the last key that a query sees is its own
    if view.places is not None:
        return here, view.places
    return here, (seen[:, -1].long().cumsum(-1).gather(1, here) - 1).clamp_min(0)
