"""What was taken from an adapter, in files beside it: `removed.json` and `removed.safetensors`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pelton.errors import AdapterError

INDEX, TENSORS = "removed.json", "removed.safetensors"


@dataclass(frozen=True)
class Step:
    """One pass over an adapter, with what takes it back.

    Attributes:
        name: Of the pass.
        shape: The fields of the config that the pass changed, as they were, as JSON.
        kept: The names of the tensors that it left alone.
        tensors: The others, as they were before it.
        digest: A hash of the adapter's tensors behind it.
    """

    name: str
    shape: dict[str, Any]
    kept: tuple[str, ...]
    tensors: dict[str, Tensor]
    digest: str


def save_steps(steps: Sequence[Step], folder: Path) -> None:
    """Writes the steps into an adapter's folder, each file whole or not at all; removes files of earlier ones."""
    if not steps:
        for name in (INDEX, TENSORS):
            (folder / name).unlink(missing_ok=True)
        return
    index = [{"name": s.name, "shape": s.shape, "kept": s.kept, "digest": s.digest} for s in steps]
    tensors = {f"{n}/{key}": value.contiguous() for n, step in enumerate(steps) for key, value in step.tensors.items()}
    write_whole(folder / TENSORS, save(tensors))
    write_whole(folder / INDEX, json.dumps(index, indent=1).encode())


def load_steps(folder: Path) -> tuple[Step, ...]:
    """Reads the steps of an adapter's folder; none where there are no such files.

    Raises:
        AdapterError: a file is missing or broken.
    """
    if not (folder / INDEX).is_file():
        return ()
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        return tuple(
            Step(
                str(entry["name"]),
                dict(entry["shape"]),
                tuple(entry["kept"]),
                {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{n}/")},
                str(entry["digest"]),
            )
            for n, entry in enumerate(index)
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterError(
            f"{folder}/{INDEX} and {TENSORS} hold what was taken from the adapter, but cannot be read ({error}). "
            "Copy both again, or remove both to load the adapter without a way back."
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file beside its place and moves it there, so that a full disk leaves what was there before."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def draft_beside(place: Path) -> Iterator[Path]:
    """Gives a hidden folder beside a place, to be filled and then moved there; what is left of it in the end goes.

    Raises:
        AdapterError: there is no folder for it, the disk is full, or nothing may be written there.
    """
    if not place.absolute().parent.is_dir():
        raise AdapterError(f"{place} could not be written: there is no folder {place.parent}. Make it first.")
    draft = place.absolute().with_name(f".{place.name}-{uuid.uuid4().hex}")
    try:
        draft.mkdir()
        yield draft
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{place} could not be written and is as it was ({error}). Make room, try again.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def exchange(draft: Path, folder: Path) -> None:
    """Moves every file and folder of a draft into another folder, in place of those of the same names: all or none."""
    new, old = sorted(draft.iterdir()), draft / ".old"
    old.mkdir()
    try:
        for entry in new:
            if (folder / entry.name).exists():
                (folder / entry.name).rename(old / entry.name)
            entry.rename(folder / entry.name)
    except BaseException:
        for entry in new:
            if not entry.exists():
                (folder / entry.name).rename(entry)
            if (old / entry.name).exists():
                (old / entry.name).rename(folder / entry.name)
        raise


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns a hash of tensors by name: their shapes and their float32 values."""
    found = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().float().cpu().contiguous()
        found.update(f"{key} {tuple(value.shape)} ".encode())
        found.update(value.numpy().tobytes())
    return found.hexdigest()
