"""Several examples in one sequence, none of which sees another.

Packed sequences carry `position_ids` that begin anew with every example and no attention mask: transformers reads off
these where examples meet, and masks them from one another (`masking_utils`, `find_packed_sequence_indices`). What fills
a batch up behind shorter sequences has position 0 at every token, and so is a sequence of its own each time.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pelton.errors import DataError
from pelton.tasks.completions import IGNORED, Completion

LEAK = 0.05
"""Share of a neighbour's full effect on an example above which a model is said not to keep packed examples apart."""


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Puts items into bins of one size: the longest first, each where the least is left (best-fit decreasing).

    Returns:
        For every bin the places of its items.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # what is left, and in which bin; sorted
    for item in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        place = bisect_left(free, (lengths[item], -1))
        if place == len(free):
            bins.append([])
            left, chosen = size, len(bins) - 1
        else:
            left, chosen = free.pop(place)
        bins[chosen].append(item)
        insort(free, (left - lengths[item], chosen))
    return bins


def pack(completions: Sequence[Completion], size: int) -> dict[str, list[list[int]]]:
    """Returns the columns of packed sequences: tokens, labels, positions that begin anew, and what examples lost."""
    packed = [
        [completions[place] for place in places] for places in best_fit([len(one.ids) for one in completions], size)
    ]
    return {
        "input_ids": [[token for one in group for token in one.ids] for group in packed],
        "labels": [[label for one in group for label in one.labels] for group in packed],
        "position_ids": [[place for one in group for place in range(len(one.ids))] for group in packed],
        "cut": [[one.cut for one in group] for group in packed],
        "lost": [[one.lost for one in group] for group in packed],
    }


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Returns rows of different lengths as one tensor, filled up on one side."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(
        tensors, batch_first=True, padding_value=value, padding_side="left" if left else "right"
    )


def require_packable(model: Any) -> None:
    """Raises DataError where a model lets packed examples see each other, tried out on two short ones."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise DataError(_refusal(model, "takes no position_ids"))
    ids = (torch.arange(8, device=model.device) * 7 + 3).remainder(model.config.vocab_size)[None]
    after = torch.arange(8, device=model.device)[None]
    packed = torch.where(after < 4, after, after - 4)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone, apart, joined = (
                model(input_ids=tokens, position_ids=places, use_cache=False).logits[:, -4:].float()
                for tokens, places in ((ids[:, 4:], after[:, :4]), (ids, packed), (ids, after))
            )
    finally:
        model.train(training)
    leak, reach = (apart - alone).abs().max(), (joined - alone).abs().max()
    if not bool(leak <= LEAK * reach):
        raise DataError(_refusal(model, f"let a neighbour change an example's logits by {leak:.2g}"))


def _refusal(model: Any, what: str) -> str:
    return (
        f"task.packing needs a model that keeps packed examples apart, but {type(model).__name__} {what}. "
        "Set task.packing=false."
    )


def collate_packed(features: Sequence[dict[str, Any]], filler: int) -> dict[str, Tensor]:
    """Makes one batch of packed sequences; `filler` is any token."""
    fillers = {"input_ids": filler, "labels": IGNORED, "position_ids": 0}
    return {name: pad([row[name] for row in features], value) for name, value in fillers.items()}
