"""Image files in folders, zip archives or the cells of a table: found, checked, and decoded when they are used."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pelton.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

ARCHIVE = ".zip"
MASK_MODES = ("L", "P", "I;16", "I", "1")
"""Pillow's names for images with one number a pixel; those of a palette are the numbers, not the colours."""
IMAGES, MASKS = "images", "masks"
T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """Where an image is; nothing of it is in memory but what a table holds itself.

    Attributes:
        path: The file, or the archive; what errors call it where `data` is given.
        member: The name inside the archive.
        data: The encoded image, where a table holds it.
    """

    path: str
    member: str | None = None
    data: bytes | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """Names the file, with the archive it is in."""
        return self.path if self.member is None else f"{self.path}: {self.member}"

    @property
    def stem(self) -> str:
        """The file's name without its folder and its suffix."""
        return PurePosixPath(self.path if self.member is None else self.member).stem

    def decode(self) -> Image:
        """Reads the image, upright and in RGB; transparency is dropped.

        Raises:
            DataError: the file is missing or is no whole image.
        """
        with self._open() as file:
            return self._try(lambda: _upright(_image(file)))

    def classes(self) -> NDArray[np.integer]:
        """Reads a mask: the class of every pixel, [Y, X].

        Raises:
            DataError: as `decode`, or the image holds colours in place of classes.
        """

        def load() -> NDArray[np.integer]:
            image = _image(file)
            if image.mode not in MASK_MODES:
                raise DataError(
                    f"{self} is an image of mode {image.mode}: expected a mask with one class id a pixel (modes "
                    f"{', '.join(MASK_MODES)}). Save class ids, not colours."
                )
            return np.asarray(image).astype(np.int64)

        with self._open() as file:
            return self._try(load)

    def verify(self) -> None:
        """Decodes the image once, as small as its format allows, which finds what is broken or cut off.

        Raises:
            DataError: as `decode`.
        """

        def load() -> None:
            image = _image(file)
            image.draft("RGB", (1, 1))
            _upright(image)  # all that `decode` does, so that nothing fails later

        with self._open() as file:
            self._try(load)

    def _open(self) -> IO[bytes]:
        if self.data is not None:
            return BytesIO(self.data)
        if self.member is None:
            return self._try(lambda: Path(self.path).open("rb"))
        member = self.member
        return self._try(lambda: BytesIO(_archive(self.path, os.getpid()).read(member)))

    def _try(self, read: Callable[[], T]) -> T:
        from PIL import Image, UnidentifiedImageError

        try:
            return read()
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{self} does not exist.") from error
        except (*BROKEN, Image.DecompressionBombError) as error:
            reason = "no image format that is known" if isinstance(error, UnidentifiedImageError) else str(error)
            raise DataError(f"{self} cannot be decoded ({reason}). Replace or remove it.") from error


BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, struct.error),
    *(zipfile.BadZipFile, zlib.error, RuntimeError),
)
"""What Pillow and zipfile raise for files that are broken or are no images.

SyntaxError is Pillow's for broken PNG; RuntimeError is zipfile's for what is encrypted, or compressed in another way.
"""


def read_pictures(path: Path) -> dict[str, list[Any]]:
    """Finds the images of a folder or zip archive that holds one folder a class, or the folders images and masks.

    Hidden files, and what macOS adds to archives, are not looked at; every other file counts as an image.

    Returns:
        The columns `image` and `label`, or `image` and `mask`, in the order of the names.

    Raises:
        DataError: an image is in no class folder, a class folder is empty, or there is none; an image has no mask, or
            a mask no image.
    """
    found = dict(sorted(_in_folder(path) if path.is_dir() else _in_archive(path)))
    for name, pictures in found.items():
        if not pictures:
            raise DataError(f"{path}: the class folder {name!r} holds no images. Remove or fill it.")
    if not found:
        raise DataError(f"{path} holds no images. Expected one folder a class, such as {path.stem}/cat/0001.jpg.")
    if set(found) == {IMAGES, MASKS}:
        return _pairs(path, found[IMAGES], found[MASKS])
    return {
        "image": [picture for pictures in found.values() for picture in pictures],
        "label": [name for name, pictures in found.items() for _ in pictures],
    }


