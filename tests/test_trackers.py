"""Trackers: TensorBoard by default, others when installed; gates among what they are told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fits import At, Make, press_ctrl_c, weights
from pelton.errors import RecipeError
from pelton.training import feasible
from pelton.training.fit import Interrupted, fit, resume
from pelton.training.recipe import TrainingSettings

BOARD = {"trackers": ["tensorboard"]}


def read_board(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder), {"histograms": 0, "scalars": 0})  # 0: all of them
    board.Reload()
    return board


def test_tensorboard_is_told_of_losses_scores_and_gates(make: Make) -> None:
    run = fit(make(**BOARD))
    board = read_board(run.folder.logs)
    tags = board.Tags()
    assert {"train/loss", "train/learning_rate", "eval/accuracy", "eval/score"} <= set(tags["scalars"])
    assert [event.step for event in board.Scalars("eval/accuracy")] == [6, 12]
    assert len(tags["histograms"]) == 2 * 2  # blocks, methods
    for name in tags["histograms"]:
        assert name.startswith("gates/")
        assert name.rpartition("/")[2] in ("lora", "bottleneck")
        events = board.Histograms(name)
        assert [event.step for event in events] == [6, 12]
        assert all(event.histogram_value.num == 16 for event in events)  # validation examples
        assert all(0 <= event.histogram_value.min <= event.histogram_value.max <= 1 for event in events)


def test_what_is_tracked_changes_nothing(make: Make) -> None:
    import torch

    tracked, plain = weights(fit(make(**BOARD))), weights(fit(make()))
    assert all(torch.equal(value, plain[name]) for name, value in tracked.items())


def test_without_validation_rows_gates_are_told_with_checkpoints(make: Make, tmp_path: Path) -> None:
    from tiny import save_data

    save_data(tmp_path / "data", validation=0)
    run = fit(make(task={"validation_fraction": 0.0}, **BOARD))
    board = read_board(run.folder.logs)
    assert [event.step for event in board.Histograms(board.Tags()["histograms"][0])] == [6, 12]


@pytest.mark.parametrize("adapter", [None, {"preset": "lora"}], ids=["whole", "ungated"])
def test_where_no_gate_learns_there_is_none_to_tell_of(make: Make, adapter: Any) -> None:
    run = fit(make(adapter, epochs=1, **BOARD))
    assert read_board(run.folder.logs).Tags()["histograms"] == []


def test_a_resumed_run_goes_on_in_its_folder(make: Make) -> None:
    with pytest.raises(Interrupted) as stopped:
        fit(make(**BOARD), callbacks=[At(8, press_ctrl_c)])
    run = resume(stopped.value.folder)
    assert [event.step for event in read_board(run.folder.logs).Scalars("eval/accuracy")] == [6, 12]


def test_nobody_is_told_when_nobody_is_asked_for(make: Make) -> None:
    assert not fit(make(epochs=1)).folder.logs.exists()
    assert TrainingSettings().trackers == ("tensorboard",)
    for nobody in ("none", None, []):
        assert TrainingSettings(trackers=nobody).trackers == ()
    assert TrainingSettings(trackers="wandb").trackers == ("wandb",)


def test_importing_pelton_and_its_trainer_imports_no_tracker() -> None:
    trackers = "[name for name in ('tensorboard', 'wandb', 'mlflow') if name in sys.modules]"
    code = f"import sys, pelton, pelton.training.fit; print({trackers})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_said_before_training(
    make: Make,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feasible, "find_spec", lambda _: None)
    with pytest.raises(
        RecipeError, match=f"training.trackers names {name}, which is not installed: pip install {name}"
    ):
        fit(make(trackers=[name]))
    assert not (tmp_path / "runs").exists()


def test_an_unknown_tracker(make: Make) -> None:
    with pytest.raises(RecipeError, match="should be 'tensorboard', 'wandb' or 'mlflow', but got 'tensorbord'"):
        make(trackers=["tensorbord"])


# ---- what is installed in some places only -----------------------------------------------------------------------


def installed(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.mark.filterwarnings("ignore")
def test_mlflow_is_told_of_the_gates_means(make: Make, tmp_path: Path, monkeypatch: Any) -> None:
    mlflow = installed("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    run = fit(make(trackers=["mlflow"]))
    found = mlflow.search_runs(search_all_experiments=True)
    assert list(found["tags.mlflow.runName"]) == [run.folder.path.name]
    gates = [column for column in found.columns if column.startswith("metrics.gates/")]
    assert len(gates) == 4
    assert found["metrics.eval_accuracy"].notna().all()
    assert ((found[gates] > 0) & (found[gates] < 1)).all(axis=None)


@pytest.mark.filterwarnings("ignore")
def test_wandb_is_told_of_the_gates(make: Make, tmp_path: Path, monkeypatch: Any) -> None:
    wandb = installed("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = fit(make(trackers=["wandb"]))
    assert wandb.run is not None
    assert wandb.run.name == run.folder.path.name
    gates = {key: value for key, value in dict(wandb.run.summary).items() if key.startswith("gates/")}
    wandb.finish()
    assert len(gates) == 4
    assert all(value["_type"] == "histogram" for value in gates.values())
