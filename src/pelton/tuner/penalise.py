"""Gate penalties, added to `outputs.loss` by hooks on the backbone: whoever calls it, with any trainer.

PEFT's wrappers differ in what they call, the tuner or the backbone; the backbone is called in every case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pelton.errors import AdapterError
from pelton.gates import DynamicGateSpec
from pelton.gates.penalties import penalty, wanted

if TYPE_CHECKING:
    from pelton.tuner.model import PeltonModel


class _Keep:
    """Has the gated blocks keep the gate values of one forward in training; runs before the backbone."""

    def __init__(self, tuner: PeltonModel) -> None:
        self.tuner = tuner

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training and _penalised(self.tuner):
            for block in self.tuner.blocks():
                block.kept = []


class _Add:
    """Adds the penalties of the kept values and lets go of them; runs after the backbone, also when it failed."""

    def __init__(self, tuner: PeltonModel) -> None:
        self.tuner = tuner

    def __call__(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        blocks = list(self.tuner.blocks())
        seen = [kept for block in blocks for kept in block.kept or ()]
        for block in blocks:
            block.kept = None
        if seen and getattr(outputs, "loss", None) is not None:
            for name in _penalised(self.tuner):
                outputs["loss"] = outputs.loss + _penalty(self.tuner, name, [(v, m) for n, v, m in seen if n == name])
        return outputs


def attach_penalties(tuner: PeltonModel, backbone: nn.Module) -> tuple[RemovableHandle, ...]:
    """Connects the hooks to the backbone."""
    return (
        backbone.register_forward_pre_hook(_Keep(tuner)),
        backbone.register_forward_hook(_Add(tuner), always_call=True),
    )


def _penalised(tuner: PeltonModel) -> list[str]:
    return [name for name in tuner.active_adapters if wanted(tuner.peft_config[name].gate_spec)]


def _penalty(tuner: PeltonModel, name: str, seen: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    if torch.is_grad_enabled() and not any(values.requires_grad for values, _ in seen):
        raise AdapterError(
            "Gate penalties need gradients through the gates, but they have none. With gradient checkpointing, "
            "pass gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
    return penalty(cast(DynamicGateSpec, tuner.peft_config[name].gate_spec), seen)
