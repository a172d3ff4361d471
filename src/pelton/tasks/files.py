"""Files of rows and images, read whole or in parts, with errors that name the line and the column."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TextIO

from pelton.errors import DataError
from pelton.tasks.pictures import ARCHIVE, holds_folders, read_pictures
from pelton.tasks.squad_json import Nested, find_nested, nested_chunks, read_nested
from pelton.tasks.tables import Row, Table, collect, from_dataset


def read_table(path: Path) -> Table:
    """Reads a JSONL, CSV, TSV or text (each also gzipped) or Parquet file, or images in a zip archive or folder.

    A text file is one row, whose column `text` holds all of it. A .json file is JSON lines too, or one of SQuAD's own.

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


def extension(path: Path) -> str:
    """Returns `.jsonl.gz` and the like: the last suffix, with the one before it when that is compressed."""
    return "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).lower()


def _open(path: Path) -> TextIO:
    """Opens text; broken UTF-8 becomes lone surrogates, which `collect` finds and names by column."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_jsonl(path: Path) -> Table:
    return collect(path, _jsonl_rows(path))


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parse_object(path, number, line)


def _read_json(path: Path) -> Table:
    nested = _nested(path)
    return _read_jsonl(path) if nested is None else read_nested(path, nested)


def _nested(path: Path) -> Nested | None:
    if not path.is_file():
        return None
    with _whole(path), _open(path) as file:
        return find_nested(path, file)


def _parse_object(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        text = f"{path}, line {number}: malformed JSON ({error.msg} at character {error.pos + 1})."
        raise DataError(f"{text} Expected one JSON object a line.") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: expected a JSON object, but got {type(row).__name__}.")
    return row


def _read_csv(path: Path) -> Table:
    return collect(path, _csv_rows(path))


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with _open(path) as file:
        reader = csv.reader(file, delimiter="\t" if ".tsv" in path.suffixes else ",", strict=True)
        start = 1
        header = _next_cells(path, start, reader)
        _require_different(path, header or [])
        while header is not None:
            start = reader.line_num + 1
            cells = _next_cells(path, start, reader)
            if cells is None:
                return
            if cells:
                yield start, _match_header(path, start, header, cells)


def _require_different(path: Path, header: list[str]) -> None:
    twice = [
        name for name in dict.fromkeys(header) if name and header.count(name) > 1
    ]  # spreadsheets end in unnamed ones
    if twice:
        raise DataError(f"{path}, line 1: more than one column is named {twice[0]!r}. Rename or remove one.")


def _next_cells(path: Path, number: int, reader: Iterator[list[str]]) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise DataError(f"{path}, line {number}: malformed CSV ({error}).") from error


def _match_header(path: Path, number: int, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        raise DataError(
            f"{path}, line {number}: expected {len(header)} columns as in the header, but got {len(cells)}."
        )
    return dict(zip(header, cells, strict=True))


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
    with _open(path) as file:
        return collect(path, iter([(1, {"text": file.read()})]))


def _read_pictures(path: Path) -> Table:
    return Table(str(path), read_pictures(path))


JSON = (".json", ".json.gz")

ROWS: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    f"{kind}{end}": read
    for kind, read in {".jsonl": _jsonl_rows, ".json": _jsonl_rows, ".csv": _csv_rows, ".tsv": _csv_rows}.items()
    for end in ("", ".gz")
}
"""Rows with their lines, by extension: what can be read in parts."""

READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".tsv": _read_csv,
    ".tsv.gz": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".txt.gz": _read_text,
    ARCHIVE: _read_pictures,
}
