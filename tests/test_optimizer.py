"""Rates: of groups, of methods, of blocks by their depth; a backbone that learns beside its adapter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from fits import At, Make, assert_same, press_ctrl_c, weights
from pelton import LoRA, MLPGate, PeltonConfig, Prefix, find_anatomy
from pelton.errors import RecipeError
from pelton.tasks.heads import MeanPoolingClassifier
from pelton.training.arguments import one_device, training_arguments
from pelton.training.depth import parameter_depths
from pelton.training.fit import Interrupted, fit, resume
from pelton.training.optimizer import make_optimizer, parameter_groups, trained_groups
from pelton.training.prepare import prepare
from pelton.training.recipe import TrainingSettings
from pelton.training.run import Run
from tiny import sentences
from zoo import ARCHS, Arch


def depths_by_name(model: Any) -> dict[str, int]:
    found = parameter_depths(model)
    return {name: found[id(p)] for name, p in model.named_parameters()}


def test_blocks_are_as_deep_as_there_are_blocks_above(arch: Arch) -> None:
    model = arch.build()
    found, blocks = depths_by_name(model), find_anatomy(model).blocks
    assert set(found) == {name for name, _ in model.named_parameters()}
    for block in blocks:
        inside = {depth for name, depth in found.items() if name.startswith(f"{block.name}.")}
        assert len(inside) == 1, block.name
    assert next(iter(found.values())) == max(found.values())  # whatever comes first embeds


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "bert",
            {"bert.embeddings": 2, "bert.encoder.layer.0": 1, "bert.encoder.layer.1": 0, "bert.pooler": 0},
        ),
        ("gpt2", {"transformer.wte": 2, "transformer.h.0": 1, "transformer.h.1": 0, "transformer.ln_f": 0}),
        (
            "t5",
            {
                "shared": 2,
                "encoder.block.0": 1,
                "encoder.block.1": 0,
                "encoder.final_layer_norm": 0,
                "decoder.block.0": 1,
                "decoder.block.1": 0,
            },
        ),
        (
            "bart",
            {
                "model.shared": 2,
                "model.encoder.layernorm_embedding": 2,
                "model.decoder.embed_positions": 2,
                "model.encoder.layers.1": 0,
                "model.decoder.layers.0": 1,
            },
        ),
        (
            "swin",
            {
                "swin.embeddings": 4,
                "swin.encoder.layers.0.blocks.0": 3,
                "swin.encoder.layers.0.downsample": 2,
                "swin.encoder.layers.1.blocks.0": 1,
                "swin.encoder.layers.1.blocks.1": 0,
                "swin.layernorm": 0,
            },
        ),
        ("albert", {"albert.embeddings": 1, "albert.encoder.embedding_hidden_mapping_in": 1, "albert.pooler": 0}),
    ],
)
def test_each_stack_counts_for_itself(name: str, expected: dict[str, int]) -> None:
    found = depths_by_name(ARCHS[name].build())
    for prefix, depth in expected.items():
        assert {d for n, d in found.items() if n.startswith(f"{prefix}.")} == {depth}, prefix


def test_rates_fall_by_the_factor_for_each_block() -> None:
    settings = TrainingSettings(layer_decay=0.5, backbone_learning_rate=0.8, head_learning_rate=3.0)
    groups = parameter_groups(ARCHS["bert"].build(), settings)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"head": 3.0, "backbone.0": 0.8, "backbone.1": 0.4, "backbone.2": 0.2}
    found = [id(p) for group in groups for p in group["params"]]
    assert len(found) == len(set(found)) == len(list(ARCHS["bert"].build().parameters()))


@pytest.mark.parametrize("name", ["t5", "bart", "llama", "gpt2"])
def test_a_language_models_pretrained_head_is_backbone(name: str) -> None:
    model = ARCHS[name].build()
    settings = TrainingSettings(backbone_learning_rate=0.5, layer_decay=0.5, l2_sp=0.1)
    groups = parameter_groups(model, settings, new_head=False)
    assert {group["name"].split(".")[0] for group in groups} == {"backbone"}
    assert max(group["lr"] for group in groups) == 0.5 > min(group["lr"] for group in groups)
    held = trained_groups(model, new_head=False)
    assert {id(p) for _, p in held["backbone"]} == {id(p) for p in model.parameters()}


def test_without_decay_the_backbone_is_one_group() -> None:
    groups = parameter_groups(ARCHS["bert"].build(), TrainingSettings())
    assert {group["name"] for group in groups} == {"head", "backbone"}


def test_methods_learn_at_their_own_rates() -> None:
    model = get_peft_model(
        ARCHS["bert"].build(), PeltonConfig(methods=[LoRA(rank=2), Prefix(prefix_length=2)], gate=MLPGate())
    )
    settings = TrainingSettings(learning_rate=1.0, gate_learning_rate=2.0, method_learning_rates={"prefix": 3.0})
    names = {id(p): n for n, p in model.named_parameters()}
    for group in parameter_groups(model, settings):
        inside = [names[id(p)] for p in group["params"]]
        expected = {"methods": ".lora.", "methods.prefix": ".prefix.", "gates": ".pelton.gates."}[group["name"]]
        assert all(expected in name for name in inside)
        assert group["lr"] == {"methods": 1.0, "methods.prefix": 3.0, "gates": 2.0}[group["name"]]


def test_factors_that_start_at_zero_may_learn_faster() -> None:
    model = get_peft_model(ARCHS["bert"].build(), PeltonConfig())
    settings = TrainingSettings(learning_rate=1.0, method_learning_rates={"bottleneck": 3.0}, up_rate_ratio=4.0)
    groups = parameter_groups(model, settings)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    found = {
        name.rpartition(".pelton.methods.default.")[2]: rates[id(p)]
        for name, p in model.named_parameters()
        if id(p) in rates
    }
    zero = {name for name, p in model.named_parameters() if id(p) in rates and p.ndim == 2 and not p.any()}
    for name, rate in found.items():
        base = {"lora": 1.0, "bottleneck": 3.0}.get(name.split(".")[0], 0.1)  # gates: a tenth of the methods' rate
        assert rate == (4.0 * base if any(whole.endswith(name) for whole in zero) else base), name
    assert {group["name"] for group in groups} == {
        *("methods", "methods.up", "methods.bottleneck", "methods.bottleneck.up", "gates"),
    }


def test_what_l2_sp_holds_does_not_decay() -> None:
    settings = TrainingSettings(l2_sp=0.1, l2_head=0.1, weight_decay=0.3)
    assert {group["weight_decay"] for group in parameter_groups(ARCHS["bert"].build(), settings)} == {0.0}
    some = parameter_groups(ARCHS["bert"].build(), TrainingSettings(l2_sp=0.1, weight_decay=0.3))
    assert {(group["name"], group["weight_decay"]) for group in some} == {
        ("head", 0.3),
        ("head", 0.0),
        ("backbone", 0.0),
    }


def test_the_fused_kernel_steps_as_the_plain_one_does() -> None:
    results = []
    for fused in (True, False):
        model = ARCHS["bert"].build()
        groups = parameter_groups(model, TrainingSettings(layer_decay=0.7, backbone_learning_rate=1e-2))
        optimizer = make_optimizer(groups) if fused else torch.optim.AdamW(groups)
        assert bool(optimizer.defaults["fused"]) == fused
        for step in range(3):
            optimizer.zero_grad()
            ARCHS["bert"].run(model, ARCHS["bert"].inputs(seed=step)).square().sum().backward()
            optimizer.step()
        results.append(dict(model.named_parameters()))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=1e-5, rtol=1e-5)


SHAPES = {
    "linear": [0.0, 0.5, 1.0, 0.5, 0.0],
    "cosine": [0.0, 0.5, 1.0, 0.5, 0.0],
    "constant": [0.0, 0.5, 1.0, 1.0, 1.0],
    "inverse_sqrt": [0.0, 0.5, 1.0, 0.5**0.5, (1 / 3) ** 0.5],
}


@pytest.mark.parametrize("schedule", SHAPES)
def test_schedules_have_their_shape(schedule: Any, make: Make) -> None:
    from transformers import get_scheduler

    settings = make(schedule=schedule, warmup_ratio=1 / 3).training
    arguments = training_arguments(settings, _Folder(), False)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(12), num_training_steps=12
    )
    rates = []
    for _ in range(13):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[::2][:3] == pytest.approx(SHAPES[schedule][:3])
    assert [rates[8], rates[12]] == pytest.approx(SHAPES[schedule][3:], abs=1e-6)


class _Folder:
    from pathlib import Path

    path = checkpoints = logs = Path("nowhere")


def test_a_schedule_and_early_stopping_act_in_a_run(make: Make) -> None:
    run = fit(
        make(
            schedule="constant",
            warmup_ratio=0.0,
            learning_rate=1e-9,
            evaluate_every=2,
            early_stopping_patience=3,
            epochs=9,
            metric_for_best="loss",
            early_stopping_min_delta=0.1,
        )
    )
    history = [entry for entry in _history(run) if "learning_rate" in entry]
    assert {entry["learning_rate"] for entry in history} == {1e-9}
    assert run.folder.read("metrics")["steps"] == 8  # the evaluation at 2 is the best; three more, then the end


def _history(run: Run) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in run.folder.history.read_text().splitlines()]


# ---- the backbone beside the adapter -----------------------------------------------------------------------------

UNFROZEN = {"train_backbone": True, "backbone_learning_rate": 1e-2, "layer_decay": 0.8}


@pytest.mark.parametrize("head", ["mean", "pooler"])
def test_a_trained_backbone_is_saved_beside_its_adapter(make: Make, head: str) -> None:
    run = fit(make(task={"head": head}, **UNFROZEN))
    texts = [(row["text"],) for row in sentences(9)]
    loaded = Run.load(run.folder.path)
    np.testing.assert_allclose(loaded.outputs(texts), run.outputs(texts), atol=1e-6)
    assert loaded.evaluate(loaded.examples()) == run.folder.read("metrics")["test"]
    frozen = Run.load(fit(make(task={"head": head})).folder.path)
    moved = dict(loaded.model.named_parameters())
    for name, value in frozen.model.named_parameters():
        if "encoder.layer" in name and ".pelton." not in name:
            same = name.endswith("key.bias") or torch.equal(value, moved[name])  # the softmax ignores a key's bias
            assert same == name.endswith("key.bias"), name
    assert not frozen.folder.model.exists()


def test_the_saved_model_and_adapter_are_ordinary_ones(make: Make) -> None:
    run = fit(make(task={"head": "pooler"}, **UNFROZEN))
    plain = AutoModelForSequenceClassification.from_pretrained(run.folder.model)
    assert not any(".pelton." in name or "original_module" in name for name in plain.state_dict())
    model = PeftModel.from_pretrained(plain, run.folder.adapter).eval()
    ids = run.processor(["the film was good"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, run.model.eval()(**ids).logits)
    assert model.peft_config["default"].base_model_name_or_path == str(run.folder.model)


def test_originals_of_saved_modules_stay_frozen(make: Make) -> None:
    model = prepare(make(**UNFROZEN)).model
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(".original_module." in name for name in frozen)
    assert len(trained_groups(model)["backbone"]) == len(
        [n for n, _ in MeanPoolingClassifier(model.config).named_parameters() if n.startswith("backbone.")]
    )


@pytest.mark.parametrize("step", [3, 6, 8], ids=["first epoch", "between epochs", "second epoch"])
@pytest.mark.parametrize("more", [{}, {"l2_sp": 10.0, "l2_head": 0.1}], ids=["plain", "l2-sp"])
def test_a_resumed_run_has_the_same_backbone(make: Make, step: int, more: Any) -> None:
    whole = fit(make(**UNFROZEN, **more))
    with pytest.raises(Interrupted) as stopped:
        fit(make(**UNFROZEN, **more), callbacks=[At(step, press_ctrl_c)])
    assert_same(weights(whole), weights(resume(stopped.value.folder)))


def test_the_best_backbone_comes_back_with_its_adapter(make: Make) -> None:
    """Learning that ruins the model makes an early checkpoint the best one."""
    settings = {**UNFROZEN, "backbone_learning_rate": 0.3, "learning_rate": 0.3, "metric_for_best": "loss", "epochs": 4}
    run = fit(make(**settings))
    metrics = run.folder.read("metrics")
    assert metrics["best_step"] < metrics["steps"]
    judged = next(e for e in _history(run) if e["step"] == metrics["best_step"] and "eval_loss" in e)
    assert metrics["validation"]["loss"] == pytest.approx(judged["eval_loss"], abs=1e-6)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_decay": 0.9}, "training.layer_decay is for a backbone that is trained"),
        ({"l2_sp": 0.1}, "training.l2_sp is for a backbone that is trained"),
        ({"adapter": None, "train_backbone": True}, "training.train_backbone is for an adapter, and adapter is null"),
        ({"adapter": None, "gate_temperature_end": 0.1}, "training.gate_temperature_end is for an adapter"),
        ({"method_learning_rates": {"prefx": 1}}, "did you mean 'prefix'?"),
        ({"method_learning_rates": {"lora": 0}}, "should be greater than 0"),
        ({"layer_decay": 1.5, "adapter": None}, "should be less than or equal to 1"),
    ],
)
def test_rates_of_what_is_not_there(make: Make, change: Any, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        make(**change)
    assert message in str(error.value)


def test_a_rate_for_a_method_that_the_adapter_lacks(make: Make) -> None:
    with pytest.raises(RecipeError, match=r"has a rate for 'prefix', but the adapter has lora, bottleneck"):
        fit(make(method_learning_rates={"prefix": 1e-2}))
    with pytest.raises(RecipeError, match=r"train_backbone and adapter.preset=head exclude each other"):
        fit(make({"preset": "head"}, train_backbone=True))


@pytest.mark.parametrize(
    ("adapter", "change", "why"),
    [
        ({"preset": "head"}, {"gate_warmup_steps": 3}, "the recipe has no methods"),
        ({"preset": "head"}, {"up_rate_ratio": 3.0}, "the recipe has no methods"),
        ({"preset": "prefix"}, {"up_rate_ratio": 3.0}, "prefix learn no product with a factor at zero"),
    ],
)
def test_what_would_have_no_effect_is_refused(make: Make, adapter: Any, change: Any, why: str) -> None:
    with pytest.raises(RecipeError, match=f"training.{next(iter(change))} would have no effect, since {why}"):
        fit(make(adapter, **change))


def test_one_process_uses_one_gpu() -> None:
    arguments: Any = SimpleNamespace(n_gpu=2, _n_gpu=2)
    with pytest.warns(UserWarning, match="Of 2 GPUs one is used. To use all, start one process for each with torchrun"):
        assert one_device(arguments)._n_gpu == 1
    single: Any = SimpleNamespace(n_gpu=1, _n_gpu=1)
    assert one_device(single) is single
