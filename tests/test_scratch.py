"""Training from scratch: a new backbone's config, its processor, a run, and that run as the next one's backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from fits import At, assert_same, press_ctrl_c, weights
from pelton.errors import DataError, RecipeError
from pelton.training.backbone import load_skeleton
from pelton.training.fit import fit, resume
from pelton.training.folder import RunFolder
from pelton.training.loading import parse_recipe
from pelton.training.recipe import Recipe
from pelton.training.run import Run
from pelton.training.scratch import new_config
from test_images import save_images
from tiny import save_data

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": [16, 24],
    "patch_size": 8,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return build(tmp_path, save_images(tmp_path / "data"))


def build(folder: Path, data: Path, **changes: Any) -> Recipe:
    training = {"epochs": 2, "batch_size": 4, "backbone_learning_rate": 1e-2, "trackers": [], "seed": 3}
    values = {
        "backbone": "new:vit",
        "backbone_config": SMALL,
        "task": {"kind": "image-classification", "data": str(data)},
        "adapter": None,
        "training": training | changes.pop("training", {}),
        "output": str(folder / "runs"),
    }
    return parse_recipe(values | changes, "test")


def test_a_new_backbone_is_trained_and_is_the_next_runs_backbone(recipe: Recipe, tmp_path: Path) -> None:
    run = fit(recipe)
    assert run.folder.read("metrics")["test"]["accuracy"] == 1.0
    again = Run.load(run.folder.path)
    assert again.processor.size["width"] == 24
    inputs = run.examples().inputs
    assert [p.probabilities for p in again.predict(inputs)] == [p.probabilities for p in run.predict(inputs)]
    plain = AutoModelForImageClassification.from_pretrained(run.folder.model)
    assert plain.config.id2label == {0: "blue", 1: "red"}
    assert AutoImageProcessor.from_pretrained(run.folder.model, backend="pil").size["height"] == 16
    adapted = build(
        tmp_path, tmp_path / "data", backbone=str(run.folder.model), backbone_config={}, adapter={"preset": "default"}
    )
    assert fit(adapted).folder.read("metrics")["test"]["accuracy"] == 1.0


def test_the_seed_decides_the_first_weights(recipe: Recipe, tmp_path: Path) -> None:
    from pelton.training.prepare import prepare

    states = [prepare(recipe).model.state_dict() for _ in range(2)]
    other = prepare(build(tmp_path, tmp_path / "data", training={"seed": 4})).model.state_dict()
    name = "vit.embeddings.patch_embeddings.projection.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], other[name])


def test_an_adapter_may_be_trained_with_it(tmp_path: Path) -> None:
    data = save_images(tmp_path / "data")
    gated = build(tmp_path, data, adapter={"preset": "lora"}, training={"train_backbone": True, "epochs": 1})
    run = fit(gated)
    inputs = run.examples().inputs
    assert [p.probabilities for p in Run.load(run.folder.path).predict(inputs)] == [
        p.probabilities for p in run.predict(inputs)
    ]


def test_an_interrupted_run_goes_on_to_the_same_weights(recipe: Recipe, tmp_path: Path) -> None:
    whole = weights(fit(recipe))
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, callbacks=[At(5, press_ctrl_c)])
    (left,) = [p for p in (tmp_path / "runs").iterdir() if RunFolder.open(p).phase == "interrupted"]
    resumed = weights(resume(left))
    assert_same(whole, resumed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"preset": "lora"}}, r"new:vit has random weights, which must be trained: set adapter=null, or"),
        ({"backbone": "some/model"}, r"backbone_config is for a backbone of random weights: set backbone=new:"),
    ],
)
def test_a_recipe_says_what_does_not_go_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(tmp_path, tmp_path, **changes)


def test_types_and_values_that_do_not_exist_are_named() -> None:
    with pytest.raises(RecipeError, match=r"Unknown type of model 'vitt'. Did you mean 'new:vit'\?"):
        new_config("new:vitt", {})
    with pytest.raises(RecipeError, match=r"Unknown key of vit's backbone_config: 'hiden_size'. Did you mean 'hidden_"):
        new_config("new:vit", {"hiden_size": 8})
    with pytest.raises(RecipeError, match=r"backbone_config: .*'hidden_size' expected int, got str"):
        new_config("new:vit", {"hidden_size": "wide"})


def test_a_model_that_cannot_be_made_is_refused_before_a_folder_is(tmp_path: Path) -> None:
    data = save_images(tmp_path / "data")
    for values, message in (
        ({"hidden_act": "gelo"}, "Backbone 'new:vit' cannot be made"),
        ({"label2id": {"green": 0}}, "backbone_config.label2id is {'green': 0}, but the task's data asks for"),
    ):
        with pytest.raises(RecipeError, match=message):
            fit(build(tmp_path, data, backbone_config={**SMALL, **values}))
    assert not (tmp_path / "runs").exists()


def test_a_task_that_needs_a_tokenizer_says_so(tmp_path: Path) -> None:
    task = {"kind": "text-classification", "data": str(save_data(tmp_path / "data"))}
    with pytest.raises(DataError, match=r"reads its inputs with the tokenizer of a pretrained backbone"):
        fit(build(tmp_path, tmp_path, backbone="new:bert", backbone_config={}, task=task))
    images = {"kind": "image-classification", "data": str(save_images(tmp_path / "images"))}
    with pytest.raises(DataError, match=r"A new bert has no image_size"):
        fit(build(tmp_path, tmp_path, backbone="new:bert", backbone_config={}, task=images))


def test_a_skeleton_needs_no_weights() -> None:
    assert load_skeleton("new:bert").config.model_type == "bert"
