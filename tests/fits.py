"""What tests of training share: recipes over tiny data, a callback that acts at one step, a run's weights.

`conftest.py` takes the fixtures in.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from pelton.training.loading import parse_recipe
from pelton.training.recipe import Recipe
from pelton.training.run import Run
from tiny import recipe_values, save_backbone, save_data

GATED = {
    "methods": [{"kind": "lora", "rank": 2}, {"kind": "bottleneck", "bottleneck_size": 4}],
    "gate": {"kind": "mlp"},
}
Make = Callable[..., Recipe]


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def make(backbone: Path, tmp_path: Path) -> Make:
    """Makes a small recipe over data in `tmp_path / "data"`; keywords change its training section.

    A key of the task that is None is left out, for kinds that lack it.
    """

    def build(adapter: Any = GATED, task: dict[str, Any] | None = None, **training: Any) -> Recipe:
        data = tmp_path / "data"
        if not data.exists():
            save_data(data)
        values = recipe_values(backbone, data, tmp_path / "runs", **{"learning_rate": 5e-3, **training})
        values["adapter"] = adapter
        values["task"] = {key: value for key, value in (values["task"] | (task or {})).items() if value is not None}
        return parse_recipe(values, "test")

    return build


class At(TrainerCallback):  # type: ignore[misc]
    """Does something at the end of one step, or before its optimiser step."""

    def __init__(self, step: int, act: Callable[[Any], None], before: bool = False) -> None:
        self.step, self.act, self.before = step, act, before

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if self.before and state.global_step + 1 == self.step:
            self.act(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if not self.before and state.global_step == self.step:
            self.act(model)


def press_ctrl_c(_: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Everything that a run saved."""
    folders = [folder for folder in (run.folder.adapter, run.folder.model) if folder.exists()]
    return {k: v for folder in folders for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-6, rtol=0)
