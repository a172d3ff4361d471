"""Combining: several adapters of one backbone become one.

    average      Σ w_i τ_i, the weights made to sum to 1
    arithmetic   Σ w_i τ_i: task arithmetic (Ilharco et al. 2023, arXiv 2212.04089, section 2)
    ties         trim each τ_i to its largest entries, elect a sign for each entry, average what agrees (Yadav et al.
                 2023, arXiv 2306.01708, section 3)
    dare         drop entries of each τ_i at random and scale up the others, then Σ w_i τ_i (Yu et al. 2024, arXiv
                 2311.03099, section 3.1)

τ is what a part adds: for LoRA its whole product scaling · B A, which is then cut to a rank by its singular values
(averages of A and of B are not the average of B A); for all else the tensors (of (IA)³ against 1). Gates and heads are
averaged.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from pelton.compress.steps import adapter_of
from pelton.errors import AdapterError, unknown
from pelton.gates import FrozenGate, GateSpec
from pelton.methods import LoRA
from pelton.registry import require
from pelton.tuner.atomic import atomic
from pelton.tuner.config import PeltonConfig
from pelton.tuner.model import PeltonModel
from pelton.tuner.recast import adapter_tensors, recast, with_changes

How = Literal["average", "arithmetic", "ties", "dare"]
HOW = ("average", "arithmetic", "ties", "dare")


@dataclass(frozen=True)
class Combined:
    """What combining gave.

    Attributes:
        adapter: The new adapter's name.
        lost: By layer, the share of the LoRA product's energy (its squared Frobenius norm) that the rank cut off.
    """

    adapter: str
    lost: dict[str, float]

    @property
    def lost_in_all(self) -> float:
        """The mean share over layers; 0 without LoRA."""
        return sum(self.lost.values()) / len(self.lost) if self.lost else 0.0


@atomic
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    *,
    how: How = "average",
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
) -> Combined:
    """Makes a new adapter of several that a model holds; they stay as they are.

    Args:
        model: A `PeftModel` with the adapters.
        weights: How much each counts, by name.
        name: Of the new adapter.
        how: See the top of this file.
        density: The share of entries that `ties` and `dare` keep.
        rank: Of the new LoRA; the largest of theirs when not given.
        seed: Of what `dare` drops.

    Raises:
        AdapterError: an adapter does not exist, the name is taken, or the adapters differ in their methods, gates or
            sizes; nothing is changed.
    """
    tuner, _ = adapter_of(model, next(iter(weights), None))
    configs = {adapter: tuner.peft_config[adapter_of(model, adapter)[1]] for adapter in weights}
    if how not in HOW:
        raise unknown("way to combine", how, HOW)
    require(0 < density <= 1, "0 < density <= 1", density=density)
    require(rank is None or rank > 0, "rank > 0", rank=rank)
    require(sum(weights.values()) > 0, "sum of weights > 0", weights=dict(weights))
    if name in tuner.peft_config:
        raise AdapterError(f"There is an adapter {name!r} already. Choose another name, or delete it first.")
    _require_alike(configs)
    mix = _Mix(list(weights.values()), how, density, torch.Generator().manual_seed(seed))
    config, tensors, lost = _combined(tuner, configs, mix, rank)
    cast(Any, model).add_adapter(name, copy.copy(config))
    recast(tuner, name, with_changes(tuner.peft_config[name]), tensors)
    _combine_heads(tuner, list(weights), name, mix)
    return Combined(name, lost)


@dataclass(frozen=True)
class _Mix:
    """How tensors of several adapters become one."""

    weights: list[float]
    how: How
    density: float
    random: torch.Generator

    def mean(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the weighted mean."""
        both = zip(self.weights, tensors, strict=True)
        return torch.stack([weight * tensor for weight, tensor in both]).sum(dim=0) / sum(self.weights)

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns what is made of the adapters' contributions."""
        stacked = torch.stack([tensor.detach().float().cpu() for tensor in tensors])  # [adapters, …]
        weights = torch.tensor(self.weights).reshape(-1, *[1] * (stacked.ndim - 1))
        if self.how == "average":
            return (weights * stacked).sum(dim=0) / sum(self.weights)
        if self.how == "dare":
            kept = torch.rand(stacked.shape, generator=self.random) < self.density
            stacked = stacked * kept / self.density
        if self.how != "ties":
            return (weights * stacked).sum(dim=0)
        flat = stacked.flatten(1).abs()
        least = flat.sort(dim=1, descending=True).values[:, max(1, round(self.density * flat.shape[1])) - 1]
        stacked = torch.where(stacked.abs() >= least.reshape(weights.shape), stacked, 0.0)
        sign = (weights * stacked).sum(dim=0).sign()
        agree = weights * ((stacked.sign() == sign) & (stacked != 0))
        return (agree * stacked).sum(dim=0) / agree.sum(dim=0).clamp_min(torch.finfo(torch.float32).tiny)


