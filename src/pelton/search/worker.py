"""Runs a study's trials, one after another, together with any number of other workers on the same storage.

Nothing is remembered here: before each trial the storage is counted anew. So it does not matter when a worker is
killed, how many there are, or when they come and go.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from pelton.errors import StudyError
from pelton.search.census import REASON, SURPLUS, Census, Lineage, root_of
from pelton.search.patient import StorageAway
from pelton.search.storage import Storage

Objective = Callable[[optuna.Trial, int], Sequence[float]]
"""Trains a trial and returns its values; the number says which of the study's trials it is, from 0."""
Told = Callable[[Lineage], None]

POLL = 1.0
"""Seconds between two looks at what other workers do."""
HOPELESS = 5
"""So many failures without any success end a study."""


class StopTrial(Exception):  # noqa: N818 - nothing went wrong
    """A trial is not worth going on with: it fell behind, or costs more than it may."""


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silences Optuna's log, and its warnings about what is experimental."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            warnings.filterwarnings("ignore", "Heartbeat of storage is supposed")
            warnings.filterwarnings("ignore", "The constraint value is ignored")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


class Worker:
    """One process at work on a study."""

    def __init__(self, study: optuna.Study, storage: Storage, objective: Objective, told: Told) -> None:
        """Takes what it works on.

        Args:
            study: Of Optuna.
            storage: The study's.
            objective: Trains a trial.
            told: Is given each trial that this worker ends.
        """
        self.study, self.storage, self.objective, self.told = study, storage, objective, told

    def work(self, trials: int | None = None, deadline: float = math.inf) -> None:
        """Works until the study has so many trials, all of them ended, or time is up.

        A trial that is running when time is up is trained to its end.

        Args:
            trials: Of the study, over all workers.
            deadline: On `time.monotonic`, after which no trial begins.

        Raises:
            StorageAway: the database went away and did not come back.
            StudyError: trial after trial failed.
            KeyboardInterrupt: the running trial is tried again when the study goes on.
        """
        with quiet_optuna():
            while time.monotonic() < deadline:
                census = self.recover()
                _require_hope(census)
                if trials is None or len(census.lineages) < trials or census.in_state("waiting"):
                    self.attempt(trials)
                elif census.in_state("running", "lost"):
                    time.sleep(POLL)
                else:
                    return

    def recover(self) -> Census:
        """Fails the trials of dead workers and queues them again; returns what the study then has."""
        self.storage.fail_dead(self.study)
        retry = RetryHeartbeatStaleTrialCallback()
        lost = Census.of(self.study.get_trials(deepcopy=False)).in_state("lost")
        for lineage in lost:
            retry(self.study, copy.deepcopy(lineage.last))
        return Census.of(self.study.get_trials(deepcopy=False))

    def attempt(self, trials: int | None) -> None:
        """Trains the next trial."""
        trial = self.study.ask()
        with self.storage.claim(trial):
            census = Census.of(self.study.get_trials(deepcopy=False))
            place = census.place(_frozen(self.study, trial))
            if place is None or (trials is not None and place >= trials):
                trial.set_user_attr(SURPLUS, True)
                self._tell(trial, None, TrialState.FAIL)
                return
            values, state = self._outcome(trial, place)
            self._tell(trial, values, state)
        root = root_of(_frozen(self.study, trial))
        after = Census.of(self.study.get_trials(deepcopy=False))
        for lineage in after.lineages:
            if lineage.root == root:
                self.told(lineage)

    def _outcome(self, trial: optuna.Trial, place: int) -> tuple[Sequence[float] | None, TrialState]:
        """Runs the objective; what goes wrong in it fails the trial, and not the study."""
        try:
            values = self.objective(trial, place)
            if all(math.isfinite(value) for value in values):
                return values, TrialState.COMPLETE
            reason = f"its values are no numbers: {', '.join(f'{value:g}' for value in values)}"
        except StopTrial as stop:
            trial.set_user_attr(REASON, str(stop))
            return None, TrialState.PRUNED
        except (StorageAway, StorageInternalError, SQLAlchemyError):  # not the trial's fault: it is tried again
            raise
        except KeyboardInterrupt:
            self._tell(trial, None, TrialState.FAIL)  # without a reason: it is tried again
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        trial.set_user_attr(REASON, reason)
        return None, TrialState.FAIL

    def _tell(self, trial: optuna.Trial, values: Sequence[float] | None, state: TrialState) -> None:
        """Ends a trial, unless it has been ended by a worker that took this one for dead."""
        with suppress(UpdateFinishedTrialError):
            self.study.tell(trial, values, state, skip_if_finished=True)


def _frozen(study: optuna.Study, trial: optuna.Trial) -> FrozenTrial:
    return next(one for one in study.get_trials(deepcopy=False) if one.number == trial.number)


def _require_hope(census: Census) -> None:
    failed = census.in_state("failed")
    if len(failed) >= HOPELESS and not census.in_state("finished", "stopped", "running"):
        raise StudyError(
            f"{len(failed)} trials of the study failed, and no other one finished. Trial {failed[-1].root}: "
            f"{failed[-1].reason.rstrip('.')}. Change the recipe or the space, and give the study another --name."
        )
