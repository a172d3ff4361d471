"""The table of effective gate weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from law import METHODS, attached
from pelton import FixedGate, MLPGate, ScalarGate, gate_summary, record_gates
from pelton.cli.main import app
from pelton.errors import AdapterError
from pelton.tuner.summary import saved_gates
from zoo import ARCHS


def test_dynamic_gates_show_the_means_of_what_was_recorded() -> None:
    arch = ARCHS["bert"]
    model = attached(arch, MLPGate(hidden_size=8, init_std=0.5))
    with record_gates(model) as log, torch.no_grad():
        arch.run(model, arch.inputs())
    frame = log.to_frame()
    table = gate_summary(model, frame)
    assert list(table["index"]) == [0, 1]
    for _, row in table.iterrows():
        mine = frame[frame["index"] == row["index"]]
        assert row["lora"] == pytest.approx(mine[mine.method == "lora"].value.mean())
        assert row["sum"] == pytest.approx(1.0, abs=1e-5)  # softmax
    assert table.requires_grad.all()
    assert not table.is_buffer.any()


@pytest.mark.parametrize(("gate", "trained"), [(ScalarGate(0.01), True), (FixedGate(0.01), False)])
def test_static_gates_show_effective_weights(gate: ScalarGate | FixedGate, trained: bool) -> None:
    from peft import get_peft_model

    from pelton import PeltonConfig

    model = get_peft_model(ARCHS["bert"].build(), PeltonConfig(methods=[METHODS["lora"], METHODS["ia3"]], gate=gate))
    table = gate_summary(model)
    assert table.lora.tolist() == pytest.approx([0.01, 0.01], rel=1e-4)  # 0.01 means 0.01, not sigmoid(0.01)
    assert table["sum"].tolist() == pytest.approx([0.02, 0.02], rel=1e-4)
    assert table.requires_grad.tolist() == [trained] * 2
    assert table.is_buffer.tolist() == [not trained] * 2


def test_dynamic_gates_without_data_are_refused() -> None:
    with pytest.raises(AdapterError, match="record_gates"):
        gate_summary(attached(ARCHS["bert"], MLPGate()))


@pytest.mark.parametrize("name", ["bert", "t5", "gemma3"])
@pytest.mark.parametrize(
    "gate", [ScalarGate(0.2), FixedGate(0.3), FixedGate(stages={"pretrain": 0.1, "finetune": 0.2})]
)
def test_saved_gates_are_those_of_the_model(name: str, gate: ScalarGate | FixedGate, tmp_path: Path) -> None:
    model = attached(ARCHS[name], gate, [METHODS["lora"], replace(METHODS["dilated"], layers=(1,))])
    model.save_pretrained(tmp_path)
    pd.testing.assert_frame_equal(saved_gates(tmp_path), gate_summary(model))


def test_the_command_shows_the_gates_of_a_saved_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attached(ARCHS["bert"], FixedGate(0.01), [METHODS["dilated"]]).save_pretrained(tmp_path)
    app(["gates", str(tmp_path)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("dilated", "original", "0.01", "0.99", "1.00", "False", "True"))


def test_saved_gates_that_read_the_input_are_refused(tmp_path: Path) -> None:
    attached(ARCHS["bert"], MLPGate()).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="record_gates"):
        saved_gates(tmp_path)
