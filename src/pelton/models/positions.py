"""Where a token stands, said four ways. Attention sums over a set: without, "dog bites man" is "man bites dog".

Sinusoidal and learned positions are vectors that join the embedding. Rotary positions turn queries and keys; ALiBi
penalises distance in the scores: both act in every block, and on differences of positions only.

Letters: B batch, T tokens, S keys, D hidden, H heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pelton.errors import SpecError


def count(attention_mask: Tensor | None, tokens: int, seen: int | Tensor, device: torch.device) -> Tensor:
    """Counts positions from each row's first token, so that padding on the left changes nothing: [B or 1, T]."""
    if attention_mask is None or attention_mask.dim() != 2:
        return (torch.arange(tokens, device=device) + seen)[None]
    return (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, -tokens:]


def frequencies(size: int, base: float, device: torch.device) -> Tensor:
    """Returns base^(−2i / size) for i < size / 2: how far each pair of features turns per position, float32."""
    return base ** -(torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)


def sinusoids(positions: Tensor, size: int, base: float) -> Tensor:
    """Returns PE(p, 2i) = sin(p ωᵢ), PE(p, 2i+1) = cos(p ωᵢ) (Vaswani et al. 2017, 3.5): [B, T] → [B, T, size].

    A shift by k turns each pair by k ωᵢ, whatever p is, so that relative positions are a linear map away.
    """
    angles = positions[..., None].float() * frequencies(size, base, positions.device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def rotation(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine of every angle p ωᵢ, each [B, 1, T, K/2], the same for all heads."""
    angles = (positions[..., None].float() * frequencies(head_dim, base, positions.device))[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns feature i with feature i + K/2 by the angle p ωᵢ (Su et al. 2021, 3.2.2): [B, H, T, K].

    ⟨R(p) q, R(s) k⟩ = ⟨q, R(s − p) k⟩: scores depend on the difference only. Values are not turned.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def alibi(queries: int, keys: int, seen: int | Tensor, heads: int, device: torch.device) -> Tensor:
    """Returns −m_h (p − s), a penalty that grows with the distance of query p and key s: [1, H, T, S], float32.

    The slopes are m_h = 2^(−8h / H), h = 1 … H (Press et al. 2021, 3; there for powers of two, here for every H).
    What lies in the future is left to the mask.
    """
    slopes = 2.0 ** (torch.arange(1, heads + 1, device=device, dtype=torch.float32) * (-8.0 / heads))
    distance = (torch.arange(queries, device=device) + seen)[:, None] - torch.arange(keys, device=device)
    return -slopes[None, :, None, None] * distance


def refuse_beyond(limit: int, tokens: int, seen: int | Tensor) -> None:
    """Refuses more tokens, padding included, than there are learned positions.

    Only sizes are compared: a compiled or exported graph takes this as a guard on its shapes. The length of a cache of
    fixed size is a tensor, which a graph cannot branch on: there the embedding's own check of its index stays.

    Raises:
        SpecError: `seen` and `tokens` together are above `limit`.
    """
    if torch.compiler.is_compiling() and isinstance(seen, Tensor):
        return
    length = int(seen) + tokens
    if length > limit:
        raise SpecError(
            f"`length <= max_position_embeddings` must hold for learned positions, but got (length={length}, "
            f"max_position_embeddings={limit}). Pass fewer tokens, or train with positions 'rotary', 'alibi' or "
            "'sinusoidal', which go on."
        )
