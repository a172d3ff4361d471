"""Opens text files, gzipped or not, and says what kind they are by their names."""

from __future__ import annotations

import gzip
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from pelton.errors import DataError


def extension(path: Path) -> str:
    """Returns `.jsonl.gz` and the like: the last suffix, with the one before it when that is compressed."""
    return "".join(path.suffixes[-2:] if is_compressed(path) else path.suffixes[-1:]).lower()


def is_compressed(path: Path) -> bool:
    """Says whether a file is gzipped, by its name."""
    return path.suffix.lower() == ".gz"


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Opens text; broken UTF-8 becomes lone surrogates, which `collect` finds and names by column."""
    with gzip.GzipFile(path, "rb") if is_compressed(path) else path.open("rb") as file:
        if file.peek(2)[:2] in (BOM_UTF16_LE, BOM_UTF16_BE):
            raise DataError(f"{path} is UTF-16: expected UTF-8. Save the file as UTF-8.")
        yield TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
