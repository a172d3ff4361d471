"""A recipe: everything that a run needs, in one YAML file."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pelton.tasks.load import AnySettings

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0.0)]


class _Section(BaseModel):
    """A part of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AdapterSettings(_Section):
    """What is attached to the backbone: a preset, or methods under a gate.

    Attributes:
        preset: `default`, `unipelt`, `unipelt_ap`, or one method's kind for that method alone, ungated.
        methods: A list of `{kind: …}`, instead of a preset.
        gate: A `{kind: …}`; takes the place of the preset's own gate.
        modules_to_save: Modules trained in full beside the adapter; the task's head when not given.
    """

    preset: str | None = None
    methods: list[Any] | None = None
    gate: Any = None
    modules_to_save: list[str] | None = None

    @model_validator(mode="after")
    def _one_source_of_methods(self) -> Self:
        if self.preset is not None and self.methods is not None:
            raise ValueError("preset and methods exclude each other: set adapter.preset=null to list methods")
        return self


class TrainingSettings(_Section):
    """How the run learns.

    Attributes:
        epochs: Passes over the training examples.
        max_steps: Optimiser steps after which training ends, whatever `epochs` says.
        batch_size: Examples a step and device.
        eval_batch_size: Examples a batch where nothing is learned.
        gradient_accumulation: Batches whose gradients are averaged into one step.
        learning_rate: Of the methods.
        gate_learning_rate: Of the gates; `learning_rate` when not given.
        head_learning_rate: Of the head; `learning_rate` when not given.
        backbone_learning_rate: Of the backbone, where it is not frozen.
        weight_decay: Of matrices; gates, biases and norms have none.
        schedule: How the learning rates fall to zero.
        warmup_ratio: Share of the steps in which they rise first.
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them.
        gate_warmup_steps: Steps in which the gates stay at their initial value.
        evaluate_every: Steps between two evaluations and checkpoints; an epoch when not given.
        early_stopping_patience: Evaluations without a better score after which training ends; never when not given.
        early_stopping_min_delta: By how much a score must be better to count.
        metric_for_best: The validation metric that chooses the checkpoint; `score` is the mean of `task.score`.
        seed: Of the sampled examples, the initial weights, the order of the data and dropout.
        group_by_length: Makes batches of examples of like length, which saves padding.
        gradient_checkpointing: Computes activations twice instead of keeping them.
        precision: fp32, or automatic mixed precision.
        log_every: Steps between two entries of the history.
    """

    epochs: Rate = 10.0
    max_steps: Count | None = None
    batch_size: Count = 16
    eval_batch_size: Count = 64
    gradient_accumulation: Count = 1
    learning_rate: Rate = 1e-3
    gate_learning_rate: Rate | None = None
    head_learning_rate: Rate | None = None
    backbone_learning_rate: Rate = 2e-5
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    schedule: Literal["linear", "cosine"] = "linear"
    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.06
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    gate_warmup_steps: Annotated[int, Field(ge=0)] = 0
    evaluate_every: Count | None = None
    early_stopping_patience: Count | None = None
    early_stopping_min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    metric_for_best: str = "score"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    group_by_length: bool = False
    gradient_checkpointing: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    log_every: Count = 10


class Recipe(_Section):
    """A complete, runnable description of one training.

    Attributes:
        name: What the run's folder is called after.
        description: One line for `pelton recipes`.
        backbone: A hub name, a local folder, or `pkg:package/folder` for one inside an installed Python package.
        task: The data and the head.
        adapter: What is attached; null trains the whole backbone instead.
        training: How the run learns.
        output: The folder in which the run makes its own.
    """

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "run"
    description: str = ""
    backbone: str
    task: AnySettings
    adapter: AdapterSettings | None = AdapterSettings()
    training: TrainingSettings = TrainingSettings()
    output: str = "runs"

    @model_validator(mode="before")
    @classmethod
    def _usual_kind(cls, values: Any) -> Any:
        """Takes text classification where `task.kind` is not given."""
        if isinstance(values, dict) and isinstance(values.get("task"), dict):
            return {**values, "task": {"kind": "text-classification", **values["task"]}}
        return values
