"""Gate penalties, added to `outputs.loss` by hooks on the backbone: whoever calls it, with any trainer.

PEFT's wrappers differ in what they call, the tuner or the backbone; the backbone is called in every case. Who computes
a loss of their own takes the penalties by `controls.gate_penalty`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pelton.errors import AdapterError
from pelton.gates import DynamicGateSpec
from pelton.gates.penalties import penalty, wanted

if TYPE_CHECKING:
    from pelton.tuner.model import PeltonModel


class GatePenalty:
    """The gate penalties of the forwards inside `gate_penalty`."""

    def __init__(self) -> None:
        """Starts without any."""
        self.terms: list[Tensor] = []

    def __call__(self) -> Tensor:
        """Returns their sum, a scalar; 0 where no gate asks for a penalty, or the model was not in training mode."""
        return torch.stack(self.terms).sum() if self.terms else torch.zeros(())


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

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        blocks = list(self.tuner.blocks())
        seen = [kept for block in blocks for kept in block.kept or ()]
        for block in blocks:
            block.kept = None
        if not seen or outputs is None:  # None where the forward failed
            return outputs
        tuner = self.tuner
        terms = [_penalty(tuner, name, [(v, m) for n, v, m in seen if n == name]) for name in _penalised(tuner)]
        total = torch.stack(terms).sum() * tuner.penalty_factor
        if tuner.penalty_taker is not None:
            tuner.penalty_taker.terms.append(total)
            return outputs
        share = share_of_step(module, kwargs.get("labels"), kwargs.get("num_items_in_batch"))
        return _with_penalty(outputs, total * share)


def share_of_step(model: nn.Module, labels: Any, total: Any) -> Tensor | float:
    """Returns a batch's share of the accumulated batches, by its labels; 1 where the loss is a mean of its own.

    A trainer that passes `num_items_in_batch` adds the losses of accumulated batches up instead of averaging them.

    Args:
        model: Says whether its loss leaves the first label out, as a causal language model's does.
        labels: Of this batch; -100 does not count.
        total: How many labels the accumulated batches have, or None.
    """
    if total is None or not isinstance(labels, Tensor):
        return 1.0
    counted = labels[..., 1:] if getattr(model, "loss_type", None) == "ForCausalLM" else labels
    return cast(Tensor, (counted != -100).sum() / total)


def _with_penalty(outputs: Any, total: Tensor) -> Any:
    """Adds a penalty to the loss of what a model returned: a mapping, or a tuple (`return_dict=False`)."""
    if isinstance(outputs, Mapping) and outputs.get("loss") is not None:
        cast(Any, outputs)["loss"] = outputs["loss"] + total
    elif type(outputs) is tuple and isinstance(outputs[0], Tensor) and outputs[0].dim() == 0:  # a scalar is a loss
        return (outputs[0] + total, *outputs[1:])
    elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
        warnings.warn(
            "The model returned no loss to add the gate penalties to, so they are lost. Pass labels, or take them with "
            "pelton.gate_penalty(model) where you compute the loss.",
            stacklevel=2,
        )
    return outputs


def attach_penalties(tuner: PeltonModel, backbone: nn.Module) -> tuple[RemovableHandle, ...]:
    """Connects the hooks to the backbone."""
    return (
        backbone.register_forward_pre_hook(_Keep(tuner)),
        backbone.register_forward_hook(_Add(tuner), with_kwargs=True, always_call=True),
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
