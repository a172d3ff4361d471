"""Dilated attention: every token attends to a few keys, spread wide, beside what the block attends to anyway.

    out = (1 − g) · original + g · dilated

Both come from the block's own queries, keys and values, so the method has no parameters: what there is to learn or to
set is the gate. At g = 0 the block is to the bit the backbone, at g = 1 all of its attention is dilated. It is no
change of the backbone's weights and does not fold: with frozen gates it stays, a constant mixture.

On sequences (LongNet, Ding et al. 2023, arXiv 2307.02486, section 3.2): for a segment w and a dilation r the token at
position t attends to the tokens j of its segment, t // w = j // w, with (t − j) divisible by r. Several pairs (w, r)
are mixed by the denominators of their softmaxes, as if one softmax ran over the keys of all. LongNet keeps one residue
class in each head and shifts it from head to head, so that a head leaves most queries out; here every head has all
classes, side by side, and every token sees at least itself.

On images (DiNAT, Hassani and Shi 2022, arXiv 2209.15001, section 3): see `neighbourhood.py`.

Letters: B batch, H heads, T queries, S keys, K head dim; w segment, r dilation, n segments, c = w / r keys of a query.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pelton.methods.base import METHODS, MethodSpec, Shape
from pelton.methods.neighbourhood import neighbourhood, require_room
from pelton.methods.segments import cached, segmented
from pelton.methods.view import View, pick
from pelton.registry import require, require_size

Sizes = int | tuple[int, ...]


@METHODS.register
@dataclasses.dataclass(frozen=True)
class DilatedAttention(MethodSpec):
    """Attention to a few keys, spread wide, mixed with the block's own by the gate.

    What the block's attention hides (padding, the future, what is outside a sliding window, other examples of a packed
    row) and adds to its scores (position biases) holds for the dilated one too. Segments are counted from a row's
    first real token; in packed rows from the first token of the row. Prefixes in the same block belong to the original
    attention alone: the dilated one does not see them.

    Attributes:
        segment: w, the length of a segment, or several.
        dilation: r, the distance between two keys, or several; each divides its segment.
        kernel: on images, how many patches a side of the neighbourhood has, or several; odd.
        heads: the query heads that attend dilated; the others keep the original. None means all.
        space: "sequence", "grid", or "auto": the grid of patches on image encoders that Pelton knows to have one.
        layers: block indices; None means all.
    """

    kind: ClassVar[str] = "dilated"
    allowed: ClassVar[tuple[str, ...]] = ("attn",)
    packs: ClassVar[bool] = False

    segment: Sizes = 192
    dilation: Sizes = 2
    kernel: Sizes = 3
    heads: tuple[int, ...] | None = None
    space: Literal["auto", "sequence", "grid"] = "auto"
    sites: tuple[str, ...] = ("attn",)
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks types, names, sizes and ranges."""
        super().__post_init__()
        for name in ("segment", "dilation", "kernel"):
            sizes = _as_tuple(getattr(self, name))
            require(len(sizes) > 0, f"{name} has at least one value", **{name: sizes})
            for size in sizes:
                require_size(**{name: size})
        for kernel in _as_tuple(self.kernel):
            require(kernel % 2 == 1, "kernel is odd", kernel=kernel)
        for segment, dilation in self.rates if self.space != "grid" else ():
            require(dilation <= segment, "dilation <= segment", dilation=dilation, segment=segment)
            require(segment % dilation == 0, "segment % dilation == 0", segment=segment, dilation=dilation)
        _ = self.kernels  # as many kernels as dilations
        if self.heads is not None:
            require(len(self.heads) > 0, "heads has at least one head (None for all)", heads=self.heads)
            require(len(set(self.heads)) == len(self.heads), "every head is named once", heads=self.heads)

    @property
    def rates(self) -> tuple[tuple[int, int], ...]:
        """The pairs (w, r)."""
        return _paired("segment", self.segment, self.dilation)

    @property
    def kernels(self) -> tuple[tuple[int, int], ...]:
        """The pairs (k, r) on a grid."""
        return _paired("kernel", self.kernel, self.dilation)

    def build(self, shape: Shape) -> DilatedPart:
        """Makes the part of one block, which has no parameters.

        Raises:
            SpecError: a head that the block lacks, or a grid that is missing or too small.
        """
        return DilatedPart(self, shape)


