"""Parameter groups: gates, methods, head and backbone learn at rates of their own, deep blocks at lower ones.

A group is named after what it holds: `gates`, `methods`, `methods.prefix` where a kind has a rate of its own,
`methods.up` for the factors of products that start at zero where they have one, `head`, `backbone`, and `backbone.2`
for what lies two blocks below the top under layer-wise decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pelton.errors import TrainingError
from pelton.methods import METHODS
from pelton.training.depth import parameter_depths
from pelton.training.recipe import TrainingSettings
from pelton.tuner.controls import tuners

INSIDE = ".pelton.methods."
GATE_SHARE = 0.1
"""Of the methods' rate, what gates learn at unless a recipe says it."""


def group_of(name: str, head: str | None) -> str:
    """Returns the group of a parameter by its name: `gates`, `methods`, `head` or `backbone`.

    Args:
        name: As `model.named_parameters()` gives it.
        head: The prefix of the pretrained part in a model that is trained whole: what is outside of it is the head.
    """
    if ".pelton.gates." in name:
        return "gates"
    if INSIDE in name:
        return "methods"
    if ".modules_to_save." in name or (head is not None and not name.startswith(f"{head}.")):
        return "head"
    return "backbone"


def learning_rates(settings: TrainingSettings) -> dict[str, float]:
    """Returns each group's rate; what a recipe leaves open learns as the methods do, and gates at a tenth of that."""
    own = {f"methods.{kind}": rate for kind, rate in settings.method_learning_rates.items()}
    return {
        "methods": settings.learning_rate,
        **own,
        "gates": settings.gate_learning_rate or settings.learning_rate * GATE_SHARE,
        "head": settings.head_learning_rate or settings.learning_rate,
        "backbone": settings.backbone_learning_rate,
    }


def trained_groups(model: nn.Module, new_head: bool = True) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Returns the trainable parameters with their names, by group.

    Args:
        model: With an adapter, or trained whole.
        new_head: Whether what stands beside a whole model's pretrained part is new. A language model's is not: its
            head, encoder and decoder, whichever way they are nested, are the backbone.
    """
    prefix = getattr(model, "base_model_prefix", None) if new_head and not tuners(model) else None
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"methods": [], "gates": [], "head": [], "backbone": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[group_of(name, prefix)].append((name, parameter))
    return groups


def parameter_groups(model: nn.Module, settings: TrainingSettings, new_head: bool = True) -> list[dict[str, Any]]:
    """Groups the trainable parameters for AdamW.

    Gates and vectors (biases, norms, scales) are not decayed, nor is what L2-SP holds instead (Li et al. 2018).

    Args:
        model: See `trained_groups`.
        settings: The recipe's.
        new_head: See `trained_groups`.

    Raises:
        TrainingError: nothing is trainable.
    """
    found, rates = trained_groups(model, new_head), learning_rates(settings)
    if not any(found.values()):
        raise TrainingError(
            "The model has no trainable parameter. Attach an adapter or set adapter=null in the recipe."
        )
    held = {"gates"} | ({"backbone"} if settings.l2_sp else set()) | ({"head"} if settings.l2_head else set())
    depths = parameter_depths(_plain(model)) if settings.layer_decay < 1 and found["backbone"] else {}
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for group, members in found.items():
        for name, parameter in members:
            part, rate = group, rates[group]
            if group == "methods":
                part, rate = _of_method(name, settings, rates)
            elif group == "backbone" and depths:
                depth = depths[id(parameter)]
                part, rate = f"backbone.{depth}", rate * settings.layer_decay**depth
            decayed = group not in held and parameter.ndim > 1
            decay = settings.weight_decay if decayed else 0.0
            new = {"name": part, "params": [], "lr": rate, "weight_decay": decay}
            groups.setdefault((part, decayed), new)["params"].append(parameter)
    return list(groups.values())


def make_optimizer(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """Makes AdamW, in one fused kernel where the parameters' device has it."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, fused=devices <= {"cpu", "cuda"})


def gate_parameters(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """Returns the gates' parameters by name."""
    return {name: p for name, p in model.named_parameters() if group_of(name, None) == "gates"}


def _of_method(name: str, settings: TrainingSettings, rates: Mapping[str, float]) -> tuple[str, float]:
    """Returns group and rate of a parameter `….pelton.methods.ADAPTER.KIND.KEY.PARAMETER`."""
    path = name.partition(INSIDE)[2].split(".")
    kind = path[1]
    part = f"methods.{kind}" if kind in settings.method_learning_rates else "methods"
    if settings.up_rate_ratio != 1 and path[-1] == METHODS[kind].up:
        return f"{part}.up", rates[part] * settings.up_rate_ratio
    return part, rates[part]


def _plain(model: nn.Module) -> nn.Module:
    """Returns the backbone under an adapter, whose names are the architecture's own."""
    found = tuners(model)
    return found[0].model if found else model
