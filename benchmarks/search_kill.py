"""Kills a study's worker with SIGKILL at random moments, and counts what is lost: python benchmarks/search_kill.py.

Two studies on SQLite: one whose trials cost nothing, so that most kills hit the storage at work, and one of real
trainings of a tiny model. After each kill the trials that had finished before it must be there with the same values;
in the end every trial must have finished once. Prints one line of JSON for each.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from cheap import Cheap, cheap_plan, ended, kill, start
from pelton.search.plan import StudyPlan
from pelton.search.space import parse_space
from pelton.search.study import Study
from pelton.training.loading import parse_recipe
from tiny import recipe_values, save_backbone, save_data

GATED = {"methods": [{"kind": "lora", "rank": 2}, {"kind": "bottleneck"}], "gate": {"kind": "mlp"}}
SPACE = {
    "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "adapter.methods.lora.rank": {"low": 1, "high": 8},
}


def killed(
    study: Study, trials: int, kills: int, objective: Any, begun: Callable[[], int], most: float
) -> dict[str, Any]:
    """Kills a study so often, up to `most` seconds after a trial began, and lets it end; returns what was counted."""
    chance, before, lost, alive = random.Random(0), ended(study), 0, 0
    started = time.perf_counter()
    for _ in range(kills):
        process, until = start(str(study.folder), trials, objective), begun() + chance.randint(1, 3)
        while begun() < until and process.is_alive():
            time.sleep(0.005)
        time.sleep(chance.random() * most)
        alive += process.is_alive()
        kill(process)
        now = ended(study)
        lost += sum(now.get(number) != value for number, value in before.items())
        before = now
    process = start(str(study.folder), trials, objective)
    process.join()
    every = study.trials()
    with study.as_optuna() as storage:
        counted = [trial.number for trial in storage.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    return {
        "kills": kills,
        "of a running worker": alive,
        "trials": len(every),
        "finished or stopped": sum(one.state in ("finished", "stopped") for one in every),
        "tried again": sum(len(one.tries) > 1 for one in every),
        "most tries": max(len(one.tries) for one in every),
        "finished ones lost": lost,
        "counted twice": len(counted) - len(every),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Runs both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--fits", type=int, default=5, help="kills of the study of real trainings")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "log"
        log.touch()
        study = Study.start(folder / "cheap", cheap_plan())
        found = killed(study, 60, chosen.kills, Cheap(0.05, str(log)), lambda: len(log.read_text().splitlines()), 0.5)
        print(json.dumps({"trials of": "nothing", **found}), flush=True)
        values = recipe_values(save_backbone(folder / "backbone"), save_data(folder / "data"), folder / "runs")
        values |= {"adapter": GATED, "name": "tiny"}
        plan = StudyPlan.of(parse_recipe(values, "tiny"), parse_space(SPACE, "space"), usual=False)
        study = Study.start(folder / "fits", plan)
        runs = study.folder / "trials"
        found = killed(study, 8, chosen.fits, None, lambda: len(list(runs.glob("*"))), 3.0)
        print(json.dumps({"trials of": "tiny trainings", **found}), flush=True)


if __name__ == "__main__":
    main()