class DilatedPart(nn.Module):
    """The dilated attention of one block, and its mixture with the original."""

    def __init__(self, spec: DilatedAttention, shape: Shape) -> None:
        """Chooses the form, and checks that the block has room for it."""
        super().__init__()
        require(
            shape.grid is not None or spec.space != "grid",
            "space != 'grid' where a block has no grid of patches (its config needs image_size and patch_size, and "
            "its tokens must be all patches)",
            space=spec.space,
        )
        for head in spec.heads or ():
            require(0 <= head < shape.heads, f"0 <= head < {shape.heads}", head=head)
        known = shape.grid is not None and shape.grid.known
        self.grid = shape.grid if spec.space == "grid" or (spec.space == "auto" and known) else None
        self.rates = spec.rates if self.grid is None else spec.kernels
        if self.grid is not None:
            require_room(self.grid.rows, self.grid.columns, self.rates)
        self.heads = tuple(range(shape.heads)) if spec.heads is None else spec.heads
        self.total, self.group = shape.heads, shape.heads // shape.kv_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, view: View) -> Tensor:
        """Returns the dilated attention of the chosen heads, [B, T, heads, K].

        Args:
            query: [B, H, T, K].
            key: [B, H_kv, S, K], with S > T where the first S − T come from a cache.
            value: [B, H_kv, S, K].
            view: what the original attention sees.
        """
        owners = [head // self.group for head in self.heads]  # the key / value head of each query head
        query, view = pick(query, self.heads), view.of_heads(self.heads)
        if self.grid is None and query.shape[2] != key.shape[2]:
            return cached(query, key, value, owners, self.rates, view).transpose(1, 2)
        key, value = pick(key, owners), pick(value, owners)
        if self.grid is None:
            return segmented(query, key, value, self.rates, view).transpose(1, 2)
        return neighbourhood(query, key, value, self.grid, self.rates, view).transpose(1, 2)

    def mix(self, original: Tensor, dilated: Tensor, gate: Tensor) -> Tensor:
        """Returns (1 − g) · original + g · dilated, [B, T, H, K], exact at both ends, in the original's dtype.

        Args:
            original: [B, T, H, K].
            dilated: [B, T, heads, K].
            gate: gate values, float32, broadcastable to [B, T, 1].
        """
        if len(self.heads) < self.total:
            mixed = dict(zip(self.heads, dilated.unbind(2), strict=True))
            dilated = torch.stack([mixed.get(head, original[:, :, head]) for head in range(self.total)], dim=2)
        wide = torch.promote_types(original.dtype, gate.dtype)
        weight = gate[..., None].to(wide).expand(original.shape)
        return torch.lerp(original.to(wide), dilated.to(wide), weight).to(original.dtype)


def _as_tuple(sizes: Sizes) -> tuple[int, ...]:
    return sizes if isinstance(sizes, tuple) else (sizes,)


def _paired(name: str, sizes: Sizes, dilations: Sizes) -> tuple[tuple[int, int], ...]:
    """Pairs sizes with dilations; one alone goes with all of the others."""
    left, right = _as_tuple(sizes), _as_tuple(dilations)
    count = max(len(left), len(right))
    law = f"len({name}) == len(dilation), unless one of them is a number"
    require({len(left), len(right)} <= {1, count}, law, **{name: sizes, "dilation": dilations})
    return tuple(zip(left * (count // len(left)), right * (count // len(right)), strict=True))
