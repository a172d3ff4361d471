"""Pruning while a model learns: methods leave their blocks in rounds, and those that stay go on as if nothing happened.

Between two rounds every step's contributions (`contributions.py`) are added up; at a round the methods that contributed
least go, structurally: their parameters, their time, and the optimizer's moments of them. How much is to be gone after
round i of n follows the cubic schedule of Zhu and Gupta 2017 (arXiv 1710.01878, equation 1), which takes most at first,
when there is most to spare, and leaves the last ones time to adapt:

    gone(i) = all that is to go · (1 − (1 − i/n)³)

A threshold rises the same way. All of it is a function of the checkpoint: a resumed run prunes what the run would have.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pelton.errors import RecipeError
from pelton.training.contributions import Meter, by_block, share
from pelton.training.folder import count_processes
from pelton.training.sections import PruningSettings
from pelton.tuner.controls import tuners
from pelton.tuner.cut import Entry, left_of, over_budget, parameters_of, weighed, without
from pelton.tuner.model import PeltonModel
from pelton.tuner.recast import adapter_tensors, recast

FILE = "pruning.json"
"""In a checkpoint: what was gone, and what the next round has measured so far."""


def require_prunable(settings: PruningSettings, model: nn.Module) -> None:
    """Raises RecipeError where the schedule cannot do what it says, or would do nothing."""
    tuner = tuners(model)[0]
    methods = _methods(tuner, tuner.active_adapters[0])
    counts = [methods[index] for index in methods]
    sizes = [size for block in counts for size in block.values()]
    if count_processes() > 1 or torch.cuda.device_count() > 1:
        raise RecipeError(
            "training.pruning needs one process on one device: processes that share a run cannot lose parameters while "
            "they train. Start it alone (CUDA_VISIBLE_DEVICES=0), or prune afterwards: pelton prune RUN."
        )
    if settings.keep is not None and settings.keep >= len(sizes):
        raise RecipeError(f"training.pruning.keep={settings.keep} takes nothing: the adapter has {len(sizes)} methods.")
    if settings.budget_params is not None:
        if settings.budget_params >= sum(sizes):
            raise RecipeError(
                f"training.pruning.budget_params={settings.budget_params} takes nothing: the adapter's methods have "
                f"{sum(sizes)} parameters."
            )
        if settings.budget_params < max(sizes):
            raise RecipeError(
                f"training.pruning.budget_params={settings.budget_params} may leave nothing, since the largest method "
                f"alone has {max(sizes)} parameters. Give at least {max(sizes)}."
            )
    if settings.threshold is not None:
        most = max(len(block) for block in counts)
        if most == 1:
            raise RecipeError(
                "training.pruning.threshold is a share of a block's contributions, and every block has one method, "
                "whose share is 1. Set training.pruning.keep instead."
            )
        if settings.threshold >= 1 / most:
            raise RecipeError(
                f"training.pruning.threshold={settings.threshold} may empty a block of {most} methods that contribute "
                f"alike. Give less than {1 / most:.3g}."
            )


def _methods(tuner: PeltonModel, adapter: str) -> dict[int, dict[str, int]]:
    """Returns how many parameters each method has, by block number and kind."""
    return {
        block.block.index: {spec.kind: parameters_of(block, adapter, spec.kind) for spec in wiring.methods}
        for block in tuner.blocks()
        if (wiring := block.wirings.get(adapter)) is not None
    }


class Pruner(TrainerCallback):  # type: ignore[misc]
    """Takes methods out of the active adapter, round by round."""

    def __init__(
        self, settings: PruningSettings, model: nn.Module, note: Callable[[dict[str, Any]], None] = lambda entry: None
    ) -> None:
        """Counts what there is before anything has gone; `note` is told of every round."""
        self.settings, self.model, self.note = settings, model, note
        self.tuner = tuners(model)[0]
        self.adapter = self.tuner.active_adapters[0]
        sizes = [size for block in _methods(self.tuner, self.adapter).values() for size in block.values()]
        self.methods, self.parameters = len(sizes), sum(sizes)
        self.meter = Meter()
        self.sums: Tensor | None = None  # [in the block or in all, methods]
        self.steps: Tensor | None = None  # how many steps they are of
        self.rounds: list[int] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Says in steps when the rounds are."""
        self.rounds = self.settings.rounds_of(state.max_steps)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Watches the gates from the start of the schedule to its end."""
        if self.settings.start_of(state.max_steps) <= state.global_step < self.rounds[-1]:
            self.meter.follow(self.model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Adds up the contributions of a step, unless its gradients overflowed; nothing waits for the device."""
        if not self.meter.handles:
            return
        products = self.meter.measure()
        row = torch.stack([torch.cat([share(block) for block in products]), share(torch.cat(products))])
        good = torch.isfinite(row).all()
        row = torch.where(good, row, 0.0)
        self.sums = row if self.sums is None else self.sums + row
        self.steps = good.long() if self.steps is None else self.steps + good

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Optimizer, **_: Any
    ) -> None:
        """Takes out what has contributed least, where a round ends with this step."""
        if state.global_step in self.rounds:
            gone = self._least(self.rounds.index(state.global_step) + 1)
            if gone:
                remove(self.tuner, self.adapter, gone, optimizer)
            left = [size for block in _methods(self.tuner, self.adapter).values() for size in block.values()]
            self.note(
                {"pruned": [asdict(entry) for entry in gone], "methods": len(left), "method_parameters": sum(left)}
            )
            self.meter.stop()
            self.sums = self.steps = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stops watching."""
        self.meter.stop()

    def done(self, step: int) -> bool:
        """Tells whether the last round is over."""
        return step >= self.rounds[-1]

    def _least(self, number: int) -> list[Entry]:
        """Returns what goes in a round; at least one method stays."""
        if self.sums is None or self.steps is None or not int(self.steps):
            return []
        inside, overall = (self.sums / self.steps).tolist()
        entries = weighed(self.tuner, self.adapter, by_block(self.meter.places, inside))
        ties = by_block(self.meter.places, overall)  # methods alone in their blocks have all of it
        entries.sort(key=lambda entry: (round(entry.importance, 6), ties[str(entry.block)][entry.kind]))
        settings, part = self.settings, 1 - (1 - number / len(self.rounds)) ** 3
        if settings.keep is not None:
            left = self.methods - math.floor((self.methods - settings.keep) * part + 1e-9)
            gone = entries[: max(0, len(entries) - left)]
        elif settings.budget_params is not None:
            gone = over_budget(entries, self.parameters - int((self.parameters - settings.budget_params) * part))
        else:
            assert settings.threshold is not None
            gone = [entry for entry in entries if entry.importance < settings.threshold * part]
        return gone[: len(entries) - 1]

    def told(self, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns what went at which step, and how much there was and is, from a trainer's history."""
        rounds = [entry for entry in history if "pruned" in entry]
        left = [size for block in _methods(self.tuner, self.adapter).values() for size in block.values()]
        return {
            "methods": [self.methods, len(left)],
            "parameters": [self.parameters, sum(left)],
            "rounds": [{"step": entry["step"], "gone": entry["pruned"]} for entry in rounds],
        }

    def save(self, folder: Path) -> None:
        """Writes into a checkpoint what a resumed run has to know."""
        values = {
            "pruned": self.tuner.peft_config[self.adapter].pruned,
            "sums": None if self.sums is None else self.sums.tolist(),
            "steps": None if self.steps is None else int(self.steps),
        }
        (folder / FILE).write_text(json.dumps(values), encoding="utf-8")

    def restore(self, folder: Path, optimizer: Optimizer) -> None:
        """Takes out of a fresh model and its optimizer what was gone in a checkpoint, before that is loaded."""
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        there = weighed(self.tuner, self.adapter, _zeros(_methods(self.tuner, self.adapter)))
        gone = [entry for entry in there if entry.kind in values["pruned"].get(str(entry.block), ())]
        if gone:
            remove(self.tuner, self.adapter, gone, optimizer)
            self.tuner.peft_config[self.adapter].pruned = values["pruned"]
        device = next(self.model.parameters()).device
        if values["sums"] is not None:
            self.sums = torch.tensor(values["sums"], device=device)
            self.steps = torch.tensor(values["steps"], device=device)


