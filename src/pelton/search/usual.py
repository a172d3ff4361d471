"""The default space: what usually decides over a gated adapter, as far as a recipe has it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from pelton.gates import GATES
from pelton.gates.base import DynamicGateSpec
from pelton.gates.mlp import MLPGate
from pelton.gates.static import FixedGate, FrozenGate
from pelton.methods import METHODS
from pelton.search.space import Dimension, Range, Space
from pelton.search.variant import kinds_of
from pelton.training.prepare import Prepared
from pelton.training.recipe import Recipe

WARM_UP = 2000
SPARSITY = Range(1e-6, 1e-2, log=True)
RATE = Range(1e-4, 1e-2, log=True)
SIZES: dict[tuple[str, str], Range] = {
    ("lora", "rank"): Range(2, 64, log=True),
    ("bottleneck", "bottleneck_size"): Range(8, 128, log=True),
    ("prefix", "prefix_length"): Range(2, 32, log=True),
}
DROPOUT = Range(0.0, 0.3)

Found = Iterator[tuple[str, Dimension | str]]
"""Keys, each with what is searched, or the reason why it is left out."""


def usual_space(prepared: Prepared, recipe: Recipe) -> Space:
    """Returns the default space of a recipe.

    Args:
        prepared: What the recipe names, loaded.
        recipe: The same, as `explicit` gave it.
    """
    found = [*_of_gate(recipe, steps_of(prepared)), *_of_methods(recipe), *_of_rates(prepared, recipe)]
    return Space(
        {key: one for key, one in found if not isinstance(one, str)},
        notes=tuple(f"{key} is not searched: {why}." for key, why in found if isinstance(why, str)),
    )


def steps_of(prepared: Prepared) -> int | None:
    """Returns how many optimiser steps a recipe trains; None where nobody knows before (streams, token budgets)."""
    settings, examples = prepared.recipe.training, prepared.data.splits.get("train")
    if settings.max_steps is not None:
        return settings.max_steps
    if examples is None or settings.batching.tokens is not None:
        return None
    batches = math.ceil(len(examples) / settings.batch_size)
    return math.ceil(settings.epochs * math.ceil(batches / settings.gradient_accumulation))


def _of_gate(recipe: Recipe, steps: int | None) -> Found:
    gate = None if recipe.adapter is None or recipe.adapter.gate is None else GATES.parse(recipe.adapter.gate)
    keys = [f"adapter.gate.{name}" for name in ("temperature", "init_std", "sparsity")]
    if gate is None or isinstance(gate, FixedGate | FrozenGate):
        why = "the recipe has no gate" if gate is None else f"a {gate.kind} gate learns nothing"
        yield from ((key, why) for key in [*keys, "training.gate_warmup_steps", "training.gate_learning_rate"])
        return
    if isinstance(gate, MLPGate):
        yield keys[0], Range(0.5, 5.0, log=True)
        yield keys[1], Range(1e-3, 1e-1, log=True)
    else:
        yield from ((key, f"a {gate.kind} gate has none") for key in keys[:2])
    if isinstance(gate, DynamicGateSpec):
        softmax = isinstance(gate, MLPGate) and gate.activation == "softmax"
        yield f"adapter.gate.{'entropy' if softmax else 'l1'}", SPARSITY
    else:
        yield keys[2], f"a {gate.kind} gate has no penalties"
    yield "training.gate_warmup_steps", Range(0, WARM_UP if steps is None else max(1, min(WARM_UP, steps)))
    yield "training.gate_learning_rate", Range(1e-5, 1e-2, log=True)


def _of_methods(recipe: Recipe) -> Found:
    kinds = kinds_of(recipe)
    for (kind, name), sizes in SIZES.items():
        yield f"adapter.methods.{kind}.{name}", sizes if kind in kinds else f"the adapter has no {kind}"
    for kind in kinds:
        if "dropout" in [entry.name for entry in fields(METHODS[kind])]:
            yield f"adapter.methods.{kind}.dropout", DROPOUT


def _of_rates(prepared: Prepared, recipe: Recipe) -> Found:
    methods: Any = kinds_of(recipe)
    yield "training.learning_rate", RATE if methods else "the recipe has no methods"
    new = prepared.data.task.new_head
    yield "training.head_learning_rate", RATE if new else "the task keeps the pretrained head"
    trained = Range(5e-6, 5e-4, log=True) if recipe.trains_backbone else "the backbone is frozen"
    yield "training.backbone_learning_rate", trained
