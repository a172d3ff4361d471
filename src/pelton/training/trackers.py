"""TensorBoard, Weights & Biases and MLflow: losses and scores by transformers' own callbacks, gates by one of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from pelton.gates.recording import record_gates
from pelton.tasks.base import Examples
from pelton.training.optimizer import gate_parameters

if TYPE_CHECKING:
    from pelton.training.run import Run

EXAMPLES = 64

Values = Mapping[str, NDArray[Any]]


class TrackGates(TrainerCallback):  # type: ignore[misc]
    """Tells the trackers, after each evaluation, how open every method is in every block on a few examples.

    Where there are no validation rows it does so with each checkpoint.
    """

    def __init__(self, trainer: Trainer, run: Run, features: Any) -> None:
        """Finds the trainer's trackers; `features` are what the run's gates are recorded on."""
        self.trackers = list(trainer.callback_handler.callbacks)
        self.run, self.features = run, features

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Reports."""
        self._report(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Reports, where nothing is evaluated."""
        if args.eval_strategy == "no":
            self._report(state)

    def _report(self, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        with record_gates(self.run.model) as log:
            self.run.forward(self.features)
        frame = log.to_frame()
        values = {
            f"gates/{block}/{method}": part.to_numpy()
            for (block, method), part in frame.groupby(["block", "method"], sort=False)["value"]
        }
        for tracker in self.trackers:
            for kind, report in REPORTS.items():
                if isinstance(tracker, kind):
                    report(tracker, values, state.global_step)


def _to_tensorboard(tracker: Any, values: Values, step: int) -> None:
    for name, each in values.items():
        tracker.tb_writer.add_histogram(name, each, step)
    tracker.tb_writer.flush()


def _to_wandb(tracker: Any, values: Values, step: int) -> None:
    wandb = tracker._wandb  # the module, as transformers has imported it
    wandb.log({**{name: wandb.Histogram(each) for name, each in values.items()}, "train/global_step": step})


def _to_mlflow(tracker: Any, values: Values, step: int) -> None:
    tracker._ml_flow.log_metrics({name: float(each.mean()) for name, each in values.items()}, step=step)


REPORTS: dict[type, Callable[[Any, Values, int], None]] = {
    TensorBoardCallback: _to_tensorboard,
    WandbCallback: _to_wandb,
    MLflowCallback: _to_mlflow,
}
"""How each tracker takes histograms; MLflow knows numbers only, and gets their means."""


def log_into(trainer: Trainer, folder: Path) -> None:
    """Has TensorBoard write into a run's folder."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(folder)


def track_gates(run: Run, trainer: Trainer, examples: Examples | None) -> list[TrainerCallback]:
    """Returns the callback that reports gates on the first of some examples, where there are gates that learn."""
    if not (run.recipe.training.trackers and examples is not None and gate_parameters(run.model)):
        return []
    few = examples.take(range(min(len(examples), EXAMPLES)))
    return [TrackGates(trainer, run, run.task.judged(few, run.processor))]
