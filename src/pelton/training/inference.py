"""A model over many examples, without gradients: the one way that runs, trainers and benchmarks evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from pelton.errors import DataError
from pelton.tasks.base import Task
from pelton.training.batching import feature_lengths

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def infer(
    model: Any,
    task: Task[Any],
    features: Any,
    processor: Any,
    *,
    batch_size: int,
    precision: Precision = "fp32",
    sort: bool = True,
) -> list[Any]:
    """Runs a model in evaluation mode and returns one output for each feature, in their order.

    In a distributed run every process takes its share of the batches, and all get all outputs.

    Args:
        model: On any device; its mode is put back afterwards.
        task: Says what is kept of a forward.
        features: What `task.encode` gave.
        processor: The tokenizer or image processor.
        batch_size: Features a batch.
        precision: As in training: automatic mixed precision where it is not fp32.
        sort: Batches features of like length, which saves padding; off where the order of forwards matters.
    """
    processes = PartialState()
    batches = _batches(_by_length(features) if sort else range(len(features)), batch_size)
    mine = batches[processes.process_index :: processes.num_processes]
    with _at_rest(model, precision):
        collated = _collated(model, task, features, processor, mine)
        found = [(rows, task.outputs(model, batch)) for rows, batch in zip(mine, collated, strict=True)]
    if processes.num_processes > 1:
        found = gather_object(found)
    outputs: list[Any] = [None] * len(features)
    for rows, results in found:
        for row, result in zip(rows, results, strict=True):
            outputs[row] = result
    return outputs


def pass_over(
    model: Any, task: Task[Any], features: Any, processor: Any, *, batch_size: int, precision: Precision = "fp32"
) -> None:
    """Runs a model once over features in their order, for what hooks see of it; nothing is kept, nothing generated.

    Takes what `infer` takes.
    """
    with _at_rest(model, precision):
        for batch in _collated(model, task, features, processor, _batches(range(len(features)), batch_size)):
            model(**batch)


def require_tokens(features: Any) -> None:
    """Raises DataError where a feature has no tokens, so that there is nothing to run a model on."""
    lengths = feature_lengths(features)
    if lengths is not None and not lengths.all():
        raise DataError(
            f"Input {int(lengths.argmin()) + 1} has no tokens: it is empty, or the tokenizer knows nothing in it. "
            "Leave it out or fill it in."
        )


@contextmanager
def _at_rest(model: Any, precision: Precision) -> Iterator[None]:
    """Switches gradients, dropout and the like off for a while, and mixed precision on where that is asked for."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, AUTOCAST[precision], enabled=precision != "fp32"):
            yield
    finally:
        model.train(was_training)


def _batches(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _collated(
    model: Any, task: Task[Any], features: Any, processor: Any, batches: Sequence[Sequence[int]]
) -> Iterator[Any]:
    device, collate = next(model.parameters()).device, task.collator(processor)
    for rows in batches:
        yield collate([features[row] for row in rows]).to(device)


def _by_length(features: Any) -> list[int]:
    """Returns the features' places, short ones first; where they have no tokens, as they are."""
    places = list(range(len(features)))
    lengths = feature_lengths(features)
    return places if lengths is None else sorted(places, key=lengths.tolist().__getitem__)
