"""Law 8: frozen gates at the recorded values, pruned closed methods and what is brought back change nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from law import GATES, METHODS, attached, far, together, wake
from pelton import FixedGate, FrozenGate, MLPGate, PeltonConfig, ScalarGate, freeze_gates, prune, record_gates, revive
from pelton.compress.steps import adapter_of
from pelton.errors import AdapterError
from pelton.gates import StaticGate
from pelton.tuner import gated_blocks
from pelton.tuner.recast import adapter_tensors
from pelton.tuner.taps import Taps
from zoo import ARCHS, Arch

KINDS = ("lora", "bottleneck", "prefix", "ia3", "bitfit", "dilated")


def output(arch: Arch, model: Any) -> Tensor:
    with torch.no_grad():
        return arch.run(model, arch.inputs())


def tensors(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model: Any, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def one_row(arch: Arch) -> dict[str, Any]:
    return {k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in arch.inputs().items()}


@pytest.mark.parametrize("gate", ["mlp", "mlp-sigmoid", "linear", "scalar"])
@pytest.mark.parametrize("statistic", ["mean", "median", "fit"])
def test_frozen_at_the_recorded_values_gives_the_recorded_output(arch: Arch, gate: str, statistic: Any) -> None:
    """One value an example: frozen on one example, that example's output stays."""
    if any(block.block.causal for block in gated_blocks(attached(arch, "fixed"))) and gate != "scalar":
        pytest.skip("gates of causal blocks have a value for each token")
    model, inputs = attached(arch, gate), one_row(arch)
    with torch.no_grad(), record_gates(model) as log:
        before = arch.run(model, inputs)
    if gate != "scalar" and len(log) > len(gated_blocks(model)):
        pytest.skip("layers that share a block have a value each")
    with torch.no_grad():
        frozen = freeze_gates(model, [inputs], statistic=statistic)
        assert far(before, arch.run(model, inputs)) < 1e-5
    assert isinstance(model.peft_config["default"].gate_spec, FrozenGate)
    assert model.peft_config["default"].gate_spec == frozen
    assert not [name for name, _ in model.named_parameters() if ".pelton.gates." in name]


@pytest.mark.parametrize("gate", list(GATES))
def test_frozen_and_revived_is_to_the_bit_what_it_was(arch: Arch, gate: str) -> None:
    model = attached(arch, gate)
    before, out, names = tensors(model), output(arch, model), [n for n, _ in model.named_modules()]
    requires = {name: p.requires_grad for name, p in model.named_parameters()}
    freeze_gates(model, [arch.inputs()])
    if gate != "fixed":
        prune(model, keep=2)
    assert revive(model) == (["prune", "freeze"] if gate != "fixed" else ["freeze"])
    assert_same(model, before)
    assert torch.equal(output(arch, model), out)
    assert [n for n, _ in model.named_modules()] == names
    assert {name: p.requires_grad for name, p in model.named_parameters()} == requires


def closed(model: Any, kinds: tuple[str, ...]) -> None:
    """Closes the gates of some methods for good, whatever the input."""
    for block in gated_blocks(model):
        gate: Any = block.gates["default"]
        numbers = [number for number, kind in enumerate(gate.methods) if kind in kinds]
        with torch.no_grad():
            if isinstance(gate, StaticGate):
                for value in gate.state_dict().values():
                    value[..., numbers] = -1e9 if "theta" in gate.state_dict() else 0.0
            else:
                gate.out.weight[numbers] = 0.0
                gate.out.bias[numbers] = -1e9


