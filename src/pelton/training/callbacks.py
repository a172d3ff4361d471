"""What happens beside a training step: a history, a bar, a clean stop."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pelton.errors import TrainingError

Diverged = Callable[[TrainerState, str], TrainingError]


class StopOnNaN(TrainerCallback):  # type: ignore[misc]
    """Refuses to save weights that are no numbers, so that every checkpoint is a good one.

    A loss that is no number is caught by the trainer before its step; weights can still overflow in a step.
    """

    def __init__(self, diverged: Diverged) -> None:
        """Takes the function that makes the error from the trainer's state and what is wrong."""
        self.diverged = diverged

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Checks the weights when they are about to be saved."""
        if control.should_save:
            self._check(state, model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Checks the weights before they are evaluated and saved."""
        self._check(state, model)

    def _check(self, state: TrainerState, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise self.diverged(state, f"the weights of {name} are no numbers")


class History(TrainerCallback):  # type: ignore[misc]
    """Writes what the trainer logs, one JSON object a line; a resumed run goes on where its checkpoint was."""

    def __init__(self, path: Path) -> None:
        """Writes to `path`."""
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the file with what the checkpoint remembers: nothing, in a new run."""
        if state.is_world_process_zero:
            self._write("w", state.log_history)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Adds the newest entry."""
        if state.is_world_process_zero:
            self._write("a", state.log_history[-1:])

    def _write(self, mode: str, entries: list[dict[str, Any]]) -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """One bar for the whole training, with the last loss and score; nothing where there is no terminal."""

    def __init__(self, console: Console) -> None:
        """Draws on `console`."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(
            *columns, TextColumn("{task.fields[scores]}"), console=console, disable=not console.is_terminal
        )
        self.task: TaskID | None = None
        self.scores: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the bar at the step that training starts from."""
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, scores="")
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Moves the bar."""
        if self.task is not None:
            epoch = f"epoch {state.epoch or 0:.1f}/{state.num_train_epochs}"
            self.bar.update(self.task, completed=state.global_step, description=epoch)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        """Shows the newest loss and validation score."""
        shown = {"loss": "loss", "eval_accuracy": "validation accuracy"}
        self.scores |= {name: logs[key] for key, name in shown.items() if key in logs}
        if self.task is not None:
            self.bar.update(self.task, scores="  ".join(f"{name} {value:.3f}" for name, value in self.scores.items()))

    def close(self) -> None:
        """Leaves the bar as it is, also after an error."""
        self.bar.stop()


class StopBetweenSteps(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C ends training after the running step, with a checkpoint from which it goes on exactly.

    A second Ctrl-C ends it at once; the run then goes on from its last checkpoint.
    """

    def __init__(self) -> None:
        """Starts unasked."""
        self.asked = False
        self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes over Ctrl-C (in the main thread, the only one that may) and gives it back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Saves and stops inside an epoch; where one ends, `on_save` stops after its evaluation."""
        ends = float(state.epoch or 0.0).is_integer() or state.global_step >= state.max_steps
        if self.asked and not ends:
            control.should_save = control.should_training_stop = self.stopped = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leaves out the evaluation of an epoch that was cut short: an uninterrupted run has none there."""
        if self.stopped:
            control.should_evaluate = control.should_save = control.should_log = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stops after an epoch, unless training ends there anyway."""
        if self.asked and not control.should_training_stop and state.global_step < state.max_steps:
            control.should_training_stop = self.stopped = True
