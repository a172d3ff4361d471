"""What a study is: its recipe, its space, its objectives. It is fixed when the study begins, for all its workers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pelton.errors import StudyError, unknown
from pelton.search.space import Space, parse_space
from pelton.search.usual import usual_space
from pelton.search.variant import explicit, require_space, typed
from pelton.tasks.base import LOWER_IS_BETTER
from pelton.tasks.load import load_task
from pelton.training.backbone import quiet
from pelton.training.feasible import OF_ADAPTERS
from pelton.training.loading import parse_recipe
from pelton.training.prepare import prepare
from pelton.training.recipe import Recipe, default_of

Objective = Literal["quality", "latency", "parameters"]
Stopping = Literal["hyperband", "halving", "none"]

OBJECTIVES: tuple[Objective, ...] = ("quality", "latency", "parameters")
STOPPING: tuple[Stopping, ...] = ("hyperband", "halving", "none")


@dataclass(frozen=True)
class Budget:
    """What a trial may cost; dearer ones are not trained.

    Attributes:
        params: Trainable parameters at most, the head's included.
        latency: Inference time at most, as a ratio to the plain backbone's.
    """

    params: int | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        """Refuses what nothing attached can meet."""
        if self.params is not None and self.params < 1:
            raise StudyError(f"`budget_params >= 1` must hold, but got {self.params}.")
        if self.latency is not None and not 1.0 < self.latency < float("inf"):
            raise StudyError(
                f"`budget_latency > 1` must hold, but got {self.latency:g}: it is a ratio to the plain backbone's "
                "time, and nothing that is attached is free. Give one such as 1.1."
            )

    def __bool__(self) -> bool:
        """Tells whether anything is limited."""
        return self.params is not None or self.latency is not None


@dataclass(frozen=True)
class StudyPlan:
    """What a study is.

    Attributes:
        recipe: What trials are variants of, with its methods listed.
        space: What they vary.
        objectives: What they are compared by; quality is the validation score that chooses the checkpoint.
        stopping: How trials that fall behind end early; with several objectives none do.
        budget: What they may cost.
    """

    recipe: Recipe
    space: Space
    objectives: tuple[Objective, ...] = ("quality",)
    stopping: Stopping = "hyperband"
    budget: Budget = Budget()

    def __post_init__(self) -> None:
        """Checks names."""
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise unknown("objective", name, OBJECTIVES)
        if len(set(self.objectives)) != len(self.objectives) or not self.objectives:
            raise StudyError(f"Objectives are named once each, and one at least, but got {list(self.objectives)}.")
        if self.stopping not in STOPPING:
            raise unknown("way of stopping", self.stopping, STOPPING)
        if not self.space.searched:
            raise StudyError(
                "The space has nothing to search: every key is fixed. Give one a range, such as "
                "training.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}."
            )

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        space: Space | None = None,
        *,
        usual: bool = True,
        objectives: tuple[Objective, ...] = ("quality",),
        stopping: Stopping = "hyperband",
        budget: Budget | None = None,
    ) -> StudyPlan:
        """Makes a plan of a recipe, and checks all that can be checked before the first trial.

        Args:
            recipe: As `pelton fit` takes it.
            space: What is searched or fixed.
            usual: Whether the default space is under it.
            objectives: See the class.
            stopping: See the class.
            budget: See the class; none if not given.

        Raises:
            StudyError: there are no validation rows, a key or value of the space that cannot be trained, or a budget
                below what the head alone costs.
            PeltonError: what is wrong with the recipe or its data.
        """
        require_validation(recipe)
        with quiet():
            prepared = prepare(recipe)
        limits = budget or Budget()
        recipe = explicit(prepared)
        asked = typed(recipe, space or Space({}))
        require_space(recipe, asked)
        whole = asked.over(usual_space(prepared, recipe)) if usual else asked
        plan = cls(recipe, whole, objectives, stopping, limits)
        require_possible(plan)
        return plan

    @property
    def metric(self) -> str:
        """The validation metric that quality is."""
        return self.recipe.training.metric_for_best

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Which way each objective is better, in Optuna's words."""
        best: Literal["minimize", "maximize"] = "minimize" if self.metric in LOWER_IS_BETTER else "maximize"
        return [best if name == "quality" else "minimize" for name in self.objectives]

    @property
    def remarks(self) -> list[str]:
        """What whoever starts the study should know."""
        late = self.stopping != "none" and not self.stops
        return [*self.space.notes, *(["With several objectives no trial ends early."] if late else [])]

    @property
    def stops(self) -> bool:
        """Whether trials may end early: Optuna compares running trials by one objective only."""
        return self.stopping != "none" and self.objectives == ("quality",)

    @property
    def needs_latency(self) -> bool:
        """Whether trials are timed."""
        return "latency" in self.objectives or self.budget.latency is not None

    def written(self) -> dict[str, Any]:
        """Returns the plan as YAML has it."""
        return {
            "objectives": list(self.objectives),
            "stopping": self.stopping,
            "budget_params": self.budget.params,
            "budget_latency": self.budget.latency,
            "space": self.space.written(),
            "notes": list(self.space.notes),
            "recipe": self.recipe.model_dump(mode="json"),
        }

    @classmethod
    def read(cls, values: Mapping[str, Any], source: str) -> StudyPlan:
        """Reads what `written` gave."""
        try:
            space = parse_space(values["space"], source)
            return cls(
                parse_recipe(values["recipe"], source),
                Space(space.searched, space.fixed, tuple(values["notes"])),
                tuple(values["objectives"]),
                values["stopping"],
                Budget(values["budget_params"], values["budget_latency"]),
            )
        except (KeyError, TypeError) as error:
            raise StudyError(f"{source} is not a study's: {error!r} is missing or of another kind.") from error

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Says in what another plan, as `written` gives it, differs: `key: its value → this one's`."""
        mine, theirs = _flat(json.loads(json.dumps(self.written()))), _flat(other)
        keys = [key for key in {**theirs, **mine} if not key.startswith(("notes", "recipe.output"))]
        return [f"{key}: {_told(theirs, key)} → {_told(mine, key)}" for key in keys if mine.get(key) != theirs.get(key)]


def require_validation(recipe: Recipe) -> None:
    """Raises StudyError where a recipe has no validation rows to compare trials on."""
    if recipe.task.data is not None and "validation" not in load_task(recipe.task, recipe.training.seed).splits:
        raise StudyError(
            f"Recipe {recipe.name} has no validation rows, and trials are compared on these, never on test "
            "rows. Hold some back with --set task.validation_fraction=0.1, or name a split with task.validation."
        )


def require_possible(plan: StudyPlan) -> None:
    """Raises StudyError where a budget of parameters is below the empty model's: the head without any method."""
    if plan.budget.params is None:
        return
    adapter = None if plan.recipe.adapter is None else plan.recipe.adapter.model_copy(
        update={"preset": "head", "methods": None, "gate": None}
    )  # fmt: skip
    alone = plan.recipe.model_copy(update={"adapter": adapter})
    with quiet():
        model = prepare(_without_methods(alone)).model
    least = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if plan.budget.params <= least:
        raise StudyError(
            f"budget_params={plan.budget.params:,} leaves nothing for methods: the head alone trains {least:,} "
            "parameters. Give more."
        )


def _without_methods(recipe: Recipe) -> Recipe:
    """Returns a recipe without the training settings that only methods and gates have."""
    if recipe.adapter is None:
        return recipe
    plain = {key: default_of(key) for key in (*OF_ADAPTERS, "train_backbone", "layer_decay", "l2_sp")}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=plain)})


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping) or not values:
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _told(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "nothing"
