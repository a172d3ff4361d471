"""How good the best recipe is: trained again with seeds that chose nothing.

The best of many trials is partly the luckiest: its validation score is too good. Fresh seeds draw other weights,
another order and, where validation rows are held back, other rows; and only here are test rows looked at.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import optuna

from pelton.errors import StudyError
from pelton.search.study import Study
from pelton.search.worker import Told
from pelton.training.fit import fit
from pelton.training.recipe import Recipe


@dataclass(frozen=True)
class Figure:
    """A mean over seeds, and its standard deviation (0 of one seed)."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Averages one value or more."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        """Says both."""
        return f"{self.mean:.4f} ± {self.std:.4f}"


@dataclass(frozen=True)
class Final:
    """What the best trial's recipe gives with fresh seeds.

    Attributes:
        trial: The best trial.
        metric: What trials were compared by.
        best: Its validation value, by which it was chosen.
        seeds: The fresh ones that trained to their end.
        validation: With these.
        test: On the test rows, where there are any.
        failed: Why the other seeds did not, by seed.
    """

    trial: int
    metric: str
    best: float
    seeds: tuple[int, ...]
    validation: Figure
    test: Figure | None
    failed: dict[int, str]


@dataclass(frozen=True)
class Again:
    """Trains a recipe with a fresh seed, a different one for each of the study's final trainings."""

    recipe: Recipe
    metric: str

    def __call__(self, trial: optuna.Trial, place: int) -> list[float]:
        """Trains, and judges on test rows too."""
        seed = self.seed(place)
        training = self.recipe.training.model_copy(update={"seed": seed})
        run = fit(self.recipe.model_copy(update={"name": f"{self.recipe.name}-seed-{seed}", "training": training}))
        metrics = run.folder.read("metrics")
        for split in ("validation", "test"):
            if split in metrics:
                trial.set_user_attr(split, metrics[split][self.metric])
        trial.set_user_attr("run", str(run.folder.path))
        return [metrics["validation"][self.metric]]

    def seed(self, place: int) -> int:
        """Returns the seed of a training: none that a trial had."""
        return (self.recipe.training.seed + 1 + place) % 2**32


def confirm(study: Study, seeds: int, told: Told = lambda _: None) -> Final:
    """Trains the best recipe with fresh seeds, shared with the study's other workers; writes `final.json`.

    With several objectives it is the one of the best quality.

    Args:
        study: With a finished trial.
        seeds: How many.
        told: Is given each training that ends here.

    Raises:
        StudyError: no trial finished, or none of the trainings.
    """
    best = study.best()[0]
    recipe = study.recipe_of(best.last)
    recipe = recipe.model_copy(update={"name": f"trial-{best.root:04d}", "output": str(study.folder / "final")})
    again = Again(recipe, study.plan.metric)
    name = f"trial {best.root} with fresh seeds"
    quality = study.plan.objectives.index("quality") if "quality" in study.plan.objectives else None
    done = study.beside(name, "maximize", again, seeds, told)[:seeds]
    good = {again.seed(place): one.last for place, one in enumerate(done) if one.state == "finished"}
    failed = {again.seed(place): one.reason for place, one in enumerate(done) if one.state != "finished"}
    if not good:
        reason = next(iter(failed.values()))
        raise StudyError(f"The best recipe, of trial {best.root}, trained with none of {seeds} fresh seeds: {reason}")
    tests = [trial.user_attrs["test"] for trial in good.values() if "test" in trial.user_attrs]
    final = Final(
        best.root,
        study.plan.metric,
        best.last.user_attrs["quality"] if quality is None else best.last.values[quality],
        tuple(good),
        Figure.of([trial.values[0] for trial in good.values()]),
        Figure.of(tests) if tests else None,
        failed,
    )
    (study.folder / "final.json").write_text(json.dumps(asdict(final), indent=2) + "\n", encoding="utf-8")
    return final
