"""Training rows that are all of one class are refused, as they are given or once they are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from pelton.errors import DataError
from pelton.tasks.load import AnySettings, load_task
from tiny import sentences, write_jsonl

TAGGED = {"tokens": ["a", "b"], "ner_tags": ["B-PER", "O"]}


def load(data: Path, kind: str = "text-classification", **values: Any) -> Any:
    settings: Any = TypeAdapter(AnySettings).validate_python({"kind": kind, "data": str(data), **values})
    return load_task(settings, seed=0)


def test_a_file_with_one_class_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", sentences(8)[::2])
    with pytest.raises(
        DataError, match=r"train.jsonl, column 'label': expected two or more classes, but got \['warm'\]"
    ):
        load(path)
    (tmp_path / "label_names.json").write_text(json.dumps(["cold", "warm"]))
    with pytest.raises(DataError, match=r"train.jsonl, column 'label': all 4 training rows have one class"):
        load(tmp_path)


def test_rows_that_were_drawn_are_refused_when_they_are_of_one_class(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", sentences(20))
    with pytest.raises(
        DataError, match=r"'label': the 1 training rows that were drawn have one class of 2.*task.examples"
    ):
        load(path, examples=1)
    assert len(load(path, shots=1).splits["train"]) == 2
    few = write_jsonl(tmp_path / "few.jsonl", [*sentences(20)[::2], sentences(2)[1]])
    with pytest.raises(DataError, match=r"drawn have one class of 2. Expected two or more: change task.examples"):
        load(few, examples=2, validation_fraction=0.0)
    with pytest.raises(DataError, match=r"change task.validation_fraction or task.validation_examples"):
        load(few, validation_examples=9)


def test_tags_of_one_kind_are_refused(tmp_path: Path) -> None:
    rows = [{**TAGGED, "ner_tags": ["O", "O"]}] * 4
    (tmp_path / "label_names.json").write_text(json.dumps(["O", "B-PER", "I-PER"]))
    write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"column 'ner_tags': all 4 training rows have one class"):
        load(tmp_path, "token-classification")
    write_jsonl(tmp_path / "train.jsonl", [*rows, TAGGED])
    assert load(tmp_path, "token-classification", validation_fraction=0.0).task.labels.bio


def test_a_judged_split_of_one_class_says_so(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", sentences(20))
    write_jsonl(tmp_path / "test.jsonl", sentences(8)[::2])
    loaded = load(tmp_path)
    assert [note for note in loaded.describe()["notes"] if "all 4 test rows have one class (column 'label')" in note]
    assert not [note for note in loaded.notes if "validation rows" in note]


def test_kinds_without_classes_are_not_asked(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": f"a{i}", "label": 1.0} for i in range(4)])
    assert len(load(path, "text-regression", validation_fraction=0.0).splits["train"]) == 4
