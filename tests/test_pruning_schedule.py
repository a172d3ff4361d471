"""Methods that go while a model learns: when, how many, what stays, and that a resumed run does the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from fits import GATED, At, Make, assert_same, press_ctrl_c, weights
from pelton import revive
from pelton.cli.main import run as command
from pelton.errors import AdapterError, RecipeError
from pelton.training.contributions import share
from pelton.training.fit import Interrupted, fit, resume
from pelton.training.run import Run
from pelton.training.sections import PruningSettings
from pelton.tuner import gated_blocks

SCALAR = {**GATED, "gate": {"kind": "scalar"}}
FIXED = {**GATED, "gate": {"kind": "fixed", "value": 0.5}}
PENALISED = {**GATED, "gate": {"kind": "mlp", "entropy": 0.1}}
THREE = {"methods": [*GATED["methods"], {"kind": "ia3"}], "gate": {"kind": "mlp"}}
KEEP = {"keep": 2, "start": 0.25, "end": 0.75, "rounds": 3}


def kinds(model: Any) -> dict[int, tuple[str, ...]]:
    """The methods that a model has, by block."""
    there = [m for m in model.modules() if type(m).__name__ == "GatedBlock"]
    return {block.block.index: tuple(spec.kind for spec in block.wirings["default"].methods) for block in there}


def count(model: Any) -> int:
    return sum(len(block) for block in kinds(model).values())


class Watch(TrainerCallback):  # type: ignore[misc]
    """Notes after each step how many methods there are, and what the optimizer holds."""

    def __init__(self) -> None:
        self.methods: list[int] = []
        self.optimizer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        self.methods.append(count(model))
        self.optimizer = optimizer
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        assert {id(p) for p in optimizer.state} <= set(held)


# ---- the schedule ------------------------------------------------------------------------------------------------


def test_rounds_are_at_equal_distances_and_end_in_time() -> None:
    settings = PruningSettings(keep=1, start=0.3, end=0.8, rounds=5)
    assert settings.start_of(100) == 30
    assert settings.rounds_of(100) == [40, 50, 60, 70, 80]
    assert settings.rounds_of(4) == [2, 3]
    assert settings.rounds_of(1) == [1]
    for steps in range(1, 60):
        rounds = PruningSettings(keep=1, start=0.9, end=0.95, rounds=3).rounds_of(steps)
        assert 1 <= rounds[0] <= rounds[-1] <= steps


def test_how_many_go_is_cubic(make: Make) -> None:
    """Zhu and Gupta 2017, equation 1: of 11 to go after round i of 4, 11 · (1 − (1 − i/4)³)."""
    watch = Watch()
    adapter = {"methods": [*THREE["methods"], {"kind": "bitfit"}, {"kind": "prefix", "prefix_length": 2}]}
    settings = {"keep": 2, "start": 0.25, "end": 0.75, "rounds": 4}
    run = fit(make({**adapter, "gate": {"kind": "mlp"}}, pruning=settings, max_steps=16), callbacks=[watch])
    left = [10 - int(8 * (1 - (1 - number / 4) ** 3)) for number in range(1, 5)]
    assert [watch.methods[step - 1] for step in (5, 6, 8, 10, 12, 16)] == [10, left[0], left[1], left[2], left[3], 2]
    assert left[0] - left[1] < 10 - left[0]
    assert count(run.model) == 2


@pytest.mark.parametrize("adapter", [GATED, SCALAR, FIXED, PENALISED, THREE], ids=lambda a: str(a["gate"]))
def test_parameters_go_with_their_methods(make: Make, adapter: Any) -> None:
    watch, whole = Watch(), fit(make(adapter, max_steps=1))
    run = fit(
        make(adapter, pruning=KEEP, gradient_accumulation=2, method_learning_rates={"lora": 1e-2}), callbacks=[watch]
    )
    assert count(run.model) == 2
    assert watch.methods == sorted(watch.methods, reverse=True)
    saved, before = weights(run), weights(whole)
    assert len(saved) < len(before)
    assert {name for name in saved if ".methods." in name} == {
        name
        for name in before
        if any(f"layer.{b}.pelton.methods.{k}." in name for b, ks in kinds(run.model).items() for k in ks)
    }
    told = run.folder.read("metrics")["pruning"]
    assert told["methods"] == [2 * len(adapter["methods"]), 2]
    assert sum(len(entry["gone"]) for entry in told["rounds"]) == told["methods"][0] - 2
    gone = sum(one["parameters"] for entry in told["rounds"] for one in entry["gone"])
    assert told["parameters"][0] - told["parameters"][1] == gone > 0
    noted = [json.loads(line) for line in run.folder.history.read_text().splitlines()]
    assert [(e["step"], e["pruned"]) for e in noted if "pruned" in e] == [
        (r["step"], r["gone"]) for r in told["rounds"]
    ]
    again = Run.load(run.folder.path)
    for one, other in zip(run.outputs(run.examples().inputs), again.outputs(again.examples().inputs), strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other))


def test_a_budget_and_a_threshold(make: Make) -> None:
    whole = fit(make(pruning={"keep": 3})).folder.read("metrics")["pruning"]["parameters"][0]
    run = fit(make(pruning={"budget_params": whole // 2, "rounds": 2}))
    first, left = run.folder.read("metrics")["pruning"]["parameters"]
    assert first == whole
    assert 0 < left <= whole // 2
    run = fit(make(THREE, pruning={"threshold": 0.3}))
    rounds = run.folder.read("metrics")["pruning"]["rounds"]
    for number, entry in enumerate(rounds, start=1):
        assert all(one["importance"] < 0.3 * (1 - (1 - number / len(rounds)) ** 3) for one in entry["gone"])
    assert sum(len(entry["gone"]) for entry in rounds) > 0
    assert all(kinds(run.model).values())


def test_the_least_contributing_go_first_and_lone_methods_last(make: Make) -> None:
    run = fit(make(THREE, pruning={"keep": 1, "rounds": 1, "start": 0.25, "end": 0.5}))
    (entry,) = run.folder.read("metrics")["pruning"]["rounds"]
    values = [one["importance"] for one in entry["gone"]]
    assert values == sorted(values)
    assert len(values) == 5


def test_contributions_are_averaged_over_batches_and_rounds(make: Make) -> None:
    """One round whose window is two steps: the shares of the gradients that a callback sees, gates being constant."""
    seen: list[torch.Tensor] = []

    def note(model: Any) -> None:
        for block in gated_blocks(model)[:1]:
            parts = block.methods["default"]
            norms = [
                torch.stack([p.grad.norm() for p in parts.get_submodule(kind).parameters()]).norm()
                for kind in ("lora", "bottleneck")
            ]
            seen.append(share(torch.stack(norms) * 0.5))

    pruning = {"keep": 1, "start": 0.5, "end": 0.75, "rounds": 1}
    looks = [At(step, note, before=True) for step in (5, 6)]
    run = fit(make(FIXED, pruning=pruning, max_steps=8, gradient_accumulation=2), callbacks=looks)
    (entry,) = run.folder.read("metrics")["pruning"]["rounds"]
    assert entry["step"] == 6
    found = {one["kind"]: one["importance"] for one in entry["gone"] if one["block"] == 0}
    expected = dict(zip(("lora", "bottleneck"), torch.stack(seen).mean(dim=0).tolist(), strict=True))
    assert found
    assert found == pytest.approx({kind: expected[kind] for kind in found}, rel=1e-4)


# ---- what stays goes on as if nothing had happened ---------------------------------------------------------------


@pytest.mark.parametrize("adapter", [GATED, SCALAR], ids=["mlp", "scalar"])
def test_moments_stay_with_their_parameters(make: Make, adapter: Any) -> None:
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
            before.update(
                {
                    n: (p.detach().clone(), optimizer.state[p])
                    for n, p in model.named_parameters()
                    if p in optimizer.state
                }
            )

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
            if state.global_step == 4 and not after:
                after.update(
                    {
                        n: (p.detach().clone(), optimizer.state[p])
                        for n, p in model.named_parameters()
                        if p in optimizer.state
                    }
                )
                control.should_training_stop = True

    fit(make(adapter, pruning={"keep": 1, "rounds": 1, "start": 0.1, "end": 0.34}, max_steps=12), callbacks=[Look()])
    assert 0 < len(after) < len(before)
    sliced = 0
    for name, (value, state) in after.items():
        old, held = before[name]
        assert state["step"] == held["step"] == 4
        if value.shape == old.shape:
            assert torch.equal(value, old)
            assert all(torch.equal(state[key], held[key]) for key in ("exp_avg", "exp_avg_sq"))
        else:
            sliced += 1
            (place,) = (old == value).nonzero()[:, -1].tolist()
            assert all(torch.equal(state[key], held[key][..., [place]]) for key in ("exp_avg", "exp_avg_sq"))
    assert sliced == (1 if adapter is SCALAR else 0)


def test_rates_and_random_numbers_go_on(make: Make) -> None:
    """Removing methods that do nothing changes nothing: the run equals one that keeps them to the end."""
    closed = {"methods": GATED["methods"], "gate": {"kind": "fixed", "value": {"lora": 1.0, "bottleneck": 0.0}}}
    last = {"validation": "train", "train": "train", "validation_examples": 0}
    run = fit(make(closed, task=last, pruning={"keep": 2, "rounds": 2}))
    assert kinds(run.model) == {0: ("lora",), 1: ("lora",)}
    plain = weights(fit(make(closed, task=last)))
    assert_same(
        weights(run), {n: v if ".gates." not in n else v[..., :1] for n, v in plain.items() if "bottleneck" not in n}
    )


# ---- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [GATED, SCALAR, PENALISED], ids=["mlp", "scalar", "penalised"])
@pytest.mark.parametrize("step", [3, 4, 7, 8, 10])
def test_a_resumed_run_prunes_and_learns_the_same(make: Make, adapter: Any, step: int) -> None:
    """Rounds are after steps 5, 7 and 9, and a run stops a step after it was asked to: before the first, at one,
    between two, at the last, behind it."""
    settings = {"pruning": KEEP, "method_learning_rates": {"bottleneck": 2e-3}}
    whole = fit(make(adapter, **settings))
    with pytest.raises(Interrupted) as stopped:
        fit(make(adapter, **settings), callbacks=[At(step, press_ctrl_c)])
    resumed = resume(stopped.value.folder)
    assert_same(weights(whole), weights(resumed))
    assert resumed.folder.read("metrics")["pruning"] == whole.folder.read("metrics")["pruning"]
    configs = [json.loads((r.folder.adapter / "adapter_config.json").read_text()) for r in (whole, resumed)]
    assert configs[0]["pruned"] == configs[1]["pruned"]


def test_a_group_may_lose_all_its_parameters(make: Make) -> None:
    closed = {**GATED, "gate": {"kind": "fixed", "value": {"lora": 1.0, "bottleneck": 0.0}}}
    settings = {"pruning": {"keep": 2, "rounds": 1}, "method_learning_rates": {"bottleneck": 2e-3}}
    whole = fit(make(closed, **settings))
    with pytest.raises(Interrupted) as stopped:
        fit(make(closed, **settings), callbacks=[At(11, press_ctrl_c)])
    assert_same(weights(whole), weights(resume(stopped.value.folder)))


def test_the_best_checkpoint_is_one_behind_the_last_round(make: Make) -> None:
    """Every evaluation before is better than all behind it; still what is kept has what was asked for."""
    recipe = make(pruning=KEEP, evaluate_every=2, max_steps=12, early_stopping_patience=1)
    scores = iter([0.9, 0.8, 0.7, 0.6, 0.1, 0.05])

    from pelton.training import trainer as module

    judged: list[int] = []
    original = module.GatedTrainer.evaluate

    def evaluate(self: Any, *args: Any, **options: Any) -> Any:
        judged.append(self.state.global_step)
        value = next(scores)
        self.judge = lambda: {"score": value, "accuracy": value}
        return original(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.GatedTrainer, "evaluate", evaluate)
        run = fit(recipe)
    assert judged == [2, 4, 6, 8, 10, 12]  # nothing stops before the last round, at step 9
    assert run.folder.read("metrics")["best_step"] == 10
    assert count(run.model) == 2
    assert json.loads((run.folder.adapter / "adapter_config.json").read_text())["pruned"]
    assert Run.load(run.folder.path).evaluate(run.examples())["score"] == run.folder.read("metrics")["test"]["score"]


def test_without_validation_the_last_weights_are_kept(make: Make) -> None:
    run = fit(make(task={"validation": "train", "train": "train", "validation_examples": 0}, pruning=KEEP))
    assert run.folder.read("metrics")["best_step"] is None
    assert count(Run.load(run.folder.path).model) == 2


def test_beside_a_trained_backbone_and_with_contributions(make: Make) -> None:
    settings = {"train_backbone": True, "contribution_window": 100, "gradient_checkpointing": True}
    whole = fit(make(pruning=KEEP, **settings))
    with pytest.raises(Interrupted) as stopped:
        fit(make(pruning=KEEP, **settings), callbacks=[At(8, press_ctrl_c)])
    assert_same(weights(whole), weights(resume(stopped.value.folder)))
    found = whole.folder.read("contributions")
    assert {int(index): tuple(row) for index, row in found.items()} == kinds(whole.model)


# ---- afterwards --------------------------------------------------------------------------------------------------


def test_nothing_is_kept_to_revive(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(make(pruning={"keep": 3}))
    with pytest.raises(AdapterError, match="what went in training was not kept"):
        revive(run.model)
    folder, before = str(run.folder.path), weights(run)
    assert command(["prune", folder, "--keep", "2"]) == 0
    assert command(["revive", folder]) == 0
    assert_same(weights(run), before)
    assert count(Run.load(run.folder.path).model) == 3
    assert command(["revive", folder]) == 2
    assert "what went in training was not kept" in capsys.readouterr().err


def test_the_command_line_says_what_went(make: Make, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from pelton.training.loading import dump_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(make()))
    assert command(["fit", str(path), "--set", "training.pruning.keep=2"]) == 0
    out = capsys.readouterr().out
    assert "pruned     4 → 2 methods" in out
    assert "in block" in out


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "keep, threshold or budget_params, but got none"),
        ({"keep": 1, "threshold": 0.1}, "but got keep and threshold"),
        ({"keep": 1, "start": 0.8, "end": 0.5}, "start < end must hold, but got start=0.8, end=0.5"),
        ({"keep": 0}, "greater than or equal to 1"),
        ({"keep": 1, "every": 5}, "unknown key 'training.pruning.every'"),
    ],
)
def test_settings_that_make_no_sense(make: Make, settings: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make(pruning=settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 4}, "keep=4 takes nothing: the adapter has 4 methods"),
        ({"budget_params": 10**9}, "takes nothing: the adapter's methods have"),
        ({"budget_params": 1}, "may leave nothing, .* Give at least"),
        ({"threshold": 0.5}, "may empty a block of 2 methods that contribute alike. Give less than 0.5"),
    ],
)
def test_what_cannot_be_is_found_before_a_folder_is_made(make: Make, settings: Any, message: str) -> None:
    recipe = make(pruning=settings)
    with pytest.raises(RecipeError, match=message):
        fit(recipe)
    assert not Path(recipe.output).exists()


def test_an_adapter_is_needed_and_one_process(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"training\.pruning is for an adapter"):
        make(None, pruning={"keep": 1})
    with pytest.raises(RecipeError, match=r"training\.pruning would have no effect"):
        fit(make({"preset": "head"}, pruning={"keep": 1}))
    with pytest.raises(RecipeError, match="every block has one method"):
        fit(make({"methods": ["lora"], "gate": {"kind": "scalar"}}, pruning={"threshold": 0.1}))
    monkeypatch.setattr("pelton.training.pruning.count_processes", lambda: 2)
    with pytest.raises(RecipeError, match="needs one process on one device"):
        fit(make(pruning={"keep": 1}))
