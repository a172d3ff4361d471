"""Batches that a model runs over: inputs by name, on the model's device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pelton.errors import AdapterError


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
