"""Pruning: methods that do not help leave the blocks where they do not. What goes takes its parameters and time along.

Which go, and what is left without them, is in `tuner/cut.py`; here is the pass, which `revive` takes back.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pelton.compress.steps import adapter_of, take_step
from pelton.errors import AdapterError
from pelton.registry import require
from pelton.tuner.cut import Entry, left_of, over_budget, weighed, without
from pelton.tuner.recast import adapter_tensors

THRESHOLD = 0.05


def prune(
    model: nn.Module,
    *,
    threshold: float | None = None,
    keep: int | None = None,
    budget_params: int | None = None,
    importance: Mapping[str, Mapping[str, float]] | None = None,
    adapter: str | None = None,
) -> list[Entry]:
    """Takes the least important methods out of the blocks; `revive` brings them back.

    One of three ways says how much goes; without any it is `threshold=0.05`.

    Args:
        model: A model with an adapter.
        threshold: Everything less important goes.
        keep: So many stay, the most important ones.
        budget_params: The least important go until what is left of the methods has at most so many parameters.
        importance: A number by block number and kind, such as `taylor` or `leave_one_out` give; the gate values when
            not given, which constant gates have.
        adapter: Its name; the active one when not given.

    Returns:
        What went, the least important first.

    Raises:
        AdapterError: nothing would be left, a budget cannot be met, or there is no importance to go by; nothing is
            changed.
    """
    tuner, name = adapter_of(model, adapter)
    entries = weighed(tuner, name, importance)
    asked = {"threshold": threshold, "keep": keep, "budget_params": budget_params}
    given = [key for key, value in asked.items() if value is not None]
    if len(given) > 1:
        raise AdapterError(f"{' and '.join(given)} exclude each other: say in one way how much is to go.")
    if keep is not None:
        require(keep > 0, "keep > 0", keep=keep)
        gone = entries[: max(0, len(entries) - keep)]
    elif budget_params is not None:
        gone = over_budget(entries, budget_params)
    else:
        gone = [entry for entry in entries if entry.importance < (THRESHOLD if threshold is None else threshold)]
    if len(gone) == len(entries):
        highest = entries[-1].importance
        raise AdapterError(
            f"Nothing would be left of adapter {name!r}: the most important of its {len(entries)} methods has "
            f"{highest:.3g}. Lower the threshold below that, or take the adapter off with unload()."
        )
    if gone:
        tensors = left_of(tuner, name, adapter_tensors(tuner, name), gone)
        take_step(tuner, name, "prune", without(tuner.peft_config[name], gone), tensors)
    return gone
