"""Pruning: methods that do not help leave the blocks where they do not. What goes takes its parameters and time along.

Which go, and what is left without them, is in `tuner/cut.py`; here is the pass, which `revive` takes back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from pelton.compress.budget import Measure, Pruned, within_latency
from pelton.compress.steps import adapter_of, take_step
from pelton.errors import AdapterError
from pelton.insight.latency import Ratio, Timer
from pelton.registry import require
from pelton.tuner.atomic import atomic
from pelton.tuner.cut import Entry, left_of, over_budget, weighed, without
from pelton.tuner.model import PeltonModel
from pelton.tuner.recast import adapter_tensors
from pelton.tuner.twin import plain_twin, twin

THRESHOLD = 0.05
"""What goes where nobody says how much: gates less open than this, or what has less than this share of the most."""


@atomic
def prune(
    model: nn.Module,
    *,
    threshold: float | None = None,
    keep: int | None = None,
    budget_params: int | None = None,
    budget_latency: float | None = None,
    timer: Timer | None = None,
    importance: Mapping[str, Mapping[str, float]] | None = None,
    adapter: str | None = None,
) -> Pruned:
    """Takes the least important methods out of the blocks; `revive` brings them back.

    One of four ways says how much goes. Without any, gates less open than 0.05 go; where `importance` is given, whose
    numbers have any size, what has less than 0.05 of the largest.

    Args:
        model: A model with an adapter.
        threshold: Everything less important goes.
        keep: So many stay, the most important ones.
        budget_params: The least important go until what is left of the methods has at most so many parameters.
        budget_latency: Methods go until inference takes at most so many times as long as with the plain backbone,
            such as 1.05; what goes is what helps least for the time it takes. The time is measured.
        timer: Measures it: `Stopwatch(batches)`.
        importance: A number by block number and kind, such as `taylor` or `leave_one_out` give; the gate values when
            not given, which constant gates have, and of all stages the largest.
        adapter: Its name; the active one when not given.

    Returns:
        What went, the least important first; its `latency` holds the times, where they were measured.

    Raises:
        AdapterError: nothing would be left, a budget cannot be met, or there is no importance to go by; nothing is
            changed.
        SpecError: an amount is no number, or too small; nothing is changed.
    """
    tuner, name = adapter_of(model, adapter)
    entries, latency = weighed(tuner, name, importance), None
    if not entries:
        raise AdapterError(
            f"Nothing of adapter {name!r} can be weighed: importance has no number for any of its methods. Give one "
            "for each, by block number and kind."
        )
    _require_one(threshold=threshold, keep=keep, budget_params=budget_params, budget_latency=budget_latency)
    if keep is not None:
        require(keep > 0, "keep > 0", keep=keep)
        gone = entries[: max(0, len(entries) - keep)]
    elif budget_params is not None:
        gone = over_budget(entries, budget_params)
    elif budget_latency is not None:
        require(0 < budget_latency < math.inf, "0 < budget_latency < inf", budget_latency=budget_latency)
        measure = _measuring(model, tuner, name, timer)
        stacks = {gated.block.index: gated.block.stack for gated in tuner.blocks()}
        gone, latency = within_latency(entries, stacks, budget_latency, measure)
    else:
        least = _least(entries, importance is not None) if threshold is None else threshold
        require(not math.isnan(least), "threshold is a number", threshold=least)
        gone = [entry for entry in entries if entry.importance < least]
    if len(gone) == len(entries):
        raise AdapterError(
            f"Nothing would be left of adapter {name!r}: the most important of its {len(entries)} methods has "
            f"{entries[-1].importance:.3g}. Lower the threshold below that, or take the adapter off with unload()."
        )
    if gone:
        _take(tuner, name, gone)
    return Pruned(gone, latency)


def _require_one(**asked: float | None) -> None:
    given = [key for key, value in asked.items() if value is not None]
    if len(given) > 1:
        raise AdapterError(f"{' and '.join(given)} exclude each other: say in one way how much is to go.")


def _least(entries: Sequence[Entry], relative: bool) -> float:
    """Returns the threshold where none is given."""
    return THRESHOLD * (max(0.0, entries[-1].importance) if relative else 1.0)


def _measuring(model: nn.Module, tuner: PeltonModel, name: str, timer: Timer | None) -> Measure:
    """Returns what times the model without some methods: copies over the same weights, pruned in earnest."""
    if timer is None:
        raise AdapterError("budget_latency is met by measuring: give timer=Stopwatch(batches), with typical batches.")
    if name not in tuner.active_adapters:
        raise AdapterError(f"Adapter {name!r} is not active, so it takes no time. Call set_adapter({name!r}).")
    plain = plain_twin(model)

    def trial(gone: Sequence[Entry]) -> nn.Module:
        other = twin(model)
        if gone:
            _take(adapter_of(other, name)[0], name, gone)
        return other

    def measure(sets: Sequence[Sequence[Entry]]) -> list[Ratio]:
        return timer([trial(gone) for gone in sets], plain)

    return measure


def _take(tuner: PeltonModel, name: str, gone: Sequence[Entry]) -> None:
    tensors = left_of(tuner, name, adapter_tensors(tuner, name), gone)
    take_step(tuner, name, "prune", without(tuner.peft_config[name], gone), tensors)