def _pairs(path: Path, images: list[Picture], masks: list[Picture]) -> dict[str, list[Any]]:
    """Puts each image beside the mask whose file has its name, whatever comes behind the dot."""
    of_images, of_masks = ({picture.stem: picture for picture in pictures} for pictures in (images, masks))
    for mine, others, here, there in ((of_images, of_masks, IMAGES, MASKS), (of_masks, of_images, MASKS, IMAGES)):
        alone = [str(picture) for stem, picture in mine.items() if stem not in others]
        if alone:
            stem = PurePosixPath(alone[0]).stem
            raise DataError(
                f"{path}: {len(alone)} of {len(mine)} files in {here} have no partner in {there}: {alone[0]} … "
                f"Expected {there}/{stem}.png: add it, or remove the file."
            )
    stems = sorted(of_images)
    return {"image": [of_images[stem] for stem in stems], "mask": [of_masks[stem] for stem in stems]}


def holds_folders(path: Path) -> bool:
    """Says whether a path is a folder of folders: what a split of images looks like."""
    return path.is_dir() and any(child.is_dir() for child in path.iterdir())


def as_picture(cell: Any, table: str, where: str) -> Picture:
    """Turns a cell into a picture: a path beside the table's file, encoded bytes, or what `datasets` makes of an image.

    Args:
        cell: The cell.
        table: The table's name; a relative path starts from its folder.
        where: What errors call the cell.

    Raises:
        DataError: the cell is none of these.
    """
    if isinstance(cell, Picture):
        return cell
    if isinstance(cell, dict) and (cell.get("bytes") or cell.get("path")):
        cell = cell.get("bytes") or cell["path"]
    if isinstance(cell, bytes) and cell:
        return Picture(where, data=cell)
    if isinstance(cell, str) and cell.strip():
        return Picture(str(Path(table).expanduser().parent / cell))
    what = "nothing" if cell is None or cell == "" else f"{type(cell).__name__} {str(cell)[:40]!r}"
    raise DataError(f"{where}: expected the path of an image or its bytes, but got {what}.")


def _in_folder(path: Path) -> Iterator[tuple[str, list[Picture]]]:
    for child in sorted(path.iterdir()):
        if child.name.startswith("."):
            continue
        if not child.is_dir():
            raise DataError(f"{child} is in no class folder. Expected one folder a class, such as {path}/cat/0001.jpg.")
        files = sorted(file for file in child.rglob("*") if file.is_file() and not file.name.startswith("."))
        yield child.name, [Picture(str(file)) for file in files]


def _in_archive(path: Path) -> Iterator[tuple[str, list[Picture]]]:
    """Takes the last folder of a member's name as its class, so that archives may have folders around the classes."""
    try:
        members = zipfile.ZipFile(path).infolist()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DataError(f"{path} is not a whole zip archive ({error}). Fetch it again.") from error
    shown = [m for m in members if not any(part.startswith((".", "__MACOSX")) for part in m.filename.split("/"))]
    found: dict[str, list[Picture]] = {}
    inner = {str(PurePosixPath(m.filename).parent) for m in shown}
    for member in sorted(shown, key=lambda m: m.filename):
        name = PurePosixPath(member.filename)
        if member.is_dir():
            if str(name) not in inner:  # not around other folders or files: an empty class
                found.setdefault(name.name, [])
        elif not name.parent.name:
            raise DataError(f"{path}: {name} is in no class folder. Expected one folder a class: cat/0001.jpg.")
        else:
            found.setdefault(name.parent.name, []).append(Picture(str(path), member.filename))
    yield from found.items()


@lru_cache(maxsize=8)
def _archive(path: str, process: int) -> zipfile.ZipFile:
    """Keeps an archive open, one for each process: a fork would share the place in the file."""
    return zipfile.ZipFile(path)


def _image(file: IO[bytes]) -> Image:
    from PIL import Image

    return Image.open(file)


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    return _rgb(ImageOps.exif_transpose(image))


def _rgb(image: Image) -> Image:
    """Converts to RGB; 16-bit greys keep their upper eight bits, which Pillow would clip instead."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: expected 8 or 16 bits a channel")
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette may hold transparency
    return image.convert("RGB")
