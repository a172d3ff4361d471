"""The gated block: the gate and the methods of every adapter, beside the modules of one transformer block.

It is added to the block as one more child, named `pelton`, and reaches the block's layers by forward hooks (`taps.py`),
so the backbone's modules, their names and its state dict stay as they are. In one forward of the block the gate opens
when the attention begins; the layers behind it then ask for what their methods add. All of that happens inside the
block's forward, hence inside its checkpointed region: recomputation opens the gate again for itself.

Letters: B batch, T tokens, D hidden, M methods. Gate values are float32, [B or 1, T or 1, M].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pelton.anatomy import Block
from pelton.errors import AdapterError, AnatomyError
from pelton.gates import Gate
from pelton.methods import Part
from pelton.tuner.flow import Flow, Flows, fit
from pelton.tuner.plan import BlockPlan, Edit, Edits, Wiring
from pelton.tuner.products import products
from pelton.tuner.routing import Route, Routes

if TYPE_CHECKING:
    from pelton.tuner.taps import Taps

P = TypeVar("P", bound=nn.Module)


class GatedBlock(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # peft is not typed
    """Holds what all adapters add to one transformer block."""

    adapter_layer_names = ("gates", "methods")
    taps: Taps

    def __init__(self, block: Block) -> None:
        """Makes a gated block without adapters."""
        nn.Module.__init__(self)
        self.block = block
        self.gates = nn.ModuleDict()
        self.methods = nn.ModuleDict()
        self.wirings: dict[str, Wiring] = {}
        self.off: frozenset[str] = frozenset()
        self.routes: Routes | None = None
        self.kept: list[tuple[str, Tensor, Tensor | None]] | None = None
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self._disable_adapters: bool = False
        self.flows = Flows()

    def add(self, adapter: str, plan: BlockPlan) -> None:
        """Takes in the gate and the parts of one more adapter."""
        self.gates[adapter] = plan.gate
        self.methods[adapter] = nn.ModuleDict({kind: nn.ModuleDict(parts) for kind, parts in plan.parts.items()})
        self.wirings[adapter] = plan.wiring

    def part(self, adapter: str, kind: str, key: str) -> Part:
        """Returns one part of an adapter."""
        parts = cast(nn.ModuleDict, self.methods[adapter])
        return cast(Part, cast(nn.ModuleDict, parts[kind])[key])

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes one adapter."""
        if adapter_name in self.wirings:
            del self.wirings[adapter_name]
            super().delete_adapter(adapter_name)

    @property
    def adapters_at_work(self) -> list[str]:
        """The active adapters, in order."""
        return self._active_adapter

    def routed(self) -> Iterator[Route]:
        """Yields the adapters at work in this block, each with its rows."""
        if self._disable_adapters:
            return
        everyone: list[Route] = [(name, None) for name in self._active_adapter]
        for name, rows in everyone if not self.mixed else self.routes.served:  # type: ignore[union-attr]
            if name in self.wirings:
                yield name, rows

    @property
    def mixed(self) -> bool:
        """Whether this thread runs a batch whose rows have adapters of their own."""
        return self.routes is not None and self.routes.mine

    def open(self, x: Tensor, mask: Tensor | None) -> None:
        """Computes the gate values of this forward.

        Args:
            x: the block's input, [B, T, D].
            mask: 1 for tokens and 0 for padding, [B, T]; None when nothing is padded.

        Raises:
            AdapterError: a mixed batch has not as many rows as there are names.
        """
        if self.mixed:
            self.routes.require_rows(x.shape[0])  # type: ignore[union-attr]
        values = self.flows.open(x.shape[0]).values
        for name, rows in self.routed():
            gate = self.gates[name]
            with _full_precision(x.device.type):
                if rows is not None:
                    mask_rows = None if mask is None else mask.expand(x.shape[:2])[rows]
                    values[name] = gate(x[rows], mask_rows)
                else:
                    values[name] = gate(x, mask)
            if self.kept is not None:
                self.kept.append((name, values[name], mask))

    def close(self) -> None:
        """Forgets the gate values and inputs of this forward."""
        self.flows.close()

    def _flow(self, path: str) -> Flow:
        flow = self.flows.here()
        if flow is None:
            raise AnatomyError(
                f"{path} in {self.block.name!r} runs before the attention {self.block.attention!r}, where gates open. "
                "Name other sites, or add a row for this architecture to pelton.anatomy.rows."
            )
        return flow

    def keep_input(self, path: str, x: Tensor) -> None:
        """Keeps a layer's input for parts at another site that read it."""
        for name, _ in self.routed():
            site = self.wirings[name].origins.get(path)
            if site is not None:
                self._flow(path).inputs[site] = x

    def edit(self, path: str, edits: Edits, y: Tensor, x: Tensor) -> Tensor:
        """Applies all parts that edit the input or the output of one layer.

        Args:
            path: the layer's name in the block.
            edits: which tensor is edited.
            y: that tensor, [B, T, features].
            x: the layer's input, [B, T, I].
        """
        for name, rows in self.routed():
            for edit in self.wirings[name].edits.get((path, edits), ()):
                if edit.kind in self.off:
                    continue
                part = self.part(name, edit.kind, edit.key)
                source = self._flow(path).inputs[part.origin] if part.origin else x
                gate = self._opening(name, edit.kind, edit.number)
                if rows is None:
                    z = self._product(name, edit, source)
                    y = _in_slice(part, y, source, self._fit(gate, y), edit, z)
                else:
                    at = self.rows_in(rows, y)
                    z = self._product(name, edit, source, at)
                    some = _in_slice(part, y[at], source[at], self._fit(gate, y[at]), edit, z)
                    y = y.index_copy(0, at, some)
        return y

    def _product(self, name: str, edit: Edit, x: Tensor, at: Tensor | None = None) -> Tensor | None:
        """Returns x · firstᵀ [B, T, R] of a part, computed with those of all parts that read x; None for one alone.

        Args:
            name: the adapter.
            edit: the part.
            x: the layer's input.
            at: the adapter's rows of it; None means all.
        """
        keys = self.wirings[name].together.get((edit.kind, edit.key))
        if keys is None:
            return None
        kept = self._flow(edit.key).products
        of, found = kept.get((name, keys), (None, {}))
        if of is not x:
            mine = x if at is None else x[at]
            found = products({key: self.part(name, edit.kind, key) for key in keys}, mine)
            kept[name, keys] = (x, found)
        return found[edit.key]

    def attends(self, name: str) -> bool:
        """Tells whether an adapter does anything inside the attention."""
        return any("attn" in spec.sites and spec.kind not in self.off for spec in self.wirings[name].methods)

    def inside(self, form: type[P], name: str, batch: Tensor) -> list[tuple[P, Tensor]]:
        """Returns what an adapter has inside the attention, each part with its gate values [B or 1, T or 1, 1].

        Args:
            form: `PrefixPart` or `DilatedPart`.
            name: the adapter.
            batch: any tensor with the attention's batch as its first dimension.
        """
        found, parts = [], cast(nn.ModuleDict, self.methods[name])
        wiring = self.wirings[name]
        for number, spec in zip(wiring.numbers, wiring.methods, strict=True):
            for part in cast(nn.ModuleDict, parts[spec.kind]).values():
                if isinstance(part, form) and spec.kind not in self.off:
                    found.append((part, self._fit(self._opening(name, spec.kind, number), batch)))
        return found

    def _opening(self, name: str, kind: str, number: int) -> Tensor:
        """Returns a method's gate values: [B or 1, T or 1, 1], or one for each of its units."""
        start, stop = gate_of(self, name).units.get(kind, (number, number + 1))
        return self._flow(kind).values[name][..., start:stop]

    def _fit(self, gate: Tensor, y: Tensor) -> Tensor:
        return fit(gate, y, self.block.windowed)

    def rows_in(self, rows: Tensor, y: Tensor) -> Tensor:
        """Turns rows of the batch into rows of examples × windows, or of examples × tokens."""
        if self.block.static:
            raise AdapterError(f"Rows cannot have adapters of their own in {self.block.name!r}: {self.block.static}.")
        return self._flow("").rows_in(rows, y)

    def get_base_layer(self) -> nn.Module:
        """Refused: PEFT looks through this for weight and bias, and a gated block wraps no layer."""
        raise AttributeError("a gated block wraps no layer")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves one adapter to the device of the block, as PEFT asks after loading onto the meta device."""
        if adapter_name in self.wirings:
            where = device or next(self.taps.attention.parameters()).device
            if where.type != "meta":
                self.gates[adapter_name].to(where)
                self.methods[adapter_name].to(where)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a gated block merges as a whole, by `merge_and_unload`."""
        raise NotImplementedError("Pelton merges by merge_and_unload only")

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the tensors of a forward out of copies and pickles."""
        return self.__dict__ | {"kept": None, "routes": None}

    def _replicate_for_data_parallel(self) -> GatedBlock:
        """Refused: replicas would share the hooks, and so the parameters, of the original."""
        raise AdapterError(
            "nn.DataParallel copies modules without what is hooked to them. Start one process for each GPU with "
            "torchrun or accelerate launch (DistributedDataParallel), or show one with CUDA_VISIBLE_DEVICES=0."
        )


def gate_of(block: GatedBlock, adapter: str) -> Gate:
    """Returns an adapter's gate in a block."""
    return cast(Gate, block.gates[adapter])


def _full_precision(device: str) -> AbstractContextManager[Any]:
    """Switches autocast off where it is on: it would run the gates' layers in half precision, whatever they are given.

    Where it is off nothing is switched, so that compiled and exported graphs stay what they are.
    """
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _in_slice(part: nn.Module, y: Tensor, x: Tensor, gate: Tensor, edit: Edit, z: Tensor | None = None) -> Tensor:
    """Applies a part to its slice of y; `z` is what `Part.first` gives of x, where it is there already."""
    given = {} if z is None else {"z": z}
    if edit.start is None:
        return part(y, x, gate, **given)  # type: ignore[no-any-return]
    edited = part(y[..., edit.start : edit.stop], x, gate, **given)
    return torch.cat([y[..., : edit.start], edited, y[..., edit.stop :]], dim=-1)
