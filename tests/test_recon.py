"""Recon: its laws beside those that every architecture obeys, and the two stages of its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from PIL import Image

from fits import At, assert_same, press_ctrl_c, weights
from law import far
from pelton import DilatedAttention, PeltonConfig, ScalarGate, find_anatomy, gate_summary, gated_blocks
from pelton import set_stage as enter
from pelton.cli.main import run as command
from pelton.errors import DataError, PeltonError, RecipeError, SpecError, UnknownName
from pelton.insight.sheets import run_sheet, save_predictions
from pelton.models.recon import ReconConfig, ReconForSemanticSegmentation, ReconModel
from pelton.models.recon_layers import hide, patchify, positions
from pelton.tasks.hiding import PatchProcessor
from pelton.tasks.load import load_task
from pelton.tasks.masked_images import MaskedImages, MaskedImageSettings
from pelton.tasks.pixels import new_image_processor
from pelton.training.fit import fit, resume
from pelton.training.folder import RunFolder
from pelton.training.loading import parse_recipe
from pelton.training.run import Run
from regions import save_scenes
from test_segmentation import RECON as SMALL
from test_segmentation import recipe as segment
from zoo import ARCHS, RECON, VISION


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_scenes(tmp_path / "data")


def pretrain(data: Path, output: Path, task: dict[str, Any] | None = None, **more: Any) -> Any:
    training = {"epochs": 4, "batch_size": 4, "backbone_learning_rate": 1e-2, "trackers": [], "seed": 3}
    values = {
        "backbone": "new:recon",
        "backbone_config": SMALL,
        "task": {"kind": "masked-images", "data": str(data)} | (task or {}),
        "adapter": None,
        "training": training | more.pop("training", {}),
        "output": str(output),
    }
    return parse_recipe(values | more, "test")


# ---- the model ---------------------------------------------------------------------------------------------------


def test_the_auto_classes_know_it(tmp_path: Path) -> None:
    config = tf.AutoConfig.for_model("recon", **RECON)
    assert isinstance(config, ReconConfig)
    for auto, kind in (
        (tf.AutoModel, ReconModel),
        (tf.AutoModelForPreTraining, ReconModel),
        (tf.AutoModelForSemanticSegmentation, ReconForSemanticSegmentation),
    ):
        assert type(auto.from_config(config)) is kind
    model = ReconModel(ReconConfig(**RECON))
    model.save_pretrained(tmp_path)
    again, report = tf.AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert set(report["unexpected_keys"]) == {"predictor.weight", "predictor.bias"}
    for name, value in model.recon.state_dict().items():
        assert torch.equal(value, again.recon.state_dict()[name])
    assert (again.config.task_type, model.config.task_type) == ("finetune", "pretrain")


def test_all_sites_and_the_grid_are_found() -> None:
    for name in ("recon", "recon-segmentation"):
        anatomy = find_anatomy(ARCHS[name].build())
        assert len(anatomy.blocks) == 3
        for block in anatomy.blocks:
            assert not block.missing
            assert block.grid is not None
            assert (block.grid.rows, block.grid.columns, block.grid.special, block.grid.known) == (4, 4, 0, True)
            assert not block.causal
    wide = find_anatomy(ReconModel(ReconConfig(**RECON | {"image_size": (16, 24)})))
    assert (wide.blocks[0].grid.rows, wide.blocks[0].grid.columns) == (4, 6)


def test_what_is_hidden_does_not_count() -> None:
    """Pixels of hidden patches change the loss, never what the model says."""
    model, pixels = ARCHS["recon"].build(), torch.randn(2, 3, 16, 16)
    noise = torch.rand(2, 16)
    out = model(pixels, noise=noise)
    assert out.mask.sum(1).tolist() == [12, 12]
    hidden = out.mask.bool().view(2, 1, 4, 1, 4, 1).expand(2, 3, 4, 4, 4, 4).reshape(2, 3, 16, 16)
    other = model(torch.where(hidden, torch.randn_like(pixels), pixels), noise=noise)
    assert torch.equal(out.logits, other.logits)
    assert not torch.equal(out.loss, other.loss)
    seen = model(torch.where(hidden, pixels, torch.randn_like(pixels)), noise=noise)
    assert far(out.logits, seen.logits) > 1e-3


@pytest.mark.parametrize("norm", [False, True])
def test_the_loss_is_that_of_hidden_patches(norm: bool) -> None:
    model = ReconModel(ReconConfig(**RECON, norm_pix_loss=norm)).eval()
    pixels, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    out = model(pixels, noise=noise)
    errors = []
    for image in range(2):
        for place in range(16):
            if noise[image].argsort().tolist().index(place) < 4:  # the lowest are kept
                assert out.mask[image, place] == 0
                continue
            row, column = divmod(place, 4)
            patch = pixels[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(1, 2, 0).flatten()
            if norm:
                patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            errors.append((out.logits[image, place] - patch).square().mean())
    torch.testing.assert_close(out.loss, torch.stack(errors).mean())


def test_masks_are_drawn_in_training_only() -> None:
    model, pixels = ReconModel(ReconConfig(**RECON, mask_ratio=0.5)), torch.randn(2, 3, 16, 16)
    first, second = model.train()(pixels), model(pixels)
    assert first.mask.sum(1).tolist() == [8, 8]
    assert not torch.equal(first.mask, second.mask)
    still = model.eval()(pixels)
    assert still.loss is None
    assert still.mask.sum() == 0


def test_hide_and_patchify_agree_with_transformers_masked_autoencoder() -> None:
    config = tf.ViTMAEConfig(**VISION, decoder_hidden_size=16, decoder_num_attention_heads=2, mask_ratio=0.6)
    theirs, pixels, noise = tf.ViTMAEForPreTraining(config), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    assert torch.equal(patchify(pixels, 4), theirs.patchify(pixels))
    assert torch.equal(hide(noise, 0.6).float(), theirs(pixels, noise=noise).mask)


def test_positions_tell_places_apart_and_images_of_other_sizes_run() -> None:
    table = positions(3, 5, torch.zeros(1, 15, 32))
    assert table.shape == (15, 32)
    assert len({tuple(row.tolist()) for row in table.round(decimals=4)}) == 15
    torch.testing.assert_close(table[7, :16], positions(3, 4, torch.zeros(1, 1, 32))[4, :16])  # row 1 of both
    model = ARCHS["recon-segmentation"].build()
    assert model(torch.randn(1, 3, 8, 24)).logits.shape == (1, 3, 8, 24)
    with pytest.raises(ValueError, match="18 × 16 pixels are no whole number of patches: expected multiples of 4"):
        model(torch.randn(1, 3, 18, 16))


def test_eager_equals_sdpa_and_gives_attentions() -> None:
    model, pixels = ARCHS["recon"].build(), torch.randn(2, 3, 16, 16)
    plain = model(pixels, output_hidden_states=True)
    assert [tuple(h.shape) for h in plain.hidden_states] == [(2, 16, 32)] * 3
    model.set_attn_implementation("eager")
    eager = model(pixels, output_attentions=True)
    torch.testing.assert_close(plain.logits, eager.logits, atol=1e-5, rtol=0)
    assert [tuple(a.shape) for a in eager.attentions] == [(2, 4, 16, 16)] * 3


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"patch_size": 5}, SpecError, r"`image_size % patch_size == 0` must hold, but got image_size=16, patch_size=5"),
    ({"image_size": (16, 18)}, SpecError, r"image_size=\[16, 18\], patch_size=4"),
    ({"image_size": (16, 16, 16)}, SpecError, "image_size is one number, or height and width"),
    ({"num_attention_heads": 5}, SpecError, "`hidden_size % num_attention_heads == 0` must hold"),
    ({"decoder_hidden_size": 6, "decoder_num_attention_heads": 2}, SpecError, "`decoder_hidden_size % 4 == 0"),
    ({"mask_ratio": 1.0}, SpecError, "`0 < mask_ratio < 1` must hold, but got mask_ratio=1.0"),
    ({"pretrain_dilated_ratio": 1.5}, SpecError, "`0 <= pretrain_dilated_ratio <= 1` must hold, .*1.5"),
    ({"finetune_dilated_ratio": -0.1}, SpecError, "`0 <= finetune_dilated_ratio <= 1` must hold, .*-0.1"),
    ({"task_type": "finetuning"}, UnknownName, "Unknown task_type 'finetuning'. Did you mean 'finetune'"),
]


@pytest.mark.parametrize(("values", "kind", "message"), BAD)
def test_configs_that_break_a_law_are_refused(values: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ReconConfig(**RECON | values)


# ---- dilated attention as the config asks for it -----------------------------------------------------------------


def asked(**more: Any) -> ReconConfig:
    return ReconConfig(**RECON | {"use_dilated": True, "finetune_dilated_ratio": 0.04} | more)


GRID = DilatedAttention(kernel=3, dilation=1)


def test_the_config_says_which_ratio_holds() -> None:
    for model, ratio in ((ReconModel(asked()), 0.01), (ReconForSemanticSegmentation(asked()), 0.04)):
        gated = get_peft_model(model, PeltonConfig.from_backbone(model.config, GRID))
        assert gate_summary(gated).dilated.tolist() == pytest.approx([ratio] * 3)
        enter(gated, "finetune")
        assert gate_summary(gated).dilated.tolist() == pytest.approx([0.04] * 3)
        with pytest.raises(UnknownName, match="Did you mean 'pretrain'"):
            enter(gated, "pretraining")
    with pytest.raises(SpecError, match="`use_dilated` must hold in the backbone's config, but that of 'recon'"):
        PeltonConfig.from_backbone(ReconConfig(**RECON))
    with pytest.raises(SpecError, match="but that of 'bert' does not ask"):
        PeltonConfig.from_backbone(tf.BertConfig())
    config = asked()
    config.finetune_dilated_ratio = 2.0
    with pytest.raises(SpecError, match="`0 <= finetune_dilated_ratio <= 1`"):
        PeltonConfig.from_backbone(config)


def test_the_grid_serves_both_stages() -> None:
    """A ratio of 0 is the plain model; above it is not, and the decoder's blocks take part."""
    inputs = ARCHS["recon"].inputs()
    plain = ARCHS["recon"].build()
    gated = get_peft_model(
        ARCHS["recon"].build(), PeltonConfig.dilated(GRID, pretrain_dilated_ratio=0.0, finetune_dilated_ratio=0.5)
    ).eval()
    with torch.no_grad():
        before = plain(**inputs).logits
        assert torch.equal(before, gated(**inputs).logits)
        enter(gated, "finetune")
        assert far(before, gated(**inputs).logits) > 1e-4
    assert all(block.methods["default"]["dilated"]["attn"].grid.rows == 4 for block in gated_blocks(gated))


