"""One trial: a variant of the recipe is trained and judged on validation rows; test rows are kept from it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pelton.errors import TrainingError
from pelton.search.census import root_of
from pelton.search.cost import Cost, cost_of, cost_of_run
from pelton.search.plan import StudyPlan
from pelton.search.variant import variant
from pelton.search.worker import StopTrial
from pelton.training.fit import Stopped, fit
from pelton.training.recipe import Recipe
from pelton.training.run import Run

RESULT = "result.json"
WEIGHTS = ("adapter", "model", "checkpoints", "features")
"""What is not kept of a trial's run: the best recipe is trained again."""


class Reports(TrainerCallback):  # type: ignore[misc]
    """Reports each validation score to a study, and ends a run that has fallen behind.

    Scores are numbered by evaluation, which is the resource that Hyperband and successive halving share out. With
    several objectives nothing is reported: Optuna compares running trials by one.
    """

    def __init__(self, trial: optuna.Trial, plan: StudyPlan) -> None:
        """Takes the trial and what its study compares."""
        self.trial, self.plan = trial, plan
        self.count, self.behind = 0, False
        self.run: Path | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Notes where the run is."""
        self.run = Path(str(args.output_dir)).parent

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        """Reports a score, and asks whether to go on."""
        value = metrics[f"eval_{self.plan.metric}"]
        if not math.isfinite(value):
            raise TrainingError(f"validation {self.plan.metric} is {value} after {state.global_step} steps")
        self.count += 1
        if self.plan.objectives != ("quality",):
            return
        self.trial.report(value, self.count)
        if self.plan.stops and state.global_step < state.max_steps and self.trial.should_prune():
            self.behind = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the run, once all others have closed what they have open."""
        if self.behind:
            raise Stopped(f"it was behind after {self.count} evaluations ({state.global_step} steps)")


@dataclass(frozen=True)
class Training:
    """The objective of a study: trains the variant that a trial stands for."""

    plan: StudyPlan
    folder: Path

    def __call__(self, trial: optuna.Trial, place: int) -> list[float]:
        """Trains a trial, unless its run is finished already and only its result got lost on the way.

        Raises:
            StopTrial: it fell behind, or would cost more than it may.
        """
        values = self.plan.space.suggest(trial)
        root = root_of(trial.study.get_trials(deepcopy=False)[trial.number])
        found = self._earlier(root, values) or self._train(trial, values, root)
        for name, value in found.items():
            trial.set_user_attr(name, value)
        return [found[name] for name in self.plan.objectives]

    def _train(self, trial: optuna.Trial, values: dict[str, Any], root: int) -> dict[str, Any]:
        recipe = variant(self.plan.recipe, values)
        changes = {"name": f"trial-{root:04d}", "output": str(self.folder)}
        recipe = recipe.model_copy(update=changes)
        cost = self._cost_before(trial, recipe)
        reports = Reports(trial, self.plan)
        try:
            run = fit(recipe, callbacks=[reports], blind=True)
        except Stopped as stopped:
            raise StopTrial(str(stopped)) from stopped
        finally:
            if reports.run is not None:
                drop_weights(reports.run)
        found = self._judge(trial, run, cost)
        draft = run.folder.path / f"{RESULT}.tmp"
        draft.write_text(json.dumps({"values": values, "found": found}), encoding="utf-8")
        draft.replace(run.folder.path / RESULT)
        return found

    def _earlier(self, root: int, values: dict[str, Any]) -> dict[str, Any] | None:
        """Returns what an earlier try of the trial found, where it had finished when its worker or storage was lost."""
        for path in self.folder.glob(f"trial-{root:04d}-*/{RESULT}"):
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["values"] == json.loads(json.dumps(values)):
                return dict(result["found"])
        return None

    def _cost_before(self, trial: optuna.Trial, recipe: Recipe) -> Cost | None:
        """Returns what a trial will cost, where that is asked for and known before it is trained."""
        if recipe.training.pruning is not None or not (self.plan.budget or self.plan.needs_latency):
            return None
        cost = cost_of(recipe, timed=self.plan.needs_latency)
        self._require_budget(trial, cost)
        return cost

    def _judge(self, trial: optuna.Trial, run: Run, cost: Cost | None) -> dict[str, Any]:
        metrics = run.folder.read("metrics")
        if cost is None:
            cost = cost_of_run(run, timed=self.plan.needs_latency)
            self._require_budget(trial, cost)
        spread = {} if cost.latency is None else {"latency": cost.latency.ratio, "latency_spread": cost.latency.spread}
        return {
            "quality": metrics["validation"][self.plan.metric],
            "parameters": cost.parameters,
            **spread,
            "steps": metrics["steps"],
            "train_seconds": metrics["train_seconds"],
            "run": run.folder.path.name,
        }

    def _require_budget(self, trial: optuna.Trial, cost: Cost) -> None:
        """Tells the sampler how far a trial is from its budgets, and stops one that is above."""
        budget, over = self.plan.budget, []
        if budget.params is not None:
            trial.set_constraint("parameters", cost.parameters / budget.params - 1)
            if cost.parameters > budget.params:
                over.append(f"{cost.parameters:,} of {budget.params:,} trainable parameters")
        if budget.latency is not None and cost.latency is not None:
            trial.set_constraint("latency", cost.latency.ratio - budget.latency)
            if cost.latency.ratio > budget.latency:
                over.append(f"{cost.latency} of {budget.latency:g} times the backbone's inference time")
        if over:
            trial.set_user_attr("parameters", cost.parameters)
            raise StopTrial(f"it is over budget: {' and '.join(over)}")


def drop_weights(run: Path) -> None:
    """Deletes the weights of a run; its recipe, metrics and history stay."""
    for part in WEIGHTS:
        shutil.rmtree(run / part, ignore_errors=True)
