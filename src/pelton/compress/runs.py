"""Passes over a run: its adapter becomes smaller in place, what that costs is measured, and it can be taken back.

Constants and importances come from training rows (`rows.py`); the score before and after is that of the validation
split (the test split where there is none). The adapter's folder is exchanged whole: what was there stays until the new
one is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

from pelton.compress.budget import Latency, Pruned
from pelton.compress.fold import fold
from pelton.compress.freeze import Statistic, freeze_gates
from pelton.compress.importance import leave_one_out, taylor
from pelton.compress.over import BlockValues
from pelton.compress.prune import prune
from pelton.compress.rows import training_batches
from pelton.compress.shrink import shrink
from pelton.compress.steps import adapter_of, revive
from pelton.errors import AdapterError, TrainingError
from pelton.insight.latency import Stopwatch
from pelton.tasks.base import Examples
from pelton.tasks.load import Loaded, load_task
from pelton.training.backbone import quiet
from pelton.training.folder import RunFolder
from pelton.training.gate_values import record_run_gates
from pelton.training.run import Run
from pelton.tuner.cut import Entry
from pelton.tuner.model import PeltonModel
from pelton.tuner.store import draft_beside, exchange

By = Literal["gate", "taylor", "leave-one-out", "contribution"]
TIMED = 2
"""Batches of them that times are measured on."""


@dataclass(frozen=True)
class Change:
    """What a pass did to a run.

    Attributes:
        name: The pass.
        split: What the scores were measured on.
        before: The metrics before it.
        after: The metrics behind it.
        parameters: Of the adapter, before and after.
        gone: The methods that went, the least important first.
        latency: The inference time before and after, where it was measured.
    """

    name: str
    split: str
    before: dict[str, float]
    after: dict[str, float]
    parameters: tuple[int, int]
    gone: tuple[Entry, ...] = ()
    latency: Latency | None = None


def freeze_run(path: Path, statistic: Statistic = "mean") -> Change:
    """Makes a run's gates constant.

    Raises:
        TrainingError: the folder is no finished run.
        AdapterError: the run has no adapter.
    """

    def act(run: Run, data: Loaded) -> list[Entry]:
        freeze_gates(run.model, list(training_batches(run, data, labelled=False)), statistic=statistic)
        return []

    return _change(path, "freeze", act)


def prune_run(
    path: Path,
    *,
    by: By = "taylor",
    threshold: float | None = None,
    keep: int | None = None,
    budget_params: int | None = None,
    budget_latency: float | None = None,
) -> Change:
    """Takes the least important methods out of a run's adapter; see `prune`.

    Args:
        path: The run's folder.
        by: How methods are weighed: how open their gates are, by gradients, by the score without each of them, or by
            what was noted in training (`training.contribution_window`).
        threshold: As in `prune`, whose default is of gates less open than 0.05, else of 0.05 of the most important.
        keep: As in `prune`.
        budget_params: As in `prune`.
        budget_latency: As in `prune`, measured on batches of training examples.
    """

    def act(run: Run, data: Loaded) -> list[Entry]:
        return prune(
            run.model,
            threshold=threshold,
            keep=keep,
            budget_params=budget_params,
            budget_latency=budget_latency,
            timer=None if budget_latency is None else _stopwatch(run, data),
            importance=_importance(run, data, by),
        )

    return _change(path, "prune", act)


def shrink_run(path: Path, *, energy: float | None = None, share: float | None = None) -> Change:
    """Takes units out of the parts of a run's adapter; see `shrink`."""

    def act(run: Run, data: Loaded) -> list[Entry]:
        shrink(run.model, energy=energy, share=share)
        return []

    return _change(path, "shrink", act)


def revive_run(path: Path, *, last: bool = False) -> Change:
    """Brings back what passes took from a run's adapter."""

    def act(run: Run, data: Loaded) -> list[Entry]:
        revive(run.model, last=last)
        return []

    return _change(path, "revive", act)