@pytest.mark.parametrize("gate", ["mlp", "mlp-sigmoid", "scalar", "fixed"])
def test_pruning_closed_methods_changes_nothing(arch: Arch, gate: str) -> None:
    model = attached(arch, gate)
    closed(model, ("lora", "bitfit"))
    out, size = output(arch, model), sum(p.numel() for p in model.parameters())
    blocks = len(gated_blocks(model))
    shut = {str(b.block.index): {k: float(k not in ("lora", "bitfit")) for k in METHODS} for b in gated_blocks(model)}
    importance = {index: {k.split("-")[0]: v for k, v in row.items()} for index, row in shut.items()}
    gone = prune(model, threshold=0.5, importance=importance)
    assert {entry.kind for entry in gone} == {"lora", "bitfit"}
    assert len(gone) == 2 * blocks
    assert torch.equal(output(arch, model), out) or far(out, output(arch, model)) < 1e-6
    assert sum(p.numel() for p in model.parameters()) < size - sum(entry.parameters for entry in gone) + 1
    assert not [n for n, _ in model.named_modules() if n.endswith((".lora", ".bitfit"))]


@pytest.mark.parametrize("gate", ["mlp", "scalar"])
def test_a_smaller_adapter_saves_loads_and_grows_again(arch: Arch, gate: str, tmp_path: Path) -> None:
    model = attached(arch, gate)
    whole, before = output(arch, model), tensors(model)
    importance = {
        str(b.block.index): {s.kind: float(n + b.block.index) for n, s in enumerate(together(arch))}
        for b in gated_blocks(model)
    }
    prune(model, keep=3, importance=importance)
    freeze_gates(model, [arch.inputs()])
    small = output(arch, model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(arch.build(), tmp_path, adapter_name="other").eval()
    assert torch.equal(output(arch, again), small)
    assert revive(again) == ["freeze", "prune"]
    assert torch.equal(output(arch, again), whole)
    same = {key.replace(".other.", ".default."): value for key, value in again.state_dict().items()}
    assert set(same) == set(before)
    assert all(torch.equal(same[key], value) for key, value in before.items())
    again.save_pretrained(tmp_path, selected_adapters=["other"])
    assert not list((tmp_path / "other").glob("removed.*"))


def test_what_is_left_learns_and_nothing_else(arch: Arch) -> None:
    model = attached(arch, "scalar")
    prune(model, keep=2)
    model.train()
    arch.run(model, arch.inputs()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".pelton." in name), name


def test_a_pass_that_fails_half_way_changes_nothing(arch: Arch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(arch, "scalar")
    before, out, names = tensors(model), output(arch, model), [n for n, _ in model.named_modules()]
    config = copy.deepcopy(model.peft_config["default"].to_dict())
    connect, calls, blocks = Taps.connect, [], len(gated_blocks(model))

    def fail(taps: Taps, *arguments: Any) -> None:
        calls.append(taps)
        if len(calls) == min(2, blocks):
            raise RuntimeError("a block")
        connect(taps, *arguments)

    for act in (lambda: freeze_gates(model), lambda: prune(model, keep=1 + len(gated_blocks(model)))):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Taps, "connect", fail)
            with pytest.raises(RuntimeError, match="a block"):
                act()
        assert_same(model, before)
        assert torch.equal(output(arch, model), out)
        assert [n for n, _ in model.named_modules()] == names
        assert model.peft_config["default"].to_dict() == config
        assert model.peft_config["default"].steps == ()


def test_another_adapter_is_left_alone(arch: Arch) -> None:
    model = attached(arch, "scalar")
    model.add_adapter("second", PeltonConfig(methods=together(arch), gate=MLPGate(hidden_size=4, init_std=0.5)))
    wake(model, "second")
    model.set_adapter("second")
    out = output(arch, model)
    prune(model, keep=2, adapter="default")
    assert torch.equal(output(arch, model), out)
    model.set_adapter("default")
    small = output(arch, model)
    assert revive(model) == ["prune"]
    assert far(small, output(arch, model)) > 1e-4
    model.set_adapter("second")
    assert torch.equal(output(arch, model), out)


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_reviving_what_was_trained_since_is_refused() -> None:
    model = attached(ARCHS["bert"], "scalar")
    with pytest.raises(AdapterError, match="has nothing to bring back"):
        revive(model)
    prune(model, keep=2)
    tuner, name = adapter_of(model, None)
    with torch.no_grad():
        next(iter(adapter_tensors(tuner, name).values())).add_(1e-3)
    before = tensors(model)
    with pytest.raises(AdapterError, match="has changed since the pass 'prune'"):
        revive(model)
    assert_same(model, before)


@pytest.mark.parametrize(
    ("gate", "arguments", "message"),
    [
        ("scalar", {"threshold": 2.0}, "Nothing would be left of adapter 'default': the most important of its"),
        ("scalar", {"threshold": 0.1, "keep": 2}, "threshold and keep exclude each other"),
        ("scalar", {"budget_params": 1}, "budget_params=1 cannot be met: .* Give at least"),
        ("scalar", {"keep": 0}, "`keep > 0` must hold, but got keep=0"),
        ("scalar", {"threshold": float("nan")}, "`threshold is a number` must hold, but got threshold=nan"),
        ("scalar", {"importance": {"0": {"lora": float("nan")}}}, "The importance of 'lora' in block 0 is nan"),
        ("scalar", {"importance": {"0": {"lora": 1.0}}}, "importance has no number for 'bottleneck' in block 0"),
        ("mlp", {"threshold": 0.1}, "These gates read the input, so how open a method is depends on data"),
        ("scalar", {"adapter": "defalt"}, "There is no adapter 'defalt'"),
    ],
)
def test_what_cannot_be_pruned_is_said(gate: str, arguments: dict[str, Any], message: str) -> None:
    model = attached(ARCHS["bert"], gate)
    before = tensors(model)
    with pytest.raises(Exception, match=message):
        prune(model, **arguments)
    assert_same(model, before)


def test_importances_of_any_size_have_a_threshold() -> None:
    """Without an amount, what has less than 0.05 of the largest goes."""
    for scale in (1e-4, 1.0, 1e4):
        model = attached(ARCHS["bert"], "scalar")
        rows = {str(block.block.index): dict.fromkeys(KINDS, 0.06 * scale) for block in gated_blocks(model)}
        rows["0"] |= {"lora": scale, "prefix": 0.04 * scale}
        rows["1"] |= {"bitfit": -0.1 * scale}
        assert [(entry.block, entry.kind) for entry in prune(model, importance=rows)] == [(1, "bitfit"), (0, "prefix")]


def test_what_has_no_parameters_is_not_weighed() -> None:
    model = attached(ARCHS["llama"], FixedGate(0.5), [METHODS["dilated"]])
    for more in ({}, {"budget_params": 5}, {"keep": 1}):
        with pytest.raises(AdapterError, match="importance has no number for any of its methods"):
            prune(model, importance={}, **more)  # type: ignore[arg-type]


def test_a_budget_is_met_by_what_matters_least() -> None:
    model = attached(ARCHS["bert"], ScalarGate(0.5))
    importance = {
        str(b.block.index): {s.kind: float(n) for n, s in enumerate(b.wirings["default"].methods)}
        for b in gated_blocks(model)
    }
    size = lambda: sum(p.numel() for n, p in model.named_parameters() if ".pelton.methods." in n)  # noqa: E731
    budget = size() // 2
    gone = prune(model, budget_params=budget, importance=importance)
    assert size() <= budget < size() + gone[-1].parameters
    assert [entry.importance for entry in gone] == sorted(entry.importance for entry in gone)


def test_freezing_without_data_is_refused() -> None:
    model = attached(ARCHS["bert"])
    with pytest.raises(AdapterError, match="freeze_gates needs data"):
        freeze_gates(model)
    with pytest.raises(AdapterError, match=r"but got one batch. Put it in a list"):
        freeze_gates(model, ARCHS["bert"].inputs())
    for wrong in (ARCHS["bert"].inputs()["input_ids"], [ARCHS["bert"].inputs()["input_ids"]], {"a": ["input_ids"]}):
        with pytest.raises(
            AdapterError, match=r"Expected batches, each of inputs by name, but got a (Tensor|str) for one"
        ):
            freeze_gates(model, wrong)
    with pytest.raises(AdapterError, match="No data reached the gates"):
        freeze_gates(model, [])
    with pytest.raises(Exception, match="Did you mean 'median'"):
        freeze_gates(model, [ARCHS["bert"].inputs()], statistic="medain")  # type: ignore[arg-type]
    model.add_adapter("second", PeltonConfig(methods=["lora"]))
    with pytest.raises(AdapterError, match="'second' is not active, so no data reaches its gates"):
        freeze_gates(model, [ARCHS["bert"].inputs()], adapter="second")


def test_each_task_may_have_its_constants() -> None:
    from pelton import set_stage

    arch = ARCHS["bert"]
    model, rows = attached(arch), [one_row(arch), arch.inputs(seed=3)]
    with torch.no_grad():
        first, second = arch.run(model, rows[0]), freeze_gates(copy.deepcopy(model), [rows[1]])
        gate = freeze_gates(model, {"a": [rows[0]], "b": [rows[1]]})
        assert far(first, arch.run(model, rows[0])) < 1e-5
        set_stage(model, "b")
    assert gate.stages is not None
    assert gate.stages["b"] == second.values


def test_the_mean_is_over_what_is_no_padding() -> None:
    arch = ARCHS["llama"]
    model = attached(arch)
    with record_gates(model) as log, torch.no_grad():
        arch.run(model, arch.inputs())
    found = freeze_gates(model, [arch.inputs()])
    frame = log.to_frame()
    for index, (_, rows) in enumerate(frame.groupby("index")):
        for kind, value in rows.groupby("method").value.mean().items():
            assert found.values[str(index)][kind] == pytest.approx(value, abs=1e-6)


def test_a_fit_changes_a_blocks_output_less_than_the_mean() -> None:
    """Seen in the first block, which reads the same before and after."""
    arch, batches, errors = ARCHS["bert"], [ARCHS["bert"].inputs(seed=seed) for seed in range(6)], {}
    for statistic in ("mean", "fit"):
        model = attached(arch, MLPGate(hidden_size=8, activation="sigmoid", init_std=1.0))
        before = first_block(model, batches)
        freeze_gates(model, batches, statistic=statistic)  # type: ignore[arg-type]
        after = first_block(model, batches)
        errors[statistic] = sum(float((a - b).square().sum()) for a, b in zip(before, after, strict=True))
    assert errors["fit"] < 0.99 * errors["mean"]


def first_block(model: Any, batches: list[dict[str, Any]]) -> list[Tensor]:
    """The first block's outputs at tokens that are no padding."""
    with torch.no_grad():
        states = [model(**batch, output_hidden_states=True).hidden_states[1] for batch in batches]
    return [state[batch["attention_mask"].bool()] for state, batch in zip(states, batches, strict=True)]


def staged(arch: Arch, **stages: Any) -> Any:
    return attached(arch, FixedGate(stages={name: dict.fromkeys(KINDS, 0.0) | row for name, row in stages.items()}))


def test_a_fixed_gate_keeps_its_stage_when_it_is_pruned() -> None:
    from pelton import set_stage

    arch = ARCHS["bert"]
    rest = {"bottleneck": 0.1, "prefix": 0.3, "ia3": 0.8, "dilated": 0.2}
    model = staged(arch, a=dict.fromkeys(rest, 0.2) | {"lora": 0.2, "bitfit": 0.04}, b=rest | {"lora": 0.9})
    set_stage(model, "b")
    out = output(arch, model)
    assert {entry.kind for entry in prune(model)} == {"bitfit"}
    assert torch.equal(output(arch, model), out)


def test_no_stage_loses_what_it_needs() -> None:
    """Whichever stage is on, a method that another one opens stays."""
    from pelton import set_stage

    arch = ARCHS["bert"]
    model = staged(arch, a={"lora": 1.0}, b={"bottleneck": 0.7})
    outs = {}
    for stage in ("b", "a"):
        set_stage(model, stage)
        outs[stage] = output(arch, model)
    gone = prune(model)
    assert {entry.kind for entry in gone} == {"prefix", "ia3", "bitfit", "dilated"}
    for stage in ("a", "b"):
        set_stage(model, stage)
        torch.testing.assert_close(output(arch, model), outs[stage], atol=1e-5, rtol=0)
