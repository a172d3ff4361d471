"""Trains a recipe, or goes on with a run that was interrupted; evaluates; saves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from transformers import EarlyStoppingCallback, TrainerCallback

from pelton.errors import PeltonError, TrainingError
from pelton.tasks.base import Examples
from pelton.tasks.load import Loaded, load_task
from pelton.training.backbone import quiet
from pelton.training.callbacks import History, ProgressBar, StopBetweenSteps, StopOnNaN
from pelton.training.contributions import Contributions
from pelton.training.features import training_features
from pelton.training.folder import SEARCH, RunFolder, is_main_process, wait_for_main_process
from pelton.training.gate_callbacks import gate_callbacks
from pelton.training.gate_values import record_run_gates
from pelton.training.loading import dump_recipe, load_recipe
from pelton.training.noted import add_notes, missing, require_same_rows
from pelton.training.prepare import JUDGED, Prepared, environment, initialize, prepare
from pelton.training.recipe import Recipe
from pelton.training.run import Run
from pelton.training.trackers import track_gates
from pelton.training.trainer import GatedTrainer
from pelton.training.unfrozen import save_model


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run that can be resumed."""

    def __init__(self, folder: Path) -> None:
        """Keeps the run's folder."""
        super().__init__(f"Interrupted. Go on with: pelton fit --resume {folder}")
        self.folder = folder


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A run that is not worth going on with ends early, unjudged; a callback raises this in `on_train_end`."""


def fit(
    recipe: Recipe, *, progress: bool = False, callbacks: Sequence[TrainerCallback] = (), blind: bool = False
) -> Run:
    """Trains a recipe in a new folder under `recipe.output`.

    Everything that can be wrong with the recipe, the data and the backbone is found before the folder is made.

    Args:
        recipe: What to train.
        progress: Draws a bar on the terminal.
        callbacks: Of your own, beside Pelton's.
        blind: Keeps test rows from the model: it is not judged on them, and no gates are recorded on them.

    Raises:
        PeltonError: see `RecipeError`, `DataError`, `SpecError` and `TrainingError`.
        Interrupted: Ctrl-C; the run can be resumed.
        Stopped: a callback did.
    """
    with quiet():
        prepared = prepare(recipe)
        if blind:
            prepared = replace(prepared, data=prepared.data.without_test())
        spent = initialize(prepared)
        folder = RunFolder.create(Path(recipe.output).expanduser(), recipe.name)
        folder.write_recipe(dump_recipe(prepared.recipe))
        folder.write("task", prepared.data.task.stored())
        folder.write("data", prepared.data.describe())
        folder.write("environment", environment())
        return _complete(folder, prepared, None, spent, progress, callbacks)


def resume(path: Path | str, *, progress: bool = False, callbacks: Sequence[TrainerCallback] = ()) -> Run:
    """Goes on with a run from its last checkpoint, to the result that an uninterrupted run has.

    Raises:
        TrainingError: the folder is not a run, the run is finished, or its rows have changed.
        Interrupted: Ctrl-C again.
    """
    folder = RunFolder.open(Path(path))
    if (folder.path / SEARCH).is_file() and not callbacks:
        raise TrainingError(f"{path} is a search. Go on with: pelton autopelt --resume {path}")
    if folder.phase == "finished":
        raise TrainingError(f"{path} is finished: there is nothing to resume. Start a new run with pelton fit RECIPE.")
    with quiet():
        if folder.phase == "trained":
            run = Run.load(folder.path)
            data = load_task(run.recipe.task, run.recipe.training.seed)
            require_same_rows(folder, data)
            with _noting(folder):
                return _finish(run, data)
        prepared, checkpoint = prepare(load_recipe(folder.recipe)), folder.last_checkpoint()
        require_same_rows(folder, prepared.data)
        spent = initialize(prepared) if checkpoint is None else 0.0
        return _complete(folder, prepared, checkpoint, spent, progress, callbacks)


def _complete(
    folder: RunFolder,
    prepared: Prepared,
    checkpoint: Path | None,
    spent: float,
    progress: bool,
    callbacks: Sequence[TrainerCallback],
) -> Run:
    """Trains and finishes a run, on whose first weights so many seconds were spent already."""
    run = Run(folder, prepared.recipe, prepared.data.task, prepared.processor, prepared.model)
    folder.set_phase("training")
    wait_for_main_process()
    with _noting(folder):
        run = _train(run, prepared.data, checkpoint, spent, progress, callbacks)
        return _finish(run, prepared.data)


@contextmanager
def _noting(folder: RunFolder) -> Iterator[None]:
    """Notes in a run's folder what ended its training early."""
    try:
        yield
    except KeyboardInterrupt as error:
        if folder.phase == "training":
            folder.set_phase("interrupted")
        raise Interrupted(folder.path) from error
    except Stopped:
        folder.set_phase("stopped")
        raise
    except PeltonError:
        if folder.phase == "training":
            folder.set_phase("failed")
        raise


