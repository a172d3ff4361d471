"""Which of a storage's trials are which of a study's: a trial, its retries, and what is one too many.

A study's trial is a *lineage*: the trial that was made first, and after each death of a worker a new one with the same
values. Trials are numbered by the database, one after another, so all workers agree without talking:

- of two retries of one trial, which two workers may make at the same time, the one of the lower number counts;
- of lineages beyond the number that was asked for, those of the lowest numbers count.

The others are surplus, and end before anything is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from optuna.trial import FrozenTrial, TrialState

RETRIES = 5
"""How often a trial whose worker died is tried again: a trial may be what kills it."""
REASON = "reason"
"""The attribute that says why a trial failed; one that failed without a reason has lost its worker."""
SURPLUS = "surplus"
FIRST_TRY, EARLIER_TRIES = "failed_trial", "retry_history"
"""What Optuna's `RetryHeartbeatStaleTrialCallback` writes on a retry."""

State = Literal["waiting", "running", "lost", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Lineage:
    """One of a study's trials.

    Attributes:
        root: The number of its first try, by which it is known.
        tries: In order; all but the last have lost their worker.
    """

    root: int
    tries: tuple[FrozenTrial, ...]

    @property
    def last(self) -> FrozenTrial:
        """The try that counts."""
        return self.tries[-1]

    @property
    def state(self) -> State:
        """How far it is."""
        trial = self.last
        if trial.state == TrialState.FAIL:
            return "failed" if REASON in trial.user_attrs or len(self.tries) > RETRIES else "lost"
        names: dict[TrialState, State] = {
            TrialState.WAITING: "waiting",
            TrialState.RUNNING: "running",
            TrialState.COMPLETE: "finished",
            TrialState.PRUNED: "stopped",
        }
        return names[trial.state]

    @property
    def reason(self) -> str:
        """Why it failed, or was stopped."""
        if self.state == "failed" and REASON not in self.last.user_attrs:
            return f"its worker died {len(self.tries)} times"
        return str(self.last.user_attrs.get(REASON, ""))


@dataclass(frozen=True)
class Census:
    """A study's trials.

    Attributes:
        lineages: By number.
        valid: The numbers of all their tries.
    """

    lineages: tuple[Lineage, ...]
    valid: frozenset[int]

    @classmethod
    def of(cls, trials: Sequence[FrozenTrial]) -> Census:
        """Counts what a storage holds."""
        generations: dict[int, dict[int, FrozenTrial]] = {}
        for trial in sorted(trials, key=lambda one: one.number):
            generation = len(_history(trial))
            generations.setdefault(root_of(trial), {}).setdefault(generation, trial)
        found = [Lineage(root, tuple(of[place] for place in sorted(of))) for root, of in sorted(generations.items())]
        kept = tuple(lineage for lineage in found if SURPLUS not in lineage.last.user_attrs)
        return cls(kept, frozenset(trial.number for lineage in kept for trial in lineage.tries))

    def place(self, trial: FrozenTrial) -> int | None:
        """Returns which of the study's trials this is, from 0; None where another try of it counts."""
        if trial.number not in self.valid:
            return None
        return sum(lineage.root < root_of(trial) for lineage in self.lineages)

    def in_state(self, *states: State) -> list[Lineage]:
        """Returns the lineages in one of some states."""
        return [lineage for lineage in self.lineages if lineage.state in states]


def root_of(trial: FrozenTrial) -> int:
    """Returns the number of the first try of a trial."""
    return int(trial.system_attrs.get(FIRST_TRY, trial.number))


def _history(trial: FrozenTrial) -> list[int]:
    return list(trial.system_attrs.get(EARLIER_TRIES, ()))
