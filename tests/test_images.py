"""Image classification: folders, archives and tables; broken images; augmentation; a run from end to end."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from pelton.errors import DataError
from pelton.tasks.images import ImageClassification, ImageSettings
from pelton.tasks.load import load_task
from pelton.tasks.pictures import Picture
from pelton.tasks.pixels import ImageFeatures, PlainProcessor, change, load_image_processor
from pelton.training.fit import fit
from pelton.training.loading import parse_recipe
from pelton.training.run import Run
from tiny import write_csv, write_jsonl
from zoo import ARCHS

COLOURS = {"blue": (20, 20, 230), "red": (230, 20, 20)}
CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10_small"
COUNTS = {"train": 8, "validation": 4, "test": 4}


def picture(name: str, seed: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 20, (20, 24, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)).convert(mode)


def save_images(folder: Path) -> Path:
    for split, count in COUNTS.items():
        for name in COLOURS:
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                picture(name, index).save(place / f"{index:04}.jpg")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_images(tmp_path / "data")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    ARCHS["vit"].build().save_pretrained(folder)
    size = {"height": 16, "width": 16}
    tf.models.vit.image_processing_pil_vit.ViTImageProcessorPil(size=size).save_pretrained(folder)
    return folder


def as_zips(folder: Path) -> Path:
    for split in COUNTS:
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            archive.writestr("__MACOSX/x", b"")
            for file in sorted((folder / split).rglob("*.jpg")):
                archive.write(file, f"{split}/{file.relative_to(folder / split)}")
        (folder / split).rename(folder.parent / f"was-{split}")
    return folder


def as_jsonl(folder: Path) -> Path:
    return _as_tables(folder, lambda name, rows: write_jsonl(folder / f"{name}.jsonl", rows))


def as_csv(folder: Path) -> Path:
    return _as_tables(folder, lambda name, rows: write_csv(folder / f"{name}.csv", rows))


def _as_tables(folder: Path, write: Callable[[str, list[dict[str, Any]]], Any]) -> Path:
    for split in COUNTS:
        files = sorted((folder / split).rglob("*.jpg"))
        write(split, [{"image": str(f.relative_to(folder)), "label": f.parent.name} for f in files])
    return folder


def as_parquet(folder: Path) -> Path:
    """What the hub has: encoded images and ClassLabel ids."""
    for split in COUNTS:
        files = sorted((folder / split).rglob("*.jpg"))
        columns = {"img": [{"bytes": f.read_bytes()} for f in files], "label": [f.parent.name for f in files]}
        features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=sorted(COLOURS)))
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
        (folder / split).rename(folder.parent / f"was-{split}")
    return folder


@pytest.mark.parametrize("form", [lambda f: f, as_zips, as_jsonl, as_csv, as_parquet])
def test_every_form_of_data_gives_the_same_images(data: Path, form: Callable[[Path], Path]) -> None:
    originals = [(data / "train" / name / "0003.jpg").read_bytes() for name in sorted(COLOURS)]
    loaded = load_task(ImageSettings(data=str(form(data))), seed=0)
    assert {split: len(examples) for split, examples in loaded.splits.items()} == {
        "train": 16,
        "validation": 8,
        "test": 8,
    }
    assert loaded.task.labels.names == ("blue", "red")
    train = loaded.splits["train"]
    assert train.targets == [0] * 8 + [1] * 8
    for row, original in zip((3, 11), originals, strict=True):
        np.testing.assert_array_equal(np.asarray(train.inputs[row].decode()), np.asarray(Image.open(BytesIO(original))))


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 200 * 256, dtype=np.uint16))
    else:
        image = picture("red", 0).convert("RGB").convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    found = Picture(str(path)).decode()
    assert found.mode == "RGB"
    if mode == "I;16":
        assert np.asarray(found).max() == 200


# ---- errors ------------------------------------------------------------------------------------------------------


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def _text(file: Path) -> None:
    file.write_text("not an image")


@pytest.mark.parametrize(("spoil", "reason"), [(_cut, "image file is truncated"), (_text, "no image format")])
@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_a_broken_image_is_named(data: Path, spoil: Callable[[Path], None], reason: str, zipped: bool) -> None:
    spoil(data / "validation" / "red" / "0002.jpg")
    if zipped:
        as_zips(data)
    name = "validation.zip: validation/red/0002.jpg" if zipped else "validation/red/0002.jpg"
    with pytest.raises(DataError, match=f"row 7, column 'image': .*{name} cannot be decoded .*({reason})"):
        load_task(ImageSettings(data=str(data)), seed=0)


def test_a_broken_image_in_a_table_is_named_by_its_line(data: Path) -> None:
    as_jsonl(data)
    (data / "train" / "blue" / "0001.jpg").unlink()
    with pytest.raises(DataError, match=r"train.jsonl, line 2, column 'image': .*blue/0001.jpg does not exist"):
        load_task(ImageSettings(data=str(data)), seed=0)
    rows = [{"image": None, "label": "a"}, {"image": 3, "label": "b"}]
    with pytest.raises(DataError, match=r"line 1, column 'image': expected the path of an image .* but got nothing"):
        load_task(ImageSettings(data=str(write_jsonl(data / "x.jsonl", rows))), seed=0)


def test_broken_bytes_are_named_by_their_row(data: Path) -> None:
    as_parquet(data)
    rows = datasets.load_dataset("parquet", data_files=str(data / "test.parquet"))["train"].cast_column(
        "img", datasets.Image(decode=False)
    )
    cells = [{"bytes": row["img"]["bytes"][: 400 if i == 5 else None], "path": None} for i, row in enumerate(rows)]
    rows.remove_columns("img").add_column("img", cells).to_parquet(data / "test.parquet")
    with pytest.raises(DataError, match=r"test.parquet, row 6, column 'img' cannot be decoded"):
        load_task(ImageSettings(data=str(data)), seed=0)


def test_class_folders_that_are_wrong(data: Path) -> None:
    settings = ImageSettings(data=str(data))
    (data / "test" / "redd").mkdir()
    with pytest.raises(DataError, match=r"test: the class folder 'redd' holds no images. Remove or fill it"):
        load_task(settings, seed=0)
    picture("red", 0).save(data / "test" / "redd" / "a.jpg")
    with pytest.raises(DataError, match=r"test, row 9, column 'label': unseen label 'redd'. Did you mean 'red'\?"):
        load_task(settings, seed=0)
    picture("red", 0).save(data / "validation" / "a.jpg")
    with pytest.raises(DataError, match=r"validation/a.jpg is in no class folder"):
        load_task(settings, seed=0)
    (data / "validation" / "a.jpg").unlink()
    (data / "train" / "blue").rename(data / "blue")
    with pytest.raises(DataError, match=r"train, column 'label': expected two or more classes, but got \['red'\]"):
        load_task(settings, seed=0)


def test_archives_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "train.zip"
    path.write_bytes(b"PK nothing")
    with pytest.raises(DataError, match="is not a whole zip archive"):
        load_task(ImageSettings(data=str(tmp_path)), seed=0)
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("cat")
    with pytest.raises(DataError, match="the class folder 'cat' holds no images"):
        load_task(ImageSettings(data=str(tmp_path)), seed=0)
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(DataError, match=r"holds no images. Expected one folder a class, such as train/cat/0001.jpg"):
        load_task(ImageSettings(data=str(tmp_path)), seed=0)


def test_an_archive_may_be_named_in_capitals(data: Path) -> None:
    (as_zips(data) / "train.zip").rename(data / "a.ZIP")
    assert (
        len(load_task(ImageSettings(data=str(data / "a.ZIP"), validation_fraction=0.0), seed=0).splits["train"]) == 16
    )


def _flag_as_encrypted(data: bytearray) -> None:
    for mark, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        for found in re.finditer(re.escape(mark), bytes(data)):
            data[found.start() + place] |= 1


def _name_another_compression(data: bytearray) -> None:
    for mark, place in ((b"PK\x01\x02", 10), (b"PK\x03\x04", 8)):
        for found in re.finditer(re.escape(mark), bytes(data)):
            data[found.start() + place] = 99


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(_flag_as_encrypted, "is encrypted"), (_name_another_compression, "compression method is not supported")],
)
def test_members_that_zipfile_cannot_read_are_named(
    data: Path, spoil: Callable[[bytearray], None], reason: str
) -> None:
    archive = as_zips(data) / "train.zip"
    spoilt = bytearray(archive.read_bytes())
    spoil(spoilt)
    archive.write_bytes(spoilt)
    with pytest.raises(
        DataError, match=rf"row 1, .*train/blue/0000.jpg cannot be decoded .*{reason}.*Replace or remove"
    ):
        load_task(ImageSettings(data=str(data)), seed=0)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_of_32_bits_are_refused_before_training(data: Path, mode: str) -> None:
    Image.new(mode, (8, 8)).save(data / "test" / "red" / "0009.tiff")
    with pytest.raises(
        DataError, match=rf"row 9, column 'image': .*0009.tiff cannot be decoded \(mode {mode}: expected 8"
    ):
        load_task(ImageSettings(data=str(data)), seed=0)


# ---- pixels ------------------------------------------------------------------------------------------------------


def test_random_changes_follow_from_seed_epoch_and_place(data: Path, backbone: Path) -> None:
    pictures = load_task(ImageSettings(data=str(data)), seed=0).splits["train"].inputs[:4]
    processor = tf.AutoImageProcessor.from_pretrained(backbone, backend="pil")

    def passes(seed: int, epochs: list[int], places: range = range(4)) -> torch.Tensor:
        features, found = ImageFeatures(pictures, processor, [0] * 4, "crop", seed), []
        for epoch in epochs:
            features.set_epoch(epoch)
            found += [features[place]["pixel_values"] for place in places]
        return torch.stack(found)

    first = passes(1, [0, 1])
    torch.testing.assert_close(passes(1, [1]), first[4:], rtol=0, atol=0)  # whatever came before
    torch.testing.assert_close(passes(1, [1], range(3, 4))[0], first[7], rtol=0, atol=0)
    assert not torch.equal(first[:4], first[4:])
    assert not torch.equal(passes(2, [0]), first[:4])
    plain = ImageFeatures(pictures, processor)
    assert plain.column_names == ["pixel_values"]
    torch.testing.assert_close(plain[0]["pixel_values"], plain[0]["pixel_values"], rtol=0, atol=0)


def test_flip_mirrors_and_crop_shifts() -> None:
    pixels = torch.arange(3 * 16 * 16.0).view(3, 16, 16)
    seen = {tuple(change(pixels, "flip", torch.Generator().manual_seed(s)).flatten().tolist()) for s in range(20)}
    assert seen == {tuple(pixels.flatten().tolist()), tuple(pixels.flip(-1).flatten().tolist())}
    cropped = [change(pixels, "crop", torch.Generator().manual_seed(s)) for s in range(40)]
    assert all(image.shape == pixels.shape for image in cropped)
    corners = {int(image[0, 8, 8]) - 136 for image in cropped if image[0, 8, 9] > image[0, 8, 8]}
    assert corners <= {16 * down + right for down in range(-2, 3) for right in range(-2, 3)}
    assert len(corners) > 8


def test_a_backbone_without_image_processor_degrades_with_a_warning(tmp_path: Path) -> None:
    ARCHS["vit"].build().save_pretrained(tmp_path)

    def load(kind: Any, **options: Any) -> Any:
        from pelton.training.backbone import _load

        return _load(kind, str(tmp_path), **options)

    with pytest.warns(
        UserWarning, match=r"cannot be loaded.*resized by Pillow to 16 × 16 pixels.*mean \[0.5, 0.5, 0.5\]"
    ):
        plain = load_image_processor(load)
    assert isinstance(plain, PlainProcessor)
    size = {"height": 16, "width": 16}
    own = tf.models.vit.image_processing_pil_vit.ViTImageProcessorPil(size=size)
    image = picture("red", 1)
    torch.testing.assert_close(
        plain(image)["pixel_values"], own(image, return_tensors="pt")["pixel_values"], atol=1e-5, rtol=0
    )


# ---- a run -------------------------------------------------------------------------------------------------------


def recipe(backbone: Path, data: Path, output: Path, **task: Any) -> Any:
    values = {
        "name": "images",
        "backbone": str(backbone),
        "task": {"kind": "image-classification", "data": str(data), **task},
        "adapter": {"methods": [{"kind": "lora", "rank": 2}, {"kind": "bottleneck", "bottleneck_size": 4}]},
        "training": {"epochs": 3, "batch_size": 4, "learning_rate": 2e-2, "seed": 3, "warmup_ratio": 0.0},
        "output": str(output),
    }
    return parse_recipe(values, "test")


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_a_run_learns_and_is_loaded_again(data: Path, backbone: Path, tmp_path: Path, augment: str) -> None:
    run = fit(recipe(backbone, data, tmp_path / "runs", augment=augment))
    metrics = run.folder.read("metrics")
    assert metrics["test"]["accuracy"] == 1.0
    assert set(metrics["test"]) == {"accuracy", "macro_f1", "f1", "matthews", "auroc", "loss", "score"}
    loaded = Run.load(run.folder.path)
    assert loaded.evaluate(loaded.examples()) == metrics["test"]
    files = [str(data / "test" / name / "0000.jpg") for name in ("red", "blue")]
    found = loaded.predict(loaded.task.from_texts(files, None))
    assert [(one.image, one.label) for one in found] == list(zip(files, ("red", "blue"), strict=True))
    assert sum(found[0].probabilities.values()) == pytest.approx(1.0)
    again = fit(recipe(backbone, data, tmp_path / "runs", augment=augment))
    assert [json.loads(line).get("loss") for line in again.folder.history.read_text().splitlines()] == [
        json.loads(line).get("loss") for line in run.folder.history.read_text().splitlines()
    ]
    with pytest.raises(DataError, match=r"nowhere.jpg does not exist"):
        loaded.task.from_texts(["nowhere.jpg"], None)


@pytest.mark.parametrize("name", ["swin", "dinov2", "beit"])
def test_other_backbones_run_too(data: Path, tmp_path: Path, name: str) -> None:
    ARCHS[name].build().save_pretrained(tmp_path / name)
    values = recipe(tmp_path / name, data, tmp_path / "runs")
    values = values.model_copy(update={"training": values.training.model_copy(update={"max_steps": 2, "epochs": 1.0})})
    with pytest.warns(UserWarning, match="resized by Pillow to 16 × 16"):
        run = fit(values)
    assert run.folder.phase == "finished"
    assert run.folder.gate_values.is_file()


def test_a_head_for_other_classes_is_replaced(data: Path, backbone: Path) -> None:
    from pelton.training.backbone import load_backbone, load_processor

    config = tf.ViTConfig.from_pretrained(backbone, num_labels=7)
    folder = backbone.parent / "seven"
    tf.ViTForImageClassification(config).save_pretrained(folder)
    tf.AutoImageProcessor.from_pretrained(backbone, backend="pil").save_pretrained(folder)
    task = ImageClassification.plan(*_planned(data))
    model, new = load_backbone(str(folder), task, load_processor(str(folder), task))
    assert model.classifier.out_features == 2
    assert new == ["classifier"]


def _planned(data: Path) -> tuple[ImageSettings, Any]:
    from pelton.tasks.splits import load_splits

    settings = ImageSettings(data=str(data))
    return settings, load_splits(settings)["train"]


@pytest.mark.skipif(not CIFAR.is_dir(), reason="the shared data is not here")
def test_real_images_are_read_and_trained_on(backbone: Path, tmp_path: Path) -> None:
    values = recipe(backbone, CIFAR, tmp_path / "runs", examples=20, validation_examples=10, test="validation")
    values = values.model_copy(update={"training": values.training.model_copy(update={"max_steps": 3, "epochs": 1.0})})
    run = fit(values)
    assert run.task.labels.names[:3] == ("airplane", "automobile", "bird")
    assert run.folder.read("data")["examples"] == {"train": 20, "validation": 10, "test": 500}
    assert 0.0 <= run.folder.read("metrics")["test"]["accuracy"] <= 1.0
