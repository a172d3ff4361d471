"""What a recipe asks of its adapter, its task and this machine: refused before anything is loaded or made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec

from pelton.errors import RecipeError, nearest
from pelton.gates import FixedGate, FrozenGate, Tempered
from pelton.gates.penalties import wanted
from pelton.tasks.load import Loaded
from pelton.training.losses import REGIONS, class_count, require_loss
from pelton.training.recipe import Recipe, TrainingSettings, default_of
from pelton.training.sections import PenaltySettings
from pelton.tuner.config import PeltonConfig

OF_GATES = (
    "gate_learning_rate",
    "gate_warmup_steps",
    "gate_temperature_end",
    "penalty",
    "contribution_window",
    "pruning",
)
"""Settings that only gates which learn, or several methods, can have."""
OF_ADAPTERS = ("method_learning_rates", "up_rate_ratio", *OF_GATES)
"""What only methods and gates have."""
OF_LEARNED_GATES = ("gate_warmup_steps", "gate_temperature_end", "penalty")
"""What constant gates cannot have; a rate is let be, since comparisons of gates give one to each of them."""

_LOG = logging.getLogger(__name__)


def require_adapter(recipe: Recipe, config: PeltonConfig | None) -> None:
    """Raises RecipeError where training asks for what the adapter does not have.

    Args:
        recipe: The recipe.
        config: Its adapter; None where only the head, or everything, is trained.
    """
    settings = recipe.training
    _tell_unused_rate(recipe)
    if "early_stopping_patience" not in settings.model_fields_set:  # null turns it off, whatever stands beside it
        _require_unused(settings, ("early_stopping_min_delta",), "training.early_stopping_patience is not given")
    if config is None:
        if recipe.adapter is not None and settings.train_backbone:
            raise RecipeError("training.train_backbone and adapter.preset=head exclude each other: head freezes it.")
        _require_unused(settings, OF_ADAPTERS, "the recipe has no methods")
        return
    kinds = [spec.kind for spec in config.specs]
    for kind in settings.method_learning_rates:
        if kind not in kinds:
            guess = nearest(kind, kinds)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise RecipeError(
                f"training.method_learning_rates has a rate for {kind!r}, but the adapter has {', '.join(kinds)}.{hint}"
            )
    loose = [spec.kind for spec in config.specs if not spec.packs]
    if loose and getattr(recipe.task, "packing", False):
        raise RecipeError(
            f"task.packing needs methods that give a packed example what it gets alone, but {loose[0]!r} counts its "
            "segments from the row's first token. Set task.packing=false."
        )
    if not any(spec.up for spec in config.specs):
        _require_unused(settings, ("up_rate_ratio",), f"{', '.join(kinds)} learn no product with a factor at zero")
    gate = config.gate_spec
    if isinstance(gate, FixedGate | FrozenGate):
        _require_unused(settings, OF_LEARNED_GATES, f"a {gate.kind} gate learns nothing")
    if settings.gate_temperature_end is not None and not isinstance(gate, Tempered):
        raise RecipeError(
            f"training.gate_temperature_end needs a gate with a temperature (mlp, gumbel), but the gate is "
            f"{gate.kind!r}."
        )
    if settings.penalty != PenaltySettings() and not wanted(gate):
        raise RecipeError(
            "training.penalty schedules the gate's penalties, but it has none. Set adapter.gate.entropy, "
            "adapter.gate.balance or, with sigmoid, adapter.gate.l1."
        )


def _tell_unused_rate(recipe: Recipe) -> None:
    """Says that a frozen backbone has no rate.

    It is no error: recipes that train their backbone keep their rate when an override attaches an adapter.
    """
    key = "backbone_learning_rate"
    rate = getattr(recipe.training, key)
    if rate != default_of(key) and not recipe.trains_backbone:
        _LOG.warning("training.%s=%g has no effect, since the backbone is frozen. Leave it out.", key, rate)


def _require_unused(settings: TrainingSettings, keys: Sequence[str], why: str) -> None:
    for key in keys:
        if getattr(settings, key) != default_of(key):
            raise RecipeError(f"training.{key} would have no effect, since {why}. Leave it out.")


def require_objective(settings: TrainingSettings, data: Loaded) -> None:
    """Raises RecipeError where the loss or the batches make no sense for the kind of task."""
    task = data.task
    require_loss(settings.loss, task)
    if settings.l2_head and not task.new_head:
        raise RecipeError(f"training.l2_head is for a new head, but {task.settings.kind} uses the pretrained one.")
    many = task.peft_type == "TOKEN_CLS" or task.settings.kind == REGIONS
    if settings.batching.oversample and (class_count(task) is None or many):
        raise RecipeError(
            f"training.batching.oversample draws examples by their class, and those of {task.settings.kind} do not "
            "have one each. Leave it out."
        )


def require_trackers(recipe: Recipe) -> None:
    """Raises RecipeError where a tracker is not installed."""
    for name in recipe.training.trackers:
        if find_spec(name) is None:
            raise RecipeError(
                f"training.trackers names {name}, which is not installed: pip install {name}, or leave it out."
            )
