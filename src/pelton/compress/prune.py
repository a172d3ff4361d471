"""Pruning: methods that do not help leave the blocks where they do not. What goes takes its parameters and time along.

What is pruned is a method in a block. Gates that compete (softmax) keep their values for what is left, so that pruning
a closed method changes nothing; constant gates lose the pruned method's value with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from pelton.compress.steps import adapter_of, take_step
from pelton.errors import AdapterError
from pelton.gates import Gate, StaticGate
from pelton.registry import require
from pelton.tuner.block import gate_of
from pelton.tuner.config import PeltonConfig
from pelton.tuner.model import PeltonModel
from pelton.tuner.recast import adapter_tensors, with_changes

THRESHOLD = 0.05


@dataclass(frozen=True)
class Entry:
    """A method in a block.

    Attributes:
        block: The block's number.
        kind: The method.
        importance: What it was weighed by.
        parameters: How many numbers it holds.
    """

    block: int
    kind: str
    importance: float
    parameters: int


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
    entries = _entries(tuner, name, importance)
    asked = {"threshold": threshold, "keep": keep, "budget_params": budget_params}
    given = [key for key, value in asked.items() if value is not None]
    if len(given) > 1:
        raise AdapterError(f"{' and '.join(given)} exclude each other: say in one way how much is to go.")
    if keep is not None:
        require(keep > 0, "keep > 0", keep=keep)
        gone = entries[: max(0, len(entries) - keep)]
    elif budget_params is not None:
        gone = _over_budget(entries, budget_params)
    else:
        gone = [entry for entry in entries if entry.importance < (THRESHOLD if threshold is None else threshold)]
    if len(gone) == len(entries):
        highest = entries[-1].importance
        raise AdapterError(
            f"Nothing would be left of adapter {name!r}: the most important of its {len(entries)} methods has "
            f"{highest:.3g}. Lower the threshold below that, or take the adapter off with unload()."
        )
    if gone:
        _take(tuner, name, gone)
    return gone


def _take(tuner: PeltonModel, name: str, gone: list[Entry]) -> None:
    config = tuner.peft_config[name]
    pruned = {block: list(kinds) for block, kinds in config.pruned.items()}
    for entry in gone:
        pruned.setdefault(str(entry.block), []).append(entry.kind)
    changed = with_changes(config, pruned=pruned, sizes=_left(config, gone))
    tensors = adapter_tensors(tuner, name)
    for path, gated in tuner.named_blocks():
        if name not in gated.wirings:
            continue
        kinds = {entry.kind for entry in gone if entry.block == gated.block.index}
        lost = tuple(f"{path}.methods.{kind}." for kind in kinds)
        tensors = {key: value for key, value in tensors.items() if not lost or not key.startswith(lost)}
        last = len(kinds) == len(gated.wirings[name].methods)
        tensors = static_values(tensors, path, gate_of(gated, name), kinds, last)
    take_step(tuner, name, "prune", changed, tensors)


def _entries(tuner: PeltonModel, name: str, importance: Mapping[str, Mapping[str, float]] | None) -> list[Entry]:
    """Returns the adapter's methods by block, the least important first."""
    found = []
    for gated in tuner.blocks():
        if name not in gated.wirings:
            continue
        gate, index, wiring = gate_of(gated, name), gated.block.index, gated.wirings[name]
        if importance is None and not isinstance(gate, StaticGate):
            raise AdapterError(
                "These gates read the input, so how open a method is depends on data. Give importance=taylor(model, "
                "batches), or freeze_gates(model, batches) first."
            )
        for spec, number in zip(wiring.methods, wiring.numbers, strict=True):
            if importance is None:
                assert isinstance(gate, StaticGate)
                value = float(gate.values()[number].detach())
            elif spec.kind in importance.get(str(index), {}):
                value = float(importance[str(index)][spec.kind])
            else:
                raise AdapterError(f"importance has no number for {spec.kind!r} in block {index}. Give one for each.")
            parameters = sum(p.numel() for p in gated.methods[name].get_submodule(spec.kind).parameters())
            found.append(Entry(index, spec.kind, value, parameters))
    return sorted(found, key=lambda entry: entry.importance)


def _over_budget(entries: list[Entry], budget: int) -> list[Entry]:
    """Returns the least important methods without which the others have at most `budget` parameters."""
    left = sum(entry.parameters for entry in entries)
    for count, entry in enumerate(entries):
        if left <= budget:
            return entries[:count]
        if count == len(entries) - 1:
            break
        left -= entry.parameters
    if left <= budget:
        return entries[:-1]
    raise AdapterError(
        f"budget_params={budget} cannot be met: the most important method alone, {entries[-1].kind!r} in block "
        f"{entries[-1].block}, has {left} parameters. Give at least {left}."
    )


def _left(config: PeltonConfig, gone: list[Entry]) -> dict[str, int]:
    """Returns the sizes of shrunk parts that are still there."""
    lost = tuple(f"{entry.block}.{entry.kind}." for entry in gone)
    return {key: size for key, size in config.sizes.items() if not key.startswith(lost)}


def static_values(tensors: dict[str, Tensor], path: str, gate: Gate, gone: set[str], last: bool) -> dict[str, Tensor]:
    """Takes the values of pruned methods out of a constant gate; out of a block without methods, the whole gate."""
    inside = f"{path}.gates."
    if last:
        return {key: value for key, value in tensors.items() if not key.startswith(inside)}
    if not isinstance(gate, StaticGate) or not gone:
        return tensors
    left = [number for number, kind in enumerate(gate.methods) if kind not in gone]
    return {key: value[..., left] if key.startswith(inside) else value for key, value in tensors.items()}
