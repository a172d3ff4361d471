"""The nested parts of a recipe's training section: loss, batches, penalties, pruning."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

GAMMA = 2.0


class Section(BaseModel):
    """A part of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LossSettings(Section):
    """What is minimised, where examples or tokens have classes.

    Attributes:
        kind: `cross_entropy`, or `focal`, which counts what is right already for less.
        gamma: How much less, in focal loss; 0 is cross-entropy.
        class_weights: `inverse` weighs classes by how rare they are in training; their mean weight is 1.
        label_smoothing: Share of the probability that is spread over all classes; works for language models too.
        dice: Weight of the Dice loss, which is added for semantic segmentation: it counts regions of all classes alike.
    """

    kind: Literal["cross_entropy", "focal"] = "cross_entropy"
    gamma: Weight = GAMMA
    class_weights: Literal["none", "inverse"] = "none"
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    dice: Weight = 0.0

    @model_validator(mode="after")
    def _gamma_is_of_focal_loss(self) -> Self:
        if self.kind != "focal" and self.gamma != GAMMA:
            raise ValueError("gamma belongs to kind focal: set training.loss.kind=focal, or leave gamma out")
        return self

    @property
    def is_plain(self) -> bool:
        """Whether the model's own loss is what is wanted."""
        return self == LossSettings()

    @property
    def needs_classes(self) -> bool:
        """Whether it makes sense for classes only, not for the tokens of a vocabulary."""
        return self.kind == "focal" or self.class_weights != "none"


class BatchingSettings(Section):
    """Which examples come together in a batch, and how often each comes.

    Attributes:
        oversample: Draws examples of rare classes as often as those of frequent ones.
        tokens: Makes batches of examples of like length whose tokens, padding included, are at most so many; takes the
            place of `batch_size`.
    """

    oversample: bool = False
    tokens: Count | None = None

    @model_validator(mode="after")
    def _one_order(self) -> Self:
        if self.oversample and self.tokens is not None:
            raise ValueError(
                "oversample and tokens exclude each other: one draws examples by class, the other by length"
            )
        return self


class PenaltySettings(Section):
    """How the gate's penalties (`adapter.gate.entropy`, `l1`, `balance`) count while training goes on.

    Attributes:
        schedule: Their factor from the end of the warm-up to the end of training: 1, from 0 to 1, or from 1 to 0.
        warmup_steps: Optimiser steps without penalties.
    """

    schedule: Literal["constant", "linear_up", "linear_down"] = "constant"
    warmup_steps: Steps = 0

    def factor(self, step: int, last: int) -> float:
        """Returns what penalties are multiplied by in one step.

        Args:
            step: Steps that are done.
            last: Steps that are done before the last one.
        """
        if step < self.warmup_steps:
            return 0.0
        done = min(1.0, (step - self.warmup_steps) / max(1, last - self.warmup_steps))
        return {"constant": 1.0, "linear_up": done, "linear_down": 1.0 - done}[self.schedule]


class PruningSettings(Section):
    """Methods that leave their blocks while training goes on.

    One of `keep`, `threshold` and `budget_params` says how many; see `training/pruning.py` for when.

    Attributes:
        keep: So many methods are left in the end, over all blocks.
        threshold: Methods go whose share of their block's contributions (gate value × gradient norm) is below this.
        budget_params: So many parameters of methods are left in the end.
        start: The share of training after which contributions are measured; the first round is a while later.
        end: The share of training at which the last round is; only later checkpoints can be the best.
        rounds: In how many rounds methods go, at equal distances.
    """

    keep: Count | None = None
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    budget_params: Count | None = None
    start: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3
    end: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    rounds: Count = 8

    @model_validator(mode="after")
    def _one_goal_and_some_time(self) -> Self:
        goals = [key for key in ("keep", "threshold", "budget_params") if getattr(self, key) is not None]
        if len(goals) != 1:
            given = " and ".join(goals) or "none"
            raise ValueError(f"say in one way what is to go: keep, threshold or budget_params, but got {given}")
        if self.start >= self.end:
            raise ValueError(f"start < end must hold, but got start={self.start}, end={self.end}")
        return self

    def start_of(self, steps: int) -> int:
        """Returns how many of a training's optimiser steps are done when measuring begins; at least one is left."""
        return min(round(self.start * steps), steps - 1)

    def rounds_of(self, steps: int) -> list[int]:
        """Returns the steps after which methods go; fewer rounds than asked for where there are fewer steps."""
        first = self.start_of(steps)
        span = max(1, round(self.end * steps) - first)
        return sorted({first + math.ceil(span * number / self.rounds) for number in range(1, self.rounds + 1)})
