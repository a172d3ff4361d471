"""The table of effective gate weights."""

from __future__ import annotations

import pytest
import torch

from law import METHODS, attached
from pelton import FixedGate, MLPGate, ScalarGate, gate_summary, record_gates
from pelton.errors import AdapterError
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
