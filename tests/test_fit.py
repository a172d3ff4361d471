"""Training: the run's folder, resuming, Ctrl-C, broken numbers, parameter groups, gate warm-up."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fits import GATED, At, Make, press_ctrl_c, weights
from pelton.errors import DataError, PeltonError, RecipeError, TrainingError
from pelton.training.fit import Interrupted, fit, resume
from pelton.training.loading import load_recipe
from pelton.training.optimizer import gate_parameters, learning_rates, parameter_groups
from pelton.training.prepare import prepare
from pelton.training.run import Run
from tiny import save_backbone, save_data, sentences, write_jsonl


def crash(*_: Any) -> None:
    raise KeyboardInterrupt


def scores(run: Run) -> Any:
    return {name: run.folder.read("metrics").get(name) for name in ("validation", "test", "best_step", "steps")}


# ---- the folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [GATED, None], ids=["gated", "whole"])
@pytest.mark.parametrize("head", ["mean", "pooler"])
def test_a_run_folder_holds_all_that_the_run_was(make: Make, adapter: Any, head: str) -> None:
    run = fit(make(adapter, {"head": head}))
    folder = run.folder
    assert folder.phase == "finished"
    assert yaml.safe_load(folder.recipe.read_text())["task"]["text_columns"] == ["text"]
    assert folder.read("task")["names"] == ["cold", "warm"]
    metrics = folder.read("metrics")
    assert set(metrics["test"]) == {"accuracy", "macro_f1", "f1", "matthews", "auroc", "loss", "score"}
    assert (metrics["parameters"]["share"] == 1.0) == (adapter is None)
    assert {"python", "torch", "transformers", "peft", "pelton", "platform"} <= set(folder.read("environment"))
    history = [json.loads(line) for line in folder.history.read_text().splitlines()]
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 6, 8, 10, 12]
    assert [entry["step"] for entry in history if "eval_accuracy" in entry] == [6, 12]
    if adapter is None:
        assert not folder.adapter.exists()
        assert not folder.gate_values.exists()
    else:
        frame = pd.read_parquet(folder.gate_values)
        assert set(frame["method"]) == {"lora", "bottleneck"}
        assert frame["example"].nunique() == 16
        assert [row["index"] for row in folder.read("gates")] == [0, 1]


@pytest.mark.parametrize("adapter", [GATED, None], ids=["gated", "whole"])
def test_a_loaded_run_says_what_the_trained_one_says(make: Make, adapter: Any) -> None:
    run = fit(make(adapter))
    loaded = Run.load(run.folder.path)
    texts = [(row["text"],) for row in sentences(9)]
    np.testing.assert_allclose(loaded.outputs(texts), run.outputs(texts), atol=1e-6)
    assert loaded.evaluate(loaded.examples()) == run.folder.read("metrics")["test"]
    found = loaded.predict(texts)
    assert [one.texts for one in found] == texts
    for one in found:
        assert sum(one.probabilities.values()) == pytest.approx(1.0)
        assert one.label == max(one.probabilities, key=lambda name: one.probabilities[name])


def test_the_order_and_number_of_texts_change_no_prediction(make: Make) -> None:
    run = fit(make())
    texts = [(row["text"],) for row in sentences(11)]
    together = run.outputs(texts)
    np.testing.assert_allclose(run.outputs(texts[::-1])[::-1], together, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([run.outputs([text]) for text in texts]), together, atol=1e-6)


def test_it_learns(make: Make) -> None:
    run = fit(make(epochs=15, learning_rate=3e-2, warmup_ratio=0.0))
    assert run.folder.read("metrics")["test"]["accuracy"] >= 0.8


def test_the_seed_decides(make: Make) -> None:
    first, again, other = (weights(fit(make(seed=seed))) for seed in (3, 3, 4))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


# ---- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [GATED, None], ids=["gated", "whole"])
@pytest.mark.parametrize(
    ("step", "act"),
    [(3, press_ctrl_c), (6, press_ctrl_c), (8, press_ctrl_c), (12, press_ctrl_c), (2, crash), (9, crash)],
    ids=["first epoch", "between epochs", "second epoch", "last step", "crash without checkpoint", "crash after one"],
)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(make: Make, adapter: Any, step: int, act: Any) -> None:
    whole = fit(make(adapter))
    with pytest.raises(Interrupted) as stopped:
        fit(make(adapter), callbacks=[At(step, act)])
    folder = stopped.value.folder
    assert f"pelton fit --resume {folder}" in str(stopped.value)
    resumed = resume(folder)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, atol=1e-6, rtol=0)
    assert scores(resumed) == scores(whole)
    steps = [json.loads(line)["step"] for line in resumed.folder.history.read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in whole.folder.history.read_text().splitlines()]


def test_a_run_can_be_interrupted_again_and_again(make: Make) -> None:
    whole = fit(make(gradient_accumulation=2, batch_size=4))
    with pytest.raises(Interrupted) as stopped:
        fit(make(gradient_accumulation=2, batch_size=4), callbacks=[At(2, press_ctrl_c)])
    for step in (5, 7, 11):
        with pytest.raises(Interrupted):
            resume(stopped.value.folder, callbacks=[At(step, press_ctrl_c)])
    for name, value in weights(resume(stopped.value.folder)).items():
        torch.testing.assert_close(value, weights(whole)[name], atol=1e-6, rtol=0)


def test_ctrl_c_while_evaluating_costs_no_training(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Run.evaluate

    def crash_when_trained(run: Run, *arguments: Any) -> dict[str, float]:
        if run.folder.phase == "trained":
            raise KeyboardInterrupt
        return evaluate(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", crash_when_trained)
        with pytest.raises(Interrupted) as stopped:
            fit(make())
        with pytest.raises(Interrupted):
            resume(stopped.value.folder)
    adapter = stopped.value.folder / "adapter" / "adapter_model.safetensors"
    written = adapter.stat().st_mtime_ns
    assert resume(stopped.value.folder).folder.phase == "finished"
    assert adapter.stat().st_mtime_ns == written


def test_ctrl_c_leaves_the_signal_as_it_was(make: Make) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        fit(make(), callbacks=[At(1, press_ctrl_c)])
    assert signal.getsignal(signal.SIGINT) is before


def test_texts_that_fill_their_length_are_counted(make: Make) -> None:
    run = fit(make(task={"max_length": 3}, max_steps=1))
    sizes = run.folder.read("data")["examples"]
    assert run.folder.read("data")["notes"] == [
        f"{count} of {count} {split} texts fill task.max_length; what is longer was cut"
        for split, count in (("training", sizes["train"]), ("validation", sizes["validation"]), ("test", sizes["test"]))
    ]


def test_an_interrupted_run_keeps_its_early_stopping_count(make: Make) -> None:
    settings = {"epochs": 9, "early_stopping_patience": 2, "learning_rate": 1e-9, "head_learning_rate": 1e-9}
    whole = fit(make(**settings))
    assert whole.folder.read("metrics")["steps"] == 18  # the first evaluation is the best; two more, then the end
    with pytest.raises(Interrupted) as stopped:
        fit(make(**settings), callbacks=[At(14, press_ctrl_c)])
    assert scores(resume(stopped.value.folder)) == scores(whole)


def test_what_cannot_be_resumed_or_used(make: Make, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"is not a run: it has no recipe.yaml"):
        resume(tmp_path)
    run = fit(make())
    with pytest.raises(TrainingError, match="is finished: there is nothing to resume"):
        resume(run.folder.path)
    with pytest.raises(Interrupted) as stopped:
        fit(make(), callbacks=[At(3, press_ctrl_c)])
    with pytest.raises(TrainingError, match=r"is not finished \(interrupted\). Go on with: pelton fit --resume"):
        Run.load(stopped.value.folder)


# ---- numbers that are none ---------------------------------------------------------------------------------------


def poison(model: torch.nn.Module) -> None:
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(make: Make) -> None:
    with pytest.raises(
        TrainingError, match=r"stopped at step 9: the loss is nan. The last good checkpoint is .*-6\."
    ) as error:
        fit(make(), callbacks=[At(8, poison)])
    folder = Path(str(error.value).partition("checkpoint is ")[2].partition(". Lower")[0])
    kept = load_file(folder / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in kept.values())


def test_weights_that_are_no_numbers_are_not_saved(make: Make) -> None:
    with pytest.raises(TrainingError, match=r"step 7: the weights of .* are no numbers. There is no checkpoint yet"):
        fit(make(), callbacks=[At(6, poison, before=False)])


# ---- how it learns -----------------------------------------------------------------------------------------------


def test_every_trainable_parameter_is_in_the_group_its_name_says(make: Make) -> None:
    recipe = make(gate_learning_rate=1.0, head_learning_rate=2.0, weight_decay=0.5)
    model = prepare(recipe).model
    groups = parameter_groups(model, recipe.training)
    assert learning_rates(recipe.training) == {"methods": 5e-3, "gates": 1.0, "head": 2.0, "backbone": 1e-3}
    assert {group["name"] for group in groups} == {"methods", "gates", "head"}
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    gates = {id(p) for p in gate_parameters(model).values()}
    for group in groups:
        assert all((id(p) in gates) == (group["name"] == "gates") for p in group["params"])
        assert group["lr"] == learning_rates(recipe.training)[group["name"]]
        assert all(p.ndim > 1 and id(p) not in gates for p in group["params"]) or group["weight_decay"] == 0.0


@pytest.mark.parametrize("head", ["mean", "pooler"])
def test_a_whole_backbone_and_its_head_learn_at_their_own_rates(make: Make, head: str) -> None:
    recipe = make(None, {"head": head})
    model = prepare(recipe).model
    groups = parameter_groups(model, recipe.training)
    assert {(group["name"], group["lr"]) for group in groups} == {("head", 5e-3), ("backbone", 1e-3)}
    heads = {id(p) for group in groups if group["name"] == "head" for p in group["params"]}
    assert heads == {id(p) for p in model.classifier.parameters()}


def test_nothing_to_train_is_an_error(make: Make) -> None:
    recipe = make()
    with pytest.raises(TrainingError, match="no trainable parameter"):
        parameter_groups(prepare(recipe).model.requires_grad_(False), recipe.training)


def test_gates_wait_for_their_warm_up_and_nothing_else_does(make: Make) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def look(step: int) -> At:
        def copy(model: torch.nn.Module) -> None:
            seen[step] = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

        return At(step, copy)

    fit(make(gate_warmup_steps=4, weight_decay=0.1, warmup_ratio=0.0), callbacks=[look(step) for step in (1, 4, 5)])
    gates = [name for name in seen[1] if ".pelton.gates." in name]
    methods = [name for name in seen[1] if ".pelton.methods." in name]
    assert gates
    assert all(torch.equal(seen[1][name], seen[4][name]) for name in gates)
    assert any(not torch.equal(seen[4][name], seen[5][name]) for name in gates)
    assert all(not torch.equal(seen[1][name], seen[4][name]) for name in methods if name.endswith("weight"))


def test_accumulated_batches_equal_one_large_batch(make: Make, backbone: Path, tmp_path: Path) -> None:
    still = tmp_path / "still"
    save_backbone(still)
    config = json.loads((still / "config.json").read_text())
    still.joinpath("config.json").write_text(
        json.dumps(config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    results = []
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        recipe = make(None, batch_size=size, gradient_accumulation=steps, epochs=1, weight_decay=0.0)
        results.append(weights(fit(recipe.model_copy(update={"backbone": str(still)}))))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=0)


def test_checkpointing_and_bf16_run(make: Make) -> None:
    run = fit(make(gradient_checkpointing=True, precision="bf16", epochs=1, schedule="cosine"))
    assert all(torch.isfinite(value).all() for value in weights(run).values())


def test_max_steps_end_a_run_inside_an_epoch(make: Make) -> None:
    metrics = fit(make(max_steps=4)).folder.read("metrics")
    assert (metrics["steps"], metrics["best_step"]) == (4, 4)


def test_the_best_checkpoint_is_what_is_kept(make: Make) -> None:
    run = fit(make(epochs=4, learning_rate=2e-2))
    history = [json.loads(line) for line in run.folder.history.read_text().splitlines()]
    best = max(entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry)
    assert run.folder.read("metrics")["validation"]["accuracy"] == best


# ---- mistakes are found before a folder is made ------------------------------------------------------------------


def test_the_recipe_of_a_run_works_from_another_folder(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make()
    monkeypatch.chdir(tmp_path)
    here = recipe.model_copy(update={"task": recipe.task.model_copy(update={"data": "data"}), "output": "runs"})
    with pytest.raises(Interrupted) as stopped:
        fit(here, callbacks=[At(3, press_ctrl_c)])
    folder = stopped.value.folder.resolve()
    monkeypatch.chdir("/")
    assert resume(folder).folder.phase == "finished"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"task": {"data": None}}, RecipeError, "needs data: --set task.data=DIR"),
        ({"task": {"label_column": "lable"}}, DataError, "Did you mean 'label'"),
        ({"adapter": {"methods": ["lora", "lora"]}}, PeltonError, "lora"),
        ({"adapter": {"preset": "unipet"}}, PeltonError, "Did you mean 'unipelt'"),
        ({"precision": "fp16"}, RecipeError, "fp16 needs a GPU"),
    ],
)
def test_mistakes_leave_no_folder(make: Make, tmp_path: Path, change: dict[str, Any], kind: Any, message: str) -> None:
    if "precision" in change and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(kind, match=message):
        fit(make(**change))
    assert not (tmp_path / "runs").exists()


def test_what_the_data_cannot_give(make: Make, tmp_path: Path) -> None:
    save_data(tmp_path / "data", validation=0, test=0)
    with pytest.raises(RecipeError, match="early_stopping_patience needs validation rows"):
        fit(make(early_stopping_patience=2, task={"validation_fraction": 0.0}))
    write_jsonl(tmp_path / "data" / "train.jsonl", [*sentences(8), {"text": "so so", "label": "mild"}])
    with pytest.raises(RecipeError, match=r"'f1' is no metric of this task. Metrics: score, accuracy, macro_f1, loss"):
        fit(make(metric_for_best="f1"))


def test_a_backbone_that_is_none(make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    recipe = make()
    for name in (str(tmp_path / "empty"), "nobody/no-model-of-this-name"):
        with pytest.raises(RecipeError, match="cannot be loaded") as error:
            fit(recipe.model_copy(update={"backbone": name}))
        assert "\n" not in str(error.value)


def test_a_backbone_that_is_not_whole(make: Make, tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "backbone")
    recipe = make().model_copy(update={"backbone": str(folder)})
    weights = folder / "model.safetensors"
    whole = load_file(weights)
    save_file({n: v for n, v in whole.items() if "layer.1.attention" not in n}, weights, {"format": "pt"})
    with pytest.raises(RecipeError, match=r"lacks 10 of its weights: encoder.layer.1.attention"):
        fit(recipe)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(RecipeError, match="cannot be loaded"):
        fit(recipe)


@pytest.mark.parametrize(("head", "modules"), [("pooler", ["classifier", "pooler"]), ("mean", ["classifier"])])
def test_a_pooler_without_pretrained_weights_is_trained(
    make: Make, tmp_path: Path, head: str, modules: list[str]
) -> None:
    folder = save_backbone(tmp_path / "backbone")
    recipe = make(task={"head": head}).model_copy(update={"backbone": str(folder)})
    assert prepare(recipe).model.peft_config["default"].modules_to_save == ["classifier"]
    whole = load_file(folder / "model.safetensors")
    save_file({n: v for n, v in whole.items() if "pooler" not in n}, folder / "model.safetensors", {"format": "pt"})
    assert prepare(recipe).model.peft_config["default"].modules_to_save == modules


def test_mrpc_asks_for_its_data() -> None:
    with pytest.raises(RecipeError, match=r"Recipe mrpc needs data: --set task.data=DIR"):
        fit(load_recipe("mrpc"))
