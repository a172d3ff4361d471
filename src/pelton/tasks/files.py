"""Files of rows and images, read whole or in parts, with errors that name the line and the column."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from pelton.errors import DataError
from pelton.tasks.opening import extension, open_text
from pelton.tasks.pictures import ARCHIVE, holds_folders, read_pictures
from pelton.tasks.separated import csv_rows
from pelton.tasks.squad_json import Nested, find_nested, nested_chunks, read_nested
from pelton.tasks.tables import Row, Table, collect, from_dataset


def read_table(path: Path) -> Table:
    """Reads a JSONL, CSV, TSV or text (each also gzipped) or Parquet file, or images in a zip archive or folder.

    A text file is one row, whose column `text` holds all of it. A .json file is JSON lines too, or one of SQuAD's own.
    Quotes in TSV are plain text, as in GLUE's, unless all of them enclose cells and it shows: see `separated.py`.

    Raises:
        DataError: the file is missing, of another kind, or broken; the message names the line and column.
    """
    reader = _read_pictures if holds_folders(path) else READERS.get(extension(path))
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    if reader is None or not (path.is_file() or holds_folders(path)):
        raise DataError(f"{path} is of no kind that can be read. Known: {', '.join(READERS)}.")
    with _whole(path):
        return reader(path)


def read_chunks(path: Path, size: int) -> Iterator[Table]:
    """Reads a JSONL, CSV, TSV or Parquet file `size` rows at a time, and is told of errors as `read_table`.

    Raises:
        DataError: as `read_table`, when the broken row is reached; or the file cannot be read in parts.
    """
    if extension(path) == ".parquet":
        yield from _parquet_chunks(path, size)
        return
    nested = _nested(path) if extension(path) in JSON else None
    if nested is not None:
        yield from nested_chunks(path, nested, size)
        return
    read = ROWS.get(extension(path))
    if read is None:
        raise DataError(f"{path} cannot be streamed. Expected one of {', '.join([*ROWS, '.parquet'])}.")
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    rows = read(path)
    while part := _next_rows(path, rows, size):
        yield collect(path, iter(part))


def _next_rows(path: Path, rows: Iterator[tuple[int, Row]], size: int) -> list[tuple[int, Row]]:
    with _whole(path):
        return list(islice(rows, size))


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}). Fetch or compress it again.") from error


def _read_jsonl(path: Path) -> Table:
    return collect(path, _jsonl_rows(path))


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parse_object(path, number, line)


def _read_json(path: Path) -> Table:
    nested = _nested(path)
    return _read_jsonl(path) if nested is None else read_nested(path, nested)


def _nested(path: Path) -> Nested | None:
    if not path.is_file():
        return None
    try:
        with _whole(path), open_text(path) as file:
            return find_nested(path, file)
    except DataError:
        raise
    except UNREADABLE:
        return None  # as JSON lines it is refused by the line


def _parse_object(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        text = f"{path}, line {number}: malformed JSON ({error.msg} at character {error.pos + 1})."
        raise DataError(f"{text} Expected one JSON object a line.") from error
    except UNREADABLE as error:
        reason = "brackets are nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{path}, line {number}: JSON that cannot be read ({reason}). Correct or remove it.") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: expected a JSON object, but got {type(row).__name__}.")
    return row


def _read_csv(path: Path) -> Table:
    return collect(path, csv_rows(path))


def _parquet_chunks(path: Path, size: int) -> Iterator[Table]:
    import datasets
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    with _parquet(path):
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(size)
    before = 0
    while True:
        with _parquet(path):
            batch = next(batches, None)
        if batch is None:
            return
        rows = datasets.Dataset(datasets.table.InMemoryTable(pyarrow.Table.from_batches([batch])))
        yield replace(from_dataset(str(path), rows), before=before)
        before += len(rows)


@contextmanager
def _parquet(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file that can be read ({str(error).splitlines()[0]}).") from error


def _read_parquet(path: Path) -> Table:
    import datasets
    import pyarrow.parquet

    with _parquet(path):
        return from_dataset(str(path), datasets.Dataset(datasets.table.InMemoryTable(pyarrow.parquet.read_table(path))))


def _read_text(path: Path) -> Table:
    with open_text(path) as file:
        return collect(path, iter([(1, {"text": file.read()})]))


def _read_pictures(path: Path) -> Table:
    return Table(str(path), read_pictures(path))


UNREADABLE = (RecursionError, ValueError)
"""What `json` raises where JSON is nested too deeply, is malformed, or has a number of thousands of digits."""
JSON = (".json", ".json.gz")

ENDS = ("", ".gz")
TEXTS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".txt": _read_text}

ROWS: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    f"{kind}{end}": read
    for kind, read in {".jsonl": _jsonl_rows, ".json": _jsonl_rows, ".csv": csv_rows, ".tsv": csv_rows}.items()
    for end in ENDS
}
"""Rows with their lines, by extension: what can be read in parts."""

READERS: dict[str, Callable[[Path], Table]] = {
    **{f"{kind}{end}": read for kind, read in TEXTS.items() for end in ENDS},
    ".parquet": _read_parquet,
    ARCHIVE: _read_pictures,
}
