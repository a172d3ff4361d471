"""What a run's `data.json` says of its rows: notes that are added later, and whether rows are still the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pelton.errors import TrainingError
from pelton.tasks.load import Loaded
from pelton.training.folder import RunFolder, is_main_process


def missing(split: str, metrics: Mapping[str, float]) -> list[str]:
    """Says which metrics do not exist on a split's rows."""
    names = [name for name, value in metrics.items() if math.isnan(value)]
    return [f"{split}: {', '.join(names)} cannot be computed on these rows"] if names else []


def add_notes(folder: RunFolder, notes: Sequence[str]) -> None:
    """Adds to the notes of a run's data; those of an interrupted training are there already."""
    if notes and is_main_process():
        data = folder.read("data")
        folder.write("data", {**data, "notes": list(dict.fromkeys([*data["notes"], *notes]))})


def require_same_rows(folder: RunFolder, data: Loaded) -> None:
    """Raises TrainingError where the data no longer give the rows that a run began with; a new test is let be."""
    path = folder.path / "data.json"
    began, now = folder.read("data") if path.is_file() else {}, data.describe()
    if not began.get("examples"):
        return
    sizes, found = began["examples"], now["examples"]
    splits = [*sizes, *(split for split in found if split not in sizes and not split.startswith("test"))]
    pairs = [(split, found.get(split, 0), sizes.get(split, 0)) for split in splits]
    changed = [f"{count} {split} rows in place of {before}" for split, count, before in pairs if count != before]
    changed += [
        f"other {split} rows" for split, rows in began.get("rows", {}).items() if rows != now["rows"].get(split)
    ]
    if changed:
        raise TrainingError(
            f"The data have changed since this run began: {data.task.settings.data} now gives {changed[0]} (see "
            f"{path}). Put the former rows back, or start a new run with pelton fit RECIPE."
        )
