"""How long models take, next to each other: rounds in which each runs once, in changing order.

Machines get faster and slower while one measures, so no two times are compared that were not taken in the same round.
What is reported is the median over rounds of a round's ratio, and the spread of these ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pelton.registry import require
from pelton.tuner.batches import inputs_of

Clock = Callable[[], float]
"""Gives the time in seconds, from any start."""


@dataclass(frozen=True)
class Ratio:
    """How long one thing takes, compared with another.

    Attributes:
        ratio: The median over rounds of its time ÷ the other's time.
        spread: The distance between the quartiles of these ratios.
        seconds: The median of its time in a round.
        reference: The median of the other's.
        rounds: How many there were.
    """

    ratio: float
    spread: float
    seconds: float
    reference: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
        """Compares the times of the same rounds; two at least."""
        ratios = [one / other for one, other in zip(seconds, reference, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(middle, high - low, statistics.median(seconds), statistics.median(reference), len(ratios))

    def __str__(self) -> str:
        """Says ratio and spread."""
        return f"{self.ratio:.3f} (spread {self.spread:.3f})"


Timer = Callable[[Sequence[nn.Module], nn.Module], list[Ratio]]
"""Compares the inference time of each of several models with that of one other, which comes last."""


def interleave(
    runs: Sequence[Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 1,
    settle: Callable[[], object] | None = None,
    clock: Clock = time.perf_counter,
) -> list[list[float]]:
    """Times several things next to each other.

    Args:
        runs: What is timed.
        rounds: How often each runs.
        warm_up: How often before, untimed.
        settle: Waits for what a run left under way, such as kernels on a GPU; part of the run.
        clock: Gives the time in seconds.

    Returns:
        The seconds of each run in each round.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(warm_up + rounds):
        order = [(turn // 2 + place) % len(runs) for place in range(len(runs))]
        for number in order if turn % 2 else reversed(order):  # each comes first and last, behind each of the others
            start = clock()
            runs[number]()
            if settle is not None:
                settle()
            if turn >= warm_up:
                seconds[number].append(clock() - start)
    return seconds


@dataclass(frozen=True)
class Stopwatch:
    """Times models at inference on given batches: a `Timer` that really measures, on this machine.

    Attributes:
        batches: The inputs of a round; all of them run in each.
        rounds: How many rounds; two at least.
        warm_up: Rounds before that do not count.
        clock: Gives the time in seconds.

    Raises:
        SpecError: there are no batches, or not two rounds.
    """

    batches: Sequence[Mapping[str, Any]]
    rounds: int = 15
    warm_up: int = 1
    clock: Clock = time.perf_counter

    def __post_init__(self) -> None:
        """Checks that there is something to time, and rounds to take quartiles of."""
        require(len(self.batches) > 0, "len(batches) > 0", batches=self.batches)
        require(self.rounds >= 2, "rounds >= 2", rounds=self.rounds)

    def __call__(self, models: Sequence[nn.Module], plain: nn.Module) -> list[Ratio]:
        """Compares each model with `plain`, in evaluation mode and without gradients; modes come back."""
        device = next(plain.parameters()).device
        cached = getattr(getattr(plain, "config", None), "use_cache", None)
        inputs = [inputs_of(batch, device) | ({"use_cache": False} if cached else {}) for batch in self.batches]
        everyone = [*models, plain]
        modes = {module: module.training for model in everyone for module in model.modules()}

        def run(model: nn.Module) -> Callable[[], None]:
            def all_batches() -> None:
                for some in inputs:
                    model(**some)

            return all_batches

        try:
            for model in everyone:
                model.eval()
            with torch.inference_mode():
                *ours, reference = interleave(
                    [run(model) for model in everyone],
                    rounds=self.rounds,
                    warm_up=self.warm_up,
                    settle=torch.cuda.synchronize if device.type == "cuda" else None,
                    clock=self.clock,
                )
        finally:
            for module, mode in modes.items():
                module.training = mode
        return [Ratio.of(seconds, reference) for seconds in ours]
