"""A model over data, to see what its gates and methods do there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pelton.errors import AdapterError
from pelton.tuner.controls import evaluating

Batches = Iterable[Mapping[str, Any]]
BlockValues = dict[str, dict[str, float]]
"""A number by block number (as text) and kind of method."""


def inputs_of(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Returns the inputs of one batch on a device.

    Raises:
        AdapterError: it is none, such as the names in a batch that was given for several.
    """
    if not isinstance(batch, Mapping):
        raise AdapterError(
            f"Expected batches, each of inputs by name, but got a {type(batch).__name__} for one. Give a "
            "DataLoader, or a list: [{'input_ids': …}]."
        )
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def run_over(model: nn.Module, batches: Batches) -> None:
    """Runs a model over batches in evaluation mode, without gradients and without a cache of keys."""
    device = next(model.parameters()).device
    cached = getattr(getattr(model, "config", None), "use_cache", None)
    with evaluating(model), torch.no_grad():
        for batch in batches:
            inputs = inputs_of(batch, device)
            model(**inputs, **({"use_cache": False} if cached and "use_cache" not in inputs else {}))
