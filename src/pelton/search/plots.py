"""Optuna's plots of a study, as pictures: history, importance, parallel coordinates, Pareto front."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from pelton.search.study import Study

FEWEST = 2
"""Finished trials that a comparison needs."""


def plot(study: Study) -> list[Path]:
    """Draws what there are enough finished trials for; returns the files."""
    with study.as_optuna() as trials, _pictures() as draw:
        done = len(trials.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        if done < FEWEST:
            return []
        found: list[Path] = []
        for place, name in enumerate(study.plan.objectives):
            ending = "" if len(study.plan.objectives) == 1 else f"-{name}"
            options: dict[str, Any] = {"target_name": name}
            if ending:
                options["target"] = lambda trial, place=place: trial.values[place]
            for kind in ("history", "importance", "parallel"):
                found += draw(kind, study.folder / f"{kind}{ending}.png", trials, **options)
        if len(study.plan.objectives) > 1:
            found += draw("pareto", study.folder / "pareto.png", trials, target_names=list(study.plan.objectives))
        return found


def _name_axes(figure: Any, names: list[str]) -> None:
    """Makes room for every axis of parallel coordinates, and writes its whole name, which Optuna cuts off."""
    figure.set_size_inches(max(7.0, 1.8 * len(names)), 5.0)
    labels = figure.axes[0].get_xticklabels()
    if len(labels) == len(names):
        figure.axes[0].set_xticks(figure.axes[0].get_xticks(), labels=names, rotation=25, ha="right")


@contextmanager
def _pictures() -> Iterator[Callable[..., list[Path]]]:
    """Gives what draws and writes one plot; pyplot, which Optuna draws with, is left as it was."""
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as kinds

    draws: dict[str, Callable[..., Any]] = {
        "history": kinds.plot_optimization_history,
        "importance": kinds.plot_param_importances,
        "parallel": kinds.plot_parallel_coordinate,
        "pareto": kinds.plot_pareto_front,
    }

    def draw(kind: str, path: Path, study: optuna.Study, **options: Any) -> list[Path]:
        with pyplot.style.context("default"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that few trials say little about importance
            try:
                figure = draws[kind](study, **options).figure
            except (ValueError, RuntimeError):  # all trials alike: nothing is more important than anything
                return []
            figure.set_size_inches(7.0, 5.0)
            if kind == "parallel":
                _name_axes(figure, [str(options["target_name"]), *sorted(study.trials[0].params)])
            figure.savefig(path, dpi=150, bbox_inches="tight")
            pyplot.close(figure)
        return [path]

    backend = pyplot.get_backend()
    pyplot.switch_backend("agg")
    try:
        yield draw
    finally:
        pyplot.close("all")
        pyplot.switch_backend(backend)
