"""Images that tables and command lines name: found, and decoded once, so that a broken one is known before training."""

from __future__ import annotations

from collections.abc import Sequence

from pelton.errors import DataError
from pelton.tasks.pictures import Picture, as_picture
from pelton.tasks.tables import Table

IMAGES = ("image", "img", "image_path", "file_name", "path", "file")
"""What columns of images are called."""


def find_pictures(table: Table, column: str) -> list[Picture]:
    """Turns a column into pictures, none of which is decoded.

    Raises:
        DataError: the table is empty, or a cell names no image.
    """
    if not len(table):
        raise DataError(f"{table.name} is empty: expected at least one row.")
    cells = table.column(column)
    return [as_picture(cell, table.name, table.where(row, column)) for row, cell in enumerate(cells)]


def check_pictures(table: Table, column: str) -> list[Picture]:
    """Turns a column into pictures, and decodes each once.

    Raises:
        DataError: the table is empty, or an image is missing or cannot be decoded.
    """
    found = find_pictures(table, column)
    for row, picture in enumerate(found):
        try:
            picture.verify()
        except DataError as error:
            where = table.where(row, column)
            raise (error if picture.data is not None else DataError(f"{where}: {error}")) from error
    return found


def named_pictures(paths: Sequence[str], pairs: Sequence[str] | None, kind: str) -> list[Picture]:
    """Takes texts of a command line as paths of image files.

    Raises:
        DataError: an image is missing or cannot be decoded, or there are second texts.
    """
    if pairs is not None:
        raise DataError(f"{kind} reads one image an example: leave --pair out.")
    found = [Picture(path) for path in paths]
    for picture in found:
        picture.verify()
    return found
