"""CSV and TSV: rows whose cells stand between commas or tabs, and may be enclosed in quotes."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from pelton.errors import DataError
from pelton.tasks.opening import extension, open_text
from pelton.tasks.tables import Row, require_utf8

CELL = 2**31 - 1
"""The characters that a cell may have: what fits C's long everywhere. The `csv` module's own limit is 131,072."""
QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"')
QUOTED_LINE = re.compile(rf'(?:{QUOTED.pattern}|[^"\t]*)(?:\t(?:{QUOTED.pattern}|[^"\t]*))*')


def csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields the rows of a CSV or TSV file with the lines that they begin on.

    Raises:
        DataError: a row is broken, or has more or fewer cells than the header.
    """
    quoted = not _is_tsv(path) or _is_quoted(path)
    with open_text(path) as file:
        reader = csv.reader(
            file,
            delimiter="\t" if _is_tsv(path) else ",",
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            strict=True,
        )
        start = 1
        header = _next_cells(path, start, reader)
        _check_header(path, header or [])
        while header is not None:
            start = reader.line_num + 1
            cells = _next_cells(path, start, reader)
            if cells is None:
                return
            if cells:
                yield start, _match_header(path, start, header, cells)


def _is_tsv(path: Path) -> bool:
    return extension(path).startswith(".tsv")


def _is_quoted(path: Path) -> bool:
    """Says whether the quotes of a TSV file enclose cells, as `csv` and pandas write them; else they are plain text.

    GLUE's files have plain ones. They enclose cells if all of them can (each opens or closes a cell, or is doubled in
    one) and this is no chance: the header has some, or some are doubled, or else lines are too short or too long.
    """
    evident, opened, seen = False, False, 0
    with open_text(path) as file:
        header = next(file, "")
        if '"' in header:
            return QUOTED_LINE.fullmatch(header.rstrip("\r\n")) is not None
        tabs = header.count("\t")
        for line in file:
            if not opened and '"' not in line:
                continue
            whole = '"' * opened + line.rstrip("\r\n")
            opened = whole.count('"') % 2 == 1
            whole += '"' * opened  # what goes on in the next line is closed here and opened there
            if not QUOTED_LINE.fullmatch(whole):
                return False
            seen += QUOTED.sub("", whole).count("\t")
            if not opened and seen != tabs:
                return False
            seen *= opened
            evident |= '""' in line or (opened and not tabs) or (line.strip() != "" and line.count("\t") != tabs)
    return evident and not opened


def _check_header(path: Path, header: list[str]) -> None:
    for name in header:
        require_utf8(name, f"{path}, line 1, the column's name {name!r}")
    twice = [
        name for name in dict.fromkeys(header) if name and header.count(name) > 1
    ]  # spreadsheets end in unnamed ones
    if twice:
        raise DataError(f"{path}, line 1: more than one column is named {twice[0]!r}. Rename or remove one.")


def _next_cells(path: Path, number: int, reader: Iterator[list[str]]) -> list[str] | None:
    before = csv.field_size_limit(CELL)  # it is the whole process's
    try:
        return next(reader, None)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {number}: malformed CSV ({error}), probably for a quote without a partner. Enclose the cell "
            'in quotes and double those inside it (""), or remove the quote.'
        ) from error
    finally:
        csv.field_size_limit(before)


def _match_header(path: Path, number: int, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        hint = " Write cells with tabs or line breaks to a JSONL file." if _is_tsv(path) else ""
        raise DataError(
            f"{path}, line {number}: expected {len(header)} columns as in the header, but got {len(cells)}.{hint}"
        )
    return dict(zip(header, cells, strict=True))
