"""The search finds what was planted: one seed of each task of `benchmarks/planted.py`, where all seeds are."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "planted.py"


@pytest.fixture(scope="module")
def planted() -> Any:
    spec = spec_from_file_location("planted", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["planted"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("task", "steps"), [("prefix", 500), ("ia3", 300), ("lora", 300)])
def test_what_was_planted_is_kept_and_nothing_else(planted: Any, task: str, steps: int) -> None:
    row = planted.search(task, 1, planted.Settings(steps=steps))
    assert row["found"], row["kept"]
    assert row["loss"] < 0.1


def test_the_teacher_differs_and_the_planted_method_is_what_it_does(planted: Any) -> None:
    for task in ("prefix", "ia3", "lora", "dilated"):
        teacher = planted.teacher(task, 0, 1)
        spec, _ = planted.planted(task, 0, 1)
        assert spec.layers == (1,)
        ids = planted.torch.arange(24).view(2, 12)
        with planted.torch.no_grad():
            ours, plain = teacher(input_ids=ids).last_hidden_state, planted.backbone(0)(input_ids=ids).last_hidden_state
        assert float((ours - plain).square().mean()) > 1e-3
