"""A model over data, to see what its gates and methods do there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pelton.tuner.batches import inputs_of
from pelton.tuner.controls import evaluating

Batches = Iterable[Mapping[str, Any]]
BlockValues = dict[str, dict[str, float]]
"""A number by block number (as text) and kind of method."""


def run_over(model: nn.Module, batches: Batches) -> None:
    """Runs a model over batches in evaluation mode, without gradients and without a cache of keys."""
    device = next(model.parameters()).device
    cached = getattr(getattr(model, "config", None), "use_cache", None)
    with evaluating(model), torch.no_grad():
        for batch in batches:
            inputs = inputs_of(batch, device)
            model(**inputs, **({"use_cache": False} if cached and "use_cache" not in inputs else {}))
