"""The blocks of a backbone and the sites in them: where methods can go, in words that fit every architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from pelton.errors import AnatomyError, unknown
from pelton.methods import SITES, Grid, Shape


@dataclasses.dataclass(frozen=True)
class Place:
    """A linear layer, or a slice of one whose output holds several projections.

    Attributes:
        path: the layer's name inside its block.
        in_features: I.
        out_features: O, of the slice.
        start: where the slice begins in the layer's output; None when the place is the whole layer.
    """

    path: str
    in_features: int
    out_features: int
    start: int | None = None

    @property
    def stop(self) -> int | None:
        """Where the slice ends; None when the place is the whole layer."""
        return None if self.start is None else self.start + self.out_features


@dataclasses.dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        name: the block's name in the model.
        index: its number among all blocks of the model, which `layers` of a method refers to.
        stack: the module list it belongs to: "encoder.block", "vision_model.encoder.layers", …
        attention: the self-attention module's name inside the block.
        hidden_size: D, the width of the attention's input.
        causal: whether a token sees only what came before it; also where nothing proves that it sees more.
        sites: places by site.
        missing: why a site that other architectures have is not here.
        kv_heads: how many key / value heads the attention has; 0 where `attn` is missing.
        head_dim: the width of one head; 0 where `attn` is missing.
        norm: a module inside the block whose output, [B, T, D], gates read instead of the attention's input, where
            the attention does not see whole examples.
        mask: the name of the attention's mask argument; None where its mask does not mean padding.
        pools: whether gates may average over the tokens: these all see each other, and padding among them can be told.
        static: why gates cannot read the input; empty where they can.
        heads: how many query heads the attention has; 0 where `attn` is missing.
        grid: how the tokens lie on an image; None where they are not the patches of one.
    """

    name: str
    index: int
    stack: str
    attention: str
    hidden_size: int
    causal: bool
    sites: dict[str, tuple[Place, ...]]
    missing: dict[str, str]
    kv_heads: int
    head_dim: int
    norm: str | None
    mask: str | None
    pools: bool
    static: str
    heads: int
    grid: Grid | None

    @property
    def windowed(self) -> bool:
        """Whether attention runs inside windows, so that its batch is examples × windows."""
        return self.norm is not None

    def shapes(self, site: str) -> tuple[Shape, ...]:
        """Returns the sizes of a site's places, in their order."""
        return tuple(
            Shape(site, place.in_features, place.out_features, self.kv_heads, self.head_dim, self.heads, self.grid)
            for place in self.sites[site]
        )


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """All blocks of a model.

    Attributes:
        model_type: as in the model's config.
        blocks: in the order of the model.
    """

    model_type: str
    blocks: tuple[Block, ...]

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """The width of every block."""
        return tuple(block.hidden_size for block in self.blocks)

    def require(self, sites: Iterable[str], what: str) -> None:
        """Raises AnatomyError unless some block has each site; says which is missing, why, and what there is."""
        for site in sites:
            if site not in SITES:
                raise unknown("site", site, SITES)
            if any(site in block.sites for block in self.blocks):
                continue
            reasons = {block.missing.get(site, "not found") for block in self.blocks}
            has = [s for s in SITES if any(s in block.sites for block in self.blocks)]
            raise AnatomyError(
                f"{what} needs the site {site!r}, but {self.model_type!r} has none: {'; '.join(sorted(reasons))}. "
                f"It has: {', '.join(has)}. Leave {what} out, or name other sites."
            )
