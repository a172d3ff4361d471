"""What a search found, trained: from the start, and from the weights that it inherits; validation rows choose.

Inherited weights have learned for longer, and beside others that are gone; which counts for more differs by task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pelton.errors import TrainingError
from pelton.search.autopelt import DERIVED, Found
from pelton.tasks.base import LOWER_IS_BETTER
from pelton.training.fit import fit
from pelton.training.recipe import Recipe
from pelton.training.run import Run

Start = Literal["scratch", "inherited"]


@dataclass(frozen=True)
class Finished:
    """The trainings of one architecture.

    Attributes:
        runs: By where they started.
        scores: The metric on validation rows by which they are compared.
        best: Where the better one started; from scratch where both are equal.
    """

    runs: dict[Start, Run]
    scores: dict[Start, float]
    best: Start

    @property
    def run(self) -> Run:
        """The better one."""
        return self.runs[self.best]


def finish(found: Found, *, progress: bool = False) -> Finished:
    """Trains a search's architecture both ways; with the search itself that is three trainings.

    Args:
        found: What `search` returned.
        progress: Draws a bar on the terminal.

    Raises:
        TrainingError: there are no validation rows to choose by.
        Interrupted: Ctrl-C; that run can be resumed by itself.
    """
    recipes = _starts(found)
    if len(recipes) > 1 and not found.metrics:
        raise TrainingError(
            "There are no validation rows to choose between two trainings by. Raise task.validation_fraction, or train "
            f"one of them: pelton fit {found.run.folder.path / 'architecture.yaml'}."
        )
    runs = {start: fit(recipe, progress=progress) for start, recipe in recipes.items()}
    metric, judged = found.recipe.training.metric_for_best, {s: run.folder.read("metrics") for s, run in runs.items()}
    scores = {start: float(m["validation"][metric]) for start, m in judged.items() if "validation" in m}
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return Finished(runs, scores, max(scores, key=lambda start: sign * scores[start], default="scratch"))


def _starts(found: Found) -> dict[Start, Recipe]:
    recipe, adapter = found.recipe, found.recipe.adapter
    starts: dict[Start, Recipe] = {"scratch": recipe}
    if any(found.architecture.blocks.values()):
        assert adapter is not None
        inherits = adapter.model_copy(update={"start": str(found.run.folder.path / DERIVED)})
        starts["inherited"] = recipe.model_copy(update={"name": f"{recipe.name}-inherited", "adapter": inherits})
    return starts
