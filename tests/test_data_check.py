"""`pelton data check`: what it finds in data, for each kind, and what broken data are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from pelton.cli.main import run
from pelton.tasks.check import check_data
from pelton.tasks.classification import ClassificationSettings
from pelton.tasks.intents import IntentSettings
from pelton.training.examine import examine
from tiny import save_backbone, save_data, save_tokenizer, sentences, write_jsonl


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    train = [{"text": f"the {word} was good", "label": "warm", "source": "x", "note": ""} for word in "abcdef"]
    train += [{"text": f"the {word} was bad", "label": "cold", "source": "x", "note": None} for word in "ab"]
    train += [{"text": " The  A was GOOD", "label": "cold", "source": "x", "note": " "}]  # conflicts with line 1
    train += [{"text": "the b was good", "label": "warm", "source": "x", "note": ""}]  # repeats line 2
    train += [{"text": "very " * 20, "label": "cold", "source": "x", "note": ""}]
    write_jsonl(folder / "train.jsonl", train)
    test = [{"text": "THE A was bad", "label": "cold"}, {"text": "the z was bad", "label": "warm"}]
    write_jsonl(folder / "test.jsonl", test)
    return folder


def test_classification(data: Path) -> None:
    report = examine(str(data))
    assert report.kind == "text-classification"
    train = report.splits["train"]
    assert (train.rows, train.duplicates, train.conflicts) == (11, 2, 1)
    assert train.examples[0].text == "the a was good"
    assert train.examples[0].targets == ("warm", "cold")
    assert train.examples[0].places == ("line 1", "line 9")
    assert train.empty == ("note",)
    assert train.constant == ("source",)
    assert train.balance is not None
    assert train.balance.counts == {"warm": 7, "cold": 4}
    assert train.balance.rarest == ("cold", 4 / 11)
    assert train.lengths is not None
    assert (train.lengths.unit, train.lengths.smallest, train.lengths.median, train.lengths.largest) == (
        "words",
        4,
        4,
        20,
    )
    assert list(report.overlaps) == ["test"]
    assert report.overlaps["test"].rows == 1
    assert report.overlaps["test"].share == 0.5
    assert report.overlaps["test"].places == ("line 1",)


def test_tokens_of_a_backbone(data: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    settings = ClassificationSettings(data=str(data), max_length=8)
    found = check_data(settings, lambda task: tokenizer).splits["train"].lengths
    assert found is not None
    assert (found.unit, found.smallest, found.largest, found.max_length) == ("tokens", 6, 22, 8)
    assert found.cut == pytest.approx(1 / 11)
    assert tokenizer.truncation_side == "right"


def test_a_recipe_counts_its_own_backbone(data: Path, tmp_path: Path) -> None:
    backbone = save_backbone(tmp_path / "bert")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"backbone": str(backbone), "task": {"data": str(data), "max_length": 5}}))
    found = examine(str(recipe)).splits["train"].lengths
    assert found is not None
    assert (found.unit, found.cut) == ("tokens", 1.0)
    assert examine("mrpc", [f"task.data={data}", f"backbone={backbone}", "task.text_columns=[text]"]).kind


def test_regression(tmp_path: Path) -> None:
    rows = [{"sentence1": f"a {i}", "sentence2": "b", "label": i / 2} for i in range(5)]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {**rows[0], "label": 4.0}])
    report = examine(str(path))
    train = report.splits["train"]
    assert report.kind == "text-regression"
    assert train.balance is None
    assert train.values is not None
    assert (train.values.smallest, train.values.largest) == (0.0, 4.0)
    assert train.values.mean == pytest.approx(1.5)
    assert train.examples[0].targets == ("0.0", "4.0")
    assert train.constant == ("sentence2",)


def test_tags_and_intents(tmp_path: Path) -> None:
    rows = [{"tokens": ["Ann", "ran"], "ner_tags": ["B-PER", "O"]}, {"tokens": ["ann", "ran"], "ner_tags": ["O", "O"]}]
    report = examine(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert report.kind == "token-classification"
    train = report.splits["train"]
    assert train.balance is not None
    assert train.balance.counts == {"O": 3, "B-PER": 1}
    assert train.examples[0].targets == ("B-PER O", "O O")
    path = write_jsonl(tmp_path / "b.jsonl", [*sentences(4), {"text": "x", "label": "oos"}])
    balance = check_data(IntentSettings(data=str(path))).splits["train"].balance
    assert balance is not None
    assert balance.counts == {"warm": 2, "cold": 2, "oos": 1}


def test_glue_and_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "rte").mkdir()
    rows = [{"sentence1": f"a {i}", "sentence2": "b", "label": i % 2} for i in range(6)]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "rte" / f"{split}.jsonl", rows)
    report = examine(str(tmp_path), ["task.kind=glue", "task.name=rte"])
    assert report.overlaps["test"].share == 1.0
    for name, colour in (("blue", (0, 0, 9)), ("red", (9, 0, 0))):
        (tmp_path / "pictures" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), colour).save(tmp_path / "pictures" / "train" / name / "a.png")
    report = examine(str(tmp_path / "pictures"))
    assert report.kind == "image-classification"
    train = report.splits["train"]
    assert (train.rows, train.duplicates, train.lengths) == (2, None, None)
    assert train.balance is not None
    assert train.balance.counts == {"blue": 1, "red": 1}
    assert report.notes == ("Lengths, repeated rows and overlaps are not measured for image-classification.",)


# ---- the command -------------------------------------------------------------------------------------------------


def test_the_command_prints_tables_and_json(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "check", str(data)]) == 0
    shown = capsys.readouterr().out
    for part in ("read as text-classification", "rows", "7 (63.6%)", "repeated inputs", "has one value in all rows"):
        assert part in shown
    assert "'the a was good' has the targets warm, cold (line 1, line 9)" in shown
    assert run(["data", "check", str(data), "--json", "--set", "task.label_column=label"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["train"]["duplicates"] == 2
    assert found["overlaps"]["test"]["rows"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["broken.jsonl"], "broken.jsonl, line 2: malformed JSON"),
        (["nothing.jsonl"], "nothing.jsonl does not exist"),
        (["mrpcc"], "Unknown recipe 'mrpcc'. Did you mean 'mrpc'?"),
        (["good", "--set", "label_column=x"], "An override of data looks like task.label_column=topic"),
        (["good", "--set", "task.labl_column=x"], "unknown key 'task.labl_column'. Did you mean 'task.label_column'?"),
    ],
)
def test_broken_data_and_mistakes_exit_with_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": 1}\n{"text"\n')
    save_data(tmp_path / "good")
    assert run(["data", "check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_is_quick_to_import() -> None:
    heavy = ("torch", "transformers", "datasets", "numpy")
    code = f"import sys, pelton.cli.data; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
