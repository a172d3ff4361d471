"""A recipe's training section in transformers' words."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from transformers import TrainingArguments

from pelton.tasks.base import LOWER_IS_BETTER
from pelton.training.folder import RunFolder
from pelton.training.recipe import TrainingSettings

# transformers 5.23 renamed the argument and warns about the old name; 5.20 has only that.
CHECKPOINTING = next(
    field.name
    for field in dataclasses.fields(TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)


def training_arguments(settings: TrainingSettings, folder: RunFolder, validated: bool) -> TrainingArguments:
    """Says a recipe's training section in transformers' words; `validated` says whether there are validation rows."""
    every = "epoch" if settings.evaluate_every is None else "steps"
    return TrainingArguments(
        output_dir=str(folder.checkpoints),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=settings.warmup_ratio,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        # Without it CPUs do not share a run, and bf16 is looked for on GPUs.
        use_cpu=not torch.accelerator.is_available()
        or (settings.precision == "bf16" and not torch.cuda.is_available()),
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
        report_to=list(settings.trackers),
        run_name=folder.path.name,
        log_level="error",
        dataloader_pin_memory=torch.cuda.is_available(),
        **{CHECKPOINTING: settings.gradient_checkpointing},
    )


def one_device(arguments: TrainingArguments) -> TrainingArguments:
    """Has a process use one GPU: transformers would wrap the model in nn.DataParallel, which hooks do not survive."""
    if arguments.n_gpu > 1:
        warnings.warn(
            f"Of {arguments.n_gpu} GPUs one is used. To use all, start one process for each with torchrun "
            "--nproc-per-node=N -m pelton fit …",
            stacklevel=2,
        )
        arguments._n_gpu = 1
    return arguments
