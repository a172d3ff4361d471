"""A recipe: everything that a run needs, in one YAML file."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pelton.errors import nearest
from pelton.methods import METHODS
from pelton.tasks.load import AnySettings
from pelton.training.sections import (
    BatchingSettings,
    Count,
    LossSettings,
    PenaltySettings,
    PruningSettings,
    Rate,
    Section,
    Steps,
    Weight,
)

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class AdapterSettings(Section):
    """What is attached to the backbone: a preset, or methods under a gate.

    Attributes:
        preset: `default`, `unipelt`, `unipelt_ap`, one method's kind for that method alone, ungated, `backbone` for
            the dilated attention that the backbone's config asks for (`use_dilated`), or `head` for no method at all:
            the head is trained on a frozen backbone.
        methods: A list of `{kind: …}`, instead of a preset.
        gate: A `{kind: …}`; takes the place of the preset's own gate.
        modules_to_save: Modules trained in full beside the adapter; the task's head when not given.
        sizes: How many units single parts have, by block, method and place (`{"0.lora.attn_v": 2}`), where they are to
            be smaller than their method says.
        start: The folder of a saved adapter of the same shape whose weights training begins with, instead of `init`.
        init: Where the first factors of LoRA and bottlenecks begin: along the `gradient` of the loss on training
            examples (`pelton.initialize_from_gradients`), or at `random`, as in PEFT.
    """

    preset: str | None = None
    methods: list[Any] | None = None
    gate: Any = None
    modules_to_save: list[str] | None = None
    sizes: dict[str, Count] = Field(default_factory=dict)
    start: str | None = None
    init: Literal["gradient", "random"] = "gradient"

    @model_validator(mode="after")
    def _one_source_of_methods(self) -> Self:
        if self.preset is not None and self.methods is not None:
            raise ValueError("preset and methods exclude each other: set adapter.preset=null to list methods")
        if self.preset == "head" and (self.sizes or self.start is not None):
            raise ValueError("sizes and start are for methods, and preset head has none: leave them out")
        return self


class TrainingSettings(Section):
    """How the run learns.

    Attributes:
        epochs: Passes over the training examples.
        max_steps: Optimiser steps after which training ends, whatever `epochs` says.
        batch_size: Examples a step and device.
        eval_batch_size: Examples a batch where nothing is learned.
        gradient_accumulation: Batches whose gradients are averaged into one step.
        learning_rate: Of the methods.
        gate_learning_rate: Of the gates; a tenth of `learning_rate` when not given: they decide over what is still
            being learned.
        head_learning_rate: Of the head; `learning_rate` when not given.
        method_learning_rates: Of single kinds of methods, `{prefix: 1.0e-2}`, instead of `learning_rate`.
        up_rate_ratio: What LoRA's B and a bottleneck's U learn at, as a multiple of their method's rate. They start at
            zero, far from where they end, while what stands before them starts at full size and bears smaller steps
            (LoRA+, Hayou et al. 2024, arXiv 2402.12354, section 4).
        backbone_learning_rate: Of the backbone, where it is not frozen.
        train_backbone: Trains the whole backbone together with the adapter; with `adapter: null` it always is.
        layer_decay: What a block of a trained backbone learns at, as a factor of the rate of the block above;
            embeddings learn slowest.
        weight_decay: Of matrices; gates, biases and norms have none, nor has what L2-SP holds.
        l2_sp: Weight λ of λ·‖θ − θ₀‖², which holds a trained backbone near its pretrained weights (L2-SP).
        l2_head: Weight of ‖head‖², L2-SP's other term.
        loss: See `LossSettings`.
        schedule: How the learning rates fall after their warm-up; `constant` leaves them.
        warmup_ratio: Share of the steps in which they rise first.
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them.
        gate_warmup_steps: Steps in which the gates stay at their initial value.
        gate_temperature_end: The gates' temperature when training ends; it gets there from the gate's own in equal
            ratios a step. The temperature of the checkpoint that is kept is saved with it.
        penalty: See `PenaltySettings`.
        contribution_window: Steps over which each method's gate value × gradient norm is averaged, for `pelton prune
            --by contribution` afterwards; nothing is noted when not given.
        pruning: See `PruningSettings`; nothing goes in training when not given.
        evaluate_every: Steps between two evaluations and checkpoints; an epoch when not given.
        early_stopping_patience: Evaluations without a better score after which training ends; never when not given.
        early_stopping_min_delta: By how much a score must be better to count.
        metric_for_best: The validation metric that chooses the checkpoint; `score` is the mean of `task.score`.
        seed: Of the sampled examples, the initial weights, the order of the data and dropout.
        group_by_length: Makes batches of `batch_size` examples of like length, which saves padding.
        batching: See `BatchingSettings`.
        gradient_checkpointing: Computes activations twice instead of keeping them.
        precision: fp32, or automatic mixed precision.
        log_every: Steps between two entries of the history.
        trackers: Who is told of losses, scores and gates beside the run's own history: `tensorboard` (files in the
            run's `logs`), `wandb`, `mlflow`; `none` of them.
    """

    epochs: Rate = 10.0
    max_steps: Count | None = None
    batch_size: Count = 16
    eval_batch_size: Count = 64
    gradient_accumulation: Count = 1
    learning_rate: Rate = 1e-3
    gate_learning_rate: Rate | None = None
    head_learning_rate: Rate | None = None
    method_learning_rates: dict[str, Rate] = Field(default_factory=dict)
    up_rate_ratio: Rate = 1.0
    backbone_learning_rate: Rate = 2e-5
    train_backbone: bool = False
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    weight_decay: Weight = 0.01
    l2_sp: Weight = 0.0
    l2_head: Weight = 0.0
    loss: LossSettings = LossSettings()
    schedule: Literal["linear", "cosine", "inverse_sqrt", "constant"] = "linear"
    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.06
    max_grad_norm: Weight = 1.0
    gate_warmup_steps: Steps = 0
    gate_temperature_end: Rate | None = None
    penalty: PenaltySettings = PenaltySettings()
    contribution_window: Count | None = None
    pruning: PruningSettings | None = None
    evaluate_every: Count | None = None
    early_stopping_patience: Count | None = None
    early_stopping_min_delta: Weight = 0.0
    metric_for_best: str = "score"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    group_by_length: bool = False
    batching: BatchingSettings = BatchingSettings()
    gradient_checkpointing: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    log_every: Count = 10
    trackers: tuple[Tracker, ...] = ("tensorboard",)

    @field_validator("trackers", mode="before")
    @classmethod
    def _none_or_one(cls, value: Any) -> Any:
        if value is None or value == "none":
            return ()
        return (value,) if isinstance(value, str) else value

    @field_validator("method_learning_rates")
    @classmethod
    def _known_methods(cls, rates: dict[str, float]) -> dict[str, float]:
        if any(kind not in METHODS for kind in rates):
            import pelton.tuner  # noqa: F401 - brings the methods of PEFT, and PEFT: seconds that others need not wait
        for kind in rates:
            if kind not in METHODS:
                guess = nearest(kind, METHODS)
                hint = f" (did you mean {guess!r}?)" if guess else ""
                raise ValueError(f"there is no method {kind!r}{hint}; keys are {', '.join(METHODS)}")
        return rates

    @model_validator(mode="after")
    def _one_balance_and_one_order(self) -> Self:
        if self.batching.oversample and self.loss.class_weights != "none":
            raise ValueError(
                "batching.oversample and loss.class_weights=inverse both balance the classes: choose one of them"
            )
        for key in ("oversample", "tokens"):
            if self.group_by_length and getattr(self.batching, key):
                raise ValueError(f"group_by_length and batching.{key} exclude each other: choose one order of examples")
        return self


class Recipe(Section):
    """A complete, runnable description of one training.

    Attributes:
        name: What the run's folder is called after.
        description: One line for `pelton recipes`.
        backbone: A hub name, a local folder, `pkg:package/folder` for one inside an installed Python package, or
            `new:MODEL_TYPE` for random weights.
        backbone_config: What a new backbone's config says beside the defaults of its type.
        attention: How attention is computed, in the words of transformers (`eager`, `sdpa` …); its choice if not given.
        task: The data and the head.
        adapter: What is attached; null trains the whole backbone instead.
        training: How the run learns.
        output: The folder in which the run makes its own.
    """

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "run"
    description: str = ""
    backbone: str
    backbone_config: dict[str, Any] = Field(default_factory=dict)
    attention: str | None = None
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

    @property
    def trains_backbone(self) -> bool:
        """Whether the pretrained weights are trained."""
        return self.adapter is None or self.training.train_backbone

    @model_validator(mode="after")
    def _random_weights_are_trained(self) -> Self:
        new = self.backbone.startswith("new:")
        if new and not self.trains_backbone:
            raise ValueError(
                f"backbone {self.backbone} has random weights, which must be trained: set adapter=null, or "
                "training.train_backbone=true"
            )
        if self.backbone_config and not new:
            raise ValueError("backbone_config is for a backbone of random weights: set backbone=new:MODEL_TYPE")
        return self

    @model_validator(mode="after")
    def _what_is_set_is_there(self) -> Self:
        """Refuses settings of what is not trained, or not attached."""
        training = self.training
        held = [key for key in ("layer_decay", "l2_sp") if getattr(training, key) != default_of(key)]
        if held and not self.trains_backbone:
            raise ValueError(
                f"training.{held[0]} is for a backbone that is trained, and it is frozen: set "
                "training.train_backbone=true, or adapter=null"
            )
        gated = (
            "train_backbone",
            "method_learning_rates",
            "up_rate_ratio",
            "gate_temperature_end",
            "gate_warmup_steps",
            "contribution_window",
            "pruning",
        )
        lost = [key for key in (*gated, "penalty") if getattr(training, key) != default_of(key)]
        if lost and self.adapter is None:
            raise ValueError(f"training.{lost[0]} is for an adapter, and adapter is null: leave one of them out")
        return self


def default_of(key: str) -> Any:
    """Returns what a training setting is where a recipe does not say it."""
    return TrainingSettings.model_fields[key].get_default(call_default_factory=True)
