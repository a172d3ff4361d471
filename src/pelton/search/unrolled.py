"""The second-order form of bilevel search: gates look one step of the weights ahead.

DARTS (Liu et al. 2018, arXiv 1806.09055, section 2.3, equations 6 to 8), with w the weights, a the gates' logits and ξ
the learning rate of each weight:

    w'       = w − ξ ∇_w L_train(w, a)
    gradient = ∇_a L_held(w', a) − (∇_a L_train(w⁺, a) − ∇_a L_train(w⁻, a)) / 2ε
    w±       = w ± ε v,    v = ξ ∇_w' L_held(w', a),    ε = 0.01 / ‖v‖

The first order leaves the second term out, and takes w for w'. The virtual step is plain gradient descent, whatever the
optimiser is, along the gradient that the trainer has just computed; the difference is taken on training rows drawn like
the held-out ones. Both of its sides draw the same noise and dropout. It costs three more passes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

EPSILON = 0.01

Loss = Callable[[nn.Module, int], Tensor]


def unrolled_gradients(
    model: nn.Module,
    logits: Sequence[nn.Parameter],
    rates: Sequence[tuple[nn.Parameter, float]],
    step: int,
    held: Loss,
    train: Loss,
) -> tuple[Tensor, list[Tensor]]:
    """Returns the held-out loss after a virtual step, and the gradients of logits.

    Args:
        model: In the mode that its losses are to be computed in.
        logits: The gates'.
        rates: The weights that learn, with their learning rates; their `grad` is that of the training loss.
        step: Says which rows and which noise.
        held: The loss on held-out rows.
        train: The loss on training rows.
    """
    weights = [(weight, rate) for weight, rate in rates if weight.grad is not None and rate > 0]
    parameters = [weight for weight, _ in weights]
    with _moved(parameters, [-rate * cast(Tensor, weight.grad) for weight, rate in weights]), _noise(step):
        loss = held(model, step)
        found = torch.autograd.grad(loss, [*logits, *parameters], allow_unused=True)
    direct, ahead = _whole(found[: len(logits)], logits), _whole(found[len(logits) :], parameters)
    ways = [rate * gradient for (_, rate), gradient in zip(weights, ahead, strict=True)]
    length = torch.stack([way.norm() for way in ways]).norm() if ways else torch.zeros(())
    if not bool(length > 0):  # nothing moves, or the loss is no number, which the caller refuses
        return loss.detach(), direct
    sides = []
    for size in (EPSILON / length, -EPSILON / length):
        with _moved(parameters, [size * way for way in ways]), _noise(step):
            sides.append(_whole(torch.autograd.grad(train(model, step), list(logits), allow_unused=True), logits))
    return loss.detach(), [g - (up - down) * length / (2 * EPSILON) for g, up, down in zip(direct, *sides, strict=True)]


def _whole(gradients: Sequence[Tensor | None], of: Sequence[Tensor]) -> list[Tensor]:
    """Puts zeros where there is no gradient."""
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, of, strict=True)]


@contextmanager
def _moved(parameters: Sequence[nn.Parameter], by: Sequence[Tensor]) -> Iterator[None]:
    """Adds to parameters for a while."""
    before = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for parameter, change in zip(parameters, by, strict=True):
                parameter.add_(change)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@contextmanager
def _noise(seed: int) -> Iterator[None]:
    """Draws what a seed says for a while."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
