"""Giving layers other weights, of any kind that `SCHEMES` knows, and counting what rounding takes.

What lies between a wanted weight and the one that a quantised layer can store is the rounding that `Lost` adds up.

Letters: O output features, I input features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from pelton.errors import AdapterError
from pelton.tuner.schemes import SCHEMES, Scheme


@dataclass(frozen=True)
class Lost:
    """What rounding to few bits took from weights.

    Attributes:
        layers: How many layers were rounded.
        largest: The largest difference of a weight from what it was to be.
        relative: The norm of all differences, as a share of the norm of the weights.
        of_change: The same as a share of the norm of what the adapter changes.
    """

    layers: int
    largest: float
    relative: float
    of_change: float

    def __str__(self) -> str:
        """Says it in words."""
        return (
            f"rounding moves the weights of {self.layers} layers by up to {self.largest:.2g}, {self.relative:.2%} of "
            f"their norm and {self.of_change:.0%} of what the adapter changes in them"
        )


@dataclass(frozen=True)
class Rounding:
    """The sums that `Lost` is made of, for one layer."""

    largest: float
    error: float
    wanted: float
    change: float

    @classmethod
    def of(cls, before: Tensor, wanted: Tensor, written: Tensor) -> Rounding:
        """Compares weights [O, I]."""
        gap = (written - wanted).double()
        squares = (float(some.double().square().sum()) for some in (gap, wanted, wanted - before))
        return cls(float(gap.abs().max()), *squares)


def lost(roundings: Iterable[Rounding | None]) -> Lost | None:
    """Adds up layers; None where none was rounded."""
    found = [rounding for rounding in roundings if rounding is not None]
    if not found:
        return None
    error, wanted, change = (sum(getattr(r, key) for r in found) for key in ("error", "wanted", "change"))
    of_change = math.sqrt(error / change) if change else 0.0
    return Lost(len(found), max(r.largest for r in found), math.sqrt(error / max(wanted, 1e-30)), of_change)


def scheme_of(layer: nn.Module, where: str) -> Scheme:
    """Returns how a layer stores its weight.

    Args:
        layer: A linear layer.
        where: Its name, for the message.

    Raises:
        AdapterError: the way is not known, or the layer cannot take another weight.
    """
    kind, weight = type(layer), type(getattr(layer, "weight", None))
    names = f"{kind.__module__}.{kind.__qualname__}", f"{weight.__module__.split('.')[0]}.{weight.__qualname__}"
    for scheme in SCHEMES:
        if names[0] in scheme.layers and names[1] in scheme.weights:
            if objection := scheme.objection(layer):
                raise AdapterError(f"{where} is a {kind.__name__} ({scheme.name}) that {objection}.")
            return scheme
    raise AdapterError(
        f"{where} is a {kind.__name__} whose weight is a {weight.__name__}: nothing is known of how it takes another "
        f"weight. Adapters merge into {', '.join(scheme.name for scheme in SCHEMES)}. Keep the adapter attached, or "
        "load the backbone in one of these."
    )


def put(layer: nn.Module, slot: str, value: Tensor, scheme: Scheme) -> None:
    """Gives a layer another weight or bias.

    Args:
        layer: The layer.
        slot: "weight" or "bias".
        value: What `Scheme.write` or `Scheme.keep` gave; for a bias, or an exact weight, any tensor of its shape.
        scheme: How the layer stores its weight.
    """
    old: nn.Parameter = getattr(layer, slot)
    if slot == "bias" or scheme.exact:
        old.data.copy_(value)
        return
    moved = value if value.device == old.device else value.to(old.device)
    new = moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
    new.requires_grad_(old.requires_grad)
    layer.register_parameter(slot, new)
    scheme.settle(layer)


def stored(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns the plain tensors that parameters are made of: one each, or the parts of quantised ones.

    Args:
        model: Holds the parameters.
        names: Theirs.

    Raises:
        AttributeError: there is no such parameter.
    """
    found: dict[str, Tensor] = {}
    for name in names:
        path, _, _ = name.rpartition(".")
        value = model.get_parameter(name)
        if type(value) is nn.Parameter:
            found[name] = value
        else:
            layer = model.get_submodule(path)
            found |= {f"{path}.{key}": part for key, part in scheme_of(layer, path).parts(layer).items()}
    return found