def _require_alike(configs: Mapping[str, PeltonConfig]) -> None:
    """Refuses adapters whose tensors do not stand for the same things."""
    shapes = {name: _shape(config) for name, config in configs.items()}
    first = next(iter(shapes))
    for name, shape in shapes.items():
        different = [field for field in shape if shape[field] != shapes[first][field]]
        if different:
            raise AdapterError(
                f"Adapters {first!r} and {name!r} differ in their {' and '.join(different)}, so their tensors do not "
                "stand for the same things. Combine adapters of one configuration (ranks of LoRA may differ)."
            )


def _shape(config: PeltonConfig) -> dict[str, Any]:
    methods = [
        dataclasses.replace(spec, rank=1, alpha=1.0) if isinstance(spec, LoRA) else spec for spec in config.specs
    ]
    gate = FrozenGate() if isinstance(config.gate_spec, FrozenGate) else config.gate_spec
    sizes = {key: size for key, size in config.sizes.items() if key.split(".")[1] != LoRA.kind}
    pruned = {block: sorted(kinds) for block, kinds in config.pruned.items()}
    heads = sorted(config.modules_to_save or ())
    shape = {"methods": methods, "gate": gate, "pruned": pruned, "sizes": sizes, "folded": config.folded}
    return {**shape, "modules_to_save": heads}


def _combined(
    tuner: PeltonModel, configs: Mapping[str, PeltonConfig], mix: _Mix, rank: int | None
) -> tuple[PeltonConfig, dict[str, Tensor], dict[str, float]]:
    """Returns the config, the tensors and the lost energy of the new adapter."""
    each = [adapter_tensors(tuner, name) for name in configs]
    loras = [spec for config in configs.values() for spec in config.specs if isinstance(spec, LoRA)]
    first = next(iter(configs.values()))
    methods = list(first.specs)
    if loras:
        size = rank or max(spec.rank for spec in loras)
        methods = [
            dataclasses.replace(spec, rank=size, alpha=size * spec.alpha / spec.rank)
            if isinstance(spec, LoRA)
            else spec
            for spec in methods
        ]
    scales = [spec.alpha / spec.rank for spec in loras]
    tensors: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    sizes = {key: size for key, size in first.sizes.items() if key.split(".")[1] != LoRA.kind}
    for key in each[0]:
        mine = [some[key] for some in each]
        head, _, tail = key.partition(f".methods.{LoRA.kind}.")
        if tail.endswith(".A"):
            place = key.removesuffix(".A")
            product = mix.of([s * some[f"{place}.B"] @ some[key] for s, some in zip(scales, each, strict=True)])
            tensors[key], tensors[f"{place}.B"], lost[place] = _cut(product, size, scales[0])
            if tensors[key].shape[0] != size:
                index = next(g.block.index for path, g in tuner.named_blocks() if path == head)
                sizes[f"{index}.{LoRA.kind}.{tail.removesuffix('.A')}"] = tensors[key].shape[0]
        elif not tail:
            inside, start = ".methods." in key, 1.0 if ".methods.ia3." in key else 0.0
            tensors[key] = mix.of([tensor - start for tensor in mine]) + start if inside else mix.mean(mine)
    gate = _mean_gate([config.gate_spec for config in configs.values()], mix)
    config = with_changes(first, methods=methods, gate=gate, sizes=sizes)
    config.steps = ()
    return config, tensors, lost


def _cut(product: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, float]:
    """Returns A [R, I] and B [O, R] with scale · B A nearest to a product, and the share of its energy that is lost."""
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    energy = s.square().sum()
    lost = float(s[rank:].square().sum() / energy) if energy > 0 else 0.0
    return root[:, None] * v[:rank], u[:, :rank] * root / scale, lost


def _mean_gate(gates: Sequence[GateSpec], mix: _Mix) -> GateSpec:
    """Returns the first gate; frozen ones with the mean of their values."""
    frozen = [gate for gate in gates if isinstance(gate, FrozenGate)]
    if not frozen:
        return gates[0]
    if any(gate.stages is not None for gate in frozen):
        raise AdapterError("Gates with stages cannot be averaged. Freeze each adapter on one set of data.")
    values = {
        block: {kind: _mean([gate.values[block][kind] for gate in frozen], mix.weights) for kind in row}
        for block, row in frozen[0].values.items()
    }
    return FrozenGate(values)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


@torch.no_grad()
def _combine_heads(tuner: PeltonModel, names: Sequence[str], new: str, mix: _Mix) -> None:
    """Averages what was trained whole beside the adapters."""
    for path, module in tuner.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            heads = cast(Any, module.modules_to_save)
            for key, place in heads[new].state_dict().items():
                each = [heads[name].state_dict()[key] for name in names]
                if any(tensor.shape != place.shape for tensor in each):
                    raise AdapterError(
                        f"The adapters' {path} differ in shape, so they have no mean. Combine equal tasks."
                    )
                place.copy_(mix.mean(each))
