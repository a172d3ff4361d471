"""Several runs on one backbone become one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from pelton.compress.combine import Combined, How, combine
from pelton.compress.runs import judged_split
from pelton.errors import AdapterError, TrainingError
from pelton.tasks.load import load_task
from pelton.training.backbone import quiet
from pelton.training.folder import RunFolder
from pelton.training.loading import load_recipe
from pelton.training.run import Run
from pelton.tuner.store import draft_beside

NEW = "combined"


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
        TrainingError: a folder is no finished run, or the output exists.
        AdapterError: the runs have different backbones, or their adapters differ; nothing is written.
    """
    if output.exists():
        raise TrainingError(f"{output} exists. Name a new folder with --output.")
    shares = [1.0] * len(paths) if weights is None else list(weights)
    if len(shares) != len(paths) or len(paths) < 2:
        raise AdapterError(f"Expected two or more runs and a weight for each, but got {len(paths)} and {len(shares)}.")
    folders = [RunFolder.open(path) for path in paths]
    backbones = [load_recipe(folder.recipe).backbone for folder in folders]
    if len(set(backbones)) > 1:
        raise AdapterError(
            f"The runs have different backbones: {', '.join(dict.fromkeys(backbones))}. Combine equal ones."
        )
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
