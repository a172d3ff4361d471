"""An Optuna storage that waits while its database is away."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from pelton.errors import StudyError

PATIENCE = 120.0
"""Seconds in which a database that went away may come back."""
OPENING = 15.0
"""Seconds in which it may come up first."""
TRIES = 4
"""At least so many: where much else runs, one try alone may take longer than all of these seconds."""
_CHECKED: set[str] = set()
"""Databases whose tables this process has found to be those of this version of Optuna, which takes half a second."""
DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""What one installs for the modules that SQLAlchemy asks for."""
INNER = ("_create_new_trial", "_set_trial_param", "_get_trials", "_get_best_trial_id")
"""What Optuna's cache calls beside the public methods."""


class StorageAway(StudyError):  # noqa: N818 - reads as the sentence it prints
    """A database cannot be reached; what is finished is in it."""


class PatientStorage(RDBStorage):
    """Optuna's storage, whose every operation is tried again while the database cannot be reached."""

    def __init__(self, url: str, patience: float = PATIENCE, **options: Any) -> None:
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
        """Ends or begins a trial; where an answer was lost on its way, what was done counts."""
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
            return _patiently(act, self.patience, shown(self.url), is_away)
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
    return gone or isinstance(cause, OperationalError | InterfaceError | PendingRollbackError)


def connect(url: str, **beats: int) -> PatientStorage:
    """Opens a database, and makes Optuna's tables where there are none.

    Args:
        url: SQLAlchemy's.
        **beats: What Optuna is told of heartbeats.

    Raises:
        StudyError: the URL is none, its driver is not installed, or nobody answers there.
    """
    options: dict[str, Any] = {"engine_kwargs": {"pool_pre_ping": True}}
    if url.startswith(("sqlite", "postgresql", "mysql")):
        wait = {"timeout": 60} if url.startswith("sqlite") else {"connect_timeout": 10}
        options["engine_kwargs"]["connect_args"] = wait
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            opened: PatientStorage = _patiently(
                lambda: PatientStorage(url, **options, **beats, skip_compatibility_check=url in _CHECKED),
                OPENING,
                shown(url),
                _is_opening,
            )
        _CHECKED.add(url)
        return opened
    except NoSuchModuleError as error:
        known = "sqlite, postgresql, mysql"
        raise StudyError(f"The storage {shown(url)} is of an unknown kind ({error}). Known: {known}.") from error
    except ImportError as error:
        module = getattr(error.__cause__, "name", None)
        driver = DRIVERS.get(str(module), "the driver that its URL names")
        raise StudyError(
            f"The storage {shown(url)} needs a driver that is not installed: pip install '{driver}'."
        ) from error


def shown(url: str) -> str:
    """Returns a storage's URL without its password.

    Raises:
        StudyError: it is no URL.
    """
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError as error:
        raise StudyError(
            f"The storage {url!r} is no URL of a database. Expected one such as postgresql://user@host/name."
        ) from error


def has_password(url: str) -> bool:
    """Tells whether a URL holds a password, which is then not written anywhere."""
    return make_url(url).password is not None


def _is_opening(error: BaseException) -> bool:
    """Tells whether opening may work soon: of workers that make tables together all but one fail."""
    return not isinstance(error, ArgumentError)


def _patiently(act: Callable[[], Any], patience: float, name: str, passing: Callable[[BaseException], bool]) -> Any:
    started, pause, tries = time.monotonic(), 0.05, 0
    while True:
        tries += 1
        try:
            return act()
        except (StorageInternalError, SQLAlchemyError) as error:
            if not passing(error):
                raise
            if tries >= TRIES and time.monotonic() - started > patience:
                reason = " ".join(str(error.__cause__ or error).split("\n[SQL")[0].split())
                raise StorageAway(
                    f"The storage {name} could not be reached for {patience:g} seconds ({reason}). Every trial that is "
                    "finished is in it: when it is back, go on with pelton search --resume FOLDER."
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