def remove(tuner: PeltonModel, adapter: str, gone: Sequence[Entry], optimizer: Optimizer) -> None:
    """Takes methods out of an adapter that is being trained; what stays keeps its place and its moments.

    Nothing is kept to revive it by: what stays learns on, and would not fit it any more.
    """
    before, state = _parameters(tuner, adapter), optimizer.state
    config = without(tuner.peft_config[adapter], gone)
    tensors = left_of(tuner, adapter, adapter_tensors(tuner, adapter), gone)
    shaped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    others: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, parameter in before.items():
        for what, value in state.get(parameter, {}).items():
            fits = isinstance(value, Tensor) and value.shape == parameter.shape
            (shaped[what] if fits else others[key])[key if fits else what] = value
    moments = {what: left_of(tuner, adapter, values, gone) for what, values in shaped.items()}
    with torch.random.fork_rng(devices=[]):  # new parts draw their first weights, which nobody sees
        recast(tuner, adapter, config, tensors)
    after = _parameters(tuner, adapter)
    names = {id(parameter): key for key, parameter in before.items()}
    for group in optimizer.param_groups:
        kept = [p for p in group["params"] if id(p) not in names or names[id(p)] in after]
        group["params"] = [after[names[id(p)]] if id(p) in names else p for p in kept]
    for key, parameter in before.items():
        if state.pop(parameter, None) is not None and key in after:
            state[after[key]] = {**others[key], **{w: values[key] for w, values in moments.items() if key in values}}


def _parameters(tuner: PeltonModel, adapter: str) -> dict[str, nn.Parameter]:
    """Returns an adapter's parameters, named as `adapter_tensors` names them."""
    parts = [
        (f"{path}.{what}", part)
        for path, gated in tuner.named_blocks()
        if adapter in gated.wirings
        for what, part in (("gates", gated.gates[adapter]), ("methods", gated.methods[adapter]))
    ]
    return {f"{name}.{key}": parameter for name, part in parts for key, parameter in part.named_parameters()}


def _zeros(methods: Mapping[int, Mapping[str, int]]) -> dict[str, dict[str, float]]:
    return {str(index): dict.fromkeys(kinds, 0.0) for index, kinds in methods.items()}
