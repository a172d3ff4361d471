"""Prefixes: learned keys and values in front of a block's own (Li and Liang 2021, arXiv 2101.00190, section 4).

With prefix keys P_k and values P_v the softmax of a query q runs over `[q·P_k + log g, q·K]`: the gate scales the
*attention mass* of the prefix. At g = 0 the prefix gets none and the block is exactly the backbone; at g = 1 it is
prefix tuning. `gating="scale"` keeps the form that UniPELT published (section 3.2), where g scales the vectors: a zero
key still draws exp(0) of the softmax there, so a closed gate is not the backbone (its footnote 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pelton.methods.base import METHODS, MethodSpec, Shape
from pelton.registry import require, require_size

Project = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Hidden states [P, D] → keys and values [P, kv_heads · head_dim], by the block's own layers."""


@METHODS.register
@dataclasses.dataclass(frozen=True)
class Prefix(MethodSpec):
    """Learned keys and values that every query of the block may attend to.

    Attributes:
        prefix_length: P, how many.
        parametrisation: "kv" learns keys and values; "mlp" learns them through a network that exists in training only
            (the paper's section 4.3); "token" learns P vectors that pass the block's own key and value projections: a
            soft prompt per layer.
        gating: "mass" or "scale", see above.
        mlp_size: width of the network of "mlp".
        init_std: standard deviation of the vectors at the start.
        layers: block indices; None means all.
    """

    kind: ClassVar[str] = "prefix"
    allowed: ClassVar[tuple[str, ...]] = ("attn",)
    size: ClassVar[str | None] = "prefix_length"
    gates_units: ClassVar[bool] = True

    prefix_length: int = 10
    parametrisation: Literal["kv", "mlp", "token"] = "kv"
    gating: Literal["mass", "scale"] = "mass"
    mlp_size: int = 128
    init_std: float = 0.02
    sites: tuple[str, ...] = ("attn",)
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks types, names and sizes."""
        super().__post_init__()
        require_size(prefix_length=self.prefix_length)
        require_size(mlp_size=self.mlp_size)
        require(self.init_std > 0, "init_std > 0", init_std=self.init_std)

    def build(self, shape: Shape) -> PrefixPart:
        """Makes the prefix of one block."""
        return PARTS[self.parametrisation](self, shape)


class PrefixPart(nn.Module):
    """The prefix of one block, as keys and values [kv_heads, P, head_dim]."""

    def __init__(self, spec: Prefix, shape: Shape) -> None:
        """Keeps the sizes."""
        super().__init__()
        self.length = spec.prefix_length
        self.gating = spec.gating
        self.heads = (shape.kv_heads, shape.head_dim)

    def forward(self, project: Project) -> tuple[Tensor, Tensor]:
        """Returns keys and values [kv_heads, P, head_dim]; `project` is the block's own key and value projection."""
        keys, values = self.flat(project)
        return self._split(keys), self._split(values)

    def flat(self, project: Project) -> tuple[Tensor, Tensor]:
        """Returns keys and values [P, kv_heads · head_dim]."""
        raise NotImplementedError

    def _split(self, flat: Tensor) -> Tensor:
        return flat.view(self.length, *self.heads).transpose(0, 1)


class KeyValuePrefix(PrefixPart):
    """Keys and values learned as they are."""

    def __init__(self, spec: Prefix, shape: Shape) -> None:
        """Makes keys and values [P, kv_heads · head_dim]."""
        super().__init__(spec, shape)
        self.keys = nn.Parameter(torch.randn(self.length, shape.out_features) * spec.init_std)
        self.values = nn.Parameter(torch.randn(self.length, shape.out_features) * spec.init_std)

    def flat(self, project: Project) -> tuple[Tensor, Tensor]:
        """Returns the parameters."""
        return self.keys, self.values


class MLPPrefix(PrefixPart):
    """Keys and values as the output of a two-layer network over P learned vectors."""

    def __init__(self, spec: Prefix, shape: Shape) -> None:
        """Makes the vectors [P, S] and the network S → S → 2 · kv_heads · head_dim, S the `mlp_size`."""
        super().__init__(spec, shape)
        self.embedding = nn.Parameter(torch.randn(self.length, spec.mlp_size))
        self.hidden = nn.Linear(spec.mlp_size, spec.mlp_size)
        self.out = nn.Linear(spec.mlp_size, 2 * shape.out_features)
        nn.init.normal_(self.out.weight, std=spec.init_std)
        nn.init.zeros_(self.out.bias)

    def flat(self, project: Project) -> tuple[Tensor, Tensor]:
        """Runs the network."""
        keys, values = self.out(torch.tanh(self.hidden(self.embedding))).chunk(2, dim=-1)
        return keys, values


class TokenPrefix(PrefixPart):
    """P learned hidden states, through the block's own key and value projections."""

    def __init__(self, spec: Prefix, shape: Shape) -> None:
        """Makes the vectors [P, D]."""
        super().__init__(spec, shape)
        self.tokens = nn.Parameter(torch.randn(self.length, shape.in_features) * spec.init_std)

    def flat(self, project: Project) -> tuple[Tensor, Tensor]:
        """Projects the vectors."""
        return project(self.tokens)


PARTS: dict[str, type[PrefixPart]] = {"kv": KeyValuePrefix, "mlp": MLPPrefix, "token": TokenPrefix}
