"""Where a study's trials are: an Optuna storage that waits while its database is away, and that knows dead workers.

A trial that runs when its worker dies stays "running" for ever. It is found

- in a study's own SQLite file by locks: each worker holds a file that the system lets go of when it ends, however it ends;
- in any other database by heartbeats, which Optuna records and compares by the database's clock.

Between the moment a trial is made and the one its worker is written on it, a trial has no worker; such a one counts as
dead when it is old enough. A worker that was taken for dead and is not finds its trial finished, and its result is
dropped: no trial is counted twice.
"""

from __future__ import annotations

import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError, SQLAlchemyError

from pelton.errors import StudyError

PATIENCE = 120.0
"""Seconds in which a database that went away may come back."""
OPENING = 15.0
"""Seconds in which it may come up first."""
HEARTBEAT = 30
GRACE = 120
ORPHAN = 20.0
"""Seconds after which a trial without a worker counts as dead, where locks tell who lives."""
WORKER = "worker"

INNER = ("_create_new_trial", "_set_trial_param", "_get_trials", "_get_best_trial_id")
"""What Optuna's cache calls beside the public methods."""


class StorageAway(StudyError):
    """A database cannot be reached; what is finished is in it."""


class PatientStorage(RDBStorage):
    """Optuna's storage, whose every operation is tried again while the database cannot be reached."""

    def __init__(self, url: str, patience: float, **options: Any) -> None:
        """Connects.

        Args:
            url: SQLAlchemy's.
            patience: Seconds.
            **options: Go to Optuna.
        """
        self.patience = patience
        self.depth = threading.local()
        super().__init__(url, **options)

    def record_heartbeat(self, trial_id: int) -> None:
        """Records that a trial's worker lives; one that is missed while the database is away does not matter."""
        with suppress(StorageInternalError, SQLAlchemyError):
            super().record_heartbeat(trial_id)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        """Ends or begins a trial; one that an attempt cut off in the middle has ended already counts."""
        tries = 0

        def attempt() -> bool:
            nonlocal tries
            tries += 1
            try:
                return RDBStorage.set_trial_state_values(self, trial_id, state, values)
            except UpdateFinishedTrialError:
                if tries > 1 and self.get_trial(trial_id).state == state:
                    return True
                raise

        return bool(self.patiently(attempt))

    def patiently(self, act: Callable[[], Any]) -> Any:
        """Does something, again and again while the database is away.

        Raises:
            StorageAway: it did not come back.
        """
        if getattr(self.depth, "inside", False):
            return act()
        self.depth.inside = True
        try:
            return _patiently(act, self.patience, shown(self.url))
        finally:
            self.depth.inside = False


def _patient(name: str) -> Callable[..., Any]:
    original = getattr(RDBStorage, name)

    @wraps(original)
    def method(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        return self.patiently(lambda: original(self, *args, **kwargs))

    return method


for _name in {*BaseStorage.__abstractmethods__, *BaseHeartbeat.__abstractmethods__, *INNER} - set(vars(PatientStorage)):
    setattr(PatientStorage, _name, _patient(_name))


def is_away(error: BaseException) -> bool:
    """Tells whether an error means that the database cannot be reached now, or is busy."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    gone = isinstance(cause, DBAPIError) and cause.connection_invalidated
    return gone or isinstance(cause, OperationalError | InterfaceError)


def _patiently(act: Callable[[], Any], patience: float, name: str, passing: Callable[[Any], bool] = is_away) -> Any:
    started, pause = time.monotonic(), 0.05
    while True:
        try:
            return act()
        except (StorageInternalError, SQLAlchemyError) as error:
            if not passing(error):
                raise
            if time.monotonic() - started > patience:
                reason = str(error.__cause__ or error).splitlines()[0]
                raise StorageAway(
                    f"The storage {name} could not be reached for {patience:g} seconds ({reason}). Every finished "
                    "trial is in it: when it is back, go on with pelton search --resume FOLDER."
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


def shown(url: str) -> str:
    """Returns a storage's URL without its password."""
    return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)


