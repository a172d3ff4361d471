"""Learning which candidate to keep while their weights are learned: the callback that makes a training a search.

It works with any transformers Trainer whose model has an adapter under a `GumbelGate`:

    single-level   gates and weights learn from the same batches
    bilevel        the weights learn from training batches, the gates from held-out ones (DARTS, Liu et al. 2018, arXiv
                   1806.09055, section 2.3), with the weights as they are, its first-order form, or as they would be
                   after the step that comes (`unrolled.py`)

Before every optimiser step the gates' gradients get those of the price (`price.py`); in the bilevel form, what they
have from the training batch is replaced by the gradient on a held-out batch first. Both are then part of one step of
the trainer's own optimiser, so that schedules, resuming and logging are the trainer's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pelton.errors import TrainingError
from pelton.gates.gumbel import GumbelGateModule
from pelton.search.architecture import choosing_gates
from pelton.search.price import Price
from pelton.search.unrolled import unrolled_gradients
from pelton.tuner.batches import inputs_of
from pelton.tuner.controls import tuners

FILE = "search.json"
"""What a checkpoint holds beside the trainer's own: the multipliers and the trace."""
LEARNED = "learned.json"
"""The same in the folder of a run whose training is over."""

Criterion = Callable[[Tensor, Tensor], Tensor]


class HeldOut:
    """Batches that gates learn from; the step says which, so that a resumed run sees the same."""

    def __init__(
        self,
        features: Sequence[Any],
        collate: Callable[[list[Any]], Mapping[str, Any]],
        batch_size: int,
        seed: int,
        criterion: Criterion | None = None,
    ) -> None:
        """Takes labelled features; `criterion` computes a loss of logits and labels, the model when not given.

        Raises:
            TrainingError: there are none.
        """
        if not len(features):
            raise TrainingError(
                "Bilevel search learns its gates on validation rows, and there are none. Raise "
                "task.validation_fraction, or search without --bilevel."
            )
        self.features, self.collate, self.seed, self.criterion = features, collate, seed, criterion
        self.size = min(batch_size, len(features))

    def batch(self, step: int) -> Mapping[str, Any]:
        """Returns the batch of a step; every epoch has its own order."""
        each = len(self.features) // self.size
        order = torch.randperm(
            len(self.features), generator=torch.Generator().manual_seed(self.seed + step // each)
        ).tolist()
        start = step % each * self.size
        return self.collate([self.features[row] for row in order[start : start + self.size]])

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Runs a model, in the mode that it is in, on the batch of a step."""
        device = next(model.parameters()).device
        batch = inputs_of(self.batch(step), device)
        outputs = model(**batch)
        if self.criterion is not None:
            return self.criterion(outputs["logits"], batch["labels"])
        if getattr(outputs, "loss", None) is None:
            raise TrainingError("The model gives no loss on held-out rows: bilevel search needs labels there.")
        return outputs.loss  # type: ignore[no-any-return]


class ArchitectureLearning(TrainerCallback):  # type: ignore[misc]
    """Adds the price to the gates' gradients, and takes them from held-out batches where there are any.

    Attributes:
        price: The costs, weights and budgets.
        trace: Expected costs and multipliers at every logged step.
    """

    def __init__(
        self, price: Price, held_out: HeldOut | None = None, warmup: float = 0.1, train: HeldOut | None = None
    ) -> None:
        """Lets the gates wait for the first `warmup` share of the steps, in which only weights learn.

        Args:
            price: The costs, weights and budgets.
            held_out: What gates learn from; the training batches when not given.
            warmup: A share of the steps.
            train: Training rows, with which gates look one step of the weights ahead.
        """
        self.price, self.held_out, self.warmup, self.train = price, held_out, warmup, train
        self.trace: list[dict[str, float]] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Goes on where a checkpoint was."""
        path = _checkpoint(args, state) / FILE
        if state.global_step and path.is_file():
            self.recall(path)

    def recall(self, path: Path) -> None:
        """Takes up the multipliers and the trace that were written."""
        values = json.loads(path.read_text(encoding="utf-8"))
        self.trace = values["trace"]
        for name, budget in self.price.budgets.items():
            budget.multiplier = values["multipliers"][name]

    def _write(self, path: Path) -> None:
        multipliers = {name: budget.multiplier for name, budget in self.price.budgets.items()}
        path.write_text(json.dumps({"multipliers": multipliers, "trace": self.trace}), encoding="utf-8")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **others: Any
    ) -> None:
        """Makes the gates' gradients what the search asks for."""
        gates = gates_of(model)
        if state.global_step < math.ceil(self.warmup * state.max_steps):
            for gate in gates.values():
                gate.logits.grad = None  # which AdamW takes as "leave it alone"
            return
        logits = [gate.logits for gate in gates.values()]
        if self.held_out is not None:
            self._learn_from(self.held_out, model, state.global_step, logits, others["optimizer"])
        expected = self.price.expected({block: gate.probabilities() for block, gate in gates.items()})
        for logit, gradient in zip(logits, torch.autograd.grad(self.price.term(expected), logits), strict=True):
            logit.grad = gradient if logit.grad is None else logit.grad + gradient
        self.price.update(expected)
        if state.global_step % max(1, int(args.logging_steps)) == 0:
            costs = {name: float(value.detach()) for name, value in expected.items()}
            prices = {f"{name}_price": budget.multiplier for name, budget in self.price.budgets.items()}
            self.trace.append({"step": state.global_step, **costs, **prices})

    def _learn_from(
        self, held_out: HeldOut, model: nn.Module, step: int, logits: list[nn.Parameter], optimizer: Any
    ) -> None:
        if self.train is None:
            loss = held_out.loss(model, step)
            gradients: Sequence[Tensor] = torch.autograd.grad(loss, logits)
        else:
            gates = set(map(id, logits))
            rates = [
                (p, group["lr"]) for group in optimizer.param_groups for p in group["params"] if id(p) not in gates
            ]
            loss, gradients = unrolled_gradients(model, logits, rates, step, held_out.loss, self.train.loss)
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"The search stopped at step {step + 1}: the held-out loss is {loss.item()}. Lower "
                "training.learning_rate, or check the validation rows."
            )
        for logit, gradient in zip(logits, gradients, strict=True):
            logit.grad = gradient

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluates at the end only: no earlier checkpoint may be taken for the best, its gates had not learned."""
        if state.global_step < state.max_steps:
            control.should_evaluate = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes what a resumed search has to know."""
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            self._write(folder / FILE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes it for a search that is interrupted after its training."""
        if state.is_world_process_zero:
            self._write(Path(str(args.output_dir)).parent / LEARNED)


def gates_of(model: nn.Module) -> dict[int, GumbelGateModule]:
    """Returns the gates of a model's active adapter by block number.

    Raises:
        TrainingError: the model has no adapter.
        AdapterError: its gates do not choose.
    """
    found = tuners(model)
    if not found:
        raise TrainingError("A search needs a model with a Pelton adapter under a GumbelGate.")
    return choosing_gates(found[0], found[0].active_adapters[0])


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
