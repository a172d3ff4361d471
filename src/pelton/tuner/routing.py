"""Mixed batches: each row of a batch under an adapter of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper

from pelton.errors import unknown
from pelton.tuner.block import Route

if TYPE_CHECKING:
    from pelton.tuner.model import PeltonModel

BASE = "__base__"
"""PEFT's name for rows that the plain backbone serves."""


@contextmanager
def routed_batch(tuner: PeltonModel, names: Sequence[str], num_beams: int) -> Iterator[None]:
    """Runs what is inside with each row of the batch under its adapter.

    Args:
        tuner: the model.
        names: an adapter name, or "__base__", for each row.
        num_beams: how often generation repeats each row; an encoder runs before that.

    Raises:
        UnknownName: a name that is not an adapter.
    """
    for name in names:
        if name != BASE and name not in tuner.peft_config:
            raise unknown("adapter", name, [*tuner.peft_config, BASE])
    beams = [name for name in names for _ in range(num_beams)]
    encoder = _encoder_modules(tuner)
    handles = []
    try:
        for block in tuner.blocks():
            device = next(chain(block.parameters(), block.buffers()), torch.empty(0)).device
            block.routes = _routes(names if block in encoder else beams, device)
        for module in tuner.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                hook = partial(_pass_names, list(names if module in encoder else beams))
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for block in tuner.blocks():
            block.routes = None
        for handle in handles:
            handle.remove()


def _routes(names: Sequence[str], device: torch.device) -> list[Route]:
    served = dict.fromkeys(name for name in names if name != BASE)
    return [(n, torch.tensor([i for i, m in enumerate(names) if m == n], device=device)) for n in served]


def _encoder_modules(tuner: PeltonModel) -> set[Any]:
    config = getattr(tuner.model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return set()
    return set(tuner.model.get_encoder().modules())


def _pass_names(names: list[str], module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}