def test_fixed_ratios_are_bitwise_the_same_after_a_thousand_steps(tmp_path: Path) -> None:
    small = RECON | dict(num_hidden_layers=1, hidden_size=8, intermediate_size=8, decoder_hidden_size=8)
    small |= dict(num_attention_heads=2, decoder_num_attention_heads=2, decoder_intermediate_size=8, image_size=12)
    model = get_peft_model(ReconModel(ReconConfig(**small)), PeltonConfig.dilated(GRID)).train()
    gates = [block.gates["default"] for block in gated_blocks(model)]
    before = [{key: value.clone() for key, value in gate.state_dict().items()} for gate in gates]
    for parameter in model.parameters():
        parameter.requires_grad = True
    weight = model.get_base_model().predictor.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    pixels = torch.randn(2, 3, 12, 12)
    for _ in range(1000):
        optimizer.zero_grad()
        model(pixel_values=pixels).loss.backward()
        optimizer.step()
    assert far(weight, model.get_base_model().predictor.weight) > 0.1
    for gate, was in zip(gates, before, strict=True):
        assert all(torch.equal(value, was[key]) for key, value in gate.state_dict().items())
        assert not list(gate.parameters())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(ReconModel(ReconConfig(**small)), tmp_path)
    for one, was in zip(gated_blocks(again), before, strict=True):
        assert torch.equal(one.gates["default"].value, was["value"])


