"""The steps that made an adapter smaller, and the way back.

Every pass leaves a `Step` with the adapter's config: what the adapter was before, and the tensors that are gone. Steps
are saved beside the adapter (`tuner/store.py`) and undone from the last to the first, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pelton.errors import AdapterError
from pelton.tuner.atomic import atomic
from pelton.tuner.config import PeltonConfig
from pelton.tuner.controls import tuners
from pelton.tuner.model import PeltonModel
from pelton.tuner.recast import adapter_tensors, recast, with_changes
from pelton.tuner.store import Step, digest

SHAPE = ("methods", "gate", "pruned", "sizes")
"""The fields of a config that a pass may change."""


def adapter_of(model: nn.Module, adapter: str | None) -> tuple[PeltonModel, str]:
    """Returns the tuner of a model, and the name of one adapter: the active one where none is named.

    Raises:
        AdapterError: there is no such adapter, or several are active.
    """
    found = tuners(model)
    if not found:
        raise AdapterError(f"{type(model).__name__} has no Pelton adapter. Attach one with peft.get_peft_model first.")
    tuner = found[0]
    if adapter is None:
        if len(tuner.active_adapters) != 1:
            raise AdapterError(
                f"Several adapters are active ({', '.join(tuner.active_adapters)}). Name one: adapter=…."
            )
        return tuner, tuner.active_adapters[0]
    if adapter not in tuner.peft_config:
        raise AdapterError(f"There is no adapter {adapter!r}. There are: {', '.join(tuner.peft_config)}.")
    return tuner, adapter


@atomic
def take_step(tuner: PeltonModel, adapter: str, name: str, config: PeltonConfig, tensors: Mapping[str, Tensor]) -> None:
    """Gives an adapter another shape, and keeps the way back.

    Args:
        tuner: Holds the adapter.
        adapter: Its name.
        name: Of the pass.
        config: What the adapter is to be.
        tensors: Its values; see `recast`.

    Raises:
        AdapterError: the tensors do not fit; nothing is changed.
    """
    old, before = tuner.peft_config[adapter], adapter_tensors(tuner, adapter)
    recast(tuner, adapter, config, tensors)
    after = adapter_tensors(tuner, adapter)
    kept = tuple(key for key in before if key in after and torch.equal(before[key], after[key]))
    gone = {key: value.detach().cpu().clone() for key, value in before.items() if key not in kept}
    shape = {field: old.to_dict()[field] for field in SHAPE}
    config.steps = (*old.steps, Step(name, shape, kept, gone, digest(after)))


@atomic
def revive(model: nn.Module, *, adapter: str | None = None, last: bool = False) -> list[str]:
    """Brings back what passes took from an adapter: bit for bit what it was.

    Args:
        model: A model with an adapter.
        adapter: Its name; the active one when not given.
        last: Undoes the last pass only, instead of all.

    Returns:
        The passes that were undone, the last one first.

    Raises:
        AdapterError: there is nothing to bring back, or the adapter was trained since; nothing is changed.
    """
    tuner, name = adapter_of(model, adapter)
    steps = list(tuner.peft_config[name].steps)
    if not steps:
        learned = "; what went in training was not kept" if tuner.peft_config[name].pruned else ""
        raise AdapterError(f"Adapter {name!r} has nothing to bring back: no pass has made it smaller{learned}.")
    tensors = adapter_tensors(tuner, name)
    undone: list[str] = []
    while steps and not (last and undone):
        step = steps.pop()
        if digest(tensors) != step.digest:
            raise AdapterError(
                f"Adapter {name!r} has changed since the pass {step.name!r}, so what that took away does not fit. "
                "Load the adapter as the pass left it, or go on without reviving."
            )
        tensors = {**{key: tensors[key] for key in step.kept}, **step.tensors}
        shape = step.shape
        undone.append(step.name)
    config = with_changes(tuner.peft_config[name], **shape)
    config.steps = tuple(steps)
    recast(tuner, name, config, tensors)
    return undone
