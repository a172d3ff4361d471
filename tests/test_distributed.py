"""Two processes share one run: one folder, the same weights as one process has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fits import GATED, weights
from pelton.training.fit import fit
from pelton.training.loading import load_recipe
from pelton.training.run import Run
from tiny import recipe_values, save_backbone, save_data

FIT = """
import sys

from pelton.training.fit import fit
from pelton.training.loading import load_recipe

fit(load_recipe(sys.argv[1]))
"""


def write_recipe(folder: Path, name: str, **training: Any) -> Path:
    """Writes a recipe over a backbone without dropout, whose batches are the same however many processes share them."""
    backbone = save_backbone(folder / "backbone")
    config = json.loads((backbone / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (backbone / "config.json").write_text(json.dumps(config | still))
    values = recipe_values(backbone, save_data(folder / "data"), folder / name, learning_rate=5e-3, **training)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**values, "adapter": {**GATED, "gate": {"kind": "mlp", "entropy": 0.1}}}))
    return path


def fit_together(recipe: Path) -> Run:
    """Runs a recipe in two processes."""
    script = recipe.with_suffix(".py")
    script.write_text(FIT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(script), str(recipe)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (recipe.parent / recipe.stem).iterdir()
    return Run.load(folder)


@pytest.mark.slow
def test_two_processes_make_one_run_and_learn_what_one_learns(tmp_path: Path) -> None:
    loss = {"kind": "focal", "class_weights": "inverse"}
    together = fit_together(write_recipe(tmp_path, "two", batch_size=4, loss=loss, trackers=["tensorboard"]))
    alone = fit(load_recipe(write_recipe(tmp_path, "one", batch_size=8, loss=loss)))
    assert together.folder.phase == "finished"
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(together)[name], value, atol=1e-5, rtol=0)
    ours, theirs = (run.folder.read("metrics") for run in (together, alone))
    assert ours["steps"] == theirs["steps"] == 12
    assert ours["test"] == pytest.approx(theirs["test"], abs=1e-4)
    steps = [
        [json.loads(line)["step"] for line in r.folder.history.read_text().splitlines()] for r in (together, alone)
    ]
    assert steps[0] == steps[1]
    assert len(list(together.folder.logs.iterdir())) == 1


@pytest.mark.slow
def test_two_processes_share_a_token_budget(tmp_path: Path) -> None:
    run = fit_together(write_recipe(tmp_path, "two", batching={"tokens": 40}, evaluate_every=4))
    assert run.folder.phase == "finished"
    assert run.folder.read("metrics")["epochs"] == 2.0
