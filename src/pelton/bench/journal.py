"""Finished cells in an append-only file, which several processes (and machines on one file system) share.

A process holds a lock file while it trains a cell. The system lets go of the lock when the process ends, however it
ends, so an interrupted cell is simply free again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pelton.errors import DataError

Record = dict[str, Any]


class Journal:
    """One JSON object a line, one line a finished cell."""

    def __init__(self, path: Path) -> None:
        """Opens a journal; the file and the folder of its locks are made when they are first needed."""
        self.path = path
        self.locks = path.with_name(f".{path.name}.locks")

    def records(self) -> list[Record]:
        """Returns what is finished, in the order of finishing.

        Raises:
            DataError: a line is no JSON object.
        """
        if not self.path.is_file():
            return []
        found = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(f"{self.path}, line {number}: expected a JSON object ({error}). Remove it.") from error
        return found

    def append(self, record: Record) -> None:
        """Adds a finished cell."""
        with self._lock("append"), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Holds a cell while it is trained; gives False where another process holds it."""
        lock = self._lock(key)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _lock(self, name: str) -> FileLock:
        self.locks.mkdir(parents=True, exist_ok=True)
        return FileLock(self.locks / f"{name}.lock")