def test_a_learned_ratio_starts_where_it_says_and_moves() -> None:
    model = get_peft_model(ARCHS["recon"].build(), PeltonConfig(methods=[GRID], gate=ScalarGate(0.01))).train()
    table = gate_summary(model)
    assert table.dilated.tolist() == pytest.approx([0.01] * 3, rel=1e-5)
    assert table.requires_grad.all()
    assert not table.is_buffer.any()
    model(**ARCHS["recon"].inputs()).loss.backward()
    assert all(block.gates["default"].theta.grad.abs().sum() > 0 for block in gated_blocks(model))


# ---- reconstruction ----------------------------------------------------------------------------------------------


def test_evaluation_hides_the_same_patches_always(data: Path) -> None:
    loaded = load_task(MaskedImageSettings(data=str(data)), seed=0)
    assert {split: len(examples) for split, examples in loaded.splits.items()} == {
        "train": 8,
        "validation": 3,
        "test": 4,
    }
    config = ReconConfig(**SMALL)
    task, examples = loaded.task, loaded.splits["test"]
    processor = task.make_processor(config, examples)
    first, again = task.judged(examples, processor), task.judged(examples, processor)
    assert all(torch.equal(first[i]["noise"], again[i]["noise"]) for i in range(4))
    assert not torch.equal(first[0]["noise"], first[1]["noise"])
    other = MaskedImages(task.settings.model_copy(update={"mask_seed": 1})).judged(examples, processor)
    assert not torch.equal(first[0]["noise"], other[0]["noise"])
    learned = task.encode(examples.inputs, processor, examples.targets)
    noise = learned[0]["noise"]
    learned.set_epoch(1)
    assert not torch.equal(noise, learned[0]["noise"])
    assert torch.equal(first[0]["pixel_values"], learned[0]["pixel_values"])


