"""A PEFT layer as a part: its contribution at one place, gated.

PEFT's layer wraps the backbone's, calls it, and adds to what it gives or changes what it gets. Here it wraps a stand-in
instead, which hands back what the backbone's own layer has computed already:

    edits the output    y' = y + g · (layer(x, base → y) − y)
    edits the input     x' = x + g · (R x − x)         and, W being linear, y' = W x' + b = y + g · (W R x − W x)

So the backbone's layer runs once, closed gates give exactly what it gave, and open ones PEFT's own layer.

Letters: B batch, T tokens, I / O the in and out features of the place.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pelton.errors import AdapterError, SpecError
from pelton.methods import Part, Shape

if TYPE_CHECKING:
    from pelton.tuner.peft_methods import Peft

OWN = "own"
"""The name that PEFT's layers know their only adapter by."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """The backbone's layer as a part sees it: the rows of its weight and bias that are the part's."""

    layer: nn.Module
    rows: slice

    @property
    def weight(self) -> Tensor:
        """The weight, [O, I], whichever way round the layer keeps it."""
        weight = cast(Tensor, self.layer.weight)
        return (weight.t() if isinstance(self.layer, Conv1D) else weight)[self.rows]

    @property
    def bias(self) -> Tensor | None:
        """The bias, [O]."""
        bias = cast(Tensor | None, self.layer.bias)
        return None if bias is None else bias[self.rows]


class StandIn(nn.Linear):
    """Stands where PEFT's layer expects the backbone's; has its sizes and weights, and no tensor of its own."""

    def __init__(self, in_features: int, out_features: int) -> None:
        """Keeps the sizes."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.seen: Seen | None = None  # a plain object, so that no state dict holds the backbone's layer twice

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Returns what the backbone's layer gave, or without it the input as PEFT's layer changed it."""
        return x if y is None else y

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The backbone's weight, [O, I]; before the layer is known, zeros that take no memory."""
        return torch.zeros(()).expand(self.out_features, self.in_features) if self.seen is None else self.seen.weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The backbone's bias, [O]."""
        return None if self.seen is None else self.seen.bias


def make_layer(spec: Peft, in_features: int, out_features: int) -> Any:
    """Makes PEFT's layer of a method around a stand-in, with PEFT's own code.

    Raises:
        SpecError: PEFT refuses the values, such as more frequencies than the layer has weights.
    """
    inside = nn.Module()
    inside.layer = StandIn(in_features, out_features)
    inside.anchor = nn.Parameter(torch.empty(0))  # PEFT's LoRA asks for the device of some parameter
    config = spec.peft_config()
    try:
        PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](inside, config, OWN)
    except (ValueError, TypeError) as error:
        raise SpecError(
            f"PEFT cannot make {spec.kind!r} for a layer of {in_features} → {out_features} features: {error}"
        ) from error
    layer = inside.layer
    assert isinstance(layer, BaseTunerLayer)
    return layer


class PeftPart(Part):
    """PEFT's layer of one method at one place.

    Its tensors are registered here and the layer itself is not: PEFT looks for its layers everywhere in a model, to
    switch their adapters by names that this one does not know.
    """

    def __init__(self, spec: Peft, shape: Shape) -> None:
        """Makes the layer for one place."""
        super().__init__()
        self.spec = spec
        self.edits = spec.edits
        layer = make_layer(spec, shape.in_features, shape.out_features)
        self.held = (layer.float(),)  # a tuple is no module
        for name, child in layer.named_children():
            if name != "base_layer" and len(child):
                self.add_module(name, child)
        self.train(self.training)

    @property
    def layer(self) -> Any:
        """PEFT's layer."""
        return self.held[0]

    def bind(self, layer: nn.Module, rows: slice) -> None:
        """Lets a method that computes with the backbone's weights see them.

        Raises:
            AdapterError: the weights are not there as numbers, in a quantised layer.
        """
        if not self.spec.reads_weight:
            return
        weight = getattr(layer, "weight", None)
        plain = isinstance(layer, nn.Linear | Conv1D) and type(weight) in (Tensor, nn.Parameter)
        if not plain or not cast(Tensor, weight).is_floating_point() or cast(Tensor, weight).dim() != 2:
            raise AdapterError(
                f"{self.spec.kind!r} computes with the weights of the layer that it adapts, but a "
                f"{type(layer).__name__} does not hold them as a matrix of numbers. Load the backbone without "
                "quantisation, or use another method there."
            )
        self.layer.base_layer.seen = Seen(layer, rows)
        self.spec.start(self.layer)

    def train(self, mode: bool = True) -> PeftPart:
        """Puts the layer in training mode where it drops something.

        Otherwise it stays as it is in evaluation: some of PEFT's layers toss a coin in training even where nothing is
        to be dropped, which no compiled graph can hold.
        """
        self.layer.train(mode and self.spec.drops)
        super().train(mode)
        return self

    def forward(self, y: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Returns y + g · (what PEFT's layer makes of it − y); computed in float32, as the parameters are."""
        delta: Tensor
        if self.edits == "input":
            source = y.float()
            delta = self.layer(source) - source
        elif self.spec.reads_output:
            base = y.float()
            delta = self.layer(x.float(), y=base) - base
        else:  # the layer only adds: asked to add to nothing, it gives its contribution without a rounding error
            delta = self.layer(x.float(), y=torch.zeros((), device=y.device))
        return y + (gate * delta).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the weight and bias of the layer that does what layer and part do: both are affine in the input.

        So the images of the unit vectors are the columns of the new weight, and that of zero is the new bias.
        """
        training = self.training
        self.eval()
        try:
            unit = torch.eye(weight.shape[1], device=weight.device)
            if self.edits == "input":
                return weight @ self(unit, unit, gate).t(), bias
            zero = torch.zeros_like(unit[:1])
            base = torch.zeros_like(weight[:, 0]) if bias is None else bias
            shift = self(base[None], zero, gate)[0]
            moved = self(weight.t() + base, unit, gate) - shift
            return moved.t(), None if bias is None else shift
        finally:
            self.train(training)
