"""An architecture: which methods each block has, and how large they are; and what it is as a recipe or on a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn

from pelton.anatomy import Anatomy, find_anatomy
from pelton.compress.steps import adapter_of, take_step
from pelton.errors import AdapterError
from pelton.gates import FixedGate
from pelton.gates.gumbel import GumbelGateModule
from pelton.methods import MethodSpec
from pelton.search.flops import parameters_of
from pelton.tuner.block import gate_of
from pelton.tuner.config import PeltonConfig
from pelton.tuner.model import PeltonModel
from pelton.tuner.plan import make_plan
from pelton.tuner.recast import adapter_tensors, with_changes

Choice = Mapping[str, int | None]
"""The size of each method that a block has, by kind; None where a method has one size."""


@dataclass(frozen=True)
class Architecture:
    """What every block has of some methods.

    Attributes:
        methods: The methods, each at its largest size and in all the blocks that may have it.
        blocks: For every block that has any: its methods and their sizes, by the block's number.
    """

    methods: tuple[MethodSpec, ...]
    blocks: Mapping[int, Choice]

    def specs(self, block: int) -> list[MethodSpec]:
        """Returns the methods of one block, as large as they are there."""
        here = self.blocks.get(block, {})
        return [sized(spec, here[spec.kind]) for spec in self.methods if spec.kind in here]

    def parameters(self, anatomy: Anatomy) -> int:
        """Returns how many parameters its methods have in all."""
        return sum(parameters_of(spec, block) for block in anatomy.blocks for spec in self.specs(block.index))

    def config(self, anatomy: Anatomy) -> PeltonConfig:
        """Returns it as an adapter with open gates.

        Raises:
            AdapterError: it has no methods at all.
        """
        kept = [self._in_its_blocks(spec) for spec in self.methods if self._where(spec.kind)]
        if not kept:
            raise AdapterError(
                "The architecture has no methods: nothing is worth its price. Lower the price, or train the head."
            )
        return PeltonConfig(methods=kept, gate=FixedGate(1.0), sizes=self._sizes(kept, anatomy))

    def settings(self, anatomy: Anatomy) -> dict[str, Any]:
        """Returns it as the `adapter` section of a recipe; without any methods it trains the head alone."""
        if not any(self.blocks.values()):
            return {"preset": "head"}
        config = self.config(anatomy)
        methods = [spec.to_dict() for spec in config.specs]
        return {"methods": methods, "gate": {"kind": "fixed", "value": 1.0}, "sizes": dict(config.sizes)}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        blocks = {str(block): dict(choice) for block, choice in sorted(self.blocks.items())}
        return {"methods": [spec.to_dict() for spec in self.methods], "blocks": blocks}

    def _where(self, kind: str) -> tuple[int, ...]:
        return tuple(block for block in sorted(self.blocks) if kind in self.blocks[block])

    def _in_its_blocks(self, spec: MethodSpec) -> MethodSpec:
        """Returns a method at the largest size that a block has, and in the blocks that have it."""
        where = self._where(spec.kind)
        sizes = [self.blocks[block][spec.kind] for block in where]
        largest = sized(spec, None if None in sizes else max(cast(list[int], sizes)))
        return cast(MethodSpec, dataclasses.replace(cast(Any, largest), layers=where))

    def _sizes(self, kept: list[MethodSpec], anatomy: Anatomy) -> dict[str, int]:
        """Returns the sizes of parts that are smaller than their method's, as `PeltonConfig.sizes` names them."""
        with init_empty_weights():
            plans = make_plan(PeltonConfig(methods=kept, gate=FixedGate(1.0)), anatomy)
        found: dict[str, int] = {}
        for plan in plans:
            for spec in plan.wiring.methods:
                size = self.blocks[plan.block.index][spec.kind]
                if size is not None and size != getattr(spec, str(spec.size)):
                    found |= {f"{plan.block.index}.{spec.kind}.{key}": size for key in plan.parts[spec.kind]}
        return found


def sized(spec: MethodSpec, size: int | None) -> MethodSpec:
    """Returns a method at a size; None leaves it as it is."""
    return spec if size is None or size == getattr(spec, str(spec.size)) else spec.resized(size)


def chosen(model: nn.Module, adapter: str | None = None) -> Architecture:
    """Returns the architecture that the gates of a supernet choose now.

    Raises:
        AdapterError: the adapter's gates do not choose.
    """
    tuner, name = adapter_of(model, adapter)
    blocks = {}
    for block, gate in choosing_gates(tuner, name).items():
        picked = [group[n - 1] for group, n in zip(gate.groups, gate.picks().tolist(), strict=True) if n]
        if picked:
            blocks[block] = {candidate.kind: candidate.size for candidate in picked}
    return Architecture(tuner.peft_config[name].specs, blocks)


def choosing_gates(tuner: PeltonModel, adapter: str) -> dict[int, GumbelGateModule]:
    """Returns an adapter's gates by block number, all of which choose."""
    gates = {block.block.index: gate_of(block, adapter) for block in tuner.blocks() if adapter in block.wirings}
    found = {index: gate for index, gate in gates.items() if isinstance(gate, GumbelGateModule)}
    if len(found) < len(gates) or not found:
        kind = tuner.peft_config[adapter].gate_spec.kind
        raise AdapterError(
            f"The gates of adapter {adapter!r} do not choose: they are {kind!r}. Attach it with GumbelGate."
        )
    return found


def derive(model: nn.Module, architecture: Architecture | None = None, *, adapter: str | None = None) -> Architecture:
    """Makes a supernet what it has chosen: closed methods and units go, open gates are constants, weights stay.

    In evaluation mode the model computes what it did, unless another architecture is given. `pelton.revive` takes it
    back.

    Args:
        model: A model with an adapter under a `GumbelGate`.
        architecture: Another than the gates choose, of the same methods.
        adapter: Its name; the active one when not given.

    Returns:
        The architecture.

    Raises:
        AdapterError: the adapter's gates do not choose, or nothing would be left; nothing is changed.
    """
    tuner, name = adapter_of(model, adapter)
    choosing_gates(tuner, name)
    found = chosen(model, name) if architecture is None else architecture
    anatomy = find_anatomy(tuner.model)
    wanted = found.config(anatomy)
    config = with_changes(
        tuner.peft_config[name], methods=wanted.methods, gate=wanted.gate, sizes=wanted.sizes, pruned={}
    )
    take_step(tuner, name, "derive", config, _inherited(tuner, name, config, anatomy))
    return found


def _inherited(tuner: PeltonModel, name: str, config: PeltonConfig, anatomy: Anatomy) -> dict[str, Tensor]:
    """Returns the first units of every part that stays: what a smaller size is made of."""
    tensors, found = adapter_tensors(tuner, name), {}
    with init_empty_weights():
        plans = make_plan(config, anatomy)
    for plan in plans:
        for kind, parts in plan.parts.items():
            for key, part in parts.items():
                for inside, place in part.state_dict().items():
                    path = f"{plan.block.name}.methods.{kind}.{key}.{inside}"
                    found[path] = tensors[path][tuple(slice(length) for length in place.shape)]
    return found
