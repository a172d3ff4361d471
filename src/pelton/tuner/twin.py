"""Copies of a model that share its tensors: another structure over the same weights, at no cost of memory."""

from __future__ import annotations

import copy

from torch import nn

from pelton.tuner.controls import tuners


def twin(model: nn.Module) -> nn.Module:
    """Returns a copy of a model over the same parameters and buffers; what is attached or removed there stays there."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def plain_twin(model: nn.Module) -> nn.Module:
    """Returns the backbone of a model, over the same weights and without anything of Pelton in it."""
    other = twin(model)
    found = tuners(other)
    plain: nn.Module = found[0].unload() if found else other
    return plain
