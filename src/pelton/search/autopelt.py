"""AutoPELT: a recipe's methods become candidates, one training decides which of them each block keeps.

The supernet has every method at every candidate size in every block, under a `GumbelGate`; it is trained by `fit`, with
the data, head and batches of the recipe. What the gates chose, within the budgets, is written as an ordinary recipe.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pelton.anatomy import Anatomy
from pelton.errors import TrainingError
from pelton.search.architecture import Architecture, derive
from pelton.search.choose import within
from pelton.search.latency_table import LatencyTable
from pelton.search.learning import FILE, LEARNED, ArchitectureLearning, gates_of
from pelton.search.picture import draw_architecture
from pelton.search.price import Price
from pelton.search.supernet import SearchSettings, labelled_rows, prepare_search
from pelton.tasks.load import load_task
from pelton.training.backbone import quiet
from pelton.training.feasible import OF_GATES
from pelton.training.fit import fit, resume
from pelton.training.folder import SEARCH, RunFolder
from pelton.training.loading import dump_recipe, parse_recipe
from pelton.training.recipe import AdapterSettings, Recipe, TrainingSettings
from pelton.training.run import Run

ARCHITECTURE = "architecture.json"
"""What a search found; the last thing that it writes."""
DERIVED = "derived"
"""Where a search's run keeps the adapter that it ends with, weights included."""


@dataclass(frozen=True)
class Found:
    """What a search ended with.

    Attributes:
        run: Of the supernet, its model made what was chosen.
        architecture: What was chosen.
        recipe: Trains it from the start.
        parameters: Of its methods.
        latency: Its expected time as a ratio to the plain backbone's; None where no times were asked for.
        full: The same of everything at its largest.
        metrics: Of the architecture with the weights that it inherits, on the validation rows.
    """

    run: Run
    architecture: Architecture
    recipe: Recipe
    parameters: int
    latency: float | None
    full: tuple[int, float | None]
    metrics: dict[str, float]


def search(
    recipe: Recipe,
    settings: SearchSettings | None = None,
    *,
    table: LatencyTable | None = None,
    progress: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Found:
    """Searches among the methods of a recipe, and writes what it found into the run's folder.

    `architecture.json` and `architecture.png` say and show it, `architecture.yaml` is the recipe, and `derived` the
    adapter with the weights that it inherits (`adapter.start` of a recipe begins with them).

    Args:
        recipe: The data, the head, the training, and the candidates: its methods, as large as they may be.
        settings: How to search.
        table: Where times come from; measured, or taken from the cache, when not given and needed.
        progress: Draws a bar on the terminal.
        tell: Gets a line about what is measured.

    Raises:
        PeltonError: as `fit` does; a budget is out of range, a method or size does not exist, or a bilevel search
            has no validation rows. Nothing is trained then.
    """
    settings = settings or SearchSettings()
    supernet, price = prepare_search(recipe, settings, table, tell)
    learning = _learning(supernet, settings, price)
    noting = _Noting({"settings": dataclasses.asdict(settings), "recipe": recipe.model_dump(mode="json")})
    return _finish(fit(supernet, progress=progress, callbacks=[noting, learning]), recipe, price, learning)


def resume_search(path: Path | str, *, table: LatencyTable | None = None, progress: bool = False) -> Found:
    """Goes on with a search that was interrupted, to what an uninterrupted one finds.

    Raises:
        TrainingError: the folder holds no search, or the search is finished: it has an architecture.
    """
    file = Path(path) / SEARCH
    if not file.is_file():
        raise TrainingError(f"{path} holds no search: there is no {SEARCH}. Start one with pelton autopelt RECIPE.")
    noted = json.loads(file.read_text(encoding="utf-8"))
    recipe = parse_recipe(noted["recipe"], str(path))
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in noted["settings"].items()}
    settings = SearchSettings(**given)
    supernet, price = prepare_search(recipe, settings, table)
    learning = _learning(supernet, settings, price)
    folder = RunFolder.open(Path(path))
    over = folder.phase == "finished" and (folder.path / ARCHITECTURE).is_file()
    if folder.phase in ("trained", "finished") and not over:
        learning.recall(_learned(folder))
    if folder.phase == "finished" and not over:
        run = Run.load(folder.path)
    else:
        run = resume(path, progress=progress, callbacks=[learning])
    return _finish(run, recipe, price, learning)


