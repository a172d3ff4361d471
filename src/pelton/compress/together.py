"""Several runs on one backbone become one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from pelton.compress.combine import Combined, How, combine
from pelton.compress.runs import judged_split, require_new
from pelton.errors import AdapterError
from pelton.tasks.base import Task
from pelton.tasks.load import load_task, restore_task
from pelton.tasks.regression import TextRegression
from pelton.training.backbone import adapter_config, quiet
from pelton.training.folder import RunFolder
from pelton.training.loading import load_recipe
from pelton.training.run import Run
from pelton.tuner.store import draft_beside

NEW = "combined"
LIKE = 0.5
"""Of a regression's deviation, by how much two runs' scales may differ."""


def combine_runs(
    paths: Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    how: How = "average",
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
) -> tuple[Combined, dict[str, float]]:
    """Combines the adapters of runs; see `combine`. The runs stay as they are.

    Args:
        paths: The runs' folders.
        output: A new folder for the adapter.
        weights: How much each run counts; all the same when not given.
        how: As in `combine`.
        density: As in `combine`.
        rank: As in `combine`.
        seed: As in `combine`.

    Returns:
        What combining gave, and the metrics of the new adapter on what the first run is judged by.

    Raises:
        TrainingError: a folder is no finished run, or the output exists or has no place.
        AdapterError: a run has no adapter or a backbone of its own, the runs have different backbones or classes, or
            their adapters differ; nothing is written.
    """
    require_new(output)
    shares = [1.0] * len(paths) if weights is None else list(weights)
    if len(shares) != len(paths) or len(paths) < 2:
        raise AdapterError(f"Expected two or more runs and a weight for each, but got {len(paths)} and {len(shares)}.")
    folders = [RunFolder.open(path) for path in paths]
    _require_one_backbone(folders)
    _require_one_task(folders)
    run = Run.load(paths[0])
    model, names = cast(Any, run.model), [f"run{number}" for number in range(len(paths))]
    with quiet():
        for name, folder in zip(names, folders, strict=True):
            model.load_adapter(str(folder.adapter), adapter_name=name)
    found = combine(model, dict(zip(names, shares, strict=True)), NEW, how=how, density=density, rank=rank, seed=seed)
    model.set_adapter(NEW)
    _, examples = judged_split(load_task(run.recipe.task, run.recipe.training.seed))
    metrics = run.evaluate(examples)
    with draft_beside(output) as draft:
        with quiet():
            model.save_pretrained(draft, selected_adapters=[NEW])
        (draft / NEW).rename(output)
    return found, metrics


def _require_one_backbone(folders: Sequence[RunFolder]) -> None:
    """Refuses runs whose adapters were not trained on the same weights."""
    recipes = [load_recipe(folder.recipe) for folder in folders]
    backbones = list(dict.fromkeys(recipe.backbone for recipe in recipes))
    if len(backbones) > 1:
        raise AdapterError(f"The runs have different backbones: {', '.join(backbones)}. Combine equal ones.")
    for folder, recipe in zip(folders, recipes, strict=True):
        if recipe.adapter is None or adapter_config(recipe.adapter) is None:
            raise AdapterError(f"{folder.path} has no adapter. Combine runs that trained one.")
        if recipe.training.train_backbone:
            raise AdapterError(
                f"{folder.path} trained its backbone too, so its adapter fits that one alone. Combine runs whose "
                "backbone was frozen (training.train_backbone=false)."
            )


def _require_one_task(folders: Sequence[RunFolder]) -> None:
    """Refuses runs whose heads do not say the same things."""
    first, *others = [restore_task(load_recipe(folder.recipe).task, folder.read("task")) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        if other.model_class is not first.model_class:
            kinds = f"{first.model_class.__name__} and {other.model_class.__name__}"
            raise AdapterError(
                f"{folders[0].path} and {folder.path} are of different models: {kinds}. Combine runs with one head."
            )
        if _classes(other) != _classes(first):
            raise AdapterError(
                f"{folders[0].path} has {_other_than(first, other)}, and {folder.path} {_other_than(other, first)}: "
                "the mean of their heads would say nothing. Combine runs of the same classes, in the same order."
            )
        if isinstance(first, TextRegression) and isinstance(other, TextRegression) and not _like_scales(first, other):
            raise AdapterError(
                f"The targets of {folders[0].path} are {first.mean:.4g} ± {first.deviation:.4g}, those of "
                f"{folder.path} {other.mean:.4g} ± {other.deviation:.4g}: the mean of their heads would say nothing. "
                "Combine runs that learned the same numbers."
            )


def _classes(task: Task[Any]) -> list[str]:
    """Returns the names of what each output says; none where outputs are no classes."""
    return list(map(str, task.model_options().get("id2label", {}).values()))


def _like_scales(first: TextRegression, other: TextRegression) -> bool:
    """Tells whether two heads' outputs mean nearly the same numbers; samples of one task differ by a little."""
    shift, ratio = abs(first.mean - other.mean) / first.deviation, other.deviation / first.deviation
    return shift <= LIKE and 1 - LIKE <= ratio <= 1 + LIKE


def _other_than(task: Task[Any], other: Task[Any]) -> str:
    """Returns in words how many classes a task has, with some that the other has not."""
    names = [name for name in _classes(task) if name not in _classes(other)]
    return f"{len(_classes(task))} classes" + (f" ({', '.join(names[:5])}{' …' if names[5:] else ''})" if names else "")
