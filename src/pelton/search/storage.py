"""Where a study's trials are, and which of their workers are dead.

A trial that runs when its worker dies stays "running" for ever. It is found

- in a study's own SQLite file by locks: each worker holds a file, which the system lets go of however the worker ends;
- in any other database by heartbeats, which Optuna records and compares by the database's clock.

Between the moment a trial is made and the one its worker is written on it, a trial has no worker; such a one counts as
dead when it is old enough. A worker that was taken for dead and is not finds its trial ended, and its result dropped,
so that none is counted twice.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from pelton.search.patient import PatientStorage, connect

HEARTBEAT = 30
GRACE = 120
ORPHAN = 20.0
"""Seconds after which a trial without a worker counts as dead, where locks tell who lives."""
WORKER = "worker"


class Life(Protocol):
    """How workers show that they live."""

    def show(self, trial: optuna.Trial) -> AbstractContextManager[None]:
        """Shows that a trial's worker lives, for as long as the context is entered."""

    def fail_stale(self, study: optuna.Study) -> None:
        """Fails trials that need no closer look."""

    def is_dead(self, worker: str | None, age: timedelta) -> bool:
        """Tells whether a running trial's worker is dead; one without a worker is told by its age."""

    def end(self) -> None:
        """Stops showing that this worker lives."""


class Storage:
    """A study's storage, as one worker sees it."""

    def __init__(self, url: str, *, locks: Path | None = None, heartbeat: int = HEARTBEAT, grace: int = GRACE) -> None:
        """Connects.

        Args:
            url: SQLAlchemy's.
            locks: A folder for the locks of workers; without one they are known by heartbeats.
            heartbeat: Seconds between two.
            grace: Seconds after the last, when a worker counts as dead.

        Raises:
            StudyError: the URL is none, its driver is not installed, or nobody answers there.
        """
        self.worker = uuid.uuid4().hex
        beats = {"heartbeat_interval": heartbeat, "grace_period": grace} if locks is None else {}
        self.optuna = connect(url, **beats)
        self.life: Life = Heartbeats(self.optuna, heartbeat, grace) if locks is None else Locks(locks, self.worker)

    def close(self) -> None:
        """Lets go of the database, and shows no more that this worker lives."""
        self.life.end()
        self.optuna.remove_session()
        self.optuna.engine.dispose()

    @contextmanager
    def claim(self, trial: optuna.Trial) -> Iterator[None]:
        """Writes this worker on a trial, and shows that it lives."""
        with self.life.show(trial):  # first: whoever is written on a trial has shown that it lives
            trial.set_user_attr(WORKER, {"trial": trial.number, "id": self.worker})
            yield

    def fail_dead(self, study: optuna.Study) -> None:
        """Fails the running trials whose workers are dead."""
        self.life.fail_stale(study)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            age = datetime.now() - (trial.datetime_start or datetime.now())
            if self.life.is_dead(_worker_of(trial), age):
                with suppress(UpdateFinishedTrialError):
                    self.optuna.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def _worker_of(trial: FrozenTrial) -> str | None:
    """Returns the worker that is written on a trial; a retry inherits what was written on the try before."""
    owner = trial.user_attrs.get(WORKER)
    return str(owner["id"]) if owner is not None and owner["trial"] == trial.number else None


class Heartbeats:
    """A trial's worker writes to the database at intervals."""

    def __init__(self, storage: PatientStorage, interval: int, grace: int) -> None:
        """Takes the seconds between two, and those after which a worker counts as dead."""
        self.storage, self.interval, self.grace = storage, interval, timedelta(seconds=grace)

    @contextmanager
    def show(self, trial: optuna.Trial) -> Iterator[None]:
        """Writes from a thread of its own."""
        stop, trial_id = threading.Event(), trial._trial_id
        self.storage.record_heartbeat(trial_id)
        thread = threading.Thread(target=self._beat, args=(trial_id, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _beat(self, trial_id: int, stop: threading.Event) -> None:
        while not stop.wait(self.interval):
            self.storage.record_heartbeat(trial_id)
        self.storage.remove_session()

    def fail_stale(self, study: optuna.Study) -> None:
        """Fails the trials whose last heartbeat is too old."""
        optuna.storages.fail_stale_trials(study)

    def is_dead(self, worker: str | None, age: timedelta) -> bool:
        """Trials with a worker have heartbeats, and are told by these."""
        return worker is None and age > self.grace

    def end(self) -> None:
        """Nothing is left: each trial's heartbeats end with it."""


class Locks:
    """A worker holds a lock file for as long as it lives."""

    def __init__(self, folder: Path, worker: str) -> None:
        """Makes the lock; it gets its name when it is held, so that nobody sees it free."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / f"{worker}.lock"
        draft = folder / f"{worker}.new"
        self.lock = FileLock(draft)
        self.lock.acquire()
        draft.rename(self.path)

    @contextmanager
    def show(self, trial: optuna.Trial) -> Iterator[None]:
        """The lock is held anyway."""
        yield

    def fail_stale(self, study: optuna.Study) -> None:
        """Removes the locks of dead workers; their trials are told by these."""
        for path in self.folder.glob("*.lock"):
            if path != self.path and not _is_held(path):
                path.unlink(missing_ok=True)

    def is_dead(self, worker: str | None, age: timedelta) -> bool:
        """A worker without a lock is dead; where nobody else has one, every running trial's is."""
        living = {path.stem for path in self.folder.glob("*.lock")}
        if worker is not None:
            return worker not in living
        return len(living) == 1 or age > timedelta(seconds=ORPHAN)

    def end(self) -> None:
        """Lets go of the lock."""
        self.path.unlink(missing_ok=True)
        self.lock.release()


def _is_held(path: Path) -> bool:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # another worker removed it first
        return False
    lock.release()
    return False
