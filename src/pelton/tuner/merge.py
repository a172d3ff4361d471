"""Folding adapters into the backbone's weights: exact where gates are static and methods linear in their layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pelton.errors import AdapterError
from pelton.gates import StaticGate
from pelton.methods import METHODS, BitFit
from pelton.tuner.block import GatedBlock
from pelton.tuner.plan import EDITS, Edit, Edits
from pelton.tuner.quantised import Rounding, put, scheme_of
from pelton.tuner.schemes import Scheme


@dataclass(frozen=True)
class Change:
    """A weight or a bias of a layer, as it is to be.

    Attributes:
        layer: The layer.
        slot: "weight" or "bias".
        value: What it takes, as it is stored.
        scheme: How the layer stores its weight.
        rounding: What storing it in few bits takes; None where nothing is rounded.
    """

    layer: nn.Module
    slot: str
    value: Tensor
    scheme: Scheme
    rounding: Rounding | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that is there now."""
        return cast(nn.Parameter, getattr(self.layer, self.slot))

    def kept(self) -> Tensor:
        """Returns what is there now, to be put back."""
        whole = self.slot == "bias" or self.scheme.exact
        return self.parameter.detach().clone() if whole else self.scheme.keep(self.layer)

    def write(self) -> None:
        """Puts the value in its place."""
        put(self.layer, self.slot, self.value, self.scheme)

    def put_back(self, kept: Tensor) -> None:
        """Puts back what `kept` gave."""
        put(self.layer, self.slot, kept, self.scheme)


def check_foldable(gated: GatedBlock, block: nn.Module, adapters: Sequence[str]) -> None:
    """Raises AdapterError unless the adapters fold exactly, and whole, into the layers of a block."""
    for name in adapters:
        if name not in gated.wirings:
            continue
        check_static(gated, name)
        for spec in gated.wirings[name].methods:
            if not spec.foldable:
                raise AdapterError(
                    f"Adapter {name!r} holds {spec.kind!r}, which is not a change of the backbone's weights. Only "
                    f"adapters of foldable methods merge ({', '.join(k for k in METHODS if METHODS[k].foldable)}); "
                    "keep this one attached."
                )
        check_layers(gated, block, name)


def check_static(gated: GatedBlock, name: str) -> None:
    """Raises AdapterError where an adapter's gate reads the input."""
    gate = gated.gates[name]
    if not isinstance(gate, StaticGate):
        raise AdapterError(
            f"Adapter {name!r} has gates that read the input ({gate.granularity!r}), so no constant weight equals it. "
            "Freeze the gates first (pelton.freeze_gates), or train with ScalarGate or FixedGate."
        )


def check_layers(gated: GatedBlock, block: nn.Module, name: str) -> None:
    """Raises AdapterError where a layer that foldable methods edit cannot take them in."""
    foldable = {spec.kind for spec in gated.wirings[name].methods if spec.foldable}
    for (path, _), edits in gated.wirings[name].edits.items():
        if not any(edit.kind in foldable for edit in edits):
            continue
        layer = block.get_submodule(path)
        where = f"{gated.block.name}.{path}"
        scheme_of(layer, where)
        if cast(nn.Linear, layer).bias is None and any(edit.kind == BitFit.kind for edit in edits):
            raise AdapterError(
                f"Adapter {name!r} trains a bias for {where}, which has none to merge into. Keep the adapter attached, "
                "or leave the site out of BitFit."
            )


def check_untied(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Raises AdapterError where a weight that is to change is also another layer's."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for parameter in parameters:
        if len(set(names[id(parameter)])) > 1:
            raise AdapterError(
                f"{' and '.join(sorted(set(names[id(parameter)])))} are one tied weight: folding into one would change "
                "the other. Leave that site out of the adapter, or keep the adapter attached."
            )


@torch.no_grad()
def fold_block(gated: GatedBlock, block: nn.Module, adapters: Sequence[str], check: bool = False) -> Iterator[Change]:
    """Yields each weight and bias of a block that changes; writes nothing.

    Methods that do not fold are passed over. A quantised weight that no method changes is left alone.

    Args:
        gated: the gated block.
        block: the transformer block it stands in.
        adapters: the adapters to fold, in order.
        check: refuse values that are not finite.
    """
    wirings = [gated.wirings[name] for name in adapters if name in gated.wirings]
    layers: dict[str, None] = {
        path: None
        for wiring in wirings
        for (path, _), edits in wiring.edits.items()
        if any(METHODS[edit.kind].foldable for edit in edits)
    }
    for path in layers:
        layer = cast(nn.Linear, block.get_submodule(path))
        scheme = scheme_of(layer, f"{gated.block.name}.{path}")
        weight = scheme.read(scheme.keep(layer))
        before = None if scheme.exact else weight.clone()
        bias: Tensor | None = None if layer.bias is None else layer.bias.detach().float().clone()
        for name, edit in _in_order(gated, path, adapters):
            weight, bias = _fold_edit(gated, name, edit, weight, bias)
        if check and not all(bool(torch.isfinite(t).all()) for t in (weight, bias) if t is not None):
            raise AdapterError(
                f"Merging into {gated.block.name}.{path} gives values that are not finite; nothing merged."
            )
        if before is None:
            yield Change(layer, "weight", scheme.write(layer, weight), scheme)
        elif not torch.equal(before, weight):
            yield _requantised(layer, scheme, before, weight)
        if bias is not None:
            yield Change(layer, "bias", bias, scheme)


def _requantised(layer: nn.Module, scheme: Scheme, before: Tensor, wanted: Tensor) -> Change:
    """Quantises a weight [O, I] as the layer does, and says what that takes."""
    value = scheme.write(layer, wanted)
    return Change(layer, "weight", value, scheme, Rounding.of(before, wanted, scheme.read(value)))


def _in_order(gated: GatedBlock, path: str, adapters: Sequence[str]) -> list[tuple[str, Edit]]:
    """Returns the foldable edits of a layer with their adapters, in the order in which they go into its weight.

    What edits the output reads the edited input, so inputs come last; and of those the one that is nearest to the
    layer, which is applied last, comes first.
    """
    found: dict[Edits, list[tuple[str, Edit]]] = {
        edits: [
            (name, edit)
            for name in adapters
            if name in gated.wirings
            for edit in gated.wirings[name].edits.get((path, edits), ())
            if edit.kind not in gated.off and METHODS[edit.kind].foldable
        ]
        for edits in EDITS
    }
    return [*found["output"], *reversed(found["input"])]


def _fold_edit(
    gated: GatedBlock, name: str, edit: Edit, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    part, gate = gated.part(name, edit.kind, edit.key), gated.gates[name]
    assert isinstance(gate, StaticGate)
    rows = slice(edit.start, edit.stop)
    new_weight, new_bias = part.fold(weight[rows], None if bias is None else bias[rows], gate.values()[edit.number])
    weight[rows] = new_weight
    if bias is not None and new_bias is not None:
        bias[rows] = new_bias
    return weight, bias
