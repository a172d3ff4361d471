"""Mixed batches: each row of a batch under an adapter of its own."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from pelton.errors import AdapterError, unknown
from pelton.tuner.flow import this_thread

if TYPE_CHECKING:
    from pelton.tuner.model import PeltonModel

BASE = "__base__"
"""PEFT's name for rows that the plain backbone serves."""

Route = tuple[str, Tensor | None]
"""An adapter and the rows of the batch that it serves; None means all rows."""

_MIXED = threading.RLock()
"""Mixed batches run one after the other: their routes are on the blocks. Other forwards go on beside them."""


@dataclasses.dataclass(frozen=True)
class Routes:
    """The adapters of a mixed batch.

    Attributes:
        served: each with its rows.
        count: how many rows the batch has.
        thread: which runs it.
    """

    served: list[Route]
    count: int
    thread: int

    @property
    def mine(self) -> bool:
        """Whether this thread runs the batch."""
        return torch.compiler.is_compiling() or self.thread == this_thread()

    def require_rows(self, count: int) -> None:
        """Raises AdapterError where the batch has another number of rows than there are names."""
        if count != self.count:
            raise AdapterError(
                f"adapter_names must name one adapter for each row: expected {count} names, but got {self.count}. In "
                "generation rows are repeated: give num_beams and num_return_sequences to generate, not elsewhere."
            )


@contextmanager
def routed_batch(tuner: PeltonModel, names: Sequence[str], repeats: int) -> Iterator[None]:
    """Runs what is inside with each row of the batch under its adapter.

    Args:
        tuner: the model.
        names: an adapter name, or "__base__", for each row.
        repeats: how often generation repeats each row; an encoder runs before that.

    Raises:
        AdapterError: names are no list, or not as many as rows.
        UnknownName: a name that is not an adapter.
    """
    if isinstance(names, str):
        raise AdapterError(f"adapter_names must be a list with one name for each row, but got {names!r}.")
    for name in names:
        if name != BASE and name not in tuner.peft_config:
            raise unknown("adapter", name, [*tuner.peft_config, BASE])
    beams = [name for name in names for _ in range(repeats)]
    encoder = _encoder_modules(tuner)
    handles = []
    _MIXED.acquire()
    try:
        for block in tuner.blocks():
            device = next(chain(block.parameters(), block.buffers()), torch.empty(0)).device
            block.routes = _routes(names if block in encoder else beams, device)
        for module in tuner.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                hook = partial(_pass_names, list(names if module in encoder else beams), this_thread())
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for block in tuner.blocks():
            block.routes = None
        for handle in handles:
            handle.remove()
        _MIXED.release()


def _routes(names: Sequence[str], device: torch.device) -> Routes:
    served = dict.fromkeys(name for name in names if name != BASE)
    rows = {n: torch.tensor([i for i, m in enumerate(names) if m == n], device=device) for n in served}
    return Routes(list(rows.items()), len(names), this_thread())


def _encoder_modules(tuner: PeltonModel) -> set[Any]:
    config = getattr(tuner.model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return set()
    return set(tuner.model.get_encoder().modules())


def _pass_names(
    names: list[str], thread: int, module: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    mine = torch.compiler.is_compiling() or thread == this_thread()
    return args, kwargs | {"adapter_names": names} if mine else kwargs
