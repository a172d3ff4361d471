"""Turning methods on and off, and switching the stage of fixed gates, without attaching anything anew."""

from __future__ import annotations

from torch import nn

from pelton.errors import AdapterError, unknown
from pelton.gates.static import FixedGateModule
from pelton.tuner.block import GatedBlock


def gated_blocks(model: nn.Module) -> list[GatedBlock]:
    """Returns the gated blocks of a model, in its order.

    Raises:
        AdapterError: there are none.
    """
    blocks = [m for m in model.modules() if isinstance(m, GatedBlock)]
    if not blocks:
        raise AdapterError(f"{type(model).__name__} has no Pelton adapter. Attach one with peft.get_peft_model first.")
    return blocks


def set_methods(model: nn.Module, **enabled: bool) -> None:
    """Turns methods on or off in every block and adapter: `set_methods(model, lora=True, prefix=False)`.

    A method that is off adds nothing and costs nothing; the gate values of the others stay what they are. It is a state
    of this model object, like PEFT's `disable_adapter`: it is not saved.

    Raises:
        UnknownName: a kind that no adapter of the model has; nothing is changed.
    """
    blocks = gated_blocks(model)
    known = {spec.kind for block in blocks for wiring in block.wirings.values() for spec in wiring.methods}
    for kind in enabled:
        if kind not in known:
            raise unknown("method of this model", kind, known)
    on = {kind for kind, value in enabled.items() if value}
    for block in blocks:
        block.off = (block.off - on) | (set(enabled) - on)


def set_stage(model: nn.Module, stage: str) -> None:
    """Switches every `FixedGate` with stages to the ratios of one of them.

    Raises:
        AdapterError: no gate of the model has stages.
        UnknownName: a stage that a gate lacks; nothing is changed.
    """
    gates = [g for b in gated_blocks(model) for g in b.gates.values() if isinstance(g, FixedGateModule)]
    gates = [g for g in gates if g.stages != ("",)]
    if not gates:
        raise AdapterError("No gate of this model has stages. Use FixedGate(stages={'pretrain': 0.01, …}).")
    for gate in gates:
        if stage not in gate.stages:
            raise unknown("stage", stage, gate.stages)
    for gate in gates:
        gate.enter(stage)
