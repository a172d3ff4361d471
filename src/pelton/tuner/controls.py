"""What changes on a model without attaching anything anew: methods that are on, stages, temperature, penalties."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pelton.errors import AdapterError, unknown
from pelton.gates import Tempered, TemperedModule
from pelton.gates.static import FixedGateModule
from pelton.registry import require
from pelton.tuner.block import GatedBlock
from pelton.tuner.model import PeltonModel
from pelton.tuner.penalise import GatePenalty


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


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Sets the temperature of every active adapter's gates, and of the spec that is saved with it.

    Raises:
        AdapterError: no active adapter has gates with a temperature.
        SpecError: the temperature is not above 0.
    """
    require(temperature > 0, "temperature > 0", temperature=temperature)
    found = [
        (tuner, name)
        for tuner in tuners(model)
        for name in tuner.active_adapters
        if isinstance(tuner.peft_config[name].gate_spec, Tempered)
    ]
    if not found:
        raise AdapterError("No gate of this model has a temperature. Use MLPGate(temperature=…) or GumbelGate.")
    for tuner, name in found:
        config = tuner.peft_config[name]
        config.gate = dataclasses.replace(config.gate_spec, temperature=temperature)
        for block in tuner.blocks():
            gate = block.gates[name] if name in block.wirings else None
            if isinstance(gate, TemperedModule):
                gate.temperature = temperature


def set_penalty_factor(model: nn.Module, factor: float) -> None:
    """Multiplies the gate penalties by a factor, beside the weights of the spec; for schedules. It is not saved."""
    require(factor >= 0, "factor >= 0", factor=factor)
    for tuner in tuners(model):
        tuner.penalty_factor = factor


@contextmanager
def gate_penalty(model: nn.Module) -> Iterator[GatePenalty]:
    """Hands the gate penalties to the caller, who computes a loss; inside, `outputs.loss` is without them.

    Example:
        with gate_penalty(model) as penalty:
            outputs = model(**inputs)
        loss = my_loss(outputs.logits, labels) + penalty()
    """
    found = tuners(model)
    before = [tuner.penalty_taker for tuner in found]
    taker = GatePenalty()
    for tuner in found:
        tuner.penalty_taker = taker
    try:
        yield taker
    finally:
        for tuner, one in zip(found, before, strict=True):
            tuner.penalty_taker = one


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module in evaluation mode for a while, and back as it was: no dropout, no checkpointing."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def tuners(model: nn.Module) -> list[PeltonModel]:
    """Returns Pelton's tuners in a model, whatever it is wrapped in; none where nothing is attached."""
    return [module for module in model.modules() if isinstance(module, PeltonModel)]
