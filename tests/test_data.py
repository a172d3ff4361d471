"""Data: what is read, what is found, and what every broken file is told."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from transformers import AutoTokenizer

from fits import At, Make, press_ctrl_c
from pelton.errors import DataError, TrainingError
from pelton.tasks.base import Examples
from pelton.tasks.classification import ClassificationSettings
from pelton.tasks.columns import find_texts
from pelton.tasks.files import read_table
from pelton.tasks.images import ImageSettings
from pelton.tasks.labels import find_labels
from pelton.tasks.load import load_task
from pelton.tasks.sampling import few_shot, hold_back
from pelton.tasks.splits import absolute_places, load_splits
from pelton.tasks.tables import Table, from_dataset
from pelton.training.fit import Interrupted, fit, resume
from pelton.training.run import Run
from tiny import save_data, save_tokenizer, sentences, write_csv, write_jsonl


def task(data: Path | str, **settings: object) -> ClassificationSettings:
    return ClassificationSettings.model_validate({"data": str(data), **settings})


def load(settings: ClassificationSettings, seed: int) -> tuple[Any, dict[str, Examples]]:
    loaded = load_task(settings, seed)
    return loaded.task, loaded.splits


# ---- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_every_format_gives_the_same_table(tmp_path: Path, name: str) -> None:
    rows = [{"text": "naïve, “quoted”\nand broken", "label": "a"}, {"text": "plain", "label": "b"}]
    path = tmp_path / name
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        write_csv(path, rows)
    else:
        write_jsonl(path, rows)
    table = read_table(path)
    assert table.columns == {"text": [row["text"] for row in rows], "label": ["a", "b"]}
    assert table.name == str(path)


def test_a_line_is_named_as_an_editor_counts_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read_table(path).where(1, "text") == f"{path}, line 3, column 'text'"
    table = read_table(write_csv(tmp_path / "a.csv", [{"text": "two\nlines"}, {"text": "x"}]))
    assert "line 4" in table.where(1, "text")


def test_parquet_keeps_the_names_of_classes(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    loaded, splits = load(task(tmp_path, validation_fraction=0.0), seed=0)
    assert loaded.labels.names == ("no", "yes")
    assert splits["train"].targets == [1, 0]


# ---- columns and labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        (["idx", "text", "label"], ("text",)),
        (["sentence", "label"], ("sentence",)),
        (["sentence1", "sentence2", "label"], ("sentence1", "sentence2")),
        (["question", "sentence", "label"], ("question", "sentence")),
        (["hypothesis", "premise", "label"], ("premise", "hypothesis")),
        (["only_one", "label"], ("only_one",)),
    ],
)
def test_text_columns_are_found(columns: list[str], texts: tuple[str, ...]) -> None:
    table = Table("t", {name: [3 if name == "idx" else "x"] for name in columns})
    assert find_texts(table, "label") == texts


def test_unclear_text_columns_are_asked_for() -> None:
    with pytest.raises(DataError, match=r"Set task.text_columns to one or two of left, right, label"):
        find_texts(Table("t", {"left": ["a"], "right": ["b"], "label": ["c"]}), "label")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 9, 1], ("1", "9", "10")),
        (["10", "9", " 1 "], ("1", "9", "10")),
        ([True, False], ("False", "True")),
        ([1.0, 0.0], ("0", "1")),
    ],
)
def test_classes_come_from_the_data_in_a_fixed_order(values: list[object], names: tuple[str, ...]) -> None:
    labels = find_labels(Table("t", {"label": values}), "label")
    assert labels.names == names
    assert all(labels.find(value) is not None for value in values)
    assert labels.find("neither") is None


def test_numbers_are_names_unless_the_source_names_its_ids() -> None:
    assert find_labels(Table("t", {"label": [1, 2, 3]}), "label").find(0) is None
    named = Table("t", {"label": [1, 0]}, class_names={"label": ("no", "yes")})
    labels = find_labels(named, "label")
    assert (labels.find(1), labels.find("1"), labels.find("yes"), labels.find(2)) == (1, 1, 1, None)


def test_label_names_beside_the_files_give_names_to_ids(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "x", "label": 1}, {"text": "y", "label": 0}])
    (tmp_path / "label_names.json").write_text('["off", "on", "unused"]')
    loaded, splits = load(task(tmp_path, validation_fraction=0.0), seed=0)
    assert loaded.labels.names == ("off", "on", "unused")
    assert splits["train"].targets == [1, 0]


# ---- sampling ----------------------------------------------------------------------------------------------------


def test_shots_are_that_many_of_each_class_and_seeded() -> None:
    labels = [0] * 30 + [1] * 5 + [2] * 4
    rows = few_shot(labels, 4, seed=1)
    assert Counter(labels[row] for row in rows) == {0: 4, 1: 4, 2: 4}
    assert rows == few_shot(labels, 4, seed=1)
    assert rows != few_shot(labels, 4, seed=2)
    with pytest.raises(DataError, match=r"task.shots asks for 9 training examples of each class, but class 'b' has 8"):
        few_shot([0] * 20 + [1] * 8, 9, seed=1, names=["a", "b"])


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_held_back_rows_keep_the_classes_proportions(fraction: float) -> None:
    labels = [0] * 400 + [1] * 80 + [2] * 40
    kept, held = hold_back(labels, int(len(labels) * fraction), seed=3)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert len(held) == int(len(labels) * fraction)
    for label, count in Counter(labels[row] for row in held).items():
        assert abs(count - labels.count(label) * fraction) <= 1


def test_validation_is_held_back_from_training_only_where_there_is_none(tmp_path: Path) -> None:
    given = save_data(tmp_path / "given", train=40, validation=8, test=4)
    _, splits = load(task(given, validation_fraction=0.25), seed=0)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 40, "validation": 8, "test": 4}
    rows = [{"text": f"text {index}", "label": index % 2} for index in range(40)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [{"text": "held out", "label": 0}])
    _, splits = load(task(tmp_path, validation_fraction=0.25, shots=3), seed=0)
    assert {name: len(found) for name, found in splits.items()} == {"train": 6, "validation": 10, "test": 1}
    assert not set(splits["train"].inputs) & set(splits["validation"].inputs)
    assert splits["test"].inputs == [("held out",)]


# ---- finding -----------------------------------------------------------------------------------------------------


def test_banking77_ships_whole() -> None:
    loaded, splits = load(task("pelton:banking77", validation_fraction=0.0, shots=10), seed=0)
    assert len(loaded.labels) == 77
    assert (len(splits["train"]), len(splits["test"])) == (770, 3080)
    assert loaded.labels.names[splits["test"].targets[0]] in loaded.labels.names
    assert set(splits["test"].targets) == set(range(77))


def test_usual_names_and_named_files_are_found(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl.gz", sentences(8))
    write_csv(tmp_path / "dev.csv", sentences(4))
    write_jsonl(tmp_path / "extra.jsonl", sentences(2))
    tables = load_splits(task(tmp_path, test="extra"))
    assert {name: len(table) for name, table in tables.items()} == {"train": 8, "validation": 4, "test": 2}
    alone = load_splits(task(tmp_path / "train.jsonl.gz", test=str(tmp_path / "dev.csv")))
    assert {name: len(table) for name, table in alone.items()} == {"train": 8, "test": 4}


def test_pairs_are_encoded_as_pairs(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    rows = [{"sentence1": "good film", "sentence2": "bad day", "label": index} for index in range(2)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    loaded, splits = load(task(tmp_path, validation_fraction=0.0), seed=0)
    encoded = loaded.encode(splits["train"].inputs, AutoTokenizer.from_pretrained(tmp_path), splits["train"].targets)
    assert encoded[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert encoded["labels"][:] == [0, 1]


# ---- bad input: the file, the row and the column are named -------------------------------------------------------


def broken(folder: Path, lines: list[str | bytes], name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


GOOD = ['{"text": "one", "label": "a"}', '{"text": "two", "label": "b"}']


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*GOOD, '{"text": "", "label": "a"}'], "line 3, column 'text': the text is empty"),
        ([*GOOD, '{"text": "  \\n ", "label": "a"}'], "line 3, column 'text': the text is empty"),
        ([*GOOD, '{"label": "a"}'], "line 3, column 'text': expected a text, but got nothing"),
        ([*GOOD, '{"text": 7, "label": "a"}'], "line 3, column 'text': expected a text, but got int 7"),
        ([*GOOD, '{"text": "x"}'], "line 3, column 'label': a label is a name or a whole number, but got None"),
        ([*GOOD, '{"text": "x", "label": 0.5}'], "column 'label': a label is a name or a whole number, but got 0.5"),
        ([*GOOD, '{"text": "x", "label": "a"'], "line 3: malformed JSON"),
        ([*GOOD, "[1, 2]"], "line 3: expected a JSON object, but got list"),
        ([*GOOD, b'{"text": "caf\xe9", "label": "a"}'], "line 3, column 'text': broken UTF-8 at character 4"),
        ([*GOOD, '{"text": "\\ud800", "label": "a"}'], "line 3, column 'text': broken UTF-8"),
        ([GOOD[0]], "expected two or more classes, but got ['a']"),
        ([], "is empty: the train split needs at least one row"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, lines: list[str | bytes], message: str) -> None:
    path = broken(tmp_path, lines)
    with pytest.raises(DataError) as error:
        load_task(task(tmp_path, validation_fraction=0.0), seed=0)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_csv_is_named(tmp_path: Path) -> None:
    path = broken(tmp_path, ["text,label", "one,a", b"caf\xe9,b"], "train.csv")
    with pytest.raises(DataError, match=rf"{path}, line 3, column 'text': broken UTF-8"):
        read_table(path)
    path = broken(tmp_path, ["text,label", "one,a", "two,b,c"], "wide.csv")
    with pytest.raises(DataError, match=r"line 3: expected 2 columns as in the header, but got 3"):
        read_table(path)
    path = broken(tmp_path, ["text,label", 'one,a"', '"two'], "quotes.csv")
    with pytest.raises(DataError, match="malformed CSV"):
        read_table(path)


def test_a_missing_column_comes_with_the_nearest_and_the_list(tmp_path: Path) -> None:
    save_data(tmp_path)
    with pytest.raises(DataError, match=r"no column 'labell'. Did you mean 'label'\? Columns: text, label"):
        load_task(task(tmp_path, label_column="labell"), seed=0)
    write_jsonl(tmp_path / "test.jsonl", [{"texte": "x", "label": "warm"}])
    with pytest.raises(DataError, match=r"test.jsonl has no column 'text'. Did you mean 'texte'\?"):
        load_task(task(tmp_path), seed=0)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_unseen_label_is_named(tmp_path: Path, split: str) -> None:
    save_data(tmp_path)
    write_jsonl(tmp_path / f"{split}.jsonl", [*sentences(3), {"text": "x", "label": "warmm"}])
    message = rf"{split}.jsonl, line 4, column 'label': unseen label 'warmm'. Did you mean 'warm'\?.*cold, warm"
    with pytest.raises(DataError, match=message):
        load_task(task(tmp_path), seed=0)


def test_hidden_labels_are_explained(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "x", "label": 0}, {"text": "y", "label": 1}])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "z", "label": -1}])
    with pytest.raises(DataError, match="label -1 marks hidden labels"):
        load_task(task(tmp_path), seed=0)


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    save_data(tmp_path)
    (tmp_path / "validation.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"validation.jsonl is empty: the validation split needs at least one row"):
        load_task(task(tmp_path), seed=0)


def test_files_that_are_missing_unreadable_or_ambiguous_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl does not exist"):
        load_splits(task(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="has no training file"):
        load_splits(task(tmp_path))
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:-12])
    with pytest.raises(DataError, match=r"train.jsonl.gz is not a whole gzip file"):
        load_splits(task(tmp_path))
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"more than one train file: train.jsonl, train.jsonl.gz"):
        load_splits(task(tmp_path))
    with pytest.raises(DataError, match=r"no test file named 'tset'. Files: train.jsonl, train.jsonl.gz"):
        load_splits(task(tmp_path, train="train.jsonl", test="tset"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_table(tmp_path / "a.parquet")
    (tmp_path / "label_names.json").write_text(json.dumps(["a", "a"]))
    with pytest.raises(DataError, match="a list of different names"):
        load_splits(task(tmp_path))


def test_a_class_without_rows_is_named(tmp_path: Path) -> None:
    rows = [{"text": f"{i}", "label": i % 2} for i in range(20)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    (tmp_path / "label_names.json").write_text('["off", "on", "unused"]')
    _, splits = load(task(tmp_path, shots=3, validation_fraction=0.0), seed=0)
    assert any("no row is of class 'unused', so nothing is learned of it" in note for note in splits["train"].notes)


def test_fewer_rows_than_asked_for_are_named_by_their_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"{i}", "label": "ab"[i % 2]} for i in range(20)])
    for asked, message in (
        ({"examples": 30}, r"train.jsonl: task.examples asks for 30 rows, but there are 20 to draw from"),
        ({"shots": 11}, r"train.jsonl: task.shots asks for 11 training examples of each class, but class 'a' has 10"),
    ):
        with pytest.raises(DataError, match=message):
            load(task(tmp_path, validation_fraction=0.0, **asked), seed=0)
    with pytest.raises(DataError, match=r"train.jsonl: task.validation_examples asks for 20 of 20 training rows"):
        load(task(tmp_path, validation_examples=20), seed=0)


def test_rows_are_not_tested_on_that_were_learned_or_chosen_by(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        rows = [{"text": f"{split} {i}", "label": "ab"[i % 2]} for i in range(20)]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    with pytest.raises(DataError, match=r"task.test names the training rows \(.*train.jsonl\)"):
        load(task(tmp_path, test="train"), seed=0)
    with pytest.raises(DataError, match=r"task.validation and task.test name the same rows"):
        load(task(tmp_path, validation="validation", test="validation"), seed=0)
    loaded = load_task(task(tmp_path, test="validation", validation_fraction=0.25), seed=0)
    assert [len(loaded.splits[split]) for split in ("train", "validation", "test")] == [15, 5, 20]
    assert any("is tested on, so validation rows are held back from training" in note for note in loaded.notes)


def test_a_test_split_that_nobody_named_gives_way(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}", "label": "ab"[i % 2]} for i in range(20)])
    loaded = load_task(task(tmp_path, validation="test"), seed=0)
    assert {split: len(rows) for split, rows in loaded.splits.items()} == {"train": 20, "validation": 20}


def test_unnamed_columns_are_let_be(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label,,\na,x,,\nc,y,,\n")
    assert load_splits(task(tmp_path))["train"].columns["label"] == ["x", "y"]


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label,text\na,x,b\nc,y,d\n")
    with pytest.raises(DataError, match="line 1: more than one column is named 'text'"):
        load_splits(task(tmp_path))


def test_classes_inside_lists_keep_their_names() -> None:
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-X"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": tags})
    rows = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[0, 1]]}, features=features)
    for given in (rows, rows.to_iterable_dataset()):
        table = from_dataset("hub[train]", given)
        assert table.class_names == {"ner_tags": ("O", "B-X")}
        assert table.columns["ner_tags"] == [[0, 1]]


def test_names_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown packaged data set 'bankin77'. Did you mean 'banking77'\?"):
        load_splits(task("pelton:bankin77"))
    with pytest.raises(DataError, match="neither a local folder or file nor a data set that the hub gives"):
        load_splits(task("nobody/nothing-of-this-name"))


def test_a_hub_data_set_is_read_by_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    hub = datasets.DatasetDict({"train": rows, "dev": rows, "test_easy": rows})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: hub)
    loaded, splits = load(task("owner/name", test="test_easy"), seed=0)
    assert loaded.labels.names == ("no", "yes")
    assert set(splits) == {"train", "validation", "test"}
    with pytest.raises(DataError, match=r"owner/name has no split 'tset_easy'. Did you mean 'test_easy'\?"):
        load_splits(task("owner/name", test="tset_easy"))


@pytest.mark.parametrize("word", ["train", "training"])
def test_rows_are_held_back_from_a_file_that_is_named_in_a_word(tmp_path: Path, word: str) -> None:
    path = write_csv(tmp_path / "a.csv", sentences(40))
    loaded = load_task(task(path, validation=word), seed=0)
    assert {split: len(rows) for split, rows in loaded.splits.items()} == {"train": 36, "validation": 4}
    with pytest.raises(DataError, match=r"task.test names the training rows \(.*a.csv\)"):
        load_splits(task(path, test=word))
    path.rename(tmp_path / "training.csv")
    assert set(load_splits(task(tmp_path, validation="train"))) == {"train"}


def test_a_file_is_known_by_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_csv(tmp_path / "a.csv", sentences(40))
    assert set(load_splits(task("a.csv", validation=str(path)))) == {"train"}
    with pytest.raises(DataError, match=r"task.test names the training rows"):
        load_splits(task("a.csv", test=str(path)))


@pytest.mark.parametrize(("count", "settings"), [(8, {}), (9, {}), (3, {}), (8, {"shots": 3}), (8, {"examples": 7})])
def test_of_few_rows_one_is_held_back(tmp_path: Path, count: int, settings: dict[str, int]) -> None:
    write_jsonl(tmp_path / "train.jsonl", sentences(count))
    loaded = load_task(task(tmp_path, **settings), seed=0)
    assert len(loaded.splits["validation"]) == 1
    assert not set(loaded.rows["train"]) & set(loaded.rows["validation"])
    assert not [note for note in loaded.notes if "too few" in note]


@pytest.mark.parametrize(("count", "settings"), [(2, {}), (8, {"shots": 4}), (8, {"examples": 8})])
def test_rows_too_few_to_hold_one_back_say_so(tmp_path: Path, count: int, settings: dict[str, int]) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", sentences(count))
    loaded = load_task(task(tmp_path, **settings), seed=0)
    assert {split: len(rows) for split, rows in loaded.splits.items()} == {"train": count}
    assert [note for note in loaded.notes if f"{path}: {count} training rows are too few to hold one back" in note]
    for without in ({"validation_fraction": 0.0}, {"validation_examples": 0}):
        assert load_task(task(tmp_path, **settings, **without), seed=0).notes == []


def save_classes(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (4, 4)).save(folder / name / f"{index}.png")
    return folder


def test_class_folders_are_training_rows_without_a_folder_around_them(tmp_path: Path) -> None:
    birds = save_classes(tmp_path / "birds", "cat", "dog")
    (birds / ".DS_Store").touch()
    loaded = load_task(ImageSettings(data=str(birds)), seed=0)
    assert loaded.task.labels.names == ("cat", "dog")
    assert {split: len(rows) for split, rows in loaded.splits.items()} == {"train": 18, "validation": 2}
    for spoil in ("notes.md", "test", "tables"):
        other = save_classes(tmp_path / spoil / "birds", "cat", "dog")
        if spoil == "notes.md":
            (other / spoil).touch()
        else:
            (other / spoil).mkdir()
        if spoil == "tables":
            write_jsonl(other / spoil / "train.jsonl", sentences(4))
        with pytest.raises(DataError, match=r"has no training file.*one folder of images a class, such as .*birds/cat"):
            load_task(ImageSettings(data=str(other)), seed=0)


# ---- runs --------------------------------------------------------------------------------------------------------


def test_places_hold_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inside = save_data(tmp_path / "data")
    for name in ("a.jsonl", "dev.jsonl", "validation.jsonl", "blob"):
        write_jsonl(tmp_path / name, sentences(8))
    (tmp_path / "link.jsonl").symlink_to("blob")
    (tmp_path / "test").mkdir()
    found = absolute_places(task("a.jsonl", train="link.jsonl", validation="train", test="dev.jsonl"))
    assert found == {key: str(tmp_path / f"{name}.jsonl") for key, name in
                     {"data": "a", "train": "link", "test": "dev"}.items()}  # fmt: skip
    found = absolute_places(task("data", train="train", validation="validation.jsonl", test="test"))
    assert found == {"data": str(inside)}  # all three are looked for inside
    found = absolute_places(task("data", validation="dev.jsonl", test="gone.jsonl"))
    assert found == {"data": str(inside), "validation": str(tmp_path / "dev.jsonl")}
    assert absolute_places(task("pelton:banking77")) == absolute_places(task("owner/name", test="test")) == {}


def test_a_run_with_relative_files_goes_on_from_another_folder(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in (("train", 40), ("dev", 8), ("held", 16)):
        write_jsonl(tmp_path / f"{name}.jsonl", sentences(count))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    files = {"data": "train.jsonl", "validation": "dev.jsonl", "test": "held.jsonl"}
    with pytest.raises(Interrupted) as stopped:
        fit(make(task=files), callbacks=[At(2, press_ctrl_c)])
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(Run.load(resume(stopped.value.folder).folder.path).examples()) == 16


def interrupted(recipe: Any) -> Path:
    with pytest.raises(Interrupted) as stopped:
        fit(recipe, callbacks=[At(2, press_ctrl_c)])
    return stopped.value.folder


def test_rows_that_changed_are_noticed_when_a_run_goes_on(make: Make, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data")
    run = interrupted(make())
    save_data(data, train=20)
    with pytest.raises(TrainingError, match=r"data now gives 20 train rows in place of 48 \(see .*data.json\). Put"):
        resume(run)
    save_data(data)
    (data / "test.jsonl").unlink()
    with pytest.raises(TrainingError, match="now gives 0 test rows in place of 16"):
        resume(run)
    save_data(data)
    assert resume(run).folder.phase == "finished"
    run = interrupted(make(task={"examples": 12}))
    save_data(data, train=40)
    with pytest.raises(TrainingError, match="now gives other train rows"):
        resume(run)


def test_runs_that_know_less_of_their_rows_go_on(make: Make, tmp_path: Path) -> None:
    save_data(tmp_path / "data", test=0)
    run = interrupted(make())
    save_data(tmp_path / "data")  # a test that comes later, or that a blind run did not see, changes no training
    kept = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({"notes": kept["notes"], "examples": kept["examples"]}))
    assert resume(run).folder.read("metrics")["test"]
    run = interrupted(make())
    (run / "data.json").write_text(json.dumps({"notes": []}))
    assert resume(run).folder.phase == "finished"
