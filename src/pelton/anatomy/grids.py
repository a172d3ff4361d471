"""The grid that the patches of an image encoder lie on: its sides from the config, other tokens from its weights."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from pelton.anatomy.rows import Row
from pelton.methods import Grid

_SPECIAL = r"(.*\.)?(cls_token|class_embedding|dist(illation)?_token|register_tokens)"
"""Parameters that stand for tokens in front of the patches: [D], or [1, n, D] for n tokens."""


def grid_of(row: Row, config: Any, name: str, modules: dict[str, nn.Module]) -> Grid | None:
    """Returns the grid of a block's tokens; None where there is none, or none that the config tells.

    Args:
        row: of the architecture.
        config: of the block's attention.
        name: the block's.
        modules: of the model, by name.
    """
    size, patch = (_pair(getattr(config, key, None)) for key in ("image_size", "patch_size"))
    if row.grid is False or size is None or patch is None or getattr(config, "num_frames", None):
        return None
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    return Grid(rows, columns, _special(name, modules), bool(row.grid)) if rows and columns else None


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _special(name: str, modules: dict[str, nn.Module]) -> int:
    """Counts the tokens in front of the patches, in the nearest module around the block that has any."""
    while name:
        name = name.rpartition(".")[0]
        found = [p for key, p in modules[name].named_parameters() if re.fullmatch(_SPECIAL, key)]
        if found:
            return sum(p.shape[-2] if p.dim() > 1 else 1 for p in found)
    return 0
