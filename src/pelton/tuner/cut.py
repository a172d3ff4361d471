"""Which methods of an adapter are to go, and what it is without them; whoever prunes, when and for whatever reason.

What goes is a method in a block. Gates that compete (softmax) keep their values for what is left, so that taking out a
closed method changes nothing; constant gates lose its value with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pelton.errors import AdapterError
from pelton.gates import Gate, StaticGate
from pelton.gates.static import FixedGateModule
from pelton.tuner.block import GatedBlock, gate_of
from pelton.tuner.config import PeltonConfig
from pelton.tuner.model import PeltonModel
from pelton.tuner.recast import with_changes


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


def weighed(tuner: PeltonModel, name: str, importance: Mapping[str, Mapping[str, float]] | None = None) -> list[Entry]:
    """Returns an adapter's methods by block, the least important first.

    Args:
        tuner: Holds the adapter.
        name: Its name.
        importance: A number by block number and kind; the gate values when not given, which constant gates have. Of
            gates with stages those count at which a method is most open: no stage loses what it needs.

    Raises:
        AdapterError: a method has no number, or nan.
    """
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
                value = float(_most_open(gate)[number])
            elif spec.kind in importance.get(str(index), {}):
                value = float(importance[str(index)][spec.kind])
            elif not parameters_of(gated, name, spec.kind):
                continue  # nothing that a gradient could tell: it stays
            else:
                raise AdapterError(f"importance has no number for {spec.kind!r} in block {index}. Give one for each.")
            if math.isnan(value):
                raise AdapterError(
                    f"The importance of {spec.kind!r} in block {index} is nan, so what matters less is unknown. Weigh "
                    "it on data on which the loss is a number."
                )
            found.append(Entry(index, spec.kind, value, parameters_of(gated, name, spec.kind)))
    return sorted(found, key=lambda entry: entry.importance)


def _most_open(gate: StaticGate) -> Tensor:
    """Returns the gate values [M], or the largest of every stage."""
    return gate.ratios.amax(dim=0) if isinstance(gate, FixedGateModule) else gate.values().detach()


def parameters_of(gated: GatedBlock, adapter: str, kind: str) -> int:
    """Returns how many numbers a method has in a block."""
    return sum(p.numel() for p in gated.methods[adapter].get_submodule(kind).parameters())


def over_budget(entries: Sequence[Entry], budget: int) -> list[Entry]:
    """Returns the least important of some methods without which the others have at most `budget` parameters.

    Raises:
        AdapterError: the most important one alone has more.
    """
    left = sum(entry.parameters for entry in entries)
    for count, entry in enumerate(entries):
        if left <= budget:
            return list(entries[:count])
        if count == len(entries) - 1:
            break
        left -= entry.parameters
    if left <= budget:
        return list(entries[:-1])
    raise AdapterError(
        f"budget_params={budget} cannot be met: the most important method alone, {entries[-1].kind!r} in block "
        f"{entries[-1].block}, has {left} parameters. Give at least {left}."
    )


def without(config: PeltonConfig, gone: Sequence[Entry]) -> PeltonConfig:
    """Returns what a config is when methods have gone from blocks."""
    pruned = {block: list(kinds) for block, kinds in config.pruned.items()}
    for entry in gone:
        pruned.setdefault(str(entry.block), []).append(entry.kind)
    lost = tuple(f"{entry.block}.{entry.kind}." for entry in gone)
    sizes = {key: size for key, size in config.sizes.items() if not key.startswith(lost)} if lost else config.sizes
    return with_changes(config, pruned=pruned, sizes=sizes)


def left_of(tuner: PeltonModel, name: str, tensors: Mapping[str, Tensor], gone: Sequence[Entry]) -> dict[str, Tensor]:
    """Returns what is left of an adapter's tensors when methods have gone.

    Args:
        tuner: Holds the adapter as it was.
        name: Its name.
        tensors: As `adapter_tensors` names them; some may be missing.
        gone: The methods.
    """
    found = dict(tensors)
    for path, gated in tuner.named_blocks():
        if name not in gated.wirings:
            continue
        kinds = {entry.kind for entry in gone if entry.block == gated.block.index}
        lost = tuple(f"{path}.methods.{kind}." for kind in kinds)
        found = {key: value for key, value in found.items() if not lost or not key.startswith(lost)}
        last = len(kinds) == len(gated.wirings[name].methods)
        found = static_values(found, path, gate_of(gated, name), kinds, last)
    return found


def static_values(tensors: dict[str, Tensor], path: str, gate: Gate, gone: set[str], last: bool) -> dict[str, Tensor]:
    """Takes the values of pruned methods out of a constant gate; out of a block without methods, the whole gate."""
    inside = f"{path}.gates."
    if last:
        return {key: value for key, value in tensors.items() if not key.startswith(inside)}
    if not isinstance(gate, StaticGate) or not gone:
        return tensors
    left = [number for number, kind in enumerate(gate.methods) if kind not in gone]
    return {key: value[..., left] if key.startswith(inside) else value for key, value in tensors.items()}
