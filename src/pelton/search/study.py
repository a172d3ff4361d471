"""A study: a folder, and a storage that any number of workers share.

study.yaml   what it is: its recipe, its space, its objectives, where its storage is
study.db     its trials, unless it has another storage
workers/     locks of the workers on study.db
trials/      one run a trial, without weights
final/       the best recipe's runs with fresh seeds
best.yaml    the best trial's recipe, for `pelton fit`; front/ those of the Pareto front
report       trials.csv, trials.md, final.json and the plots
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import optuna
import yaml
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial

from pelton.errors import StudyError
from pelton.search.census import Census, Lineage
from pelton.search.patient import has_password, shown
from pelton.search.plan import StudyPlan
from pelton.search.storage import GRACE, HEARTBEAT, Storage
from pelton.search.trial import Training
from pelton.search.variant import variant
from pelton.search.worker import Objective, Told, Worker, quiet_optuna
from pelton.training.folder import count_processes
from pelton.training.recipe import Recipe

PLAN = "plan"
"""The attribute that holds what a study is, in its storage."""
REDUCTION = 3
"""Hyperband and successive halving let one trial in so many go on (Li et al. 2018, arXiv 1603.06560, section 3)."""


class Study:
    """Trials of variants of a recipe, compared on validation rows.

    Every trial is in a database as soon as it is begun, so a study can be killed at any moment and goes on from there.
    """

    def __init__(self, folder: Path, name: str, plan: StudyPlan, url: str | None, wanted: int | None = None) -> None:
        """Takes what `start` made or `open` read."""
        self.folder, self.name, self.plan, self.wanted = folder, name, plan, wanted
        self.url = f"sqlite:///{(folder / 'study.db').resolve()}" if url is None else url
        self.locks = folder / "workers" if url is None else None
        self.heartbeat, self.grace = HEARTBEAT, GRACE

    @classmethod
    def start(
        cls, folder: Path | str, plan: StudyPlan, *, name: str | None = None, storage: str | None = None
    ) -> Study:
        """Makes a study in a folder, or goes on with the same one.

        Args:
            folder: Its folder.
            plan: What it is.
            name: In its storage; the folder's name if not given.
            storage: A database's URL; a SQLite file in the folder if not given.

        Raises:
            StudyError: a study of this name is there that is another one.
        """
        study = cls(Path(folder), name or Path(folder).name, plan, storage)
        if (study.folder / "study.yaml").is_file():
            before = cls.open(folder, storage=storage)
            _require_same(before.plan.written(), plan, f"{folder}")
            study.wanted = before.wanted
        study.folder.mkdir(parents=True, exist_ok=True)
        with study._connected():
            study._write()
        return study

    @classmethod
    def open(cls, folder: Path | str, *, storage: str | None = None) -> Study:
        """Opens a study's folder.

        Args:
            folder: One that `start` made.
            storage: Its database's URL, where that has a password, which no folder holds.

        Raises:
            StudyError: the folder is not a study, or its storage's password is missing.
        """
        path = Path(folder) / "study.yaml"
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise StudyError(
                f"{folder} is not a study: its study.yaml cannot be read ({' '.join(str(error).split())}). Expected a "
                "folder that pelton search made."
            ) from error
        if not isinstance(values, dict) or not {"name", "storage", "space", "recipe"} <= set(values):
            raise StudyError(f"{path} is not a study's: expected a name, a storage, a space and a recipe.")
        if storage is None and values["storage"] is not None and "***" in values["storage"]:
            raise StudyError(
                f"The storage {values['storage']} has a password, which the folder does not hold: give --storage again."
            )
        plan = StudyPlan.read(values, str(path))
        return cls(Path(folder), values["name"], plan, storage or values["storage"], values.get("trials"))

    def run(
        self,
        trials: int | None = None,
        seconds: float = math.inf,
        *,
        objective: Objective | None = None,
        told: Told = lambda _: None,
    ) -> None:
        """Works on the study until it has so many trials, or time is up; other workers may do so at the same time.

        Args:
            trials: Of the study in all, those of other workers and of earlier times included; as many as were asked
                for the last time if not given, and no limit where none was.
            seconds: After which no trial begins.
            objective: Trains a trial; one `fit` of a variant if not given.
            told: Is given each trial that ends here.

        Raises:
            StudyError: the storage went away for long, or trial after trial failed.
            KeyboardInterrupt: Ctrl-C; the running trial is tried again when the study goes on.
        """
        if count_processes() > 1:
            raise StudyError("A trial trains in one process: start several `pelton search` instead of torchrun.")
        if trials is not None and trials != self.wanted:
            self.wanted = trials
            self._write()
        with self._connected() as (study, storage):
            act = objective or Training(self.plan, self.folder / "trials")
            Worker(study, storage, act, told).work(self.wanted, time.monotonic() + seconds)

    def beside(
        self, name: str, direction: Literal["minimize", "maximize"], objective: Objective, count: int, told: Told
    ) -> list[Lineage]:
        """Runs a number of trainings that are searched in no space, shared with other workers and resumed like trials.

        Args:
            name: What they are; the same name goes on.
            direction: Of what `objective` gives.
            objective: Trains one.
            count: How many there are to be.
            told: Is given each that ends here.
        """
        storage = self._storage()
        try:
            with quiet_optuna():
                study = optuna.create_study(
                    study_name=f"{self.name}: {name}", storage=storage.optuna, direction=direction, load_if_exists=True,
                    sampler=optuna.samplers.RandomSampler(),
                )  # fmt: skip
                Worker(study, storage, objective, told).work(count)
                return list(Census.of(study.get_trials(deepcopy=False)).lineages)
        finally:
            storage.close()

    def trials(self) -> list[Lineage]:
        """Returns the study's trials."""
        with self._connected() as (study, _):
            return list(Census.of(study.get_trials(deepcopy=False)).lineages)

    def best(self) -> list[Lineage]:
        """Returns the best trial, or with several objectives the Pareto front, best quality first.

        Raises:
            StudyError: no trial finished.
        """
        with self._connected() as (study, _):
            every = Census.of(study.get_trials(deepcopy=False)).lineages
            best = {trial.number for trial in study.best_trials} if _any_finished(every) else set()
        found = [lineage for lineage in every if lineage.last.number in best]
        if not found:
            raise StudyError(nothing_finished(every))
        sign = -1.0 if self.plan.directions[0] == "maximize" else 1.0
        found.sort(key=lambda lineage: (sign * lineage.last.values[0], lineage.root))
        return found if len(self.plan.objectives) > 1 else found[:1]

    def recipe_of(self, trial: FrozenTrial) -> Recipe:
        """Returns the recipe of a trial, as `pelton fit` runs it."""
        return variant(self.plan.recipe, self.plan.space.values(trial.params))

    @contextmanager
    def as_optuna(self) -> Iterator[optuna.Study]:
        """Gives the study as Optuna has it, for its own plots and analyses."""
        with self._connected() as (study, _):
            yield study

    @contextmanager
    def _connected(self) -> Iterator[tuple[optuna.Study, Storage]]:
        storage = self._storage()
        try:
            with quiet_optuna():
                yield self._load(storage), storage
        finally:
            storage.close()

    def _storage(self) -> Storage:
        return Storage(self.url, locks=self.locks, heartbeat=self.heartbeat, grace=self.grace)

    def _load(self, storage: Storage) -> optuna.Study:
        """Loads the study, or makes it; workers that begin together make one."""
        study = optuna.create_study(
            study_name=self.name,
            storage=storage.optuna,
            directions=self.plan.directions,
            sampler=TPESampler(),
            pruner=_pruner(self.plan),
            load_if_exists=True,
        )
        if PLAN not in study.user_attrs:
            study.set_user_attr(PLAN, json.dumps(self.plan.written()))
        _require_same(json.loads(study.user_attrs[PLAN]), self.plan, f"{self.name} in {shown(self.url)}")
        return study

    def _write(self) -> None:
        """Writes study.yaml, whole or not at all, and without the password of a storage."""
        url = None if self.locks is not None else shown(self.url) if has_password(self.url) else self.url
        values = {"name": self.name, "storage": url, "trials": self.wanted, **self.plan.written()}
        draft = self.folder / "study.yaml.tmp"
        draft.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
        draft.replace(self.folder / "study.yaml")


