"""What a method is: a frozen spec, and the parts it builds, one for each place it goes to.

Letters: B batch, T tokens, D hidden, I / O the in and out features of a linear layer, R rank, P prefix length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from pelton.errors import SpecError, unknown
from pelton.registry import Registry, Spec, require

LINEAR_SITES = ("attn.q", "attn.k", "attn.v", "attn.out", "ffn.in", "ffn.out")
"""The places in a block where a linear layer stands."""

SITES = (*LINEAR_SITES, "attn")
"""All architecture-neutral places in a block; `attn` is the softmax itself."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """How the patches of an image lie.

    Attributes:
        rows: at the image size of the config.
        columns: likewise.
        special: how many tokens that are no patches come first.
        known: whether the architecture is known to have all patches, in order, and nothing behind them.
    """

    rows: int
    columns: int
    special: int = 0
    known: bool = True


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of the place that a part is built for.

    At a linear site `in_features` and `out_features` are the layer's. At `attn` they are the width of the block and
    the width of its keys, which is `kv_heads * head_dim`; `grid` is there where the tokens are patches of an image.
    """

    site: str
    in_features: int
    out_features: int
    kv_heads: int = 0
    head_dim: int = 0
    heads: int = 0
    grid: Grid | None = None


class Part(nn.Module):
    """One method at one place: edits the tensor that passes there, by as much as its gate lets through.

    `edits` says which tensor that is: the linear layer's "output" or its "input". Parts at one place apply in the
    order of `order`: sums (0), then rescalings (1), then what reads the finished output (2). `origin` names the site
    whose input the part reads instead of its own layer's, if any.
    """

    edits: Literal["input", "output"] = "output"
    order: ClassVar[int] = 0
    origin: str | None = None

    @property
    def first(self) -> Tensor | None:
        """The matrix [R, I] whose product with x is all that the part reads of x, where it is so.

        Layers with one input (queries, keys and values) have their parts' products computed as one: `forward` of such
        a part takes its own, x · firstᵀ [B, T, R], as `z`.
        """
        return None

    def forward(self, y: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Returns the edited tensor.

        Args:
            y: what is edited, [B, T, O] (or [B, T, I] where `edits` is "input").
            x: the input of the layer, or of the site that `origin` names, [B, T, I].
            gate: gate values, float32, broadcastable to [B, T, 1].
        """
        raise NotImplementedError

    def bind(self, layer: nn.Module, rows: slice) -> None:
        """Lets the part see the layer that it edits, before either is used; most parts have no need to.

        Args:
            layer: the backbone's.
            rows: those of its output that are the part's.
        """

    def fold(self, weight: Tensor, bias: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns weight [O, I] and bias [O] of the layer that equals layer and part at a constant gate value."""
        raise NotImplementedError(f"{type(self).__name__} does not fold")


@dataclasses.dataclass(frozen=True)
class MethodSpec(Spec):
    """Hyperparameters of a method. Subclasses set `kind`, `allowed` and `foldable` and build parts."""

    allowed: ClassVar[tuple[str, ...]] = LINEAR_SITES
    foldable: ClassVar[bool] = False
    packs: ClassVar[bool] = True
    """Whether an example that is packed with others in one row gets what it gets alone."""
    up: ClassVar[str | None] = None
    """The parameter of a part that stands last in a product and starts at zero, where a part is such a product."""

    def __post_init__(self) -> None:
        """Checks types, and the fields every method shares: `sites` and `layers`."""
        super().__post_init__()
        object.__setattr__(self, "sites", tuple(self.sites))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            require(len(self.layers) > 0, f"{self.kind!r} has at least one layer (None for all)", layers=self.layers)
            require(len(set(self.layers)) == len(self.layers), "every layer is named once", layers=self.layers)
        for site in self.sites:
            if site not in SITES:
                raise unknown("site", site, SITES)
            require(site in self.allowed, f"a site of {self.kind!r} is one of {', '.join(self.allowed)}", site=site)
        require(len(self.sites) > 0, f"{self.kind!r} has at least one site", sites=self.sites)
        require(len(set(self.sites)) == len(self.sites), "every site is named once", sites=self.sites)

    @classmethod
    def advice(cls, name: str) -> str:
        """Returns what to write instead of an argument that does not exist; names the sites, where it is about them."""
        advice = super().advice(name)
        return f"{advice} {allowed_sites(cls)}" if "'sites'" in advice else advice

    @property
    def sites(self) -> tuple[str, ...]:
        """Where in a block the method goes."""
        raise NotImplementedError

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The indices of the blocks the method goes to; None means all."""
        raise NotImplementedError

    size: ClassVar[str | None] = None
    """The field that says how many units a part has (a rank, a width, a length), where a part may have fewer."""
    gates_units: ClassVar[bool] = False
    """Whether parts take a gate value for each unit, [B, T, units], as well as one for all; shut units add nothing."""

    def resized(self, size: int) -> Self:
        """Returns the spec of a part with fewer units; what multiplies their sum stays.

        Raises:
            SpecError: the method's parts have no units.
        """
        if self.size is None:
            raise SpecError(f"Parts of {self.kind!r} have no size. Leave them out of `sizes`.")
        return dataclasses.replace(self, **{self.size: size})

    def build(self, shape: Shape) -> nn.Module:
        """Makes the trainable part for one place: a `Part`, or at `attn` a `PrefixPart` or a `DilatedPart`."""
        raise NotImplementedError

    def share(self, shapes: Sequence[Shape], parts: Sequence[nn.Module]) -> None:
        """Gives the parts of one adapter what they have in common; most methods' have nothing.

        Args:
            shapes: of all places of the method in the backbone, also of those that were pruned.
            parts: those that were built.
        """


def allowed_sites(spec: type[MethodSpec]) -> str:
    """Says which sites a method may have; they have these names in every backbone."""
    return f"The sites of {spec.kind!r} are {', '.join(spec.allowed)}."


METHODS: Registry[MethodSpec] = Registry("method", MethodSpec)
"""Every known method by kind."""

register_method = METHODS.register


def add_product(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """Returns y + z weightᵀ in one pass over y, the sum fused into the product; without gradients, in place.

    Args:
        y: [..., O], the fresh output of a layer.
        z: [..., R].
        weight: [O, R].
    """
    if y.dtype != z.dtype:  # autocast: the product comes in its dtype
        return y + nn.functional.linear(z, weight).to(y.dtype)
    flat, low = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
    high = weight.t().contiguous()  # a transposed view makes the gradient of `weight` up to five times slower on CPU
    if torch.is_grad_enabled() or not y.is_contiguous():
        return torch.addmm(flat, low, high).view(y.shape)
    return flat.addmm_(low, high).view(y.shape)
