"""Gates while a model learns: their precision, their penalties' schedule, their temperature."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model

from fits import GATED, At, Make, assert_same, press_ctrl_c, weights
from law import GATES, attached
from pelton import MLPGate, PeltonConfig, record_gates, set_temperature
from pelton.errors import AdapterError, RecipeError, SpecError
from pelton.training.fit import Interrupted, fit, resume
from pelton.training.gate_callbacks import TemperatureAnnealing
from pelton.training.run import Run
from pelton.training.sections import PenaltySettings
from pelton.tuner.controls import set_penalty_factor, tuners
from tiny import sentences
from zoo import ARCHS

ENTROPY = {**GATED, "gate": {"kind": "mlp", "entropy": 0.7}}


# ---- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["mlp", "mlp-sigmoid", "linear", "scalar"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_are_computed_in_float32_under_autocast(gate: str, dtype: torch.dtype) -> None:
    arch = ARCHS["bert"]
    model = attached(arch, GATES[gate])
    products: list[torch.dtype] = []
    inputs: list[tuple[torch.nn.Module, torch.Tensor, Any, torch.Tensor]] = []
    gates = [module for name, module in model.named_modules() if name.endswith(".pelton.gates.default")]
    for module in gates:
        module.register_forward_hook(lambda m, args, out: inputs.append((m, *args, out)))
    with torch.autocast("cpu", dtype), _Products(products):
        arch.run(model, arch.inputs())
    assert len(inputs) == len(gates)
    for module, x, mask, values in inputs:
        assert values.dtype == torch.float32
        with torch.no_grad():
            assert torch.equal(module.forward(x, mask), values)  # what it gives without autocast, bit by bit
    assert dtype in products  # autocast was at work elsewhere


class _Products(torch.overrides.TorchFunctionMode):
    """Notes the types of what linear layers give."""

    def __init__(self, seen: list[torch.dtype]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.linear:
            self.seen.append(result.dtype)
        return result


# ---- penalties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear_up"}, [0.0, 0.25, 0.5, 0.75, 1.0]),
        ({"schedule": "linear_down"}, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"warmup_steps": 2}, [0.0, 0.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear_up", "warmup_steps": 2}, [0.0, 0.0, 0.0, 0.5, 1.0]),
        ({"schedule": "linear_down", "warmup_steps": 2}, [0.0, 0.0, 1.0, 0.5, 0.0]),
        ({"schedule": "linear_up", "warmup_steps": 9}, [0.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_the_factor_of_the_penalties(settings: Any, expected: list[float]) -> None:
    schedule = PenaltySettings(**settings)
    assert [schedule.factor(step, 4) for step in range(5)] == expected


def test_a_factor_multiplies_the_penalties_and_nothing_else() -> None:
    arch = ARCHS["bert"]
    model = attached(arch, MLPGate(entropy=2.0, hidden_size=8)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = arch.inputs() | {"labels": torch.tensor([0, 1, 0])}
    losses = {}
    for factor in (0.0, 0.5, 1.0):
        set_penalty_factor(model, factor)
        losses[factor] = model(**inputs).loss.item()
    assert losses[1.0] - losses[0.0] > 0.1
    assert losses[0.5] - losses[0.0] == pytest.approx((losses[1.0] - losses[0.0]) / 2, abs=1e-5)
    assert losses[0.0] == pytest.approx(model.eval()(**inputs).loss.item(), abs=1e-6)
    with pytest.raises(SpecError, match="factor >= 0"):
        set_penalty_factor(model, -1.0)


def test_a_schedule_acts_in_a_run_and_ends_with_it(make: Make) -> None:
    factors: list[float] = []
    looks = [At(step, lambda model: factors.append(tuners(model)[0].penalty_factor)) for step in (1, 6, 12)]
    run = fit(make(ENTROPY, penalty={"schedule": "linear_up", "warmup_steps": 1}), callbacks=looks)
    assert factors == pytest.approx([0.0, 0.4, 1.0])
    assert tuners(run.model)[0].penalty_factor == 1.0
    plain = fit(make(ENTROPY))
    assert any(not torch.equal(value, weights(plain)[name]) for name, value in weights(run).items())


def test_a_resumed_run_has_the_same_penalties(make: Make) -> None:
    settings = {"penalty": {"schedule": "linear_down"}}
    whole = fit(make(ENTROPY, **settings))
    with pytest.raises(Interrupted) as stopped:
        fit(make(ENTROPY, **settings), callbacks=[At(8, press_ctrl_c)])
    assert_same(weights(whole), weights(resume(stopped.value.folder)))


# ---- temperature -------------------------------------------------------------------------------------------------


def test_a_temperature_is_set_and_saved(tmp_path: Any) -> None:
    arch = ARCHS["bert"]
    model = attached(arch, MLPGate(hidden_size=8, init_std=0.5, temperature=2.0))
    before = arch.run(model, arch.inputs())
    set_temperature(model, 0.25)
    with record_gates(model) as log:
        after = arch.run(model, arch.inputs())
    assert not torch.allclose(before, after)
    sharp = attached(arch, MLPGate(hidden_size=8, init_std=0.5, temperature=0.25))
    torch.testing.assert_close(arch.run(sharp, arch.inputs()), after)
    assert len(log) == 2
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["gate"]["temperature"] == 0.25
    loaded = PeftModel.from_pretrained(arch.build(), tmp_path).eval()
    torch.testing.assert_close(arch.run(loaded, arch.inputs()), after)


def test_a_temperature_of_one_adapter_leaves_the_other() -> None:
    arch = ARCHS["bert"]
    model = get_peft_model(arch.build(), PeltonConfig(methods=["lora"], gate=MLPGate()))
    model.add_adapter("second", PeltonConfig(methods=["lora"], gate=MLPGate(temperature=3.0)))
    set_temperature(model, 0.5)
    assert [model.peft_config[name].gate.temperature for name in ("default", "second")] == [0.5, 3.0]


def test_temperatures_that_cannot_be() -> None:
    model = attached(ARCHS["bert"], "linear")
    with pytest.raises(AdapterError, match="No gate of this model has a temperature"):
        set_temperature(model, 0.5)
    with pytest.raises(SpecError, match="temperature > 0"):
        set_temperature(attached(ARCHS["bert"]), 0.0)


def test_it_falls_by_the_same_ratio_in_every_step() -> None:
    annealing = TemperatureAnnealing(2.0, 0.125)
    found = [annealing.at(step, 4) for step in range(5)]
    assert found == pytest.approx([2.0, 1.0, 0.5, 0.25, 0.125])


HOT = {**GATED, "gate": {"kind": "mlp", "temperature": 4.0, "init_std": 1.0}}


def test_an_annealed_run_loads_with_the_temperature_it_was_judged_at(make: Make) -> None:
    seen: dict[int, float] = {}
    looks = [At(s, lambda m, s=s: seen.update({s: m.peft_config["default"].gate.temperature})) for s in (1, 6, 12)]
    run = fit(make(HOT, gate_temperature_end=0.25, learning_rate=2e-2), callbacks=looks)
    assert seen == pytest.approx({s: 4.0 * (1 / 16) ** (s / 12) for s in (1, 6, 12)})
    best = run.folder.read("metrics")["best_step"]
    saved = json.loads((run.folder.adapter / "adapter_config.json").read_text())["gate"]["temperature"]
    assert saved == pytest.approx(4.0 * (1 / 16) ** (best / 12))
    loaded, texts = Run.load(run.folder.path), [(row["text"],) for row in sentences(9)]
    np.testing.assert_allclose(loaded.outputs(texts), run.outputs(texts), atol=1e-6)
    assert loaded.evaluate(loaded.examples()) == run.folder.read("metrics")["test"]


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_best_checkpoint_keeps_its_own_temperature(make: Make, metric: str) -> None:
    """Learning that ruins the model makes the first checkpoint the best one."""
    run = fit(make(HOT, gate_temperature_end=0.25, learning_rate=1.0, metric_for_best=metric, epochs=3))
    best = run.folder.read("metrics")["best_step"]
    saved = json.loads((run.folder.adapter / "adapter_config.json").read_text())["gate"]["temperature"]
    assert saved == pytest.approx(4.0 * (1 / 16) ** (best / 18))
    history = [json.loads(line) for line in run.folder.history.read_text().splitlines()]
    judged = next(entry for entry in history if entry["step"] == best and f"eval_{metric}" in entry)
    assert run.folder.read("metrics")["validation"][metric] == pytest.approx(judged[f"eval_{metric}"], abs=1e-6)


@pytest.mark.parametrize("step", [3, 8])
def test_a_resumed_run_has_the_same_temperatures(make: Make, step: int) -> None:
    whole = fit(make(HOT, gate_temperature_end=0.25))
    with pytest.raises(Interrupted) as stopped:
        fit(make(HOT, gate_temperature_end=0.25), callbacks=[At(step, press_ctrl_c)])
    resumed = resume(stopped.value.folder)
    assert_same(weights(whole), weights(resumed))
    configs = [(r.folder.adapter / "adapter_config.json").read_text() for r in (whole, resumed)]
    assert configs[0] == configs[1]


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_gates_without_what_is_scheduled(make: Make) -> None:
    with pytest.raises(RecipeError, match=r"training.penalty schedules the gate's penalties, but it has none"):
        fit(make(penalty={"schedule": "linear_up"}))
    with pytest.raises(RecipeError, match=r"needs a gate with a temperature \(mlp, gumbel\), but the gate is 'linear'"):
        fit(make({**GATED, "gate": "linear"}, gate_temperature_end=0.5))
    with pytest.raises(RecipeError, match=r"training.penalty is for an adapter, and adapter is null"):
        make(None, penalty={"warmup_steps": 3})
    with pytest.raises(RecipeError, match="should be 'constant', 'linear_up' or 'linear_down', but got 'up'"):
        make(penalty={"schedule": "up"})
