"""Rows that are streamed, and encoded rows in a file: the same features, the same errors, the same training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pelton.errors import DataError, RecipeError
from pelton.tasks import streams
from pelton.tasks.causal_settings import CausalSettings
from pelton.tasks.classification import ClassificationSettings
from pelton.tasks.load import load_task
from pelton.tasks.regression import RegressionSettings
from pelton.training import features as training_rows
from pelton.training.fit import Interrupted, fit, resume
from pelton.training.loading import parse_recipe
from pelton.training.run import Run
from test_fit import At, press_ctrl_c
from tiny import recipe_values, save_backbone, save_data, save_tokenizer, sentences, write_csv, write_jsonl

NAMES = ["cold", "warm"]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHUNK", 5)
    monkeypatch.setattr(training_rows, "CHUNK", 5)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    save_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return path
    return write_csv(path, rows) if path.suffix in (".csv", ".tsv") else write_jsonl(path, rows)


def settings(data: Path, **values: Any) -> ClassificationSettings:
    return ClassificationSettings.model_validate(
        {"data": str(data), "validation_examples": 0, "shuffle_buffer": 16, **values}
    )


def bag(features: Any) -> list[str]:
    return sorted(json.dumps(dict(row), sort_keys=True) for row in features)


# ---- streams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet"])
def test_a_stream_has_the_features_of_the_whole(tmp_path: Path, tokenizer: Any, name: str) -> None:
    path = write(tmp_path / name, sentences(23))
    whole = load_task(settings(path), seed=0)
    expected = whole.task.encode(whole.splits["train"].inputs, tokenizer, whole.splits["train"].targets)
    loaded = load_task(settings(path, streaming=True, labels=NAMES), seed=0)
    assert "train" not in loaded.splits
    assert loaded.stream is not None
    assert bag(loaded.stream.encoded(tokenizer)) == bag(expected)
    stream = loaded.stream.features(tokenizer, seed=1)
    assert isinstance(stream, datasets.IterableDataset)
    first, again = list(stream.take(40)), list(stream.take(40))
    assert first == again
    assert first != list(loaded.stream.features(tokenizer, seed=2).take(40))
    assert {json.dumps(row, sort_keys=True) for row in first} <= set(bag(expected))


def test_one_pass_comes_whole_before_the_next_without_a_buffer(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", sentences(23))
    loaded = load_task(settings(path, streaming=True, labels=NAMES, shuffle_buffer=1), seed=0)
    assert loaded.stream is not None
    rows = list(loaded.stream.features(tokenizer, seed=0).take(46))
    assert rows[:23] == rows[23:] == list(loaded.stream.encoded(tokenizer))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_an_error_names_its_line(tmp_path: Path, tokenizer: Any, name: str) -> None:
    rows = sentences(12)
    rows[6 if name == "a.jsonl" else 5]["text"] = " "
    loaded = load_task(settings(write(tmp_path / name, rows), streaming=True, labels=NAMES), seed=0)
    assert loaded.stream is not None
    with pytest.raises(DataError, match=f"{name}, line 7, column 'text': the text is empty"):
        list(loaded.stream.encoded(tokenizer))


def test_an_error_names_its_row_in_parquet_and_its_unseen_label(tmp_path: Path, tokenizer: Any) -> None:
    rows = sentences(12)
    rows[6]["label"] = "wrm"
    for name, place in (("a.parquet", "row 7"), ("b.jsonl", "line 7")):
        loaded = load_task(settings(write(tmp_path / name, rows), streaming=True, labels=NAMES), seed=0)
        assert loaded.stream is not None
        with pytest.raises(
            DataError, match=rf"{name}, {place}, column 'label': unseen label 'wrm'. Did you mean 'warm'"
        ):
            list(loaded.stream.encoded(tokenizer))
    path = write(tmp_path / "c.jsonl", sentences(12))
    path.write_text(path.read_text().replace('{"text"', '{text"', 7).replace('{text"', '{"text"', 6))
    loaded = load_task(settings(path, streaming=True, labels=NAMES), seed=0)
    assert loaded.stream is not None
    with pytest.raises(DataError, match=r"c.jsonl, line 7: malformed JSON"):
        list(loaded.stream.encoded(tokenizer))


def test_classes_come_from_a_file_of_names_or_the_recipe(tmp_path: Path) -> None:
    folder = save_data(tmp_path / "data")
    with pytest.raises(DataError, match=r"classes must be known before rows are streamed. Set task.labels="):
        load_task(settings(folder, streaming=True), seed=0)
    assert load_task(settings(folder, streaming=True, labels=["warm", "cold"]), seed=0).task.labels.names == (
        "warm",
        "cold",
    )
    (folder / "label_names.json").write_text(json.dumps(NAMES))
    loaded = load_task(settings(folder, streaming=True), seed=0)
    assert loaded.task.labels.names == ("cold", "warm")
    assert {split: len(examples) for split, examples in loaded.splits.items()} == {"validation": 16, "test": 16}
    assert len(loaded.some()) == 16
    with pytest.raises(DataError, match=r"task.labels: expected two or more different classes"):
        load_task(settings(folder, labels=["a", "a"]), seed=0)
    numbers = write(tmp_path / "numbers.jsonl", [{"text": "a", "label": i % 2 + 1} for i in range(4)])
    assert load_task(settings(numbers, labels=[2, 1]), seed=0).splits["train"].targets == [1, 0, 1, 0]


def test_regression_is_streamed_at_the_scale_of_its_first_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": row["text"], "label": float(i)} for i, row in enumerate(sentences(12))]
    path = write(tmp_path / "a.jsonl", rows)
    loaded = load_task(RegressionSettings(data=str(path), streaming=True, validation_examples=0), seed=0)
    assert loaded.stream is not None
    assert loaded.task.mean == 2.0
    labels = [row["labels"] for row in loaded.stream.encoded(tokenizer)]
    assert labels == pytest.approx([(i - 2.0) / loaded.task.deviation for i in range(12)])


def test_language_models_are_streamed(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.eos_token = "[SEP]"
    rows = [{"prompt": row["text"], "response": "very " + row["text"]} for row in sentences(12)]
    path = write(tmp_path / "a.jsonl", rows)
    whole = load_task(CausalSettings(data=str(path), validation_examples=0), seed=0)
    train = whole.splits["train"]
    loaded = load_task(CausalSettings(data=str(path), validation_examples=0, streaming=True), seed=0)
    assert loaded.stream is not None
    expected = whole.task.encode(train.inputs, tokenizer, train.targets)
    assert bag(loaded.stream.encoded(tokenizer)) == bag(expected)
    settings = CausalSettings(data=str(path), validation_examples=0, streaming=True, max_length=8, max_new_tokens=2)
    short = load_task(settings, seed=0)
    assert short.stream is not None
    assert all(note.startswith("Of the first 5 rows that are streamed: ") for note in short.stream.notes(tokenizer))
    assert len(short.stream.notes(tokenizer)) > 0
    write(tmp_path / "a.jsonl", [*rows[:6], {"prompt": "a", "response": None}])
    with pytest.raises(DataError, match=r"a.jsonl, line 7"):
        list(loaded.stream.encoded(tokenizer))


def test_nothing_is_said_when_a_process_ends_in_a_stream(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        path = write(tmp_path / name, sentences(9))
        code = (
            "from pathlib import Path; from pelton.tasks.files import read_chunks\n"
            f"rows = read_chunks(Path({str(path)!r}), 2); next(rows)"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert found.stderr == ""


def test_the_hub_is_streamed(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=NAMES))
    rows = datasets.Dataset.from_list(
        [{**r, "label": NAMES.index(r["label"])} for r in sentences(12)], features=features
    )

    def load(name: str, subset: Any = None, split: str | None = None, streaming: bool = False) -> Any:
        assert streaming  # else the training rows would be downloaded
        given = rows.to_iterable_dataset()
        return given if split else datasets.IterableDatasetDict(train=given, test=given)

    monkeypatch.setattr(datasets, "load_dataset", load)
    loaded = load_task(settings(Path("some/name"), streaming=True), seed=0)
    assert loaded.stream is not None
    assert loaded.task.labels.names == ("cold", "warm")
    assert list(loaded.splits) == ["test"]
    assert len(list(loaded.stream.encoded(tokenizer))) == 12


def test_what_streaming_cannot_do_is_refused(tmp_path: Path, backbone: Path) -> None:
    folder = save_data(tmp_path / "data", validation=0)
    for name, value in (("shots", 2), ("examples", 4), ("memory_map", True)):
        with pytest.raises(ValidationError, match=f"streaming never holds all rows, which {name} needs"):
            settings(folder, streaming=True, **{name: value})
    with pytest.raises(ValidationError, match="head_init class_means reads all training rows"):
        settings(folder, streaming=True, head="mean", head_init="class_means")
    with pytest.raises(DataError, match=r"cannot hold validation rows back. Name a split or file with task.validation"):
        load_task(ClassificationSettings(data=str(folder), streaming=True, labels=("cold", "warm")), seed=0)
    write_jsonl(tmp_path / "t.jsonl", [{"tokens": ["a"], "ner_tags": ["O"]}])
    from pelton.tasks.tokens import TokenSettings

    with pytest.raises(DataError, match=r"token-classification cannot be streamed, since it needs all of its training"):
        load_task(TokenSettings(data=str(tmp_path / "t.jsonl"), streaming=True), seed=0)
    with pytest.raises(DataError, match=r"is empty: the train split needs at least one row"):
        load_task(settings(write_jsonl(tmp_path / "e.jsonl", []), streaming=True), seed=0)
    with pytest.raises(RecipeError, match=r"task.streaming needs training.max_steps"):
        fit(recipe(backbone, folder, tmp_path / "runs", None, streaming=True, labels=NAMES, validation_examples=0))


def test_streamed_rows_are_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_data(tmp_path / "data", validation=0, test=0)
    file = folder / "train.jsonl"
    options = {"streaming": True, "labels": NAMES, "validation_examples": None}
    for data, validation in ((folder, "train"), (folder, str(file)), (file, "train"), (file, "data/train.jsonl")):
        with pytest.raises(DataError, match=r"cannot hold validation rows back. Name .* that is not trained on"):
            load_task(settings(data, validation=validation, **options), seed=0)
    for data, test in ((folder, "train"), (file, "train"), (file, "data/train.jsonl")):
        with pytest.raises(DataError, match=r"task.test names the training rows \(.*train.jsonl\)"):
            load_task(settings(data, test=test, streaming=True, labels=NAMES), seed=0)
    with pytest.raises(DataError, match="cannot hold validation rows back"):
        load_task(settings(folder, train="train", validation="train", **options), seed=0)


def test_streamed_rows_of_the_hub_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=NAMES))
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)

    def load(name: str, subset: Any = None, split: str | None = None, streaming: bool = False) -> Any:
        given = rows.to_iterable_dataset()
        return given if split else datasets.IterableDatasetDict(train=given, extra=given)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for train, same in ((None, "train"), ("extra", "extra")):
        names = {"train": train, "validation": same, "validation_examples": None}
        with pytest.raises(DataError, match="cannot hold validation rows back"):
            load_task(settings(Path("some/name"), streaming=True, **names), seed=0)
        with pytest.raises(DataError, match=rf"task.test names the training rows \(some/name\[{same}\]\)"):
            load_task(settings(Path("some/name"), train=train, test=same, streaming=True), seed=0)
    loaded = load_task(settings(Path("some/name"), validation="extra", streaming=True), seed=0)
    assert set(loaded.splits) == {"validation"}


# ---- runs --------------------------------------------------------------------------------------------------------


def recipe(backbone: Path, data: Path, output: Path, max_steps: int | None, **task: Any) -> Any:
    values = recipe_values(backbone, data, output, max_steps=max_steps, evaluate_every=4, learning_rate=5e-3)
    values["adapter"] = {"methods": [{"kind": "lora", "rank": 2}, {"kind": "bottleneck", "bottleneck_size": 4}]}
    values["task"] |= task
    return parse_recipe(values, "test")


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder.adapter / "adapter_model.safetensors")


def test_a_streamed_run_is_trained_and_resumed(backbone: Path, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data", train=30)
    options = {"streaming": True, "labels": NAMES, "shuffle_buffer": 8}
    whole = fit(recipe(backbone, data, tmp_path / "runs", 12, **options))
    metrics = whole.folder.read("metrics")
    assert metrics["steps"] == 12
    assert metrics["train_examples"] is None
    assert whole.folder.gate_values.is_file()
    assert Run.load(whole.folder.path).task.labels.names == ("cold", "warm")
    for step in (3, 9):  # 30 rows in batches of 8: the second is in the third pass
        with pytest.raises(Interrupted) as stopped:
            fit(recipe(backbone, data, tmp_path / "runs", 12, **options), callbacks=[At(step, press_ctrl_c)])
        resumed = resume(stopped.value.folder)
        assert resumed.folder.read("metrics")["test"] == metrics["test"]
        for name, value in weights(whole).items():
            torch.testing.assert_close(weights(resumed)[name], value, atol=1e-6, rtol=0)


def test_a_memory_map_trains_as_memory_does(backbone: Path, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data")
    plain = fit(recipe(backbone, data, tmp_path / "runs", 10))
    mapped = fit(recipe(backbone, data, tmp_path / "runs", 10, memory_map=True))
    assert (mapped.folder.features / "train.arrow").is_file()
    assert not plain.folder.features.exists()
    for name, value in weights(plain).items():
        assert torch.equal(weights(mapped)[name], value), name
    assert mapped.folder.read("metrics")["test"] == plain.folder.read("metrics")["test"]


def test_mapped_features_are_those_of_memory(tmp_path: Path, tokenizer: Any) -> None:
    loaded = load_task(settings(write(tmp_path / "a.jsonl", sentences(23))), seed=0)
    train = loaded.splits["train"]
    found = training_rows.write_features(loaded.task, train, tokenizer, tmp_path / "new" / "train.arrow")
    expected = loaded.task.encode(train.inputs, tokenizer, train.targets)
    assert found.features == expected.features
    assert found.to_list() == expected.to_list()
    assert type(found.data).__name__ == "MemoryMappedTable"
