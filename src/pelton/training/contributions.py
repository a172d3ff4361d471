"""What each method contributes while a model learns: gate value × gradient norm, over a window of the last steps.

A method whose gate is open but whose weights get no gradient has nothing left to learn, and one behind a closed gate
does nothing: the product asks for both. In each block the products of a step are divided by their sum, so that 0.05 is
a twentieth of what the block's methods do.
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


class Contributions(TrainerCallback):  # type: ignore[misc]
    """Notes every step, on the device, and writes `contributions.json` when training ends.

    A resumed run's window begins anew.
    """

    def __init__(self, folder: RunFolder, window: int) -> None:
        """Keeps the last `window` steps."""
        self.folder = folder
        self.steps: deque[Tensor] = deque(maxlen=window)
        self.seen: dict[int, Tensor] = {}
        self.handles: list[RemovableHandle] = []
        self.blocks: list[GatedBlock] = []
        self.adapter = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Begins to watch the gates of the active adapter."""
        blocks = gated_blocks(model)
        self.adapter = blocks[0].adapters_at_work[0]
        self.blocks = [block for block in blocks if self.adapter in block.wirings]
        for number, block in enumerate(self.blocks):
            gate = gate_of(block, self.adapter)
            self.handles.append(gate.register_forward_hook(partial(self._see, number)))

    def _see(self, number: int, gate: Gate, args: tuple[Any, ...], values: Tensor) -> None:
        if torch.is_grad_enabled():
            self.seen[number] = values.detach().flatten(0, -2).mean(dim=0)  # [M]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Notes the products of a step, [methods of all blocks]."""
        rows = []
        for number, block in enumerate(self.blocks):
            wiring = block.wirings[self.adapter]
            norms = torch.stack([_norm(block, self.adapter, spec.kind) for spec in wiring.methods])
            gates = self.seen[number][list(wiring.numbers)] if number in self.seen else torch.zeros_like(norms)
            products = gates * norms
            rows.append(products / products.sum().clamp_min(torch.finfo(products.dtype).tiny))
        self.steps.append(torch.cat(rows))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stops watching, and writes the means over the window by block number and kind."""
        for handle in self.handles:
            handle.remove()
        if self.steps:
            means = iter(torch.stack(list(self.steps)).mean(dim=0).tolist())
            kinds = {str(b.block.index): [spec.kind for spec in b.wirings[self.adapter].methods] for b in self.blocks}
            self.folder.write(NAME, {index: {kind: next(means) for kind in row} for index, row in kinds.items()})


def _norm(block: GatedBlock, adapter: str, kind: str) -> Tensor:
    """Returns the norm of a method's gradients in a block."""
    parameters = list(block.methods[adapter].get_submodule(kind).parameters())
    gradients = [p.grad.norm() for p in parameters if p.grad is not None]
    return torch.stack(gradients).norm() if gradients else parameters[0].new_zeros(())
