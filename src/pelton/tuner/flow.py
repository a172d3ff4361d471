"""What a gated block keeps during one forward. Each thread has its own: a model may serve several at once.

Letters: B batch, T tokens, M methods.
"""

from __future__ import annotations

import dataclasses
import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor

COMPILED = 0
"""Stands for the thread in compiled graphs."""


@dataclasses.dataclass
class Flow:
    """One forward through a block.

    Attributes:
        batch: B.
        values: gate values by adapter, [B or 1, T or 1, M].
        inputs: the inputs of layers that parts at other sites read, by site.
        products: by adapter and parts: the input, and what each part's first factor makes of it.
    """

    batch: int
    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    inputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    products: dict[tuple[str, tuple[str, ...]], tuple[Tensor, dict[str, Tensor]]] = dataclasses.field(
        default_factory=dict
    )

    def rows_in(self, rows: Tensor, y: Tensor) -> Tensor:
        """Turns rows of the batch into rows of y: of examples × windows, or of examples × tokens."""
        if y.shape[0] == self.batch:
            return rows
        each = y.shape[0] // self.batch
        return (rows[:, None] * each + torch.arange(each, device=rows.device)).flatten()


class Flows:
    """The forwards that are under way in a block, by thread."""

    def __init__(self) -> None:
        """Begins with none."""
        self._by_thread: dict[int, Flow] = {}

    def open(self, batch: int) -> Flow:
        """Begins this thread's forward, in place of one that was not closed."""
        thread = this_thread()
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            # Recomputation by checkpointing does not reach the end of the block: clean up when backward ends.
            torch.autograd.Variable._execution_engine.queue_callback(partial(self.close, thread))
        flow = self._by_thread[thread] = Flow(batch)
        return flow

    def here(self) -> Flow | None:
        """Returns what this thread's forward keeps; None outside of one.

        Where a part of a block is compiled and the rest is not, one of them opened the flow and the other reads it.
        """
        flow = self._by_thread.get(this_thread(), self._by_thread.get(COMPILED))
        if flow is None and torch.compiler.is_compiling():
            return next(iter(self._by_thread.values()), None)
        return flow

    def close(self, thread: int | None = None) -> None:
        """Forgets the forward of a thread, or of this one."""
        self._by_thread.pop(this_thread() if thread is None else thread, None)
        self._by_thread.pop(COMPILED, None)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the tensors of a forward out of copies and pickles."""
        return {"_by_thread": {}}


def this_thread() -> int:
    """Returns the thread's number; a compiled graph is traced as if there were one only."""
    return COMPILED if torch.compiler.is_compiling() else threading.get_ident()


def fit(gate: Tensor, y: Tensor, windowed: bool) -> Tensor:
    """Gives gate values the layout of what they scale.

    Args:
        gate: [B or 1, T or 1, n].
        y: [B, T, features]; [B · windows, tokens, features] where attention is `windowed`; or [B · T, features].
        windowed: whether attention runs in windows.
    """
    if y.dim() == 2:
        return _flat(gate, y.shape[0])
    if not windowed or gate.shape[0] in (1, y.shape[0]):
        return gate
    return gate.repeat_interleave(y.shape[0] // gate.shape[0], dim=0)


def _flat(gate: Tensor, count: int) -> Tensor:
    """Flattens gate values [B or 1, T or 1, n] for tokens one after the other, [count or 1, n]."""
    if gate.shape[0] == gate.shape[1] == 1:
        return gate[0]
    if gate.shape[1] == 1:
        return gate[:, 0].repeat_interleave(count // gate.shape[0], dim=0)
    return gate.expand(count // gate.shape[1], -1, -1).flatten(0, 1)