def fold_run(path: Path, output: Path) -> tuple[Change, bool]:
    """Folds a run's adapter and writes what is left; the run stays as it is.

    Args:
        path: The run's folder.
        output: A new folder. It gets an ordinary model with its tokenizer where all of the adapter folds; else the
            folded backbone in `model` and the rest of the adapter in `adapter`.

    Returns:
        What it cost, and whether all of the adapter folded.

    Raises:
        TrainingError: the output exists, or has no place.
        AdapterError: as `fold` does; nothing is written.
    """
    require_new(output)
    run = Run.load(path)
    tuner, adapter = adapter_of(run.model, None)
    split, examples = judged_split(load_task(run.recipe.task, run.recipe.training.seed))
    features = run.task.judged(examples, run.processor)
    before, size = run.evaluate(examples, features), adapter_size(tuner, adapter)
    plain = fold(run.model)
    whole = plain is not run.model
    folded = replace(run, model=plain)
    rest = 0 if whole else adapter_size(tuner, adapter)
    change = Change("fold", split, before, folded.evaluate(examples, features), (size, rest))
    with draft_beside(output) as draft:
        with quiet():
            if not whole:
                run.model.active_peft_config.base_model_name_or_path = str(output.resolve() / "model")
                run.model.save_pretrained(draft / "adapter", save_embedding_layers=False)  # they are in the model
                plain = run.model.unload()
            place = draft if whole else draft / "model"
            cast(Any, plain).save_pretrained(place)
            run.processor.save_pretrained(place)
        draft.rename(output)
    return change, whole


def _stopwatch(run: Run, data: Loaded) -> Stopwatch:
    return Stopwatch(tuple(islice(training_batches(run, data, labelled=False), TIMED)))


def _importance(run: Run, data: Loaded, by: By) -> BlockValues | None:
    if by == "taylor":
        return taylor(run.model, training_batches(run, data, labelled=True))
    if by == "contribution":
        if not (run.folder.path / "contributions.json").is_file():
            raise AdapterError(
                "The run noted no contributions. Train with training.contribution_window=1000, or prune --by taylor."
            )
        return cast(BlockValues, run.folder.read("contributions"))
    if by == "leave-one-out":
        if "validation" not in data.splits:
            raise TrainingError(
                "--by leave-one-out chooses on validation rows, and the run has none. Prune --by taylor."
            )
        examples = data.splits["validation"]
        features = run.task.judged(examples, run.processor)
        return leave_one_out(run.model, lambda: run.evaluate(examples, features)["score"])
    return None


def _change(path: Path, name: str, act: Callable[[Run, Loaded], list[Entry]]) -> Change:
    run = Run.load(path)
    tuner, adapter = adapter_of(run.model, None)
    data = load_task(run.recipe.task, run.recipe.training.seed)
    split, examples = judged_split(data)
    features = run.task.judged(examples, run.processor)
    before, size = run.evaluate(examples, features), adapter_size(tuner, adapter)
    gone = act(run, data)
    after, sizes = run.evaluate(examples, features), (size, adapter_size(tuner, adapter))
    latency = gone.latency if isinstance(gone, Pruned) else None
    change = Change(name, split, before, after, sizes, tuple(gone), latency)
    _write(run, data, change)
    return change


def adapter_size(tuner: PeltonModel, adapter: str) -> int:
    """Returns how many parameters an adapter's gates and methods have."""
    return sum(
        p.numel()
        for block in tuner.blocks()
        if adapter in block.wirings
        for part in (block.gates[adapter], block.methods[adapter])
        for p in part.parameters()
    )


def judged_split(data: Loaded) -> tuple[str, Examples]:
    """Returns the name of the split that passes are measured on, and its examples."""
    for split in ("validation", "test"):
        if split in data.splits:
            return split, data.splits[split]
    raise TrainingError("The run has neither validation nor test rows to measure the change on. Name one in its task.")


def require_new(output: Path) -> None:
    """Raises TrainingError where no new folder can be made, before any work is done for it."""
    if output.exists():
        raise TrainingError(f"{output} exists. Name a new folder with --output.")
    if not output.absolute().parent.is_dir():
        raise TrainingError(f"There is no folder {output.parent} for {output.name}. Make it, or name another --output.")


def _write(run: Run, data: Loaded, change: Change) -> None:
    """Writes the smaller adapter, its gate values and what was done beside the run's, then exchanges all of them."""
    folder = run.folder
    noted = folder.read("changes") if (folder.path / "changes.json").is_file() else []
    with draft_beside(folder.adapter) as draft:
        new = RunFolder(draft)
        with quiet():
            run.model.save_pretrained(new.adapter)
        record_run_gates(replace(run, folder=new), data.some())
        new.write("changes", [*noted, asdict(change)])
        exchange(draft, folder.path)
