"""transformers' Trainer with groups of parameters, that stops on a loss which is no number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerState

from pelton.errors import TrainingError
from pelton.tasks.base import Task
from pelton.training.anchor import make_anchor
from pelton.training.arguments import one_device, training_arguments
from pelton.training.batching import EachEpoch, TokenBatches, make_sampler
from pelton.training.folder import RunFolder
from pelton.training.language import Smoother, divides_by_tokens
from pelton.training.losses import make_loss
from pelton.training.optimizer import make_optimizer, parameter_groups, trained_groups
from pelton.training.pruning import Pruner
from pelton.training.recipe import TrainingSettings
from pelton.training.trackers import log_into
from pelton.training.unfrozen import load_weights, load_whole, save_weights
from pelton.tuner.controls import gate_penalty
from pelton.tuner.penalise import share_of_step

Judge = Callable[[], dict[str, float]]


class GatedTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for a Pelton adapter, or for the whole backbone."""

    control: Any

    def __init__(
        self,
        settings: TrainingSettings,
        folder: RunFolder,
        judge: Judge | None,
        *,
        task: Task[Any],
        targets: Sequence[Any],
        **options: Any,
    ) -> None:
        """Makes the trainer.

        Args:
            settings: The recipe's.
            folder: The run's.
            judge: Computes the validation metrics of the model; None where there are no validation rows.
            task: What is learned.
            targets: Of the training examples; empty where they are streamed.
            **options: Go to transformers.
        """
        super().__init__(args=one_device(training_arguments(settings, folder, judge is not None)), **options)
        self.settings = settings
        self.folder = folder
        self.judge = judge
        # A classifier averages its loss over a batch whatever it is told: the trainer averages accumulated batches.
        # A language model is told how many tokens the accumulated batches have, and most divide by these.
        self.model_accepts_loss_kwargs = task.loss_counts_tokens and divides_by_tokens(self.model)
        self.remove_callback(PrinterCallback)
        log_into(self, folder.logs)
        self.new_head = task.new_head
        self.criterion = make_loss(settings.loss, task, targets)
        if settings.loss.label_smoothing and self.criterion is None:
            shifts = task.peft_type == "CAUSAL_LM"
            self.label_smoother: Any = Smoother(settings.loss.label_smoothing, shifts=shifts)
        self.anchor = make_anchor(trained_groups(self.model, task.new_head), settings.l2_sp, settings.l2_head)
        self.sampler = make_sampler(settings, self.train_dataset, targets, self.accelerator.num_processes)
        if self.sampler is not None:
            self.add_callback(EachEpoch(self.sampler.generator, settings.seed))
        self.pruner = None if settings.pruning is None else Pruner(settings.pruning, self.model, self.note)
        if self.pruner is not None:
            self.add_callback(self.pruner)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes AdamW over the groups of `parameter_groups`."""
        if self.optimizer is None:
            self.optimizer: Any = make_optimizer(parameter_groups(model or self.model, self.settings, self.new_head))
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Makes the batches; those of a token budget have no fixed size, and are shared out whole."""
        if not isinstance(self.sampler, TokenBatches):
            return super().get_train_dataloader()  # type: ignore[no-any-return]
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Returns the recipe's sampler, or transformers' own."""
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the loss of a batch: the task's or the recipe's, gate penalties, and L2-SP."""
        # A loss that is divided by all accumulated tokens is a share of the step's: so must be what is added to it.
        total = num_items_in_batch if self.model_accepts_loss_kwargs else None
        share = share_of_step(self.model, inputs.get("labels"), total)
        if total is not None:  # counted over all processes, whose gradients are then averaged
            share = share * self.accelerator.num_processes
        with gate_penalty(model) as penalty:
            if self.criterion is None:
                loss, outputs = super().compute_loss(model, self._with_decoder(inputs), True, num_items_in_batch)
            else:
                outputs = model(**inputs)
                loss = self.criterion(outputs["logits"], inputs["labels"]) * share
        extra = penalty().to(loss.device)
        if self.anchor is not None:
            extra = extra + self.anchor()
        loss = loss + extra * share
        return (loss, outputs) if return_outputs else loss

    def _with_decoder(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Adds the decoder's inputs, which an encoder-decoder makes of the labels that the smoother takes away."""
        make = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if self.label_smoother is None or make is None or "decoder_input_ids" in inputs:
            return inputs
        return {**inputs, "decoder_input_ids": make(labels=inputs["labels"])}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Saves a checkpoint's weights; those of a backbone that learns beside its adapter, too."""
        super()._save(output_dir, state_dict)
        if self.settings.train_backbone and self.args.should_save:
            save_weights(self.model, Path(output_dir or self.args.output_dir))
        if self.pruner is not None and self.args.should_save:
            self.pruner.save(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Reads a checkpoint's weights, likewise."""
        if self.pruner is not None:  # what is gone has no place in the weights, nor in the optimizer's state
            self.pruner.restore(Path(resume_from_checkpoint), self.create_optimizer())
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_backbone(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Reads the best checkpoint's weights, likewise."""
        super()._load_best_model()
        self._load_backbone(Path(str(self.state.best_model_checkpoint)))

    def _load_backbone(self, checkpoint: Path) -> None:
        """Reads what transformers' trainer does not, or does by names that files need not have."""
        if self.settings.train_backbone:
            load_weights(self.model, checkpoint)
        elif isinstance(self.model, PreTrainedModel):
            load_whole(self.model, checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Lets no checkpoint be the best before the last methods are gone: what is kept is what was asked for."""
        if self.pruner is not None and not self.pruner.done(self.state.global_step):
            return False
        return bool(super()._determine_best_metric(metrics, trial))

    def note(self, entry: dict[str, Any]) -> None:
        """Adds an entry to the history; its numbers go to the trackers, too."""
        step = {"epoch": self.state.epoch, "step": self.state.global_step}
        self.state.log_history.append({**entry, **step})
        numbers = {key: value for key, value in entry.items() if isinstance(value, int | float)}
        wanted = self.control.should_log
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, numbers)
        self.control.should_log = wanted

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Judges the model on the validation rows as the task does, and logs it.

        Raises:
            TrainingError: the model's outputs are no numbers, or there are no validation rows.
        """
        if self.judge is None:
            raise TrainingError("There are no validation rows to evaluate on. Raise task.validation_fraction.")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._judged(self.judge).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _judged(self, judge: Judge) -> dict[str, float]:
        """Judges; finite weights can give outputs that are no numbers, and metrics make anything of these.

        A metric that the rows themselves cannot give is NaN too, and no reason to stop.
        """
        what = "the model's outputs on the validation rows are no numbers"
        with _no_numbers(self.model) as found:
            try:
                values = judge()
            except ValueError as error:  # scikit-learn's
                if found:
                    raise self.diverged(self.state, what) from error
                raise
        if math.isinf(values.get("loss", 0.0)) or (found and not all(map(math.isfinite, values.values()))):
            raise self.diverged(self.state, what)
        return values

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


@contextmanager
def _no_numbers(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects a model's logits that are no numbers; minus infinity is one: it stands for what is ruled out."""
    found: list[Tensor] = []

    def look(_: nn.Module, __: Any, outputs: Any) -> None:
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if isinstance(logits, Tensor) and not found and bool((logits.isnan() | logits.isposinf()).any()):
            found.append(logits)

    hook = model.register_forward_hook(look)
    try:
        yield found
    finally:
        hook.remove()
