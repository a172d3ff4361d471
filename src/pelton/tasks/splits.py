"""Train, validation and test rows of a folder, a file, a hub name or a packaged set."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from pelton.errors import DataError, nearest, unknown
from pelton.tasks.files import READERS, read_table
from pelton.tasks.opening import extension
from pelton.tasks.pictures import holds_folders
from pelton.tasks.settings import TaskSettings
from pelton.tasks.tables import Table, from_dataset

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
    "test_mismatched": ("validation_mismatched",),  # MNLI has two; GLUE's second test has hidden labels
}
PACKAGED = ("banking77",)
PREFIX = "pelton:"


@dataclass(frozen=True)
class Place:
    """Where the rows of a split are; two are equal where they are the same rows.

    Attributes:
        key: The whole path, or the hub's name and split.
        name: What errors call it.
        read: Reads the rows.
    """

    key: str
    name: str = field(compare=False)
    read: Callable[[], Table] = field(compare=False)


def load_splits(settings: TaskSettings) -> dict[str, Table]:
    """Loads every split that exists; `train` always does, but is not loaded where it is streamed.

    Raises:
        DataError: the data, a named split or a file is missing, empty or broken.
    """
    if settings.data is None:
        raise DataError("The task has no data. Set task.data to a folder, a file or a hub name.")
    places = _apart(_find(settings), settings)
    if settings.streaming:
        places.pop("train")
    tables = {split: place.read() for split, place in places.items()}
    for split, table in tables.items():
        if not len(table):
            raise DataError(f"{table.name} is empty: the {split} split needs at least one row.")
    return tables


def _find(settings: TaskSettings) -> dict[str, Place]:
    """Finds every split that exists; one that is named as the training rows are has their place."""
    data = str(settings.data)
    path = _local(data)
    names = {split: getattr(settings, split, None) for split in SPLITS}
    one_file = path is not None and not path.is_dir()
    words = (settings.train or "train", *(SPLITS["train"] if one_file else ()))
    same = [split for split, name in names.items() if split != "train" and name in words]
    others = {split: name for split, name in names.items() if split not in same}
    if path is None:
        places = _on_hub(data, settings.subset, others, settings.streaming)
    else:
        places = _in_files(path, others) if one_file else _in_folder(path, others)
    return {**places, **dict.fromkeys(same, places["train"])}


def _apart(places: dict[str, Place], settings: TaskSettings) -> dict[str, Place]:
    """Refuses to test on rows that are trained on or chosen by; validation that is found to be either is held back.

    A test split that nobody named gives way to the others.
    """
    train, validation, test = (places.get(split) for split in ("train", "validation", "test"))
    if settings.test is None and test in (train, validation if settings.validation is not None else None):
        test = None
    if test is not None and test == train:
        raise DataError(
            f"task.test names the training rows ({test.name}), and a score on what was learned tells nothing. Name "
            "other rows, or leave task.test out."
        )
    if test is not None and test == validation and settings.validation is not None:
        raise DataError(
            f"task.validation and task.test name the same rows ({test.name}), so the checkpoint would be chosen by "
            "its test score. Set task.validation=train to hold rows back from training instead, or name other rows."
        )
    if validation in (train, test):
        validation = None
    left = {**places, "validation": validation, "test": test}
    return {split: place for split, place in left.items() if place is not None}


def training_file(settings: TaskSettings) -> tuple[Path, tuple[str, ...] | None] | None:
    """Returns the file of the training rows and the names of their classes; None where they are on the hub.

    Raises:
        DataError: there is no such file.
    """
    path = _local(str(settings.data))
    if path is None:
        return None
    if path.is_dir():
        return _find_training(path, settings.train), _read_class_names(path / "label_names.json")
    return Path(settings.train or path).expanduser(), None


def absolute_places(settings: TaskSettings) -> dict[str, str]:
    """Returns the keys of a task that name local files or folders, with paths that hold in any working folder.

    Links stay links: what one leads to may lack the suffix that tells how a file is read.
    """
    data = str(settings.data)
    path = _local(data)
    if path is None:
        return {}
    found = {} if data.startswith(PREFIX) else {"data": str(path.absolute())}
    for split in ("train", "validation", "test"):
        name = getattr(settings, split)
        if name is not None and _is_outside(name, path):
            found[split] = str(Path(name).expanduser().absolute())
    return found


def _is_outside(name: str, data: Path) -> bool:
    """Says whether a split is a file that exists elsewhere than in the data folder."""
    path = Path(name).expanduser()
    if data.is_dir():
        return extension(path) in READERS and not (data / name).is_file() and path.exists()
    return name not in SPLITS["train"] and path.exists()


def packaged_folder(data: str) -> Path:
    """Returns the folder of a data set that ships with Pelton, such as `pelton:banking77`."""
    name = data.removeprefix(PREFIX)
    if name not in PACKAGED:
        raise unknown("packaged data set", name, PACKAGED)
    return Path(str(resources.files("pelton") / "data" / name))


def looks_local(data: str) -> bool:
    """Says whether a name is written as a path or a file is, whether or not there is one."""
    return data.startswith(("/", ".", "~")) or extension(Path(data)) in READERS


def _local(data: str) -> Path | None:
    """Returns the folder or file that `task.data` names; None where that is on the hub."""
    path = packaged_folder(data) if data.startswith(PREFIX) else Path(data).expanduser()
    return path if path.exists() or looks_local(data) else None


def _in_folder(folder: Path, names: dict[str, str | None]) -> dict[str, Place]:
    class_names = _read_class_names(folder / "label_names.json")
    places = {}
    for split, name in names.items():
        path = _find_training(folder, name) if split == "train" else _find_file(folder, split, name)
        if path is not None:
            places[split] = _at(path, class_names)
    return places


def _at(path: Path, class_names: tuple[str, ...] | None = None) -> Place:
    return Place(str(path.resolve()), str(path), partial(_read, path, class_names))


def _read(path: Path, class_names: tuple[str, ...] | None) -> Table:
    table = read_table(path)
    return replace(table, class_names=dict.fromkeys(table.columns, class_names)) if class_names else table


def _find_training(folder: Path, name: str | None) -> Path:
    """Finds the file of training rows; a folder that holds class folders and no splits is one itself."""
    found = _find_file(folder, "train", name)
    if found is None and _holds_classes(folder):
        return folder
    if found is None:
        raise DataError(
            f"{folder} has no training file. Expected train.jsonl or another of {', '.join(READERS)}, or nothing but "
            f"one folder of images a class, such as {folder}/cat/0001.jpg."
        )
    return found


def _holds_classes(folder: Path) -> bool:
    """Says whether a folder holds folders alone, none of which is a split or has tables in it."""
    splits = {name for names in SPLITS.values() for name in names}
    children = [child for child in folder.iterdir() if not child.name.startswith(".")]
    return bool(children) and all(
        child.is_dir() and child.name not in splits and not any(extension(file) in READERS for file in child.iterdir())
        for child in children
    )


def _find_file(folder: Path, split: str, name: str | None) -> Path | None:
    """Finds the file of a split: by the name the user gave, else by the usual names."""
    if name is not None and extension(Path(name)) in READERS:
        inside = folder / name
        return inside if inside.is_file() else Path(name).expanduser()
    stems = SPLITS[split] if name is None else (name,)
    found = [path for stem in stems for end in READERS if (path := folder / f"{stem}{end}").is_file()]
    found = found or [path for stem in stems if holds_folders(path := folder / stem)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder} has more than one {split} file: {names}. Name one with task.{split}=FILE.")
    if not found and name is not None:
        files = sorted(path.name for path in folder.iterdir() if extension(path) in READERS)
        raise DataError(f"{folder} has no {split} file named {name!r}. Files: {', '.join(files) or 'none'}.")
    return found[0] if found else None


def _in_files(path: Path, names: dict[str, str | None]) -> dict[str, Place]:
    """Finds one file of training rows, and the others where they are named."""
    files = {**names, "train": names["train"] or str(path)}
    return {split: _at(Path(file).expanduser()) for split, file in files.items() if file is not None}


def _read_class_names(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not UTF-8 JSON ({error}).") from error
    if not isinstance(names, list) or len(set(map(str, names))) != len(names):
        raise DataError(f"{path} must be a list of different names, in the order of their ids.")
    return tuple(str(name) for name in names)


def _on_hub(name: str, subset: str | None, names: dict[str, str | None], streaming: bool) -> dict[str, Place]:
    """Finds splits; where training rows are streamed the others are, too: else all of them would be downloaded."""
    import datasets

    options = {"streaming": True} if streaming else {}
    try:
        loaded: dict[str, Any] = datasets.load_dataset(name, subset, **options)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        text = f"{name!r} is neither a local folder or file nor a data set that the hub gives ({reason})."
        raise DataError(f"{text} Check the spelling, task.subset and the connection.") from error
    places = {}
    for split, wanted in names.items():
        usual = [known for known in SPLITS[split] if known in loaded]
        chosen = wanted or (usual[0] if usual else None)
        if chosen is not None and chosen not in loaded:
            guess = nearest(chosen, loaded)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise DataError(f"{name} has no split {chosen!r}.{hint} Splits: {', '.join(loaded)}.")
        if chosen is None and split == "train":
            raise DataError(f"{name} has no training split. Name one with task.train. Splits: {', '.join(loaded)}.")
        if chosen is not None:
            place = f"{name}[{chosen}]"
            places[split] = Place(place, place, partial(from_dataset, place, loaded[chosen]))
    return places
