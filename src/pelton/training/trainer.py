"""transformers' Trainer with groups of parameters, that stops on a loss which is no number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments

from pelton.errors import TrainingError
from pelton.tasks.base import LOWER_IS_BETTER
from pelton.training.folder import RunFolder
from pelton.training.optimizer import parameter_groups
from pelton.training.recipe import TrainingSettings

Judge = Callable[[], dict[str, float]]

# transformers 5.23 renamed the argument and warns about the old name; 5.20 has only that.
CHECKPOINTING = next(
    field.name
    for field in dataclasses.fields(TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)


class GatedTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for a Pelton adapter, or for the whole backbone."""

    def __init__(self, settings: TrainingSettings, folder: RunFolder, judge: Judge | None, **options: Any) -> None:
        """Makes the trainer.

        Args:
            settings: The recipe's.
            folder: The run's.
            judge: Computes the validation metrics of the model; None where there are no validation rows.
            **options: Go to transformers.
        """
        super().__init__(args=training_arguments(settings, folder, judge is not None), **options)
        self.settings = settings
        self.folder = folder
        self.judge = judge
        # Classifiers average their loss over a batch whatever they are told: accumulated batches are averaged here.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes AdamW over the groups of `parameter_groups`."""
        if self.optimizer is None:
            self.optimizer: Any = torch.optim.AdamW(parameter_groups(model or self.model, self.settings))
        return self.optimizer

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Judges the model on the validation rows as the task does, and logs it."""
        if self.judge is None:
            raise TrainingError("There are no validation rows to evaluate on. Raise task.validation_fraction.")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.judge().items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Runs one batch forward and backward.

        Raises:
            TrainingError: the loss is no number; no weight has been changed by it.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise self.diverged(self.state, f"the loss is {loss.item()}")
        return loss

    def diverged(self, state: TrainerState, what: str) -> TrainingError:
        """Makes the error for a run that left the numbers: the step, the last good checkpoint, what to try."""
        checkpoint = self.folder.last_checkpoint()
        kept = f"The last good checkpoint is {checkpoint}" if checkpoint else "There is no checkpoint yet"
        return TrainingError(
            f"Training stopped at step {state.global_step + 1}: {what}. {kept}. "
            "Lower training.learning_rate, raise training.warmup_ratio, or use precision fp32."
        )


def training_arguments(settings: TrainingSettings, folder: RunFolder, validated: bool) -> TrainingArguments:
    """Says a recipe's training section in transformers' words; `validated` says whether there are validation rows."""
    every = "epoch" if settings.evaluate_every is None else "steps"
    return TrainingArguments(
        output_dir=str(folder.checkpoints),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        train_sampling_strategy="group_by_length" if settings.group_by_length else "random",
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        use_cpu=settings.precision == "bf16" and not torch.cuda.is_available(),  # bf16 is looked for on GPUs otherwise
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        eval_strategy=every if validated else "no",
        save_strategy=every,
        eval_steps=settings.evaluate_every,
        save_steps=settings.evaluate_every or 500,
        save_total_limit=2,  # the best and the last; with 1, transformers deletes the last when training stops
        load_best_model_at_end=validated,
        metric_for_best_model=settings.metric_for_best if validated else None,
        greater_is_better=settings.metric_for_best not in LOWER_IS_BETTER,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
        dataloader_pin_memory=torch.cuda.is_available(),
        **{CHECKPOINTING: settings.gradient_checkpointing},
    )
