"""Dilated attention on a grid of patches (DiNAT, Hassani and Shi 2022, arXiv 2209.15001, section 3; NAT, 2204.07143).

Each patch attends to the k × k nearest patches of its residue class: those a multiple of r rows and columns away. At an
edge the window moves inwards, so that every patch has k² keys. Tokens that are no patches ([CLS], registers) attend to
everything and are seen by all. Time and memory grow with N · k² for N patches.

Letters: B batch, H heads, N patches, C tokens in front of them, T = C + N, K head dim, M keys of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor

from pelton.errors import AdapterError
from pelton.methods.base import Grid
from pelton.methods.view import View, gather, shares, weigh
from pelton.registry import require

Kernels = Sequence[tuple[int, int]]
"""Pairs (k, r)."""


def require_room(rows: int, columns: int, kernels: Kernels) -> None:
    """Raises SpecError unless every residue class of a grid has k rows and k columns."""
    side = min(rows, columns)
    for kernel, dilation in kernels:
        law = f"kernel * dilation <= {side} on a grid of {rows} × {columns} patches"
        require(kernel * dilation <= side, law, kernel=kernel, dilation=dilation)


def sides(tokens: int, grid: Grid) -> tuple[int, int]:
    """Returns the rows and columns of an image of T tokens: those of the config, or else a square.

    Raises:
        AdapterError: the patches are neither as many as the config says nor a square number.
    """
    patches = tokens - grid.special
    if patches == grid.rows * grid.columns:
        return grid.rows, grid.columns
    side = isqrt(max(patches, 0))
    if side * side != patches or not patches:
        raise AdapterError(
            f"The grid of {patches} patches cannot be told: expected {grid.rows} × {grid.columns}, as the backbone's "
            "config says, or a square number. Resize the images, or use DilatedAttention(space='sequence')."
        )
    return side, side


def neighbours(rows: int, columns: int, kernels: Kernels, device: torch.device) -> Tensor:
    """Returns the patches that each patch attends to, [N, M], M the sum of all k²."""
    tables = []
    for kernel, dilation in kernels:
        down, across = (_window(side, kernel, dilation, device) for side in (rows, columns))
        table = down[:, None, :, None] * columns + across[None, :, None, :]  # [rows, columns, k, k]
        tables.append(table.reshape(rows * columns, kernel * kernel))
    return torch.cat(tables, dim=1)


def _window(side: int, kernel: int, dilation: int, device: torch.device) -> Tensor:
    """The k places along one side that each place attends to, [side, k]."""
    place = torch.arange(side, device=device)
    first = place % dilation
    count = (side - first + dilation - 1) // dilation  # of the residue class
    start = torch.minimum((place // dilation - kernel // 2).clamp_min(0), count - kernel)
    return first[:, None] + dilation * (start[:, None] + torch.arange(kernel, device=device))


def neighbourhood(query: Tensor, key: Tensor, value: Tensor, grid: Grid, kernels: Kernels, view: View) -> Tensor:
    """Returns the dilated attention of images, [B, H, T, K].

    Args:
        query: [B, H, T, K].
        key: [B, H, T, K].
        value: [B, H, T, K].
        grid: how the tokens lie.
        kernels: pairs (k, r); several are mixed as one softmax over the keys of all.
        view: what the original attention adds to its scores.
    """
    rows, columns = sides(query.shape[2], grid)
    require_room(rows, columns, kernels)
    first, device = grid.special, query.device
    near = neighbours(rows, columns, kernels, device)[None] + first  # [1, N, M]
    every = torch.arange(first, device=device).expand(1, near.shape[1], first)
    patches = torch.arange(first, query.shape[2], device=device)[None, :, None]
    own = query[:, :, first:]
    scores = torch.cat(
        [own @ key[:, :, :first].transpose(-2, -1), (gather(key, near) @ own[..., None])[..., 0]], dim=-1
    )
    scores = weigh(scores * view.scaling, *view.at(patches, torch.cat([every, near], dim=-1)))
    weights = shares(scores, view.dropout).to(query.dtype)
    out = weights[..., :first] @ value[:, :, :first]
    out = out + (weights[..., None, first:] @ gather(value, near))[..., 0, :]
    if not first:
        return out
    special = query[:, :, :first] @ key.transpose(-2, -1) * view.scaling
    special = weigh(special, *view.first(first))
    weights = shares(special, view.dropout).to(query.dtype)
    return torch.cat([weights @ value, out], dim=2)
