"""What a variant of a recipe costs: its trainable parameters, and its inference time next to the plain backbone's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pelton.insight.latency import Ratio, Stopwatch
from pelton.tasks.load import Loaded, load_task
from pelton.training.backbone import quiet
from pelton.training.prepare import prepare
from pelton.training.recipe import Recipe
from pelton.training.run import Run
from pelton.tuner.controls import tuners
from pelton.tuner.twin import plain_twin

BATCHES = 2
"""Batches of validation rows that a round of timing runs."""


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: Those that are trained, the head's included.
        latency: The time of inference as a ratio to the plain backbone's; None where nobody asks.
    """

    parameters: int
    latency: Ratio | None


def cost_of(recipe: Recipe, *, timed: bool) -> Cost:
    """Returns what a recipe's model costs, before it is trained: time does not depend on what weights are."""
    with quiet():
        prepared = prepare(recipe)
    batches = _batches(prepared.data, prepared.processor, recipe.training.eval_batch_size)
    return _cost(prepared.model, tuple(batches), timed)


def cost_of_run(run: Run, *, timed: bool) -> Cost:
    """Returns what a trained model costs: less than its recipe says, where methods left while it learned."""
    data = load_task(run.recipe.task, run.recipe.training.seed)
    return _cost(run.model, tuple(_batches(data, run.processor, run.recipe.training.eval_batch_size)), timed)


def _cost(model: Any, batches: tuple[Mapping[str, Any], ...], timed: bool) -> Cost:
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not timed:
        return Cost(parameters, None)
    if not tuners(model):  # it is its own backbone
        return Cost(parameters, Ratio(1.0, 0.0, 0.0, 0.0, 0))
    with quiet():
        return Cost(parameters, Stopwatch(batches)([model], plain_twin(model))[0])


def _batches(data: Loaded, processor: Any, size: int) -> Iterator[Mapping[str, Any]]:
    examples = data.splits["validation"]
    some = examples.take(range(min(len(examples), BATCHES * size)))
    features, collate = data.task.encode(some.inputs, processor), data.task.collator(processor)
    for start in range(0, min(len(features), BATCHES * size), size):
        yield collate([features[row] for row in range(start, min(start + size, len(features)))])