def _train(
    run: Run,
    data: Loaded,
    checkpoint: Path | None,
    spent: float,
    progress: bool,
    callbacks: Sequence[TrainerCallback],
) -> Run:
    """Runs the trainer, lets the task choose what it chooses on validation rows, and saves both."""
    settings, folder = run.recipe.training, run.folder
    examples, held = data.splits.get("train"), data.splits.get("validation")
    features, left_out = training_features(data, run.processor, folder.features, settings.seed)
    add_notes(folder, left_out)
    validation = None if held is None else run.task.judged(held, run.processor)
    if held is not None:
        add_notes(folder, run.task.left_out(held, validation, "validation"))
    trainer = GatedTrainer(
        settings,
        folder,
        None if held is None else partial(run.evaluate, held, validation),
        task=run.task,
        targets=[] if examples is None else examples.targets,
        model=run.model,
        train_dataset=features,
        eval_dataset=validation,
        data_collator=run.task.collator(run.processor),
    )
    stop, bar = StopBetweenSteps(), ProgressBar(Console(stderr=True))
    own = _callbacks(run, trainer, stop, held or examples)
    for callback in [*own, *([bar] if progress and is_main_process() else []), *callbacks]:
        trainer.add_callback(callback)
    started = time.perf_counter() - spent
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        bar.close()
        trainer.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)  # a forward without its autocast
    if not stop.stopped:
        if held is not None and run.task.calibrates:
            run = run.calibrated(held, validation)
        _save(run, trainer, None if examples is None else len(examples), time.perf_counter() - started)
    if stop.asked:
        raise KeyboardInterrupt
    return run


def _callbacks(run: Run, trainer: GatedTrainer, stop: StopBetweenSteps, few: Examples | None) -> list[TrainerCallback]:
    """Returns Pelton's callbacks; `StopOnNaN` comes after `stop`, whose saving it checks."""
    settings = run.recipe.training
    callbacks = [History(trainer.folder.history), stop, StopOnNaN(trainer.diverged)]
    callbacks += gate_callbacks(settings, run.model)
    if settings.contribution_window is not None:
        callbacks.append(Contributions(trainer.folder, settings.contribution_window))
    if settings.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping_patience, settings.early_stopping_min_delta))
    return [*callbacks, *track_gates(run, trainer, few)]


def _save(run: Run, trainer: GatedTrainer, examples: int | None, seconds: float) -> None:
    """Saves the trained weights and what is known of the training; from here on only evaluation is missing."""
    if is_main_process():
        _save_weights(run)
    parameters = [(p.numel(), p.requires_grad) for p in run.model.parameters()]
    trainable, total = sum(n for n, learns in parameters if learns), sum(n for n, _ in parameters)
    values = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "best_step": trainer.state.best_global_step,
        "train_examples": examples,
        "train_features": None if examples is None else len(trainer.train_dataset),  # nobody counts a stream
        "train_seconds": round(seconds, 1),
        "parameters": {"trainable": trainable, "total": total, "share": trainable / total},
    }
    if trainer.pruner is not None:
        values["pruning"] = trainer.pruner.told(trainer.state.log_history)
    run.folder.write("metrics", values)
    run.folder.set_phase("trained")
    wait_for_main_process()


def _save_weights(run: Run) -> None:
    if run.recipe.training.train_backbone:
        save_model(run.model, run.folder.model)
    run.model.save_pretrained(run.folder.adapter if isinstance(run.model, PeftModel) else run.folder.model)
    if run.folder.model.is_dir() and hasattr(run.processor, "save_pretrained"):
        run.processor.save_pretrained(run.folder.model)  # so that the folder is a backbone


def _finish(run: Run, data: Loaded) -> Run:
    """Evaluates a trained run, and records its gates."""
    metrics = run.folder.read("metrics")
    for split in JUDGED:
        if split in data.splits:
            examples = data.splits[split]
            features = run.task.judged(examples, run.processor)
            metrics[split] = run.evaluate(examples, features)
            add_notes(run.folder, [*run.task.left_out(examples, features, split), *missing(split, metrics[split])])
    run.folder.write("metrics", metrics)
    if isinstance(run.model, PeftModel) and is_main_process():
        record_run_gates(run, data.some())
    run.folder.set_phase("finished")
    return run
