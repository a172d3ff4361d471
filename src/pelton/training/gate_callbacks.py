"""What happens to gates while a model learns: they wait, their penalties come and go, they sharpen."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pelton.gates import Tempered
from pelton.training.optimizer import gate_parameters
from pelton.training.recipe import TrainingSettings
from pelton.training.sections import PenaltySettings
from pelton.tuner.controls import set_penalty_factor, set_temperature, tuners


class GateWarmup(TrainerCallback):  # type: ignore[misc]
    """Keeps the gates at their initial value for the first optimiser steps.

    Their gradients are dropped before the step, which AdamW takes as "leave it alone": no moments, no decay. All
    processes of a distributed run do the same, and the step comes from the trainer's state, so resuming is exact.
    """

    def __init__(self, steps: int) -> None:
        """Holds the gates for `steps` optimiser steps."""
        self.steps = steps

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Drops the gates' gradients while the warm-up lasts."""
        if state.global_step < self.steps:
            for parameter in gate_parameters(model).values():
                parameter.grad = None


class PenaltySchedule(TrainerCallback):  # type: ignore[misc]
    """Weighs the gates' penalties by the step; afterwards they count in full again."""

    def __init__(self, settings: PenaltySettings) -> None:
        """Takes the recipe's schedule."""
        self.settings = settings

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Sets the factor of the step that begins."""
        set_penalty_factor(model, self.settings.factor(state.global_step, state.max_steps - 1))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Sets the factor to 1."""
        set_penalty_factor(model, 1.0)


class TemperatureAnnealing(TrainerCallback):  # type: ignore[misc]
    """Moves the gates' temperature from one value to another, by the same ratio in every step.

    After s of S steps it is τ₀ (τ₁ / τ₀)^(s / S). What is evaluated and saved after a step has the temperature of that
    step; where an earlier checkpoint is the one that is kept, its temperature comes back with it.
    """

    def __init__(self, start: float, end: float) -> None:
        """Goes from `start` to `end`."""
        self.start, self.end = start, end

    def at(self, step: int, steps: int) -> float:
        """Returns the temperature after `step` of `steps`."""
        return float(self.start * (self.end / self.start) ** (step / steps))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Sets the temperature from which a new or a resumed run goes on."""
        set_temperature(model, self.at(state.global_step, state.max_steps))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Sets the temperature of what follows: evaluation, checkpoint, the next step."""
        set_temperature(model, self.at(state.global_step, state.max_steps))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Sets the temperature that the weights which are kept were judged at."""
        step = (state.best_global_step if args.load_best_model_at_end else None) or state.global_step
        set_temperature(model, self.at(step, state.max_steps))


def gate_callbacks(settings: TrainingSettings, model: nn.Module) -> list[TrainerCallback]:
    """Returns the callbacks that a recipe asks for."""
    callbacks: list[TrainerCallback] = []
    if settings.gate_warmup_steps:
        callbacks.append(GateWarmup(settings.gate_warmup_steps))
    if settings.penalty != PenaltySettings():
        callbacks.append(PenaltySchedule(settings.penalty))
    if settings.gate_temperature_end is not None:
        tuner = tuners(model)[0]
        start = cast(Tempered, tuner.peft_config[tuner.active_adapters[0]].gate_spec).temperature
        callbacks.append(TemperatureAnnealing(start, settings.gate_temperature_end))
    return callbacks
