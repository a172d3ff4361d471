"""AutoPELT: a recipe's methods become candidates, one training decides which of them each block keeps.

The supernet has every method at every candidate size in every block, under a `GumbelGate`; it is trained by `fit`, with
the data, head and batches of the recipe. What the gates chose, within the budgets, is written as an ordinary recipe.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pelton.anatomy import Anatomy, find_anatomy
from pelton.errors import RecipeError, TrainingError, unknown
from pelton.gates import GumbelGate
from pelton.methods import MethodSpec
from pelton.registry import require
from pelton.search.architecture import Architecture, derive, sized
from pelton.search.choose import default_sizes, within
from pelton.search.latency_table import LatencyTable
from pelton.search.learning import ArchitectureLearning, HeldOut, gates_of
from pelton.search.picture import draw_architecture
from pelton.search.price import Price, Space
from pelton.search.profile import profile
from pelton.tasks.load import load_task
from pelton.training.backbone import adapter_config, load_plain, load_processor, load_skeleton, quiet
from pelton.training.fit import fit, resume
from pelton.training.folder import SEARCH, count_processes
from pelton.training.loading import dump_recipe, parse_recipe
from pelton.training.losses import make_loss
from pelton.training.recipe import AdapterSettings, Recipe, TrainingSettings
from pelton.training.run import Run
from pelton.tuner.plan import fitting_methods

OF_GATES = (
    "gate_learning_rate",
    "gate_warmup_steps",
    "gate_temperature_end",
    "penalty",
    "contribution_window",
    "pruning",
)
"""Settings of a training that only gates which learn, or more methods than are left, can have."""

DERIVED = "derived"
"""Where a search's run keeps the adapter that it ends with, weights included."""


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Attributes:
        sizes: Candidate sizes by method; a quarter, half and all of its own size where a method is not named.
        choose: "method" decides over each method of a block by itself, "block" lets a block have one at most.
        bilevel: Gates learn from validation rows instead of training rows.
        alpha: Weight of the expected latency, as a share of the backbone's time.
        beta: Weight of the expected parameters, as a share of all.
        budget_parameters: The most parameters of methods; up to 1 a share of all of them.
        budget_latency: The longest inference time, as a ratio to the plain backbone's.
        shape: Examples and tokens of the inputs whose time counts.
        gate_learning_rate: Of the gates' logits.
        warmup: The share of the steps in which only weights learn.
        init: The probability of a method (or of anything in a block) at the start.
        temperature: Of the gates, at the start and at the end.
        straight_through: Opens one candidate wholly in each forward pass.
    """

    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    choose: Literal["method", "block"] = "method"
    bilevel: bool = False
    alpha: float = 0.0
    beta: float = 0.0
    budget_parameters: float | None = None
    budget_latency: float | None = None
    shape: tuple[int, int] = (1, 32)
    gate_learning_rate: float = 0.05
    warmup: float = 0.1
    init: float = 0.75
    temperature: tuple[float, float] = (1.0, 0.2)
    straight_through: bool = False

    def __post_init__(self) -> None:
        """Checks ranges."""
        require(0 <= self.warmup < 1, "0 <= warmup < 1", warmup=self.warmup)
        require(self.gate_learning_rate > 0, "gate_learning_rate > 0", gate_learning_rate=self.gate_learning_rate)
        require(min(self.temperature) > 0, "temperature > 0", temperature=self.temperature)

    @property
    def needs_times(self) -> bool:
        """Whether latency plays a part."""
        return self.alpha > 0 or self.budget_latency is not None


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
        TrainingError: the folder holds no search, or the search is finished.
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
    return _finish(resume(path, progress=progress, callbacks=[learning]), recipe, price, learning)


def _learning(supernet: Recipe, settings: SearchSettings, price: Price) -> ArchitectureLearning:
    return ArchitectureLearning(price, _held_out(supernet) if settings.bilevel else None, settings.warmup)


class _Noting(TrainerCallback):  # type: ignore[misc]
    """Writes into a run's folder how it searches, for `resume_search`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        (Path(str(args.output_dir)).parent / SEARCH).write_text(json.dumps(self.values), encoding="utf-8")


def prepare_search(
    recipe: Recipe,
    settings: SearchSettings,
    table: LatencyTable | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Recipe, Price]:
    """Returns the recipe of the supernet, and its price; takes what `search` takes."""
    config = None if recipe.adapter is None else adapter_config(recipe.adapter)
    if config is None:
        raise RecipeError("A search needs methods to choose from. Set adapter.preset or adapter.methods.")
    if count_processes() > 1:
        raise RecipeError("A search needs one process: its gates draw for themselves. Start it without torchrun.")
    if recipe.training.precision == "fp16":
        raise RecipeError("A search adds to gradients, which fp16 scales. Set training.precision to bf16 or fp32.")
    with quiet():
        anatomy = find_anatomy(load_skeleton(recipe.backbone))
        methods = fitting_methods(config, anatomy)
        gate = choosing_gate(methods, settings)
        if settings.needs_times and table is None:
            table = _measured(recipe, methods, gate, settings.shape, tell)
    space = Space.of(methods, gate, anatomy, table, settings.shape)
    limit = settings.budget_parameters
    if limit is not None and 0 < limit <= 1:
        limit *= space.range["parameters"][1]
    weights = {"alpha": settings.alpha, "beta": settings.beta}
    price = Price(space, **weights, parameters=limit, latency=settings.budget_latency)
    return _supernet(recipe, settings, methods, gate), price