def _independent_loss(model: Any, features: Any) -> float:
    """All images in one batch: the mean over all hidden patches of the set."""
    rows = [features[i] for i in range(len(features))]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


@pytest.mark.parametrize("kind", ["recon", "vit_mae"])
def test_a_run_reconstructs_is_loaded_again_and_draws(data: Path, tmp_path: Path, kind: str) -> None:
    mae = VISION | dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    config = SMALL if kind == "recon" else mae | {"decoder_intermediate_size": 16}
    task = {"mask_ratio": 0.5, "normalise": kind == "recon", "augment": "flip"}
    values = {"backbone": f"new:{kind}", "backbone_config": config}
    run = fit(pretrain(data, tmp_path / "runs", task, training={"epochs": 20, "eval_batch_size": 3}, **values))
    metrics = run.folder.read("metrics")
    history = [json.loads(line) for line in run.folder.history.read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    loaded = Run.load(run.folder.path)
    assert loaded.model.config.mask_ratio == 0.5
    examples = loaded.examples()
    assert loaded.evaluate(examples) == pytest.approx(metrics["test"])
    features = loaded.task.judged(examples, loaded.processor)
    assert metrics["test"]["loss"] == pytest.approx(_independent_loss(loaded.model, features), rel=1e-5)
    found = loaded.predict(examples.inputs)
    assert np.mean([one.loss for one in found]) == pytest.approx(metrics["test"]["loss"])
    shape = (16, 24, 3) if kind == "recon" else (16, 16, 3)
    for one in found:
        same = (one.hidden == one.original).all(axis=-1)
        assert one.rebuilt.shape == one.original.shape == shape
        assert 0.3 < same.mean() < 0.7  # half of the patches are grey
        assert np.abs(one.rebuilt.astype(int) - one.original)[same].max() <= 1  # what is seen is kept
    resized = np.asarray(examples.inputs[0].decode().resize(shape[1::-1], Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(found[0].original - resized).max() <= 1
    written = save_predictions(examples.inputs, found, tmp_path / "drawn")
    names = ["predictions.jsonl", "000-input.png", "000-hidden.png", "000-reconstruction.png"]
    assert [path.name for path in written[:4]] == names
    assert run_sheet(loaded, 2).width == 3 * shape[1] + 4 * 6


@pytest.mark.parametrize("stage", [pretrain, segment], ids=["masked-images", "semantic-segmentation"])
def test_an_interrupted_run_goes_on_to_the_same_weights(data: Path, tmp_path: Path, stage: Any) -> None:
    dilated = {"backbone_config": SMALL | {"use_dilated": True, "image_size": [24, 36]}}
    dilated |= {"adapter": {"preset": "backbone"}, "training": {"train_backbone": True, "epochs": 3}}
    recipe = stage(data, tmp_path / "runs", {"augment": "crop"}, **dilated)
    whole = weights(fit(recipe))
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, callbacks=[At(3, press_ctrl_c)])
    (left,) = [p for p in (tmp_path / "runs").iterdir() if RunFolder.open(p).phase == "interrupted"]
    assert_same(whole, weights(resume(left)))


def test_two_stages_from_recipe_to_pictures(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    dilated = {"adapter": {"preset": "backbone"}, "training": {"train_backbone": True, "max_steps": 3}}
    small = SMALL | {"use_dilated": True, "finetune_dilated_ratio": 0.25, "image_size": [24, 36]}
    first = fit(pretrain(data, tmp_path / "runs", backbone_config=small, **dilated))
    second = fit(segment(data, tmp_path / "runs", backbone=str(first.folder.model), **dilated))
    for run, ratio, blocks in ((first, 0.01, 2), (second, 0.25, 2)):
        table = gate_summary(run.model)
        assert table.dilated.tolist() == pytest.approx([ratio] * blocks)
        assert (table.dilated + table.original == 1.0).all()
        capsys.readouterr()
        assert command(["gates", str(run.folder.path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split() == ["block", "dilated", "original", "sum", "requires_grad", "is_buffer"]
        for line in lines[2:]:
            cells = line.split()
            assert cells[1:] == [f"{ratio:.2f}", f"{1 - ratio:.2f}", "1.00", "False", "True"]
        assert len(lines) == 2 + blocks
    images = str(data / "test")
    folder = tmp_path / "out"
    assert command(["predict", str(second.folder.path), "--file", images, "--output", str(folder)]) == 0
    assert "predictions.jsonl and 8 pictures" in capsys.readouterr().out
    assert {path.suffix for path in folder.iterdir()} == {".jsonl", ".png"}
    assert command(["pictures", str(first.folder.path), "--count", "2"]) == 0
    with Image.open(first.folder.path / "pictures.png") as page:
        assert page.format == "PNG"
    assert command(["predict", str(second.folder.path), "--text", str(data / "test" / "images" / "000.png")]) == 0
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])) == {"image", "shares"}
    file = tmp_path / "file"
    file.write_text("")
    assert command(["predict", str(second.folder.path), "--file", images, "--output", str(file)]) == 2
    assert "is a file, but pictures need a folder" in capsys.readouterr().err


def test_an_unheard_wish_is_said(data: Path, tmp_path: Path) -> None:
    small = SMALL | {"use_dilated": True}
    with pytest.warns(UserWarning, match=r"asks for dilated attention \(use_dilated\), but the adapter has none"):
        run = fit(pretrain(data, tmp_path / "runs", backbone_config=small, training={"max_steps": 1}))
    assert not isinstance(run.model, PeftModel)
    dilated = {"adapter": {"preset": "backbone"}, "training": {"train_backbone": True, "max_steps": 1}}
    with pytest.raises(SpecError, match="`use_dilated` must hold in the backbone's config"):
        fit(pretrain(data, tmp_path / "runs", **dilated))


def test_reconstruction_refuses_what_it_cannot_use(data: Path, tmp_path: Path) -> None:
    ARCHS["vit"].build().save_pretrained(tmp_path / "vit")
    with pytest.raises(DataError, match=r"models that hide patches \(recon, vit_mae\), but the backbone is 'vit'"):
        fit(pretrain(data, tmp_path, backbone="new:vit", backbone_config=VISION))
    with pytest.raises(RecipeError, match="images have none here: set examples instead"):
        pretrain(data, tmp_path, {"shots": 1})
    mae = tf.ViTMAEConfig(image_size=18, patch_size=4)
    with pytest.raises(DataError, match="resized to 18 × 18 pixels, and the patch size 4 does not divide both"):
        PatchProcessor(new_image_processor(mae), mae)
    (data / "train" / "images" / "001.png").write_text("nothing")
    with pytest.raises(DataError, match=r"row 2, column 'image': .*001.png cannot be decoded"):
        fit(pretrain(data, tmp_path))
    save_scenes(tmp_path / "more")
    with pytest.raises(PeltonError, match=r"training.loss is for classes, and masked-images has none"):
        fit(pretrain(tmp_path / "more", tmp_path, training={"loss": {"kind": "focal"}}))
