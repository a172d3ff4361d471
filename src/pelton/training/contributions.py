"""What each method contributes while a model learns: gate value × gradient norm, over a window of steps.

A method whose gate is open but whose weights get no gradient has nothing left to learn, and one behind a closed gate
does nothing: the product asks for both. In each block the products of a step are divided by their sum, so that 0.05 is
a twentieth of what the block's methods do. A method without weights, such as dilated attention, has no product and is
left out: prune it by another importance.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pelton.gates import Gate
from pelton.training.folder import RunFolder
from pelton.tuner.block import GatedBlock, gate_of
from pelton.tuner.controls import gated_blocks

NAME = "contributions"


class Meter:
    """Sees the gates of the active adapter open, and multiplies them with the gradients of its methods.

    Attributes:
        places: The methods that are measured: block number and kind.
    """

    def __init__(self) -> None:
        """Watches nothing yet."""
        self.seen: dict[int, tuple[Tensor, int]] = {}
        self.handles: list[RemovableHandle] = []
        self.blocks: list[GatedBlock] = []
        self.watched: list[Gate] = []
        self.places: list[tuple[int, str]] = []
        self.adapter = ""

    def follow(self, model: nn.Module) -> bool:
        """Watches the gates that a model has now; tells whether they are others than before."""
        blocks = gated_blocks(model)
        adapter = blocks[0].adapters_at_work[0]
        blocks = [block for block in blocks if adapter in block.wirings]
        gates = [gate_of(block, adapter) for block in blocks]
        if len(gates) == len(self.watched) and all(a is b for a, b in zip(gates, self.watched, strict=True)):
            return False
        self.stop()
        self.adapter, self.blocks, self.watched = adapter, blocks, gates
        self.places = [(block.block.index, kind) for block in blocks for kind in _weighted(block, adapter)]
        self.handles = [gate.register_forward_hook(partial(self._see, n)) for n, gate in enumerate(gates)]
        return True

    def stop(self) -> None:
        """Stops watching."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.watched, self.seen = [], [], {}

    def _see(self, number: int, gate: Gate, args: tuple[Any, ...], values: Tensor) -> None:
        if torch.is_grad_enabled():
            total, count = self.seen.get(number, (0.0, 0))
            self.seen[number] = (total + _mean(gate, values.detach(), args[1]), count + 1)

    def measure(self) -> list[Tensor]:
        """Returns the products of a step for each block that has any, [methods], and forgets the gates that it saw.

        Call it when the gradients of a step are complete. Gate values are averaged over accumulated batches.
        """
        rows = []
        for number, block in enumerate(self.blocks):
            here = _weighted(block, self.adapter)
            if not here:
                continue
            norms = torch.stack([_norm(block, self.adapter, kind) for kind in here])
            total, count = self.seen.get(number, (None, 0))
            rows.append(norms * 0 if total is None else norms * (total / count)[list(here.values())])
        self.seen = {}
        return rows


def share(products: Tensor) -> Tensor:
    """Divides products by their sum; where that is 0 they stay 0."""
    return products / products.sum().clamp_min(torch.finfo(products.dtype).tiny)


class Contributions(TrainerCallback):  # type: ignore[misc]
    """Notes every step, on the device, and writes `contributions.json` when training ends.

    The window begins anew in a resumed run, and when methods go.
    """

    def __init__(self, folder: RunFolder, window: int) -> None:
        """Keeps the last `window` steps."""
        self.folder = folder
        self.steps: deque[Tensor] = deque(maxlen=window)
        self.meter = Meter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Watches the gates that are there."""
        if self.meter.follow(model):
            self.steps.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Notes the shares of a step, [methods of all blocks]."""
        if rows := self.meter.measure():
            self.steps.append(torch.cat([share(products) for products in rows]))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stops watching, and writes the means over the window by block number and kind."""
        if self.steps:
            means = torch.stack(list(self.steps)).mean(dim=0).tolist()
            self.folder.write(NAME, by_block(self.meter.places, means))
        self.meter.stop()


def by_block(places: list[tuple[int, str]], values: list[float]) -> dict[str, dict[str, float]]:
    """Returns numbers by block number, as text, and kind."""
    found: dict[str, dict[str, float]] = {}
    for (index, kind), value in zip(places, values, strict=True):
        found.setdefault(str(index), {})[kind] = value
    return found


def _mean(gate: Gate, values: Tensor, mask: Tensor | None) -> Tensor:
    """Averages gate values [B or 1, T or 1, M] over everything but padding, [M]."""
    if gate.granularity == "token" and mask is not None:
        weights = mask.expand(values.shape[:2]).to(values.dtype)[..., None]
        return (values * weights).sum(dim=(0, 1)) / weights.sum().clamp_min(1.0)
    return values.flatten(0, -2).mean(dim=0)


def _weighted(block: GatedBlock, adapter: str) -> dict[str, int]:
    """Returns the block's methods that have weights, each with its number among the gate values."""
    wiring = block.wirings[adapter]
    pairs = zip(wiring.methods, wiring.numbers, strict=True)
    return {s.kind: n for s, n in pairs if any(True for _ in block.methods[adapter].get_submodule(s.kind).parameters())}


def _norm(block: GatedBlock, adapter: str, kind: str) -> Tensor:
    """Returns the norm of a method's gradients in a block."""
    parameters = list(block.methods[adapter].get_submodule(kind).parameters())
    gradients = [p.grad.norm() for p in parameters if p.grad is not None]
    return torch.stack(gradients).norm() if gradients else parameters[0].new_zeros(())
