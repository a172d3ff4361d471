"""Exchanges what an adapter holds, in every block at once: what all passes that make adapters smaller are built on.

A pass says how the adapter is to look (a config) and which tensors it is to have. Everything is planned, built
and filled beside the model first; then the blocks take it in. Whatever goes wrong, the model is as it was before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pelton.anatomy import find_anatomy
from pelton.errors import AdapterError
from pelton.gates.static import FixedGateModule
from pelton.tuner.atomic import as_before
from pelton.tuner.block import GatedBlock
from pelton.tuner.config import PeltonConfig
from pelton.tuner.model import CHILD, PeltonModel
from pelton.tuner.plan import BlockPlan, Wiring, bind_parts, device_of, make_plan
from pelton.tuner.taps import Taps


def adapter_tensors(tuner: PeltonModel, adapter: str) -> dict[str, Tensor]:
    """Returns an adapter's tensors by `BLOCK.gates.…` and `BLOCK.methods.KIND.KEY.…`, without the adapter's name.

    They are the model's own, not copies.
    """
    found: dict[str, Tensor] = {}
    for path, gated in tuner.named_blocks():
        if adapter in gated.wirings:
            found |= _tensors(path, gated.gates[adapter], gated.methods[adapter])
    return found


def recast(tuner: PeltonModel, adapter: str, config: PeltonConfig, tensors: Mapping[str, Tensor]) -> None:
    """Gives an adapter another shape.

    Args:
        tuner: Holds the adapter.
        adapter: Its name.
        config: What it is to be.
        tensors: Its values, as `adapter_tensors` names them; those of constant gates come from the config.

    Raises:
        AdapterError: a tensor is missing, has another shape or has no place; nothing is changed.
        SpecError: as `get_peft_model` does; nothing is changed.
    """
    plans = {plan.block.name: plan for plan in make_plan(config, find_anatomy(tuner.model))}
    bind_parts(list(plans.values()), tuner.model)
    trained = [p.requires_grad for p in _parameters(tuner, adapter)]
    # Where nothing with weights is left (dilated attention, frozen gates), what comes back learns as a new one does.
    learns = any(trained) if trained else adapter in tuner.active_adapters and not config.inference_mode
    _fill(tuner, plans, tensors, learns)
    before = [path for path, gated in tuner.named_blocks() if adapter in gated.wirings]
    with as_before(tuner):
        for path in dict.fromkeys([*before, *plans]):
            _exchange(tuner, adapter, path, _Held.planned(plans[path]) if path in plans else None)
        tuner.peft_config[adapter] = config


@dataclass(frozen=True)
class _Held:
    """What one block is to hold of an adapter."""

    plan: BlockPlan
    gate: nn.Module
    methods: nn.Module
    wiring: Wiring

    @classmethod
    def planned(cls, plan: BlockPlan) -> _Held:
        methods = nn.ModuleDict({kind: nn.ModuleDict(parts) for kind, parts in plan.parts.items()})
        return cls(plan, plan.gate, methods, plan.wiring)


def _exchange(tuner: PeltonModel, adapter: str, path: str, held: _Held | None) -> None:
    """Puts in one block what an adapter is to hold there, or takes it out; connects the block's hooks anew."""
    parent = tuner.model.get_submodule(path)
    gated = cast(GatedBlock | None, getattr(parent, CHILD, None))
    if gated is not None:
        gated.taps.disconnect()
    elif held is None:
        return
    else:
        gated = _new_block(tuner, held.plan)
        parent.add_module(CHILD, gated)
    if held is not None:
        gated.gates[adapter], gated.methods[adapter], gated.wirings[adapter] = held.gate, held.methods, held.wiring
    elif adapter in gated.wirings:
        del gated.gates[adapter], gated.methods[adapter], gated.wirings[adapter]
    if not gated.wirings:
        delattr(parent, CHILD)
        return
    gated.taps = Taps(gated, parent)
    for name in gated.wirings:
        gated.taps.connect(parent, name)


def _new_block(tuner: PeltonModel, plan: BlockPlan) -> GatedBlock:
    """Makes a gated block for a block that has none, in the state of the others."""
    gated = GatedBlock(plan.block)
    gated._active_adapter = list(tuner.active_adapters)
    gated._disable_adapters = any(block._disable_adapters for block in tuner.blocks())
    gated.off = frozenset().union(*(block.off for block in tuner.blocks()))
    gated.train(tuner.training)
    return gated


@torch.no_grad()
def _fill(tuner: PeltonModel, plans: Mapping[str, BlockPlan], tensors: Mapping[str, Tensor], learns: bool) -> None:
    """Writes tensors into planned parts, on their blocks' devices."""
    left = dict(tensors)
    for path, plan in plans.items():
        held = _Held.planned(plan)
        device = device_of(tuner.model.get_submodule(path), plan.block)
        held.gate.to(device).train(tuner.training)
        held.methods.to(device).train(tuner.training)
        for key, place in _tensors(path, held.gate, held.methods).items():
            value = left.pop(key, None)
            if value is None and isinstance(held.gate, FixedGateModule) and key.startswith(f"{path}.gates."):
                continue
            if value is None or value.shape != place.shape:
                found = "missing" if value is None else f"{tuple(value.shape)}"
                raise AdapterError(f"{key} is to be {tuple(place.shape)}, but is {found}; nothing is changed.")
            place.copy_(value)
        for parameter in (*held.gate.parameters(), *held.methods.parameters()):
            parameter.requires_grad_(learns)
    if left:
        raise AdapterError(f"{len(left)} tensors have no place, such as {next(iter(left))}; nothing is changed.")


def _tensors(path: str, gate: nn.Module, methods: nn.Module) -> dict[str, Tensor]:
    parts = {f"{path}.gates": gate, f"{path}.methods": methods}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def _parameters(tuner: PeltonModel, adapter: str) -> list[nn.Parameter]:
    blocks = [gated for gated in tuner.blocks() if adapter in gated.wirings]
    return [p for g in blocks for part in (g.gates[adapter], g.methods[adapter]) for p in part.parameters()]


def with_changes(config: PeltonConfig, **changes: object) -> PeltonConfig:
    """Returns a copy of a config with some fields changed and checked anew."""
    new = copy.copy(config)
    for name, value in changes.items():
        setattr(new, name, value)
    saved, steps = new.saved, new.steps
    new.__post_init__()
    new.saved, new.steps = saved, steps
    return new
