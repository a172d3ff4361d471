"""Finished cells in an append-only file, which several processes (and machines on one file system) share.

A process holds a lock file while it trains a cell. The system lets go of the lock when the process ends, however it
ends, so an interrupted cell is simply free again. A process that ends while it writes leaves the beginning of a line:
readers pass over it, and the next writer takes its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from pelton.errors import DataError

Record = dict[str, Any]
BEGINNING = b"{"


class Journal:
    """One JSON object a line, one line a finished cell."""

    def __init__(self, path: Path, needs: Sequence[str] = ()) -> None:
        """Opens a journal; the file and the folder of its locks are made when they are first needed.

        Args:
            path: The file.
            needs: Keys that every line must have, so that a file of something else is refused.
        """
        self.path = path
        self.needs = needs
        self.locks = path.with_name(f".{path.name}.locks")

    def records(self) -> list[Record]:
        """Returns what is finished, in the order of finishing.

        Raises:
            DataError: a line is no JSON object, or none of this kind of journal.
        """
        if not self.path.is_file():
            return []
        *lines, last = self.path.read_bytes().split(b"\n")
        found = [self._read(line, number) for number, line in enumerate(lines, 1) if line.strip()]
        if last and (_is_object(last) or not last.startswith(BEGINNING)):  # no line that a crash cut off
            found.append(self._read(last, len(lines) + 1))
        return found

    def append(self, record: Record) -> None:
        """Adds a finished cell; when this returns, it is on the disk."""
        line = json.dumps(record).encode() + b"\n"
        with self._lock("append"), self.path.open("ab+") as file:
            file.write(_end_line(file) + line)
            file.flush()
            os.fsync(file.fileno())

    def require_writable(self) -> None:
        """Makes the file and the folder of its locks, before anything is trained for them.

        Raises:
            DataError: they cannot be made or written.
        """
        try:
            self.locks.mkdir(parents=True, exist_ok=True)
            self.path.open("ab").close()
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be written ({error.strerror}), but finished runs go into it. Name another file."
            ) from error

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

    def _read(self, line: bytes, number: int) -> Record:
        try:
            value = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise DataError(
                f"{self.path}, line {number}: expected a JSON object ({error}). A line that a crash cut off can be "
                "removed."
            ) from error
        lacks = [key for key in self.needs if not isinstance(value, dict) or key not in value]
        if lacks or not isinstance(value, dict):
            kind = f"a JSON object with {', '.join(self.needs)}" if lacks else "a JSON object"
            raise DataError(
                f"{self.path}, line {number}: expected {kind}, but got {line.decode('utf-8')[:40]!r}. Name another "
                "file, or remove the line."
            )
        return value

    def _lock(self, name: str) -> FileLock:
        self.locks.mkdir(parents=True, exist_ok=True)
        return FileLock(self.locks / f"{name}.lock")


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text.decode("utf-8")), dict)
    except ValueError:
        return False


def _end_line(file: IO[bytes]) -> bytes:
    """Returns what must stand before a new line; takes away the beginning of a line that a crash cut off.

    No beginning of an object is an object, so a last line that is one lacks its end only. What does not begin as a
    journal's lines do is somebody's text, and stays.
    """
    file.seek(0)
    rest = file.read().rpartition(b"\n")[2]
    if not rest:
        return b""
    if _is_object(rest) or not rest.startswith(BEGINNING):
        return b"\n"
    file.seek(-len(rest), os.SEEK_END)
    file.truncate()
    return b""
