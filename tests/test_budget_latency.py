"""Pruning to a time: what goes, what is measured, what is refused; with costs that are given instead of measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fits import Make
from law import METHODS, attached, far
from pelton import PeltonConfig, prune, revive
from pelton.cli.main import run as command
from pelton.compress.budget import Costs, choose, measured_costs, within_latency
from pelton.errors import AdapterError, SpecError
from pelton.insight.latency import Ratio, Stopwatch, interleave
from pelton.training.fit import fit
from pelton.training.run import Run
from pelton.tuner import gated_blocks
from pelton.tuner.block import GatedBlock
from pelton.tuner.cut import Entry
from pelton.tuner.twin import plain_twin, twin
from test_laws_compress import assert_same, output, tensors
from zoo import ARCHS, Arch

COST = {"lora": 0.02, "bottleneck": 0.01, "ia3": 0.004, "prefix": 0.03}
GATE = 0.003


def ratio(value: float) -> Ratio:
    return Ratio(value, 0.01, value, 1.0, 5)


class Pretend:
    """Times models by what they hold, as a machine would on which costs are these; off by `noise`, in turn."""

    def __init__(self, noise: Sequence[float] = (0.0,)) -> None:
        self.noise, self.asked = list(noise), 0

    def __call__(self, models: Sequence[nn.Module], plain: nn.Module) -> list[Ratio]:
        assert not [module for module in plain.modules() if isinstance(module, GatedBlock)]
        found = [ratio(time_of(model) + self.noise[self.asked % len(self.noise)]) for model in models]
        self.asked += 1
        return found


def time_of(model: nn.Module) -> float:
    blocks = [module for module in model.modules() if isinstance(module, GatedBlock)]
    return 1 + sum(GATE + sum(COST[spec.kind] for spec in block.wirings["default"].methods) for block in blocks)


def given(model: Any, value: Callable[[int, str], float]) -> dict[str, dict[str, float]]:
    return {
        str(block.block.index): {spec.kind: value(block.block.index, spec.kind) for spec in block.wirings[name].methods}
        for block in gated_blocks(model)
        for name in block.wirings
    }


def left(model: Any) -> set[tuple[int, str]]:
    return {(b.block.index, s.kind) for b in gated_blocks(model) for s in b.wirings["default"].methods}


@pytest.fixture
def model() -> Any:
    return attached(ARCHS["bert"], "mlp", [METHODS["lora"], METHODS["bottleneck"], METHODS["prefix-kv"]])


# ---- the budget is met -------------------------------------------------------------------------------------------


def test_what_stays_is_within_the_budget_and_worth_most(model: Any) -> None:
    """All cost 0.126. Within 0.07, bottlenecks (10 a hundredth) and one LoRA (5) beat prefixes (1)."""
    worth = {"lora": 10.0, "bottleneck": 10.0, "prefix": 3.0}
    importance = given(model, lambda block, kind: worth[kind] + 0.1 * block)
    gone = prune(model, budget_latency=1.07, timer=Pretend(), importance=importance)
    assert gone.latency is not None
    assert gone.latency.before.ratio == pytest.approx(1.126)
    assert gone.latency.after.ratio == pytest.approx(1.066)
    assert time_of(model) == pytest.approx(1.066)
    assert left(model) == {(0, "lora"), (1, "lora"), (0, "bottleneck"), (1, "bottleneck")}
    assert [(e.block, e.kind) for e in gone] == [(0, "prefix"), (1, "prefix")]
    assert revive(model) == ["prune"]


def test_a_model_that_is_fast_enough_stays(model: Any) -> None:
    before = tensors(model)
    gone = prune(model, budget_latency=1.2, timer=Pretend(), importance=given(model, lambda *_: 1.0))
    assert gone == []
    assert gone.latency is not None
    assert gone.latency.before == gone.latency.after == ratio(time_of(model))
    assert_same(model, before)
    assert prune(model, keep=3, importance=given(model, lambda *_: 1.0)).latency is None


def test_every_architecture(arch: Arch) -> None:
    model = attached(arch, "scalar", [METHODS["lora"], METHODS["bottleneck"], METHODS["ia3"]])
    budget = 1 + 0.5 * (time_of(model) - 1)
    gone = prune(model, budget_latency=budget, timer=Pretend())
    assert gone
    assert left(model)
    assert gone.latency is not None
    assert gone.latency.after.ratio == pytest.approx(time_of(model))
    assert time_of(model) <= budget
    output(arch, model)


def test_what_turns_out_too_slow_loses_more(model: Any) -> None:
    """The first measurement of what is left is off by more than the gap; the next one is right."""
    timer = Pretend([0.0, 0.03, 0.0])
    gone = prune(model, budget_latency=1.07, timer=timer, importance=given(model, lambda block, _: 1.0 + block))
    assert timer.asked == 3
    assert gone.latency is not None
    assert time_of(model) == pytest.approx(gone.latency.after.ratio)
    assert time_of(model) <= 1.045


@pytest.mark.parametrize("budget", [1.01, 1.0, 0.5])
def test_a_budget_that_cannot_be_met_names_the_nearest_that_can(model: Any, budget: float) -> None:
    before = tensors(model)
    message = r"cannot be met: the nearest was 1\.013 \(spread 0\.010\) .*with 1 of 6 methods left.*at least 1\.013"
    with pytest.raises(AdapterError, match=message):
        prune(model, budget_latency=budget, timer=Pretend(), importance=given(model, lambda *_: 1.0))
    assert_same(model, before)
    prune(model, budget_latency=1.0131, timer=Pretend(), importance=given(model, lambda *_: 1.0))
    assert {kind for _, kind in left(model)} == {"bottleneck"}


def test_a_machine_too_noisy_to_tell_is_given_up_on(model: Any) -> None:
    before, timer = tensors(model), Pretend([0.0, *[0.2] * 20])
    with pytest.raises(AdapterError, match=r"budget_latency=1\.09 cannot be met"):
        prune(model, budget_latency=1.09, timer=timer, importance=given(model, lambda *_: 1.0))
    assert timer.asked <= 6
    assert_same(model, before)


def test_one_kind_alone_is_pruned_by_blocks() -> None:
    model = attached(ARCHS["bert"], "scalar", [METHODS["lora"]])
    gone = prune(model, budget_latency=1.03, timer=Pretend(), importance={"0": {"lora": 2.0}, "1": {"lora": 1.0}})
    assert [(e.block, e.kind) for e in gone] == [(1, "lora")]
    assert time_of(model) == pytest.approx(1.023)


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_bad_input_is_refused_and_changes_nothing(model: Any) -> None:
    before, importance = tensors(model), given(model, lambda *_: 1.0)
    with pytest.raises(AdapterError, match="keep and budget_latency exclude each other"):
        prune(model, budget_latency=1.05, keep=2, timer=Pretend(), importance=importance)
    with pytest.raises(AdapterError, match=r"give timer=Stopwatch\(batches\)"):
        prune(model, budget_latency=1.05, importance=importance)
    with pytest.raises(AdapterError, match="These gates read the input"):
        prune(model, budget_latency=1.05, timer=Pretend())
    for budget in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(SpecError, match="0 < budget_latency < inf"):
            prune(model, budget_latency=budget, timer=Pretend(), importance=importance)
    with pytest.raises(SpecError, match="len"):
        Stopwatch([])
    with pytest.raises(SpecError, match="rounds >= 2"):
        Stopwatch([{}], rounds=1)
    model.add_adapter("second", PeltonConfig(methods=["lora"]))
    with pytest.raises(AdapterError, match="'second' is not active"):
        prune(
            model,
            budget_latency=1.05,
            timer=Pretend(),
            importance={"0": {"lora": 1}, "1": {"lora": 1}},
            adapter="second",
        )
    model.delete_adapter("second")
    assert_same(model, before)


def test_a_timer_that_fails_changes_nothing(model: Any) -> None:
    before, out = tensors(model), output(ARCHS["bert"], model)

    def fail(models: Sequence[nn.Module], plain: nn.Module) -> list[Ratio]:
        raise RuntimeError("no clock")

    with pytest.raises(RuntimeError, match="no clock"):
        prune(model, budget_latency=1.05, timer=fail, importance=given(model, lambda *_: 1.0))
    assert_same(model, before)
    assert torch.equal(output(ARCHS["bert"], model), out)


# ---- choosing ----------------------------------------------------------------------------------------------------


def entries(*rows: tuple[int, str, float]) -> list[Entry]:
    return sorted([Entry(b, kind, value, 1) for b, kind, value in rows], key=lambda entry: entry.importance)


def test_costs_are_found_by_stack_and_kind() -> None:
    stacks = {0: "encoder", 1: "encoder", 2: "decoder"}
    true = {("encoder", "lora"): 0.02, ("encoder", "ia3"): 0.01, ("decoder", "lora"): 0.05}
    some = entries((0, "lora", 1), (1, "lora", 1), (0, "ia3", 1), (1, "ia3", 1), (2, "lora", 1))
    right = Costs(stacks, true, 0.0)

    def measure(sets: Sequence[Sequence[Entry]]) -> list[Ratio]:
        return [ratio(right.of([e for e in some if e not in gone])) for gone in sets]

    whole, found = measured_costs(some, stacks, measure)
    assert whole.ratio == pytest.approx(1.11)
    kept = [e for e in some if e.block < 2]
    assert found.of(kept) == pytest.approx(right.of(kept))
    assert found.of(some) == pytest.approx(right.of(some))
    assert found.methods["encoder", "ia3"] == pytest.approx(0.01)


def test_a_whole_block_goes_where_its_gate_is_what_costs() -> None:
    some = entries((0, "a", 1.0), (0, "b", 1.0), (1, "a", 1.1), (1, "b", 1.1))
    costs = Costs({0: "s", 1: "s"}, {("s", "a"): 0.01, ("s", "b"): 0.01}, gate=0.05)
    assert {(e.block, e.kind) for e in choose(some, costs, 1.08)} == {(1, "a"), (1, "b")}


def test_what_still_fits_comes_back() -> None:
    """The greedy way drops the small one first and the large one then; the small one fits again."""
    some = entries((0, "small", 1.0), (1, "large", 50.0), (2, "dear", 90.0))
    costs = Costs(dict.fromkeys(range(3), "s"), {("s", "small"): 0.01, ("s", "large"): 0.06, ("s", "dear"): 0.05}, 0.0)
    assert {e.kind for e in choose(some, costs, 1.06)} == {"small", "dear"}
    assert {e.kind for e in choose(some, costs, 1.001)} == {"small"}


def test_methods_that_harm_go_first_and_do_not_come_back() -> None:
    some = entries((0, "a", -1.0), (1, "a", 0.5), (2, "a", 0.4))
    costs = Costs(dict.fromkeys(range(3), "s"), {("s", "a"): 0.02}, 0.0)
    assert {e.block for e in choose(some, costs, 1.05)} == {1, 2}


def test_times_that_tell_nothing_end_in_a_refusal() -> None:
    some = entries((0, "a", 1.0), (1, "a", 2.0), (0, "b", 1.0))
    with pytest.raises(AdapterError, match=r"the nearest was 1\.100 .*with 3 of 3"):
        within_latency(some, {0: "s", 1: "s"}, 1.05, lambda sets: [ratio(1.1) for _ in sets])


# ---- measuring ---------------------------------------------------------------------------------------------------


def test_runs_take_turns_and_each_is_timed_alone() -> None:
    now, order = [0.0], []

    def takes(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            now[0] += seconds

        return run

    found = interleave([takes("a", 2.0), takes("b", 3.0), takes("c", 5.0)], rounds=6, warm_up=1, clock=lambda: now[0])
    assert found == [[2.0] * 6, [3.0] * 6, [5.0] * 6]
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 7
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {turn[0] for turn in rounds} == {"a", "b", "c"}


def test_what_is_left_under_way_is_waited_for() -> None:
    now = [0.0]

    def settle() -> None:
        now[0] += 1.0

    (found,) = interleave([lambda: None], rounds=2, settle=settle, clock=lambda: now[0])
    assert found == [1.0, 1.0]


def test_ratios_are_of_the_same_round() -> None:
    """The machine is twice as slow in the second half; the ratio is not."""
    found = Ratio.of([1.1, 1.1, 2.2, 2.2], [1.0, 1.0, 2.0, 2.0])
    assert found.ratio == pytest.approx(1.1)
    assert found.spread == pytest.approx(0.0)
    assert (found.seconds, found.reference, found.rounds) == (pytest.approx(1.65), pytest.approx(1.5), 4)
    assert str(Ratio(1.05, 0.0123, 1.0, 1.0, 9)) == "1.050 (spread 0.012)"


def test_a_stopwatch_leaves_models_as_they_were(model: Any) -> None:
    ticks: Iterator[int] = iter(range(1000))
    model.train()
    model.get_base_model().bert.eval()
    modes = [module.training for module in model.modules()]
    before = tensors(model)
    watch = Stopwatch([ARCHS["bert"].inputs()], rounds=3, clock=lambda: float(next(ticks)))
    (found,) = watch([model], plain_twin(model))
    assert found == Ratio(1.0, 0.0, 1.0, 1.0, 3)
    assert [module.training for module in model.modules()] == modes
    assert_same(model, before)


def test_twins_share_weights_and_nothing_else(arch: Arch) -> None:
    model = attached(arch, "scalar")
    out, names = output(arch, model), [name for name, _ in model.named_modules()]
    other = twin(model)
    assert all(one is two for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(output(arch, other), out)
    prune(other, keep=1)
    plain = plain_twin(model)
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in arch.build().named_modules()]
    assert far(output(arch, plain), output(arch, arch.build())) == 0
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(output(arch, model), out)
    assert all(type(block.gates["default"]).__name__ == "ScalarGateModule" for block in gated_blocks(model))


# ---- runs --------------------------------------------------------------------------------------------------------


def test_from_the_command_line(make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder: Path = fit(make(max_steps=2)).folder.path
    seen: list[int] = []

    def pretend(batches: Sequence[Any]) -> Pretend:
        seen.append(len(batches))
        return Pretend()

    monkeypatch.setattr("pelton.compress.runs.Stopwatch", pretend)
    start = time_of(Run.load(folder).model)
    assert command(["prune", str(folder), "--budget-latency", "1.0"]) == 2
    assert "budget_latency=1 cannot be met: the nearest was" in capsys.readouterr().err
    assert not (folder / "changes.json").exists()
    assert command(["prune", str(folder), "--budget-latency", "1.03", "--keep", "2"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert command(["prune", str(folder), "--budget-latency", "1.035"]) == 0
    end = time_of(Run.load(folder).model)
    assert end <= 1.035 < start
    said = capsys.readouterr().out
    assert f"inference  {start:.3f} (spread 0.010) → {end:.3f} (spread 0.010) times the plain backbone" in said
    (change,) = json.loads((folder / "changes.json").read_text())
    assert change["latency"]["after"]["ratio"] == pytest.approx(end)
    assert 0 < max(seen) <= 2
