"""One product for all parts that begin with a matrix times the same input: LoRA's A on queries, keys and values.

    [z_q, z_k, z_v] = x [A_q; A_k; A_v]ᵀ

A product with so few columns takes the time of reading x: read once, not three times, it takes a third, and so does its
gradient with respect to x. Letters: B batch, T tokens, I in features, R ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from pelton.methods import Part

ONE_INPUT = (("attn_q", "attn_k", "attn_v"), ("ffn_in",))
"""How the keys of parts begin whose layers read the same tensor."""


def together(
    parts: Mapping[str, Mapping[str, nn.Module]], own: Collection[str]
) -> dict[tuple[str, str], tuple[str, ...]]:
    """Groups the parts of a block whose products may be computed as one.

    Args:
        parts: by kind and key.
        own: keys of parts that edit a layer's input, which other layers then do not share.

    Returns:
        For a part's kind and key, the keys of its group.
    """
    groups = {}
    for kind, some in parts.items():
        for sites in ONE_INPUT:
            if any(key.startswith(sites) for key in own):
                continue
            of_width: dict[int, list[str]] = {}
            for key, part in some.items():
                first = _first(part) if key.startswith(sites) else None
                if first is not None:
                    of_width.setdefault(first.shape[1], []).append(key)
            groups.update({(kind, k): tuple(keys) for keys in of_width.values() if len(keys) > 1 for k in keys})
    return groups


def products(parts: Mapping[str, nn.Module], x: Tensor) -> dict[str, Tensor]:
    """Returns x · firstᵀ [B, T, R] for each of some parts, from x [B, T, I]."""
    firsts = [cast(Tensor, _first(part)) for part in parts.values()]
    z = nn.functional.linear(x, torch.cat(firsts).to(x.dtype))
    return dict(zip(parts, torch.split(z, [first.shape[0] for first in firsts], dim=-1), strict=True))


def _first(part: nn.Module) -> Tensor | None:
    return part.first if isinstance(part, Part) else None
