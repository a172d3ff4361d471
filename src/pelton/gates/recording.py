"""Recording gate values: hooks that someone attaches and that remove themselves. `forward` stores nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from pelton.gates.base import Gate

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("adapter", "block", "index", "method", "example", "token", "value")


@dataclasses.dataclass(frozen=True)
class _Frame:
    """What one gate let through in one forward; `each` tells whether `values` [B or 1, T or 1, M] has one per token."""

    adapter: str
    block: str
    index: int
    methods: tuple[str, ...]
    each: bool
    first: int
    values: Tensor
    mask: Tensor | None

    def table(self) -> pd.DataFrame:
        """Returns the rows of `GateLog.to_frame`."""
        import numpy as np
        import pandas as pd

        rows, tokens, count = self.values.shape
        token = np.tile(np.repeat(np.arange(tokens), count), rows) if self.each else np.full(rows * count, -1)
        table = pd.DataFrame(
            {
                "adapter": self.adapter,
                "block": self.block,
                "index": self.index,
                "method": np.tile(np.array(self.methods), rows * tokens),
                "example": np.repeat(np.arange(rows) + self.first, tokens * count),
                "token": token,
                "value": self.values.flatten().numpy(),
            }
        )
        if self.mask is None:
            return table
        return table[self.mask.expand(rows, tokens).reshape(-1).repeat_interleave(count).numpy()]


class GateLog:
    """The gate values of the forwards that ran while it was recording."""

    def __init__(self) -> None:
        """Makes an empty log."""
        self._frames: list[_Frame] = []
        self._order: dict[tuple[str, int], int] = {}
        self._seen: dict[tuple[str, int], int] = defaultdict(int)

    def __len__(self) -> int:
        """Returns how many gates have been seen open, over all forwards."""
        return len(self._frames)

    def add(self, name: str, call: int, gate: Gate, values: Tensor, mask: Tensor | None) -> None:
        """Takes in the values of one gate in one forward.

        Args:
            name: the gate's name in the model.
            call: how often the gate has opened before in this forward; above 0 where layers share a block.
            gate: the gate.
            values: [B or 1, T or 1, M].
            mask: 1 for tokens and 0 for padding, [B, T], or None.
        """
        block, _, adapter = name.partition(".pelton.gates.")
        index = self._order.setdefault((block, call), len(self._order))
        first = -1 if gate.granularity == "static" else self._seen[name, call]
        self._seen[name, call] += values.shape[0]
        each = gate.granularity == "token"
        kept = mask.detach().bool().cpu() if each and mask is not None else None
        self._frames.append(
            _Frame(adapter, block, index, gate.methods, each, first, values.detach().float().cpu(), kept)
        )

    def to_frame(self) -> pd.DataFrame:
        """Returns one row per adapter, block, example, token and method, with its value.

        `index` numbers the blocks in the order in which they ran; a block that layers share has a number for each of
        them. `example` counts over all forwards; it is -1 where one value holds for all inputs. `token` is -1 where one
        value holds for the whole example. Padding has no rows.
        """
        import pandas as pd

        frames = [frame.table() for frame in self._frames]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))

    def to_parquet(self, path: str | Path) -> None:
        """Writes the frame as Parquet."""
        self.to_frame().to_parquet(path, index=False)


@contextmanager
def record_gates(model: nn.Module) -> Iterator[GateLog]:
    """Records the gate values of every forward inside the context.

    Recomputation by gradient checkpointing is not recorded twice.

    Example:
        with record_gates(model) as log:
            model(**batch)
        log.to_frame().groupby(["block", "method"]).value.mean()
    """
    log = GateLog()
    with listening(model, log):
        yield log


class Listener(Protocol):
    """Whoever takes in gate values: a `GateLog`, or a monitor."""

    def add(self, name: str, call: int, gate: Gate, values: Tensor, mask: Tensor | None) -> None:
        """Takes in the values of one gate in one forward; see `GateLog.add`."""


@contextmanager
def listening(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Tells a listener of every gate that opens inside the context; the hooks remove themselves."""
    calls = _Calls()
    gates = [(name, module) for name, module in model.named_modules() if isinstance(module, Gate)]
    handles = [gate.register_forward_hook(partial(_note, listener, calls, name)) for name, gate in gates]
    for module in _around(model, [name for name, _ in gates]):
        handles.append(module.register_forward_pre_hook(calls.enter))
        handles.append(module.register_forward_hook(calls.leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Calls:
    """Tells the model's forwards apart, and counts how often each gate opens in one of them."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.outermost: nn.Module | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Starts to count anew, unless `module` runs inside another."""
        if self.outermost is None:
            self.outermost = module
            self.count.clear()

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Notes that the forward is over."""
        if module is self.outermost:
            self.outermost = None


def _around(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """Returns every module that holds one of the named ones: whichever is called, a forward begins there."""
    parents = {name.rsplit(".", up)[0] for name in names for up in range(1, name.count(".") + 1)}
    return [model, *(model.get_submodule(parent) for parent in sorted(parents))]


def _note(listener: Listener, calls: _Calls, name: str, gate: Gate, args: tuple[Any, ...], values: Tensor) -> None:
    if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
        listener.add(name, calls.count[name], gate, _of_methods(gate, values), args[1])
        calls.count[name] += 1


def _of_methods(gate: Gate, values: Tensor) -> Tensor:
    """Returns the values of the methods, without those of units; a static gate that draws is told by its mean."""
    values = values[..., : len(gate.methods)]
    return values.mean(dim=0, keepdim=True) if gate.granularity == "static" else values
