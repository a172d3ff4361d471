"""Which training examples come together, and in which order: by length, by token budget, by class.

Every order draws from a generator of its own, which is seeded anew for each epoch: a resumed run draws what an
uninterrupted one draws, and so does every process of a distributed one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler, WeightedRandomSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from pelton.errors import RecipeError
from pelton.training.recipe import TrainingSettings

WIDTH = 8
TOKENS = "input_ids"


class TokenBatches(Sampler[list[int]]):
    """Batches of examples of like length whose tokens, padding included, are at most a budget.

    Lengths are rounded up to multiples of 8. The examples of one rounded length are shuffled and cut into batches of as
    many as the budget holds at that length; those left over go to the next longer ones. Thus the number of batches is
    the same in every epoch, while their members and their order are not. In a distributed run a few batches come twice,
    so that every process has as many.
    """

    def __init__(self, lengths: Sequence[int] | NDArray[np.integer], tokens: int, processes: int = 1) -> None:
        """Sorts the examples by length.

        Raises:
            RecipeError: an example is longer than the budget.
        """
        longest = int(np.argmax(lengths))
        if lengths[longest] > tokens:
            raise RecipeError(
                f"training.batching.tokens={tokens} holds no batch of the longest training example, which has "
                f"{lengths[longest]} tokens (example {longest + 1} of {len(lengths)}). Raise it to {lengths[longest]} "
                "or more, or lower the task's max_length."
            )
        self.tokens, self.processes, self.generator = tokens, processes, torch.Generator()
        members: dict[int, list[int]] = defaultdict(list)
        for place, length in enumerate(lengths):
            members[min(-(-int(length) // WIDTH) * WIDTH, tokens)].append(place)
        self.members = dict(sorted(members.items()))
        self.count = -(-len(self._cut(shuffled=False)) // processes) * processes

    def __len__(self) -> int:
        """Returns the number of batches, of all processes together."""
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the batches of one epoch."""
        batches = self._cut(shuffled=True)
        order = torch.randperm(len(batches), generator=self.generator).tolist()
        for place in range(self.count):
            yield batches[order[place % len(order)]]

    def _cut(self, shuffled: bool) -> list[list[int]]:
        batches: list[list[int]] = []
        waiting: list[int] = []
        for width, places in self.members.items():
            if shuffled:
                order = torch.randperm(len(places), generator=self.generator).tolist()
                places = [places[place] for place in order]
            waiting, size = waiting + places, self.tokens // width
            whole = len(waiting) // size * size
            batches += [waiting[start : start + size] for start in range(0, whole, size)]
            waiting = waiting[whole:]
        return [*batches, waiting] if waiting else batches


class EachEpoch(TrainerCallback):  # type: ignore[misc]
    """Seeds the order of the examples at the start of each epoch."""

    def __init__(self, generator: torch.Generator, seed: int) -> None:
        """Takes a sampler's generator and the recipe's seed."""
        self.generator, self.seed = generator, seed

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seeds by the epoch, which a resumed run knows from its checkpoint."""
        self.generator.manual_seed(self.seed + int(state.epoch or 0))


def make_sampler(settings: TrainingSettings, features: Any, targets: Sequence[Any], processes: int) -> Any:
    """Makes the sampler that a recipe asks for; None where examples are drawn evenly, one by one.

    Args:
        settings: The recipe's.
        features: The encoded training examples.
        targets: What they are to be told as: classes, where they are drawn by class.
        processes: How many share the batches.

    Raises:
        RecipeError: the examples have no tokens to count, or one has too many.
    """
    batching = settings.batching
    if batching.oversample:
        return balanced(np.asarray(targets))
    if batching.tokens is not None:
        return TokenBatches(_lengths(features, "training.batching.tokens"), batching.tokens, processes)
    if settings.group_by_length:
        lengths = _lengths(features, "training.group_by_length").tolist()
        size = settings.batch_size * settings.gradient_accumulation
        return LengthGroupedSampler(size, lengths=lengths, generator=torch.Generator())
    return None


def balanced(classes: NDArray[np.integer]) -> WeightedRandomSampler:
    """Draws as many examples as there are, with replacement, every class as often as any other."""
    _, which, counts = np.unique(classes, return_inverse=True, return_counts=True)
    return WeightedRandomSampler((1 / counts[which]).tolist(), len(classes), generator=torch.Generator())


def feature_lengths(features: Any) -> NDArray[np.integer] | None:
    """Returns how many tokens each row of a `datasets.Dataset` has, without decoding rows; None where it has none."""
    if TOKENS not in features.column_names:
        return None
    table = features.select_columns([TOKENS]).with_format("arrow")[:]
    return np.asarray(pc.list_value_length(table[TOKENS]), dtype=np.int64)


def _lengths(features: Any, key: str) -> NDArray[np.integer]:
    lengths = feature_lengths(features)
    if lengths is None:
        raise RecipeError(
            f"{key} groups examples by their tokens, and this task's have none ({', '.join(features.column_names)})."
        )
    return lengths