def _learned(folder: RunFolder) -> Path:
    """Returns what a search whose training is over noted, or else its last checkpoint."""
    checkpoint = folder.last_checkpoint()
    files = [folder.path / LEARNED, *([] if checkpoint is None else [checkpoint / FILE])]
    for file in files:
        if file.is_file():
            return file
    raise TrainingError(f"{folder.path} does not say what its search learned: there is no {LEARNED}. Search anew.")


def _learning(supernet: Recipe, settings: SearchSettings, price: Price) -> ArchitectureLearning:
    held_out = labelled_rows(supernet, "validation") if settings.bilevel else None
    train = labelled_rows(supernet, "train") if settings.second_order else None
    return ArchitectureLearning(price, held_out, settings.warmup, train)


class _Noting(TrainerCallback):  # type: ignore[misc]
    """Writes into a run's folder how it searches, for `resume_search`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        (Path(str(args.output_dir)).parent / SEARCH).write_text(json.dumps(self.values), encoding="utf-8")


def _finish(run: Run, recipe: Recipe, price: Price, learning: ArchitectureLearning) -> Found:
    choices, folder = price.choices, run.folder.path
    gates = gates_of(run.model)
    architecture = within(choices, gates, price.limits, price.scarce)
    likely = price.expected({block: gate.probabilities() for block, gate in gates.items()})
    expected = {name: float(value.detach()) for name, value in likely.items()}
    (parameters, latency), (most, slowest) = choices.cost(architecture), choices.cost(choices.full)
    found = searched_recipe(recipe, architecture, choices.anatomy)
    metrics: dict[str, float] = {}
    if any(architecture.blocks.values()):
        derive(run.model, architecture)
        with quiet():
            run.model.save_pretrained(folder / DERIVED)
        metrics = _judged(run)
    (folder / "architecture.yaml").write_text(dump_recipe(found), encoding="utf-8")
    values = {
        **architecture.to_dict(),
        "parameters": [parameters, most],
        "latency": [latency, slowest] if choices.timed else None,
        "expected": expected,
        "metrics": metrics,
        "trace": learning.trace,
    }
    draw_architecture(architecture, choices.anatomy, folder / "architecture.png")
    run.folder.write(ARCHITECTURE.removesuffix(".json"), values)  # the last: with it a search is over
    times = (latency, slowest) if choices.timed else (None, None)
    return Found(run, architecture, found, parameters, times[0], (most, times[1]), metrics)


def _judged(run: Run) -> dict[str, float]:
    data = load_task(run.recipe.task, run.recipe.training.seed)
    return run.evaluate(data.splits["validation"]) if "validation" in data.splits else {}


def searched_recipe(recipe: Recipe, architecture: Architecture, anatomy: Anatomy) -> Recipe:
    """Returns the recipe that trains an architecture as another recipe trains its methods.

    Settings of what is gone go along: those of gates that learn, and of methods that no block keeps.
    """
    assert recipe.adapter is not None
    before = recipe.adapter
    adapter = AdapterSettings(
        **architecture.settings(anatomy), init=before.init, modules_to_save=before.modules_to_save
    )
    kept = {kind for choice in architecture.blocks.values() for kind in choice}
    training, plain = recipe.training, TrainingSettings()
    gone = {key: getattr(plain, key) for key in OF_GATES}
    gone["method_learning_rates"] = {k: v for k, v in training.method_learning_rates.items() if k in kept}
    if not any(spec.up for spec in architecture.methods if spec.kind in kept):
        gone["up_rate_ratio"] = plain.up_rate_ratio
    changes = {"name": f"{recipe.name}-searched", "adapter": adapter, "training": training.model_copy(update=gone)}
    return recipe.model_copy(update=changes)
