"""Where low-rank factors begin: along the gradients of the backbone's weights, instead of at random.

With G = ∂L/∂W = Σ δ xᵀ over some training examples, what LoRA's first steps can do to W is G Aᵀ A: only what lies in
the span of A's rows. Random rows catch R / I of the gradient's energy, its leading right singular vectors most of it
(LoRA-GA, Wang et al. 2024, arXiv 2407.05000, section 3.2; here B stays zero, so that the model stays the backbone). The
same holds for the down-projection D of a bottleneck and its input; D gets each direction with both signs, since an
activation that is zero below zero would see half of it.

G itself is never formed: Gᵀ Ω with a few random columns Ω spans its leading right singular vectors nearly (Halko et al.
2011, arXiv 0909.4061, section 4), and takes [I, k] numbers a layer instead of [O, I].

Letters: I / O the in and out features of a place, R rank or bottleneck size, k columns of a sketch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from pelton.errors import AdapterError
from pelton.methods.bottleneck import BottleneckPart
from pelton.methods.lora import LoRAPart
from pelton.tuner.batches import inputs_of
from pelton.tuner.block import GatedBlock
from pelton.tuner.controls import evaluating, tuners
from pelton.tuner.model import PeltonModel
from pelton.tuner.plan import Edit

EXAMPLES = 512
OVERSAMPLING = 16


def initialize_from_gradients(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, examples: int = EXAMPLES, adapter: str | None = None
) -> int:
    """Turns the first factors of a fresh adapter's LoRA and bottlenecks to where the loss falls fastest.

    What the model computes stays the same, as the second factors are zero. Gradients of parameters, random states and
    training modes are left alone.

    Example:
        model = get_peft_model(backbone, PeltonConfig(task_type="SEQ_CLS"))
        pelton.initialize_from_gradients(model, train_dataloader)

    Args:
        model: A model with a fresh adapter that is at work.
        batches: Training inputs with labels, so that the model gives a loss.
        examples: About how many examples are enough.
        adapter: Its name; the active one when not given.

    Returns:
        How many parts were turned; parts of other kinds, and prefixes, start as they do.

    Raises:
        AdapterError: the adapter is not active, was trained already or has no gradients, or the model gives no finite
            loss; nothing is changed.
    """
    tuner, name = _adapter_of(model, adapter)
    sketches = list(_sketches(tuner, name))
    if not sketches:
        return 0
    seen = 0
    with _watching(tuner, sketches), evaluating(model), torch.enable_grad():
        for batch in batches:
            seen += _look(model, batch, sketches)
            if seen >= examples:
                break
    if not seen:
        raise AdapterError("No data: initialize_from_gradients needs at least one batch with labels.")
    found = [(sketch.factor, sketch.rows()) for sketch in sketches if sketch.product is not None]
    with torch.no_grad():
        for factor, rows in found:
            factor.copy_(rows)
    return len(found)


@dataclass
class _Sketch:
    """The sketch Gᵀ Ω of the gradient at one place, and the factor that will lie along it."""

    block: str
    path: str
    edit: Edit
    origin: str | None
    factor: nn.Parameter
    both: bool
    seed: int
    product: Tensor | None = None
    columns: Tensor | None = None
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    source: Tensor | None = None

    def see(self, x: Tensor, y: Tensor) -> None:
        """Keeps the input and the output of one forward; those of a slice are the layer's."""
        if y.requires_grad:
            self.inputs.append((y if self.both and self.origin is None else x).detach())
            self.outputs.append(y)

    def add(self, gradients: Iterable[Tensor | None]) -> None:
        """Adds x δᵀ Ω of every forward that was seen."""
        for x, gradient in zip(self.inputs, gradients, strict=True):
            if gradient is not None:
                delta = gradient[..., self.edit.start : self.edit.stop].flatten(0, -2).float()
                source = x[..., self.edit.start : self.edit.stop] if self.both and self.origin is None else x
                wide = source.flatten(0, -2).float()
                part = wide.t() @ (delta @ self._omega(delta))
                self.product = part if self.product is None else self.product + part
        self.inputs, self.outputs = [], []

    def _omega(self, delta: Tensor) -> Tensor:
        """Draws Ω [O, k] once."""
        if self.columns is None:
            size = min(2 * len(self.factor) + OVERSAMPLING, delta.shape[1])
            random = torch.Generator().manual_seed(self.seed)
            self.columns = torch.randn(delta.shape[1], size, generator=random).to(delta.device)
        return self.columns

    def rows(self) -> Tensor:
        """Returns the leading directions as rows as long as the factor's own are in the mean, [R, I].

        Where there are more rows than directions, the others keep their random values.
        """
        assert self.product is not None
        count, length = len(self.factor), self.factor.detach().norm(dim=1).mean()
        directions = torch.linalg.svd(self.product, full_matrices=False).U.t()  # [k, I], the strongest first
        if self.both:
            half = directions[: (count + 1) // 2]
            directions = torch.stack([half, -half], dim=1).flatten(0, 1)
        rows = self.factor.detach().clone()
        found = directions[:count]
        rows[: len(found)] = found * length
        return rows


def _adapter_of(model: nn.Module, adapter: str | None) -> tuple[PeltonModel, str]:
    found = tuners(model)
    if not found:
        raise AdapterError(f"{type(model).__name__} has no Pelton adapter. Attach one with peft.get_peft_model first.")
    tuner = found[0]
    name = tuner.active_adapters[0] if adapter is None else adapter
    if name not in tuner.active_adapters:
        raise AdapterError(f"Adapter {name!r} is not active, so it has no gradients. Call set_adapter({name!r}).")
    return tuner, name


def _sketches(tuner: PeltonModel, name: str) -> Iterator[_Sketch]:
    """Yields an empty sketch for every LoRA and bottleneck."""
    seed = 0
    for block, gated in tuner.named_blocks():
        if name not in gated.wirings:
            continue
        for (path, _), edits in gated.wirings[name].edits.items():
            for edit in edits:
                part = gated.part(name, edit.kind, edit.key)
                if isinstance(part, LoRAPart | BottleneckPart):
                    seed += 1
                    yield _sketch(block, gated, name, path, edit, part, seed)


def _sketch(
    block: str, gated: GatedBlock, name: str, path: str, edit: Edit, part: LoRAPart | BottleneckPart, seed: int
) -> _Sketch:
    narrow = isinstance(part, BottleneckPart)
    factor, up = (part.down.weight, part.up) if isinstance(part, BottleneckPart) else (part.A, part.B)
    if bool(up.detach().any()):
        raise AdapterError(
            f"Adapter {name!r} was trained already ({gated.block.name}, {edit.kind!r}): its first factors belong to "
            "what it learned. Initialize a fresh adapter."
        )
    origins = {site: where for where, site in gated.wirings[name].origins.items()}
    origin = origins[part.origin] if part.origin else None
    return _Sketch(block, path, edit, origin, cast(nn.Parameter, factor), narrow, seed)


@contextmanager
def _watching(tuner: PeltonModel, sketches: Iterable[_Sketch]) -> Iterator[None]:
    """Shows the sketches what passes at their places, until the context ends."""
    handles = []

    def watch(sketch: _Sketch) -> None:
        block = tuner.model.get_submodule(sketch.block)

        def source(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            sketch.source = args[0]

        def see(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            sketch.see(args[0] if sketch.source is None else sketch.source, output)

        if sketch.origin is not None:
            handles.append(block.get_submodule(sketch.origin).register_forward_hook(source))
        handles.append(block.get_submodule(sketch.path).register_forward_hook(see))

    try:
        for sketch in sketches:
            watch(sketch)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _look(model: nn.Module, batch: Mapping[str, Any], sketches: list[_Sketch]) -> int:
    """Runs one batch forward and backward; returns how many examples it has."""
    device = next(model.parameters()).device
    inputs = inputs_of(batch, device)
    loss = getattr(model(**inputs), "loss", None)
    if loss is None:
        raise AdapterError("The model gives no loss: initialize_from_gradients needs batches with labels.")
    if not bool(torch.isfinite(loss)):
        raise AdapterError(f"The loss is {float(loss.detach())}, so it falls in no direction. Look at the data.")
    outputs = [output for sketch in sketches for output in sketch.outputs]
    if not outputs:
        raise AdapterError(
            "There is no gradient at any part of the adapter: it is loaded for inference (pass is_trainable=True), or "
            "this runs under torch.inference_mode."
        )
    gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
    for sketch in sketches:
        sketch.add([next(gradients) for _ in sketch.outputs])
    return next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
