"""Recording gate values: hooks that someone attaches and that remove themselves. `forward` stores nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pelton.gates.base import Gate

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("adapter", "block", "index", "method", "example", "token", "value")


class GateLog:
    """The gate values of the forwards that ran while it was recording."""

    def __init__(self) -> None:
        """Makes an empty log."""
        self._frames: list[tuple[str, str, tuple[str, ...], int, Tensor, Tensor | None]] = []
        self._order: dict[str, int] = {}
        self._seen: dict[tuple[str, str], int] = defaultdict(int)

    def __len__(self) -> int:
        """Returns how many gates have been seen open, over all forwards."""
        return len(self._frames)

    def add(self, name: str, gate: Gate, values: Tensor, mask: Tensor | None) -> None:
        """Takes in the values of one gate in one forward.

        Args:
            name: the gate's name in the model.
            gate: the gate.
            values: [B or 1, T or 1, M].
            mask: 1 for tokens and 0 for padding, [B, T], or None.
        """
        block, _, adapter = name.partition(".pelton.gates.")
        self._order.setdefault(block, len(self._order))
        first = -1 if gate.granularity == "static" else self._seen[block, adapter]
        self._seen[block, adapter] += values.shape[0]
        kept = None if mask is None else mask.detach().bool().cpu()
        self._frames.append((adapter, block, gate.methods, first, values.detach().float().cpu(), kept))

    def to_frame(self) -> pd.DataFrame:
        """Returns one row per adapter, block, example, token and method, with its value.

        `example` counts over all forwards; it is -1 where one value holds for all inputs. `token` is -1 where one value
        holds for the whole example. Padding has no rows.
        """
        import pandas as pd

        frames = [self._table(*frame) for frame in self._frames]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))

    def _table(
        self, adapter: str, block: str, methods: tuple[str, ...], first: int, values: Tensor, mask: Tensor | None
    ) -> pd.DataFrame:
        import numpy as np
        import pandas as pd

        rows, tokens, count = values.shape
        example = np.repeat(np.arange(rows) + first, tokens * count)
        token = (
            np.full(rows * tokens * count, -1) if tokens == 1 else np.tile(np.repeat(np.arange(tokens), count), rows)
        )
        table = pd.DataFrame(
            {
                "adapter": adapter,
                "block": block,
                "index": self._order[block],
                "method": np.tile(np.array(methods), rows * tokens),
                "example": example,
                "token": token,
                "value": values.flatten().numpy(),
            }
        )
        if mask is None or tokens == 1:
            return table
        return table[mask.expand(rows, tokens).reshape(-1).repeat_interleave(count).numpy()]

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
    gates = [(name, module) for name, module in model.named_modules() if isinstance(module, Gate)]
    handles = [gate.register_forward_hook(partial(_note, log, name)) for name, gate in gates]
    try:
        yield log
    finally:
        for handle in handles:
            handle.remove()


def _note(log: GateLog, name: str, gate: Gate, args: tuple[Any, ...], values: Tensor) -> None:
    if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
        log.add(name, gate, values, args[1])
