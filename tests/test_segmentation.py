"""Semantic segmentation: masks in every form, what is refused, metrics, losses, heads, runs from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score, log_loss

from pelton.errors import DataError, RecipeError
from pelton.insight.sheets import palette, run_sheet, save_predictions
from pelton.tasks.load import load_task
from pelton.tasks.masks import IGNORED, MaskReader, RegionFeatures
from pelton.tasks.pictures import Picture
from pelton.tasks.pixels import exact_image_processor
from pelton.tasks.segmentation import SegmentationSettings, SemanticSegmentation
from pelton.tasks.segmenters import PatchSegmenter, Segmenter
from pelton.training.fit import fit
from pelton.training.loading import parse_recipe
from pelton.training.losses import ClassLoss, dice
from pelton.training.run import Run
from pelton.training.sections import LossSettings
from regions import COUNTS, NAMES, SIZE, UNLABELLED, save_scenes, scene
from tiny import write_jsonl
from zoo import VISION

CAMVID = Path(__file__).parents[2] / "shared" / "data" / "camvid_small"
RECON = {
    "image_size": [16, 24],
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
    "cells": 2,
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_scenes(tmp_path / "data")


def settings(data: Path, **more: Any) -> SegmentationSettings:
    return SegmentationSettings(**{"data": str(data), "class_names": NAMES, "ignore_class": UNLABELLED} | more)


def recipe(data: Path, output: Path, task: dict[str, Any] | None = None, **more: Any) -> Any:
    training = {"epochs": 8, "batch_size": 4, "backbone_learning_rate": 1e-2, "trackers": [], "seed": 3}
    values = {
        "name": "regions",
        "backbone": "new:recon",
        "backbone_config": RECON if more.get("backbone", "new:recon") == "new:recon" else {},
        "task": settings(data).model_dump(exclude_unset=True) | {"kind": "semantic-segmentation"} | (task or {}),
        "adapter": None,
        "training": training | more.pop("training", {}),
        "output": str(output),
    }
    return parse_recipe(values | more, "test")


# ---- data --------------------------------------------------------------------------------------------------------


def as_jsonl(folder: Path) -> Path:
    for split in COUNTS:
        stems = [file.stem for file in sorted((folder / split / "images").iterdir())]
        rows = [{"image": f"{split}/images/{s}.png", "mask": f"{split}/masks/{s}.png"} for s in stems]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.mark.parametrize("form", ["folder", "zip", "jsonl"])
def test_every_form_of_data_gives_the_same_masks(tmp_path: Path, form: str) -> None:
    folder = save_scenes(tmp_path / "data", zipped=form == "zip")
    loaded = load_task(settings(as_jsonl(folder) if form == "jsonl" else folder), seed=0)
    assert {split: len(examples) for split, examples in loaded.splits.items()} == COUNTS
    image, mask = scene(105)
    examples = loaded.splits["validation"]
    assert loaded.splits["train"].inputs[0].stem == "000"
    image, mask = scene(102)
    np.testing.assert_array_equal(np.asarray(examples.inputs[2].decode()), np.asarray(image))
    found = loaded.task.reader.read(examples.targets[2])
    true = np.asarray(mask).astype(int)
    np.testing.assert_array_equal(found, np.where(true == UNLABELLED, IGNORED, true))
    assert loaded.task.labels.names == NAMES


def test_classes_are_found_in_the_masks_or_beside_the_data(data: Path) -> None:
    task = load_task(settings(data, class_names=None), seed=0).task
    assert task.labels.names == ("0", "1", "2")
    (data / "label_names.json").write_text(json.dumps(["a", "b", "c"]))
    assert load_task(settings(data, class_names=None), seed=0).task.labels.names == ("a", "b", "c")
    assert load_task(settings(data), seed=0).task.labels.names == NAMES
    counts = task.class_counts(load_task(settings(data), seed=0).splits["train"].targets)
    masks = [np.asarray(scene(index)[1]) for index in range(COUNTS["train"])]
    np.testing.assert_array_equal(counts, [sum(int((m == c).sum()) for m in masks) for c in range(3)])


def _wrong_class(data: Path) -> None:
    mask = np.asarray(scene(100)[1]).copy()
    mask[7, 5] = 9
    Image.fromarray(mask).save(data / "validation" / "masks" / "000.png")


def _other_size(data: Path) -> None:
    scene(0)[1].resize((30, 20), Image.Resampling.NEAREST).save(data / "train" / "masks" / "001.png")


def _no_mask(data: Path) -> None:
    (data / "train" / "masks" / "002.png").unlink()


def _no_image(data: Path) -> None:
    (data / "test" / "images" / "001.png").unlink()


def _cut(data: Path) -> None:
    file = data / "train" / "masks" / "003.png"
    file.write_bytes(file.read_bytes()[:-30])


def _text(data: Path) -> None:
    (data / "train" / "images" / "003.png").write_text("not an image")


def _colours(data: Path) -> None:
    scene(1)[0].save(data / "train" / "masks" / "001.png")


BAD: list[tuple[Callable[[Path], None], str]] = [
    (
        _wrong_class,
        r"validation, row 1, column 'mask': .*masks/000.png: class 9 at row 7, column 5, but there are 3 classes. "
        r"Expected 0 to 2 \(sky to road\), or 3 for no class. Correct .* task.ignore_class=9",
    ),
    (_other_size, r"row 2, .*masks/001.png has 20 × 30 pixels, but its image .*images/001.png has 24 × 36"),
    (_no_mask, r"1 of 8 files in images have no partner in masks: .*images/002.png … Expected masks/002.png"),
    (_no_image, r"1 of 4 files in masks have no partner in images: .*masks/001.png … Expected images/001.png"),
    (_cut, r"row 4, column 'mask': .*masks/003.png cannot be decoded"),
    (_text, r"row 4, column 'image': .*images/003.png cannot be decoded \(no image format"),
    (_colours, r"masks/001.png is an image of mode RGB: expected a mask with one class id a pixel"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_bad_data_are_refused_by_name(data: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(data)
    with pytest.raises(DataError, match=message):
        load_task(settings(data), seed=0)


def test_settings_that_contradict_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="an image has several: set examples instead"):
        recipe(data, tmp_path, {"shots": 2})
    with pytest.raises(RecipeError, match=r"class_names must differ, but \['a'\] repeat"):
        recipe(data, tmp_path, {"class_names": ["a", "b", "a"]})
    with pytest.raises(RecipeError, match=r"image_size % patch_size == 0.*image_size=\[16, 24\], patch_size=5"):
        fit(recipe(data, tmp_path, backbone_config=RECON | {"patch_size": 5}))
    vit = {key: value for key, value in VISION.items() if key != "patch_size"} | {"patch_size": 5}
    with pytest.raises(DataError, match="resized to 16 × 16 pixels, and the patch size 5 does not divide both"):
        fit(recipe(data, tmp_path, backbone="new:vit", backbone_config=vit))
    with pytest.raises(RecipeError, match="draws examples by their class"):
        fit(recipe(data, tmp_path, training={"batching": {"oversample": True}}))
    for file in (data / "train" / "masks").iterdir():
        Image.fromarray(np.zeros(SIZE, dtype=np.uint8)).save(file)
    with pytest.raises(DataError, match="two or more classes in the masks"):
        load_task(settings(data, class_names=None), seed=0)


# ---- pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
def test_image_and_mask_change_together(data: Path, augment: Any) -> None:
    """An image whose red channel is its mask: whatever happens to one must have happened to the other."""
    files = sorted((data / "train" / "masks").iterdir())
    for file in files:
        mask = np.asarray(Image.open(file))
        Image.fromarray(np.stack([mask * 50] * 3, axis=-1)).save(data / "train" / "images" / file.name)
    examples = load_task(settings(data), seed=0).splits["train"]
    size = dict(zip(("height", "width"), SIZE, strict=True))
    processor = tf.ViTImageProcessorPil(size=size, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    features = RegionFeatures(examples.inputs, processor, examples.targets, MaskReader(None, None), augment, 5)
    seen = set()
    for epoch in range(6):
        features.set_epoch(epoch)
        for place in range(len(features)):
            row = features[place]
            torch.testing.assert_close((row["pixel_values"][0] * 255 / 50).round().long(), row["labels"])
            seen.add((place, tuple(row["labels"].flatten().tolist())))
    per_image = len(seen) / len(features)
    assert {"none": per_image == 1, "flip": per_image == 2, "crop": per_image > 4}[augment]


def test_nothing_is_cropped_where_every_pixel_counts() -> None:
    cropping = tf.BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 24, "width": 28}, image_mean=[0.1] * 3, image_std=[0.7] * 3
    )
    exact = exact_image_processor(cropping)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3)).astype(np.uint8))
    assert exact(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 24, 28)
    assert (tuple(exact.image_mean), tuple(exact.image_std)) == ((0.1,) * 3, (0.7,) * 3)
    assert exact_image_processor(exact) is exact


# ---- metrics and losses ------------------------------------------------------------------------------------------


def test_metrics_equal_scikit_learns(data: Path) -> None:
    loaded = load_task(settings(data, class_names=[*NAMES, "white", "never"], ignore_class=7), seed=0)
    task, examples = loaded.task, loaded.splits["test"]
    g = np.random.default_rng(3)
    outputs = [g.normal(size=(5, 6, 9)).astype(np.float32) for _ in examples.targets]
    for one in outputs:
        one[4] = -50.0  # a class that is neither there nor predicted
    found = task.evaluate(examples, None, outputs)
    assert np.isnan(found["iou_never"])  # and is not in the mean
    true, said, shares = [], [], []
    for mask, logits in zip(examples.targets, outputs, strict=True):
        wide = torch.nn.functional.interpolate(torch.tensor(logits)[None], size=SIZE, mode="bilinear")[0]
        true.append(np.asarray(Image.open(mask.path)).ravel().astype(int))
        said.append(wide.argmax(0).numpy().ravel())
        shares.append(wide.double().softmax(0).flatten(1).numpy().T)
    truth, prediction, probabilities = np.concatenate(true), np.concatenate(said), np.concatenate(shares)
    labels = [0, 1, 2, 3]
    each = jaccard_score(truth, prediction, labels=labels, average=None, zero_division=0)
    assert [found[f"iou_{name}"] for name in (*NAMES, "white")] == pytest.approx(each.tolist())
    assert found["mean_iou"] == pytest.approx(each.mean())
    assert found["pixel_accuracy"] == pytest.approx(accuracy_score(truth, prediction))
    assert found["loss"] == pytest.approx(log_loss(truth, probabilities, labels=range(5)), rel=1e-4)
    assert tuple(found) == task.metrics


def test_pixels_without_a_label_do_not_count(data: Path) -> None:
    loaded = load_task(settings(data), seed=0)
    examples = loaded.splits["test"]
    right = []
    for mask in examples.targets:
        true = np.asarray(Image.open(mask.path)).astype(int)
        logits = np.stack([np.where(true == c, 30.0, 0.0) for c in range(3)])
        right.append(np.where(true == UNLABELLED, np.random.default_rng(0).normal(size=(3, *SIZE)), logits))
    found = loaded.task.evaluate(examples, None, [one.astype(np.float32) for one in right])
    assert (found["mean_iou"], found["pixel_accuracy"]) == (1.0, 1.0)
    assert found["loss"] < 1e-9
    assert loaded.task.score(found | {"score": 0}) == 1.0


def test_dice_is_the_formula() -> None:
    logits, labels = torch.randn(50, 4, requires_grad=True), torch.randint(0, 3, (50,))
    labels[:7] = IGNORED
    share = logits[7:].softmax(-1)
    scores = []
    for c in labels[7:].unique():
        true = (labels[7:] == c).float()
        scores.append(2 * (share[:, c] * true).sum() / (share[:, c].sum() + true.sum()))
    torch.testing.assert_close(dice(logits, labels), 1 - torch.stack(scores).mean())
    assert dice(logits, torch.full_like(labels, IGNORED)) == 0
    sure = torch.nn.functional.one_hot(labels.clamp_min(0), 4) * 40.0
    assert dice(sure, labels) < 1e-6
    both = ClassLoss(LossSettings(dice=0.5), None)(logits, labels)
    torch.testing.assert_close(
        both, torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED) + 0.5 * dice(logits, labels)
    )


def test_dice_is_for_regions(make: Any) -> None:
    with pytest.raises(RecipeError, match=r"training.loss.dice compares regions of images, and text-classification"):
        fit(make(loss={"dice": 1.0}))


# ---- heads -------------------------------------------------------------------------------------------------------


def _beit() -> Any:
    values = VISION | dict(num_hidden_layers=4, out_indices=[1, 2, 3, 4], pool_scales=[1, 2], auxiliary_channels=8)
    return tf.BeitForSemanticSegmentation(tf.BeitConfig(**values))


def _segformer() -> Any:
    return tf.SegformerForSemanticSegmentation(
        tf.SegformerConfig(
            depths=[1, 1],
            num_encoder_blocks=2,
            hidden_sizes=[8, 16],
            num_attention_heads=[1, 2],
            sr_ratios=[2, 1],
            patch_sizes=[3, 3],
            strides=[2, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
        )
    )


def _registers() -> Any:
    return tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**VISION))


@pytest.mark.parametrize(
    "make_backbone", [_beit, _segformer, _registers], ids=["beit", "segformer", "dinov2-registers"]
)
def test_heads_of_transformers_and_our_own_learn(make_backbone: Any, data: Path, tmp_path: Path) -> None:
    make_backbone().save_pretrained(tmp_path / "backbone")
    processor = tf.ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "backbone")
    values = {"training": {"epochs": 1, "loss": {"dice": 1.0}}, "backbone": str(tmp_path / "backbone")}
    run = fit(recipe(data, tmp_path / "runs", **values))
    metrics = run.folder.read("metrics")
    assert np.isfinite(metrics["test"]["loss"])
    again = Run.load(run.folder.path)
    assert type(again.model) is type(run.model)
    assert again.evaluate(again.examples()) == pytest.approx(metrics["test"], nan_ok=True)


def test_our_head_keeps_the_encoder_and_reads_patches_only() -> None:
    config = tf.Dinov2WithRegistersConfig(**VISION, num_labels=3)
    model = Segmenter.from_config(config).eval()
    assert isinstance(model, PatchSegmenter)
    pixels = torch.randn(2, 3, 16, 16)
    out = model(pixel_values=pixels)
    assert out.logits.shape == (2, 3, 16, 16)
    hidden = model.backbone(pixels).last_hidden_state
    laid = model._lay(hidden, pixels)
    torch.testing.assert_close(laid[0, :, 1, 2], hidden[0, hidden.shape[1] - 16 + 6])
    labels = torch.randint(0, 3, (2, 20, 20))
    labels[0, :5] = IGNORED
    wide = torch.nn.functional.interpolate(out.logits, size=(20, 20), mode="bilinear")
    expected = torch.nn.functional.cross_entropy(wide, labels)
    torch.testing.assert_close(model(pixel_values=pixels, labels=labels).loss, expected)


def test_an_encoder_without_patches_is_refused() -> None:
    swin = tf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    with pytest.raises(ValueError, match=r"swin gives features .* expected a token for each. Choose a backbone"):
        PatchSegmenter(swin)(torch.randn(1, 3, 16, 16))


# ---- runs --------------------------------------------------------------------------------------------------------


def test_a_run_learns_is_loaded_again_and_draws(data: Path, tmp_path: Path) -> None:
    task = {"augment": "crop"}
    loss = {"dice": 1.0, "class_weights": "inverse"}
    run = fit(recipe(data, tmp_path / "runs", task, training={"epochs": 30, "loss": loss}))
    metrics = run.folder.read("metrics")
    assert metrics["test"]["mean_iou"] > 0.6
    loaded = Run.load(run.folder.path)
    assert loaded.evaluate(loaded.examples()) == metrics["test"]
    inputs = loaded.examples().inputs[:2]
    found = loaded.predict(inputs)
    assert found[0].classes.shape == SIZE
    assert sum(found[0].shares.values()) == pytest.approx(1.0)
    folder = tmp_path / "drawn"
    written = save_predictions(inputs, found, folder)
    assert [path.name for path in written[:3]] == ["predictions.jsonl", "000-mask.png", "000-overlay.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "000-mask.png")), palette(3)[found[0].classes])
    line = json.loads((folder / "predictions.jsonl").read_text().splitlines()[0])
    assert set(line) == {"image", "shares"}
    page = run_sheet(loaded, 3)
    assert page.width == 3 * SIZE[1] + 4 * 6
    assert page.height > 3 * SIZE[0]


def test_a_masked_autoencoder_becomes_a_vit_that_segments(data: Path, tmp_path: Path) -> None:
    config = VISION | dict(
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    values = dict(
        backbone="new:vit_mae", backbone_config=config, training={"epochs": 2, "backbone_learning_rate": 1e-3}
    )
    recipe_values = recipe(data, tmp_path / "runs", **values).model_dump()
    recipe_values["task"] = {"kind": "masked-images", "data": str(data)}
    pretrained = fit(parse_recipe(recipe_values, "test"))
    assert type(pretrained.model).__name__ == "ViTMAEForPreTraining"
    lora = {"methods": [{"kind": "lora", "rank": 2}]}
    for adapter in (None, lora):
        run = fit(
            recipe(
                data,
                tmp_path / "runs",
                backbone=str(pretrained.folder.model),
                adapter=adapter,
                training={"max_steps": 1, "backbone_learning_rate": 1e-9, "learning_rate": 1e-9},
            )
        )
        plain = run.model if adapter is None else run.model.get_base_model()
        assert isinstance(plain, PatchSegmenter)
        assert type(plain.backbone).__name__ == "ViTModel"
        learned = pretrained.model.vit.layers[1].attention.q_proj.weight
        found = plain.backbone.layers[1].attention.q_proj.weight
        torch.testing.assert_close(found, learned, atol=1e-6, rtol=0)
        again = Run.load(run.folder.path)
        assert again.evaluate(again.examples()) == run.folder.read("metrics")["test"]


@pytest.mark.skipif(not CAMVID.is_dir(), reason="the shared data is not here")
def test_real_scenes_are_read(tmp_path: Path) -> None:
    from pelton.tasks.splits import load_splits

    task_settings = SegmentationSettings(data=str(CAMVID), ignore_class=11)
    tables = load_splits(task_settings)
    assert {split: len(table) for split, table in tables.items()} == {"train": 120, "validation": 40, "test": 60}
    task = SemanticSegmentation.plan(task_settings, tables["validation"])
    assert len(task.labels) == 11
    examples = task.check(tables["validation"])
    assert task.reader.read(examples.targets[0]).shape == (180, 240)


def test_a_picture_knows_its_name() -> None:
    assert Picture("a/b.tar.png").stem == "b.tar"
    assert Picture("a.zip", "images/x.png").stem == "x"
