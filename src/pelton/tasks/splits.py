"""Train, validation and test rows of a folder, a file, a hub name or a packaged set."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from pelton.errors import DataError, nearest, unknown
from pelton.tasks.files import READERS, extension, read_table
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
HELD_BACK = "-"
"""Stands for a validation split that is to be taken from the training rows, even where another one exists."""


def load_splits(settings: TaskSettings) -> dict[str, Table]:
    """Loads every split that exists; `train` always does.

    Raises:
        DataError: the data, a named split or a file is missing, empty or broken.
    """
    if settings.data is None:
        raise DataError("The task has no data. Set task.data to a folder, a file or a hub name.")
    data, names = settings.data, {split: getattr(settings, split, None) for split in SPLITS}
    if names["validation"] is not None and names["validation"] == names["train"]:
        names["validation"] = HELD_BACK
    if settings.streaming:
        names["train"] = HELD_BACK  # is read by `streams`
    path = packaged_folder(data) if data.startswith(PREFIX) else Path(data).expanduser()
    if path.is_dir():
        tables = _load_folder(path, names)
    elif path.is_file() or _looks_local(data):
        tables = _load_files(path, names)
    else:
        tables = _load_hub(data, settings.subset, names, settings.streaming)
    for split, table in tables.items():
        if not len(table):
            raise DataError(f"{table.name} is empty: the {split} split needs at least one row.")
    return _apart(tables, settings)


def _apart(tables: dict[str, Table], settings: TaskSettings) -> dict[str, Table]:
    """Refuses to test on rows that are trained on or chosen by; validation that is found to be either is held back.

    A test split that nobody named gives way to the others.
    """
    places = {split: table.name for split, table in tables.items()}
    named = [places.get("train"), places.get("validation") if settings.validation is not None else None]
    if settings.test is None and places.get("test") in named:
        tables = {split: table for split, table in tables.items() if split != "test"}
        places.pop("test", None)
    test = places.get("test")
    if test is not None and test == places.get("train"):
        raise DataError(
            f"task.test names the training rows ({test}), and a score on what was learned tells nothing. Name other "
            "rows, or leave task.test out."
        )
    if test is not None and test == places.get("validation") and settings.validation is not None:
        raise DataError(
            f"task.validation and task.test name the same rows ({test}), so the checkpoint would be chosen by its test "
            "score. Set task.validation=train to hold rows back from training instead, or name other rows."
        )
    same = places.get("validation") in (test, places.get("train"), None)
    return {split: table for split, table in tables.items() if split != "validation" or not same}


def training_file(settings: TaskSettings) -> tuple[Path, tuple[str, ...] | None] | None:
    """Returns the file of the training rows and the names of their classes; None where they are on the hub.

    Raises:
        DataError: there is no such file.
    """
    data = str(settings.data)
    path = packaged_folder(data) if data.startswith(PREFIX) else Path(data).expanduser()
    if path.is_dir():
        found = _find_file(path, "train", settings.train)
        if found is None:
            raise DataError(f"{path} has no training file. Expected train.jsonl or another of {', '.join(READERS)}.")
        return found, _read_class_names(path / "label_names.json")
    if path.is_file() or _looks_local(data):
        return Path(settings.train or path).expanduser(), None
    return None


def packaged_folder(data: str) -> Path:
    """Returns the folder of a data set that ships with Pelton, such as `pelton:banking77`."""
    name = data.removeprefix(PREFIX)
    if name not in PACKAGED:
        raise unknown("packaged data set", name, PACKAGED)
    return Path(str(resources.files("pelton") / "data" / name))


def _looks_local(data: str) -> bool:
    return data.startswith(("/", ".", "~")) or extension(Path(data)) in READERS


def _load_folder(folder: Path, names: dict[str, str | None]) -> dict[str, Table]:
    class_names = _read_class_names(folder / "label_names.json")
    tables = {}
    for split, name in names.items():
        path = None if name == HELD_BACK else _find_file(folder, split, name)
        if path is None and split == "train" and name != HELD_BACK:
            raise DataError(f"{folder} has no training file. Expected train.jsonl or another of {', '.join(READERS)}.")
        if path is not None:
            table = read_table(path)
            named = dict.fromkeys(table.columns, class_names) if class_names else table.class_names
            tables[split] = replace(table, class_names=named)
    return tables


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


def _load_files(path: Path, names: dict[str, str | None]) -> dict[str, Table]:
    """Loads one file of training rows, and the others where they are named."""
    files = {**names, "train": names["train"] or str(path)}
    return {
        split: read_table(Path(file).expanduser()) for split, file in files.items() if file not in (None, HELD_BACK)
    }


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


def _load_hub(name: str, subset: str | None, names: dict[str, str | None], streaming: bool) -> dict[str, Table]:
    """Loads splits; where training rows are streamed the others are, too: else all of them would be downloaded."""
    import datasets

    options = {"streaming": True} if streaming else {}
    try:
        loaded: dict[str, Any] = datasets.load_dataset(name, subset, **options)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        text = f"{name!r} is neither a local folder or file nor a data set that the hub gives ({reason})."
        raise DataError(f"{text} Check the spelling, task.subset and the connection.") from error
    tables = {}
    for split, wanted in names.items():
        if wanted == HELD_BACK:
            continue
        usual = [known for known in SPLITS[split] if known in loaded]
        chosen = wanted or (usual[0] if usual else None)
        if chosen is not None and chosen not in loaded:
            guess = nearest(chosen, loaded)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise DataError(f"{name} has no split {chosen!r}.{hint} Splits: {', '.join(loaded)}.")
        if chosen is None and split == "train":
            raise DataError(f"{name} has no training split. Name one with task.train. Splits: {', '.join(loaded)}.")
        if chosen is not None:
            tables[split] = from_dataset(f"{name}[{chosen}]", loaded[chosen])
    return tables
