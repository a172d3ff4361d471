"""Freezing: gates that read the input become constants, chosen on data; the networks that computed them go.

The constant of a method in a block is the mean or the median of its gate values, over examples or tokens without
padding; or what a least-squares fit of the block's output asks for (`fit.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pelton.compress.fit import fitted
from pelton.compress.over import Batches, BlockValues, run_over
from pelton.compress.steps import adapter_of, take_step
from pelton.errors import AdapterError, unknown
from pelton.gates import FrozenGate, Gate, StaticGate
from pelton.tuner.atomic import atomic
from pelton.tuner.block import GatedBlock, gate_of
from pelton.tuner.model import PeltonModel
from pelton.tuner.recast import adapter_tensors, with_changes

Statistic = Literal["mean", "median", "fit"]
STATISTICS = ("mean", "median", "fit")


@atomic
def freeze_gates(
    model: nn.Module,
    batches: Batches | Mapping[str, Batches] | None = None,
    *,
    statistic: Statistic = "mean",
    adapter: str | None = None,
) -> FrozenGate:
    """Makes an adapter's gates constant, on every block at once.

    `revive` takes it back. The model's mode is left as it is; data runs through it in evaluation mode.

    Args:
        model: A model with an adapter.
        batches: Inputs of the model; or inputs by task, where each task is to have constants of its own, between which
            `set_stage` switches. Gates that do not read the input need none.
        statistic: "mean", "median", or "fit".
        adapter: Its name; the active one when not given.

    Returns:
        The gate that the adapter has now.

    Raises:
        AdapterError: the gates read the input and there is no data, or the adapter is not at work; nothing is changed.
    """
    if statistic not in STATISTICS:
        raise unknown("statistic", statistic, STATISTICS)
    tuner, name = adapter_of(model, adapter)
    if isinstance(batches, Mapping):
        if any(isinstance(value, Tensor) for value in batches.values()):
            raise AdapterError("Expected batches, or batches by task, but got one batch. Put it in a list: [batch].")
        stages = {task: _choose(model, tuner, name, some, statistic) for task, some in batches.items()}
        gate = FrozenGate(stages=stages)
    else:
        gate = FrozenGate(_choose(model, tuner, name, batches, statistic))
    left = {key: value for key, value in adapter_tensors(tuner, name).items() if ".gates." not in key}
    take_step(tuner, name, "freeze", with_changes(tuner.peft_config[name], gate=gate), left)
    return gate


def _choose(
    model: nn.Module, tuner: PeltonModel, name: str, batches: Batches | None, statistic: Statistic
) -> BlockValues:
    blocks = [block for block in tuner.blocks() if name in block.wirings]
    if any(gate_of(block, name).units for block in blocks):
        raise AdapterError("These gates choose the sizes of methods. Take what they chose first: pelton.derive(model).")
    static = [gate for block in blocks if isinstance(gate := gate_of(block, name), StaticGate)]
    if len(static) == len(blocks):
        both = zip(blocks, static, strict=True)
        return {str(block.block.index): _here(block, name, gate.values()) for block, gate in both}
    if name not in tuner.active_adapters:
        raise AdapterError(f"Adapter {name!r} is not active, so no data reaches its gates. Call set_adapter({name!r}).")
    if batches is None:
        raise AdapterError("These gates read the input: freeze_gates needs data, such as a DataLoader of batches.")
    batches = list(batches) if statistic == "fit" else batches
    kept: dict[int, list[Tensor]] = defaultdict(list)
    handles = [gate_of(block, name).register_forward_hook(partial(_keep, kept[id(block)])) for block in blocks]
    try:
        run_over(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    if not all(kept[id(block)] for block in blocks):
        raise AdapterError("No data reached the gates: expected at least one batch.")
    found = {}
    for block in blocks:
        values = torch.cat(kept[id(block)])  # [examples or tokens, M]
        middle = values.median(dim=0).values if statistic == "median" else values.double().mean(dim=0)
        found[str(block.block.index)] = _here(block, name, middle)
    return fitted(model, tuner, name, batches, found) if statistic == "fit" else found


def _here(block: GatedBlock, name: str, values: Tensor) -> dict[str, float]:
    """Returns the values of the methods that the block has, by kind."""
    wiring = block.wirings[name]
    return {
        spec.kind: min(1.0, max(0.0, float(values[number].detach())))
        for spec, number in zip(wiring.methods, wiring.numbers, strict=True)
    }


def _keep(kept: list[Tensor], gate: Gate, args: tuple[Any, ...], values: Tensor) -> None:
    """Keeps gate values [examples or tokens, M], those of padding left out."""
    mask, flat = args[1], values.detach().float().cpu()
    if gate.granularity == "token" and mask is not None:
        kept.append(flat[mask.expand(flat.shape[:2]).bool().cpu()])
    else:
        kept.append(flat.flatten(0, 1))
