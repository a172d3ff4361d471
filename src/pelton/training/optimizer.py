"""Parameter groups: gates, methods, head and backbone each learn at their own rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pelton.errors import TrainingError
from pelton.training.recipe import TrainingSettings


def group_of(name: str, head: str | None) -> str:
    """Returns the group of a parameter by its name.

    Args:
        name: As `model.named_parameters()` gives it.
        head: The prefix of the pretrained part in a model that is trained whole: what is outside of it is the head.
    """
    if ".pelton.gates." in name:
        return "gates"
    if ".pelton.methods." in name:
        return "methods"
    if ".modules_to_save." in name or (head is not None and not name.startswith(f"{head}.")):
        return "head"
    return "backbone"


def learning_rates(settings: TrainingSettings) -> dict[str, float]:
    """Returns each group's rate; what a recipe leaves open learns as the methods do."""
    return {
        "methods": settings.learning_rate,
        "gates": settings.gate_learning_rate or settings.learning_rate,
        "head": settings.head_learning_rate or settings.learning_rate,
        "backbone": settings.backbone_learning_rate,
    }


def parameter_groups(model: nn.Module, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Groups the trainable parameters for AdamW; gates and vectors (biases, norms, scales) are not decayed.

    Raises:
        TrainingError: nothing is trainable.
    """
    rates = learning_rates(settings)
    prefix = getattr(model, "base_model_prefix", None) if not _is_adapted(model) else None
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {
        (name, decay): [] for name in rates for decay in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = group_of(name, prefix)
            groups[group, group != "gates" and parameter.ndim > 1].append(parameter)
    if not any(groups.values()):
        raise TrainingError(
            "The model has no trainable parameter. Attach an adapter or set adapter=null in the recipe."
        )
    return [
        {"name": name, "params": found, "lr": rates[name], "weight_decay": settings.weight_decay if decay else 0.0}
        for (name, decay), found in groups.items()
        if found
    ]


def gate_parameters(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """Returns the gates' parameters by name."""
    return {name: p for name, p in model.named_parameters() if group_of(name, None) == "gates"}


def _is_adapted(model: nn.Module) -> bool:
    return any(".pelton." in name for name, _ in model.named_parameters())
