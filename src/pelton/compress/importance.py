"""How much a method in a block matters: by gradients, or by taking it out. (How open its gate is is another question.)

taylor          mean over examples of |Σ_t g · ∂L/∂g|: what the loss would change by, to first order, if the gate
                closed (Molchanov et al. 2017, arXiv 1611.06440, section 2.2, with gates for channels)
leave_one_out   the score with all methods minus the score without this one
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pelton.compress.over import Batches, BlockValues
from pelton.compress.steps import adapter_of
from pelton.errors import AdapterError
from pelton.tuner.atomic import atomic
from pelton.tuner.batches import inputs_of
from pelton.tuner.block import GatedBlock, gate_of
from pelton.tuner.controls import evaluating


@atomic
def taylor(model: nn.Module, batches: Batches, *, adapter: str | None = None) -> BlockValues:
    """Returns each method's first-order importance, by block number and kind.

    Args:
        model: A model with an adapter that is at work; its parameters and their gradients are left alone.
        batches: Inputs with labels, so that the model gives a loss.
        adapter: Its name; the active one when not given.

    Raises:
        AdapterError: the model gives no loss, there are no batches of inputs by name, or the adapter is not active.
    """
    tuner, name = adapter_of(model, adapter)
    _require_active(tuner.active_adapters, name)
    blocks = [block for block in tuner.blocks() if name in block.wirings]
    sums = {id(block): torch.zeros(len(block.wirings[name].methods)).double() for block in blocks}
    device, examples = next(model.parameters()).device, 0
    with evaluating(model), torch.enable_grad(), _leaves(blocks, name) as leaves:
        for batch in batches:
            leaves.clear()
            inputs = inputs_of(batch, device)
            loss = getattr(model(**inputs), "loss", None)
            if loss is None:
                raise AdapterError("The model gives no loss: taylor needs batches with labels.")
            rows = next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
            seen = [(block, leaf) for block in blocks for leaf in leaves.get(id(block), [])]
            gradients = torch.autograd.grad(loss, [leaf for _, leaf in seen], allow_unused=True)
            for (block, leaf), gradient in zip(seen, gradients, strict=True):
                if gradient is not None:
                    change = (leaf.detach() * gradient).sum(dim=1)  # [B or 1, M]; the loss is a mean over rows
                    sums[id(block)] += rows * _by_method(change, block, name).abs().sum(dim=0).double().cpu()
            examples += rows
    if not examples:
        raise AdapterError("No data: taylor needs at least one batch with labels.")
    return {str(block.block.index): _by_kind(block, name, sums[id(block)] / examples) for block in blocks}


@atomic
def leave_one_out(model: nn.Module, score: Callable[[], float], *, adapter: str | None = None) -> BlockValues:
    """Returns by how much the score falls without each method, by block number and kind.

    Args:
        model: A model with an adapter that is at work.
        score: Evaluates the model as it is then, such as on validation rows; more is better.
        adapter: Its name; the active one when not given.
    """
    tuner, name = adapter_of(model, adapter)
    _require_active(tuner.active_adapters, name)
    whole, found = score(), {}
    for block in [block for block in tuner.blocks() if name in block.wirings]:
        row = {}
        for spec in block.wirings[name].methods:
            with _closed(block, name, spec.kind):
                row[spec.kind] = whole - score()
        found[str(block.block.index)] = row
    return found


def _require_active(active: list[str], name: str) -> None:
    if name not in active:
        raise AdapterError(f"Adapter {name!r} is not active, so it has no effect. Call set_adapter({name!r}).")


def _by_method(values: Tensor, block: GatedBlock, name: str) -> Tensor:
    """Sums values of a gate [B, …] over the units of each method that has them, [B, M]."""
    spans = [gate_of(block, name).span(spec.kind) for spec in block.wirings[name].methods]
    return torch.stack([values[:, start:stop].sum(dim=1) for start, stop in spans], dim=1)


def _by_kind(block: GatedBlock, name: str, values: Tensor) -> dict[str, float]:
    kinds = [spec.kind for spec in block.wirings[name].methods]
    return dict(zip(kinds, values.tolist(), strict=True))


@contextmanager
def _leaves(blocks: list[GatedBlock], name: str) -> Iterator[dict[int, list[Tensor]]]:
    """Makes the gate values of each forward leaves of the graph, and hands them out by block."""
    found: dict[int, list[Tensor]] = {}

    def cut(block: GatedBlock) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(gate: nn.Module, args: Any, values: Tensor) -> Tensor:
            leaf = values.detach().clone().requires_grad_()
            found.setdefault(id(block), []).append(leaf)
            return leaf

        return hook

    handles = [gate_of(block, name).register_forward_hook(cut(block)) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _closed(block: GatedBlock, name: str, kind: str) -> Iterator[None]:
    """Closes one method's gate for a while; the others stay as they are."""
    start, stop = gate_of(block, name).span(kind)

    def hook(gate: nn.Module, args: Any, values: Tensor) -> Tensor:
        places = torch.arange(values.shape[-1], device=values.device)
        return torch.where((places >= start) & (places < stop), 0.0, values)

    handle = gate_of(block, name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
