"""A study whose trials cost nothing, for tests of what happens to its workers, and processes that work on it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import alembic.command  # noqa: F401 - what each process would import when it connects
import optuna

from pelton.search.plan import StudyPlan
from pelton.search.space import Range, Space
from pelton.search.study import Study
from pelton.search.worker import StopTrial
from pelton.training.loading import parse_recipe

KEY = "training.learning_rate"


def cheap_plan(**changes: Any) -> StudyPlan:
    """Returns a plan whose recipe is never trained."""
    recipe = parse_recipe({"name": "cheap", "backbone": "none", "task": {"data": "none"}}, "test")
    return StudyPlan(recipe, Space({KEY: Range(1e-4, 1e-2, log=True)}), **changes)


def value_of(x: float) -> float:
    """What a trial gives: best at 1e-3."""
    return -abs(x - 1e-3)


@dataclass(frozen=True)
class Cheap:
    """Sleeps instead of training.

    Attributes:
        seconds: How long at most.
        log: Gets a line when a trial begins: its number, and the process.
    """

    seconds: float
    log: str | None = None

    def __call__(self, trial: optuna.Trial, place: int) -> list[float]:
        x = trial.suggest_float(KEY, 1e-4, 1e-2, log=True)
        if self.log is not None:
            with Path(self.log).open("a", encoding="utf-8") as file:
                file.write(f"{trial.number} {os.getpid()}\n")
        time.sleep((0.5 + 0.5 * random.Random(trial.number).random()) * self.seconds)
        trial.report(value_of(x), 1)
        if place % 5 == 4:
            raise StopTrial("it was behind")
        return [value_of(x)]


def work(folder: str, trials: int, objective: Any, storage: str | None = None, grace: int | None = None) -> None:
    """Works on a study, in a process of its own."""
    study = Study.open(folder, storage=storage)
    if grace is not None:
        study.heartbeat, study.grace = 1, grace
    study.run(trials, objective=objective)


def start(*arguments: Any, **options: Any) -> BaseProcess:
    """Starts a process that works; only the first one of all imports anything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cheap", "pelton.search.trial"])
    process = context.Process(target=work, args=arguments, kwargs=options)
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """Kills a process as nothing can be caught."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def ended(study: Study) -> dict[int, tuple[str, list[float] | None]]:
    """Returns the state and the values of the trials that have ended, by number."""
    done = [lineage for lineage in study.trials() if lineage.state in ("finished", "stopped", "failed")]
    return {lineage.root: (lineage.state, lineage.last.values) for lineage in done}