def _pruner(plan: StudyPlan) -> BasePruner:
    if not plan.stops:
        return NopPruner()
    if plan.stopping == "halving":
        return SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)
    return HyperbandPruner(min_resource=1, reduction_factor=REDUCTION)


def _any_finished(lineages: tuple[Lineage, ...]) -> bool:
    return any(lineage.state == "finished" for lineage in lineages)


def nothing_finished(lineages: tuple[Lineage, ...] | list[Lineage]) -> str:
    """Says why a study has no best trial, and what to do."""
    if not lineages:
        return "The study has no trials yet. Give it some: pelton search --resume FOLDER --trials 20."
    ended = [lineage for lineage in lineages if lineage.reason]
    said = f" The last one: trial {ended[-1].root}: {ended[-1].reason.rstrip('.')}." if ended else ""
    over = [lineage.last.user_attrs["parameters"] for lineage in ended if "over budget" in lineage.reason]
    least = f" The smallest over budget trains {min(over):,} parameters." if over else ""
    return (
        f"None of the study's {len(lineages)} trials finished.{said}{least} Give it more trials with pelton search "
        "--resume FOLDER --trials N, or change the recipe, the space or the budget under another --name."
    )


def _require_same(before: dict[str, Any], plan: StudyPlan, name: str) -> None:
    changes = plan.differences(before)
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise StudyError(
            f"The study {name} is there already, and it is another one: {'; '.join(changes[:3])}{more}. Trials of "
            "different spaces or objectives cannot be compared: give this one another --name, or go on with the "
            "old one: pelton search --resume FOLDER."
        )
