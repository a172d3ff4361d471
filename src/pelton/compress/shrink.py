"""Shrinking inside methods: fewer ranks, bottleneck units and prefix positions, where few of them do the work.

What a unit does is measured without data:

    LoRA        the squared singular values of B A (the best cut of a rank there is: Eckart and Young 1936)
    bottleneck  (‖row of D‖ · ‖column of U‖)²: how much a unit can add
    prefix      ‖value‖² of a position: what it adds where attention goes to it

`energy` keeps the fewest units that hold that share of their part's sum; `share` keeps that share of the units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pelton.compress.steps import adapter_of, take_step
from pelton.errors import AdapterError
from pelton.methods import Bottleneck, LoRA, Prefix, PrefixPart
from pelton.registry import require
from pelton.tuner.atomic import atomic
from pelton.tuner.block import GatedBlock
from pelton.tuner.model import PeltonModel
from pelton.tuner.prefixes import Projection
from pelton.tuner.recast import adapter_tensors, with_changes


@dataclass(frozen=True)
class Shrunk:
    """A part that has fewer units.

    Attributes:
        block: The block's number.
        kind: The method.
        key: The part, such as `attn_v`.
        before: Its units before.
        after: Those that are left.
        lost: The share of the part's energy that went.
    """

    block: int
    kind: str
    key: str
    before: int
    after: int
    lost: float


@atomic
def shrink(
    model: nn.Module, *, energy: float | None = None, share: float | None = None, adapter: str | None = None
) -> list[Shrunk]:
    """Takes units out of an adapter's LoRA, bottlenecks and prefixes; `revive` brings them back.

    Args:
        model: A model with an adapter.
        energy: Each part keeps the fewest units that hold this share of its energy.
        share: Each part keeps this share of its units, the strongest, and at least one.
        adapter: Its name; the active one when not given.

    Returns:
        The parts that have fewer units now.

    Raises:
        AdapterError: neither or both of `energy` and `share` are given, or no part has units; nothing is changed.
    """
    if (energy is None) == (share is None):
        raise AdapterError("Say how much is to stay: energy=0.95 of each part, or share=0.5 of its units.")
    wanted = energy if energy is not None else share
    assert wanted is not None
    require(0 < wanted <= 1, "0 < energy or share <= 1", **{"energy" if share is None else "share": wanted})
    tuner, name = adapter_of(model, adapter)
    tensors, sizes = adapter_tensors(tuner, name), dict(tuner.peft_config[name].sizes)
    found, seen = [], 0
    for path, gated, kind, key in _parts(tuner, name):
        seen += 1
        place = f"{path}.methods.{kind}.{key}"
        energies, order = _energies(tuner, path, gated, name, kind, key).sort(descending=True)
        count = _count(energies, energy) if energy is not None else max(1, math.ceil(wanted * len(energies)))
        if count < len(energies):
            here = {k: v for k, v in tensors.items() if k.startswith(f"{place}.")}
            tensors |= _cut(kind, gated.part(name, kind, key), place, here, order[:count])
            sizes[f"{gated.block.index}.{kind}.{key}"] = count
            lost = float(energies[count:].sum() / energies.sum().clamp_min(torch.finfo(energies.dtype).tiny))
            found.append(Shrunk(gated.block.index, kind, key, len(energies), count, lost))
    if not seen:
        raise AdapterError(f"Adapter {name!r} has no parts with units: only lora, bottleneck and prefix have.")
    if found:
        take_step(tuner, name, "shrink", with_changes(tuner.peft_config[name], sizes=sizes), tensors)
    return found


def _parts(tuner: PeltonModel, name: str) -> list[tuple[str, GatedBlock, str, str]]:
    """Returns block, kind and key of every part with units."""
    return [
        (path, gated, kind, key)
        for path, gated in tuner.named_blocks()
        if name in gated.wirings
        for kind, parts in cast(nn.ModuleDict, gated.methods[name]).items()
        if kind in (LoRA.kind, Bottleneck.kind, Prefix.kind)
        for key in cast(nn.ModuleDict, parts)
    ]


def _count(energies: Tensor, energy: float) -> int:
    """Returns how many of the largest energies hold a share of their sum."""
    held = energies.cumsum(dim=0)
    return min(len(energies), int((held < energy * held[-1]).sum()) + 1) if held[-1] > 0 else 1


@torch.no_grad()
def _energies(tuner: PeltonModel, path: str, gated: GatedBlock, name: str, kind: str, key: str) -> Tensor:
    """Returns what each unit of a part does."""
    part = gated.part(name, kind, key)
    if kind == LoRA.kind:
        _, s, _ = _svd(cast(Tensor, part.A), cast(Tensor, part.B))
        return s.square()
    if kind == Bottleneck.kind:
        down, up = cast(nn.Linear, part.down), cast(Tensor, part.up)
        reach: Tensor = down.weight.norm(dim=1) * up.norm(dim=0)
        return reach.square().cpu()
    attention = tuner.model.get_submodule(path).get_submodule(gated.block.attention)
    _, values = cast(PrefixPart, part).flat(Projection(attention, gated))
    return values.float().square().sum(dim=1).cpu()


def _svd(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the singular value decomposition of B A, cut to its rank, by way of R × R matrices."""
    qb, rb = torch.linalg.qr(b.detach().float().cpu())  # [O, R], [R, R]
    qa, ra = torch.linalg.qr(a.detach().float().cpu().t())  # [I, R], [R, R]
    u, s, v = torch.linalg.svd(rb @ ra.t())
    return qb @ u, s, v @ qa.t()


@torch.no_grad()
def _cut(kind: str, part: nn.Module, place: str, here: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    """Returns a part's tensors with the units that are kept, in their order."""
    if kind == LoRA.kind:
        u, s, v = _svd(cast(Tensor, part.A), cast(Tensor, part.B))
        root = s[kept].sqrt()
        return {f"{place}.A": root[:, None] * v[kept], f"{place}.B": u[:, kept] * root}
    order = kept.sort().values
    if kind == Bottleneck.kind:
        return {
            key: value.detach().cpu()[:, order] if key.endswith(".up") else value.detach().cpu()[order]
            for key, value in here.items()
        }
    positions = ("keys", "values", "tokens", "embedding")
    return {key: value.detach().cpu()[order] for key, value in here.items() if key.rpartition(".")[2] in positions}
