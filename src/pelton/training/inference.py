"""A model over many examples, without gradients: the one way that runs, trainers and benchmarks evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from pelton.tasks.base import Task

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
    order = _by_length(features) if sort else list(range(len(features)))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = batches[processes.process_index :: processes.num_processes]
    found = list(zip(mine, _forward(model, task, features, processor, mine, precision), strict=True))
    if processes.num_processes > 1:
        found = gather_object(found)
    outputs: list[Any] = [None] * len(features)
    for rows, results in found:
        for row, result in zip(rows, results, strict=True):
            outputs[row] = result
    return outputs


def _forward(
    model: Any, task: Task[Any], features: Any, processor: Any, batches: Sequence[Sequence[int]], precision: Precision
) -> list[list[Any]]:
    device, collate = next(model.parameters()).device, task.collator(processor)
    was_training = model.training
    model.eval()
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, AUTOCAST[precision], enabled=precision != "fp32"),
        ):
            return [task.outputs(model, collate([features[row] for row in rows]).to(device)) for rows in batches]
    finally:
        model.train(was_training)


def _by_length(features: Any) -> list[int]:
    """Returns the features' places, short ones first; where they have no tokens, as they are."""
    places = list(range(len(features)))
    if "input_ids" not in features.column_names:
        return places
    lengths = [len(ids) for ids in features["input_ids"]]
    return sorted(places, key=lengths.__getitem__)