def choosing_gate(methods: Sequence[MethodSpec], settings: SearchSettings) -> GumbelGate:
    """Returns the gate of a supernet of methods.

    Raises:
        UnknownName: sizes of a method that is not among them.
        SpecError: sizes of a method that has none, or larger ones than its own.
    """
    kinds = [spec.kind for spec in methods]
    for kind in settings.sizes:
        if kind not in kinds:
            raise unknown("method of this recipe in sizes", kind, kinds)
    sizes: dict[str, tuple[int, ...]] = {}
    for spec in methods:
        given = settings.sizes.get(spec.kind)
        own = getattr(spec, spec.size) if spec.size is not None and spec.gates_units else None
        if own is None or getattr(spec, "gating", "mass") == "scale":
            require(given is None, f"{spec.kind!r} has one size only", sizes=given)
            continue
        sizes[spec.kind] = default_sizes([own]) if given is None else tuple(sorted(set(given) | {own}))
        require(max(sizes[spec.kind]) == own, f"a size of {spec.kind!r} is at most its {spec.size}, {own}", sizes=given)
    return GumbelGate(
        sizes=sizes,
        choose=settings.choose,
        temperature=settings.temperature[0],
        init=settings.init,
        straight_through=settings.straight_through,
    )


def _measured(
    recipe: Recipe,
    methods: Sequence[MethodSpec],
    gate: GumbelGate,
    shape: tuple[int, int],
    tell: Callable[[str], None],
) -> LatencyTable:
    """Returns a table in which every candidate was measured on the backbone itself."""
    model: Any = load_plain(recipe.backbone)
    if torch.cuda.is_available():
        model = model.to("cuda")
    probes = [sized(spec, size) for spec in methods for size in gate.sizes.get(spec.kind, (None,))]
    profile(model, shapes=[shape], tell=tell)  # tells the terms of the time model apart
    return profile(model, probes, shapes=[shape], tell=tell)


def _supernet(recipe: Recipe, settings: SearchSettings, methods: Sequence[MethodSpec], gate: GumbelGate) -> Recipe:
    assert recipe.adapter is not None
    adapter = AdapterSettings(
        methods=[spec.to_dict() for spec in methods],
        gate=gate.to_dict(),
        modules_to_save=recipe.adapter.modules_to_save,
        init=recipe.adapter.init,
    )
    training = recipe.training.model_copy(
        update={
            "gate_learning_rate": settings.gate_learning_rate,
            "gate_temperature_end": settings.temperature[1],
            "gate_warmup_steps": 0,  # the search has a warm-up of its own
            "early_stopping_patience": None,
            "contribution_window": None,
            "pruning": None,
            "evaluate_every": None,
            "penalty": type(recipe.training.penalty)(),
        }
    )
    return recipe.model_copy(update={"name": f"{recipe.name}-search", "adapter": adapter, "training": training})


def _held_out(recipe: Recipe) -> HeldOut:
    """Returns the validation rows, labelled."""
    training = recipe.training
    data = load_task(recipe.task, training.seed)
    held = data.splits.get("validation")
    if held is None:
        return HeldOut([], dict, 1, 0)  # which says what is missing
    processor = load_processor(recipe.backbone, data.task)
    features = data.task.encode(held.inputs, processor, held.targets)
    criterion = make_loss(training.loss, data.task, held.targets)
    collate: Any = data.task.collator(processor)
    return HeldOut(features, collate, training.batch_size, training.seed, criterion)


def _finish(run: Run, recipe: Recipe, price: Price, learning: ArchitectureLearning) -> Found:
    space, folder = price.space, run.folder.path
    gates = gates_of(run.model)
    architecture = within(space, gates, price.limits)
    likely = price.expected({block: gate.probabilities() for block, gate in gates.items()})
    expected = {name: float(value.detach()) for name, value in likely.items()}
    (parameters, latency), (most, slowest) = space.cost(architecture), space.cost(space.full)
    found = searched_recipe(recipe, architecture, space.anatomy)
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
        "latency": [latency, slowest] if space.timed else None,
        "expected": expected,
        "metrics": metrics,
        "trace": learning.trace,
    }
    (folder / "architecture.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    draw_architecture(architecture, space.anatomy, folder / "architecture.png")
    times = (latency, slowest) if space.timed else (None, None)
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
