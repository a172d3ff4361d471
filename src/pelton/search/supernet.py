"""A recipe's methods as a supernet: how to search among them, the recipe that trains them together, and its price."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from pelton.anatomy import find_anatomy
from pelton.errors import RecipeError, unknown
from pelton.gates import GumbelGate
from pelton.methods import MethodSpec
from pelton.registry import require
from pelton.search.architecture import sized
from pelton.search.choose import default_sizes
from pelton.search.costs import Choices
from pelton.search.latency_table import LatencyTable
from pelton.search.learning import HeldOut
from pelton.search.price import Price
from pelton.search.profile import profile
from pelton.tasks.load import load_task
from pelton.training.backbone import adapter_config, load_plain, load_skeleton, quiet
from pelton.training.folder import count_processes
from pelton.training.losses import make_loss
from pelton.training.prepare import find_processor
from pelton.training.recipe import AdapterSettings, Recipe
from pelton.tuner.plan import fitting_methods


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Attributes:
        sizes: Candidate sizes by method; a quarter, half and all of its own size where a method is not named.
        choose: "method" decides over each method of a block by itself, "block" lets a block have one at most.
        bilevel: Gates learn from validation rows instead of training rows.
        second_order: They do so with the weights as they would be after the coming step; three more passes a step.
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
    second_order: bool = False
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
        require(self.bilevel or not self.second_order, "second_order is for bilevel search", bilevel=self.bilevel)

    @property
    def needs_times(self) -> bool:
        """Whether latency plays a part."""
        return self.alpha > 0 or self.budget_latency is not None


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
        anatomy = find_anatomy(load_skeleton(recipe.backbone, recipe.backbone_config))
        methods = fitting_methods(config, anatomy)
        gate = choosing_gate(methods, settings)
        if settings.needs_times and table is None:
            table = _measured(recipe, methods, gate, settings.shape, tell)
    choices = Choices.of(methods, gate, anatomy, table, settings.shape)
    limit = settings.budget_parameters
    if limit is not None and 0 < limit <= 1:
        limit *= choices.range["parameters"][1]
    weights = {"alpha": settings.alpha, "beta": settings.beta}
    price = Price(choices, **weights, parameters=limit, latency=settings.budget_latency)
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
    model: Any = load_plain(recipe.backbone, recipe.backbone_config)
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


def labelled_rows(recipe: Recipe, split: str) -> HeldOut:
    """Returns the rows of a split that gates learn from."""
    training = recipe.training
    data = load_task(recipe.task, training.seed)
    rows = data.splits.get(split)
    if rows is None:
        return HeldOut([], dict, 1, 0)  # which says what is missing
    processor = find_processor(recipe, data)
    features = data.task.encode(rows.inputs, processor, rows.targets)
    criterion = make_loss(training.loss, data.task, rows.targets)
    collate: Any = data.task.collator(processor)
    return HeldOut(features, collate, training.batch_size, training.seed, criterion)