def has_password(url: str) -> bool:
    """Tells whether a URL holds a password, which is then not written anywhere."""
    return sqlalchemy.engine.make_url(url).password is not None


class Storage:
    """A study's storage and this worker's life in it."""

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
        self.locks, self.grace = locks, grace
        self.worker = uuid.uuid4().hex
        beats = {} if locks is not None else {"heartbeat_interval": heartbeat, "grace_period": grace}
        self.optuna = _connect(url, beats)
        self._lock = None if locks is None else FileLock(locks / f"{self.worker}.lock")
        if locks is not None and self._lock is not None:
            locks.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()

    def close(self) -> None:
        """Lets go of the database, and of the worker's lock."""
        self.optuna.remove_session()
        self.optuna.engine.dispose()
        if self._lock is not None:
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)

    @contextmanager
    def claim(self, trial: optuna.Trial) -> Iterator[None]:
        """Writes this worker on a trial, and shows that it lives."""
        if self.locks is None:
            self.optuna.record_heartbeat(trial._trial_id)  # first: whoever is written on a trial has a heartbeat
        trial.set_user_attr(WORKER, {"trial": trial.number, "id": self.worker})
        stop = threading.Event()
        thread = threading.Thread(target=self._beat, args=(trial._trial_id, stop), daemon=True)
        if self.locks is None:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            if self.locks is None:
                thread.join()

    def _beat(self, trial_id: int, stop: threading.Event) -> None:
        while not stop.wait(self.optuna.heartbeat_interval):
            self.optuna.record_heartbeat(trial_id)
        self.optuna.remove_session()

    def fail_dead(self, study: optuna.Study) -> None:
        """Fails the running trials whose workers are dead."""
        if self.locks is None:
            optuna.storages.fail_stale_trials(study)
        dead = self._dead_workers()
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._is_dead(trial, dead):
                with suppress(UpdateFinishedTrialError):
                    self.optuna.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _is_dead(self, trial: FrozenTrial, dead: set[str] | None) -> bool:
        owner = trial.user_attrs.get(WORKER)
        owner = owner["id"] if owner is not None and owner["trial"] == trial.number else None
        if owner is not None:
            return dead is not None and owner != self.worker and owner not in self._living()
        age = datetime.now() - (trial.datetime_start or datetime.now())
        alone = dead is not None and not self._living()
        return alone or age > timedelta(seconds=self.grace if dead is None else ORPHAN)

    def _dead_workers(self) -> set[str] | None:
        """Removes the locks of dead workers; None where there are no locks."""
        if self.locks is None:
            return None
        dead = set()
        for path in self.locks.glob("*.lock"):
            if path.stem != self.worker and not _is_held(path):
                dead.add(path.stem)
                path.unlink(missing_ok=True)
        return dead

    def _living(self) -> set[str]:
        """Returns the other workers that hold their locks."""
        assert self.locks is not None
        return {path.stem for path in self.locks.glob("*.lock") if path.stem != self.worker}


def _is_held(path: Path) -> bool:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _connect(url: str, beats: dict[str, int]) -> PatientStorage:
    try:
        name = shown(url)
    except ArgumentError as error:
        raise StudyError(
            f"The storage {url!r} is no URL of a database. Expected such as postgresql://user@host/name."
        ) from error
    wait = {"timeout": 60} if url.startswith("sqlite") else {"connect_timeout": 10}
    options: dict[str, Any] = {"engine_kwargs": {"pool_pre_ping": True}}
    if url.startswith(("sqlite", "postgresql", "mysql")):
        options["engine_kwargs"]["connect_args"] = wait
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Workers that begin together make the tables together: all but one are told that they exist.
            return _patiently(lambda: PatientStorage(url, PATIENCE, **options, **beats), OPENING, name, lambda _: True)
    except NoSuchModuleError as error:
        raise StudyError(f"The storage {name} is of an unknown kind ({error}). Known: sqlite, postgresql, mysql.") from error
    except ImportError as error:
        driver = "psycopg2-binary" if url.startswith("postgresql") else "the driver that its URL names"
        raise StudyError(f"The storage {name} needs a driver that is not installed: pip install {driver}.") from error
