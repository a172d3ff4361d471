"""What is cut or missing in rows that are only judged is said, before training where it would be in vain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fits import Make
from pelton.errors import DataError, RecipeError
from pelton.tasks.intents import OUT, IntentClassification, IntentSettings
from pelton.tasks.labels import Labels
from pelton.tasks.tokens import TokenSettings
from pelton.training.fit import fit
from pelton.training.loading import load_recipe
from test_answers import plan, row, table, tokenizer  # noqa: F401 - a fixture
from test_causal import made as conversations
from test_causal import save_tokenizer
from tiny import save_data, sentences, write_jsonl

LONG = "the film was " + "very " * 30 + "red"


def notes(folder: Any) -> list[str]:
    found: list[str] = folder.read("data")["notes"]
    return found


def test_texts_that_are_cut_are_counted_in_every_split(make: Make, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data")
    for split, count in (("validation", 2), ("test", 3)):
        write_jsonl(data / f"{split}.jsonl", [*sentences(8), *[{"text": LONG, "label": "warm"}] * count])
    run = fit(make(epochs=1))
    assert [note for note in notes(run.folder) if "fill" in note] == [
        "2 of 10 validation texts fill task.max_length; what is longer was cut",
        "3 of 11 test texts fill task.max_length; what is longer was cut",
    ]


def test_responses_that_are_not_judged_are_counted(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "letters")
    letters = AutoTokenizer.from_pretrained(tmp_path / "letters")
    short, long = {"prompt": "abc", "response": "xy"}, {"prompt": "abcdefghijklmnop", "response": "xy"}
    cut = {"prompt": "abcdefg", "response": "xyz12"}
    task, examples = conversations([short, long, cut], tmp_path, max_length=12)
    task.require_judgeable("test", examples, letters)
    assert task.left_out(examples, task.judged(examples, letters), "test") == (
        "2 of 3 test responses lost their end at task.max_length",
        "1 of 3 test examples have nothing of their response left and are not judged",
    )
    with pytest.raises(DataError, match=r"judge of any response of the test rows: all prompts fill task.max_length=12"):
        task.require_judgeable("test", examples.take([1]), letters)


def test_questions_that_are_cut_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:  # noqa: F811
    asked = [row("was the film", "the film was good", "good"), row("the very " * 40, "the film was good", "good")]
    task = plan(*asked)
    examples = task.check(table(*asked))
    for split, features in (
        ("training", task.encode(examples.inputs, tokenizer, examples.targets)),
        ("test", task.judged(examples, tokenizer)),
    ):
        assert task.left_out(examples, features, split)[0].startswith(f"1 of 2 {split} questions are longer than task")


# ---- metrics that do not exist --------------------------------------------------------------------------------------


def test_a_metric_that_validation_rows_cannot_give_is_refused(make: Make, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data")
    write_jsonl(data / "validation.jsonl", [one for one in sentences(16) if one["label"] == "warm"])
    message = r"auroc cannot choose the checkpoint: a kind of row that it needs is missing in the 8 validation rows"
    with pytest.raises(RecipeError, match=message):
        fit(make(metric_for_best="auroc"))
    with pytest.raises(RecipeError, match=message):
        fit(make(task={"score": "auroc"}))
    assert not (tmp_path / "runs").exists()


def test_a_metric_that_test_rows_cannot_give_is_said(make: Make, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data")
    write_jsonl(data / "test.jsonl", [one for one in sentences(16) if one["label"] == "warm"])
    run = fit(make(epochs=1))
    assert "test: auroc cannot be computed on these rows" in notes(run.folder)


def test_what_each_kind_cannot_measure() -> None:
    asked = [row("was the film", "the film was good", "good"), row("was the film", "the film was good")]
    task = plan(*asked)
    examples = task.check(table(*asked))
    assert task.unmeasurable(examples) == ()
    assert task.unmeasurable(examples.take([0])) == ("unanswered_exact_match",)
    assert task.unmeasurable(examples.take([1])) == ("answered_exact_match", "answered_f1")
    intents = IntentClassification(IntentSettings(data="d"), Labels(("a", "b"), ids=False), 2, 0.6)
    for targets in ([0, 1], [OUT, OUT], [0, OUT]):
        lost = intents.unmeasurable(type(examples)(["x", "y"], targets))
        values = intents.evaluate(
            type(examples)(["x", "y"], targets), None, [np.array([2.0, 1.0]), np.array([0.0, 1.0])]
        )
        assert set(lost) == {name for name, value in values.items() if np.isnan(value)}


def test_a_loss_that_validation_rows_cannot_give_stops_nothing(make: Make, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data")
    outside = [{"text": "the and the", "label": "oos"}] * 4
    write_jsonl(data / "train.jsonl", [*sentences(24), *outside])
    write_jsonl(data / "validation.jsonl", outside)
    task = {"kind": "intent-classification", "oos_threshold": 0.5, "score": "macro_f1"}
    run = fit(make(task=task, epochs=1))
    assert np.isnan(run.folder.read("metrics")["validation"]["loss"])
    assert "validation: accuracy, in_scope_accuracy, oos_auroc, loss cannot be computed on these rows" in notes(
        run.folder
    )


# ---- answers, strata, streams ---------------------------------------------------------------------------------------


def test_impossible_questions_have_no_answer_whatever_is_listed() -> None:
    asked = [
        {**row("was the film", "the film was good", "good"), "is_impossible": flag} for flag in (False, True, None)
    ]
    task = plan(*asked)
    assert task.settings.unanswerable
    assert [gold.texts for gold in task.check(table(*asked)).targets] == [("good",), (), ("good",)]
    with pytest.raises(DataError, match=r"line 1, column 'is_impossible': expected true or false, but got 'yes'"):
        task.check(table({**asked[0], "is_impossible": "yes"}))


def test_two_subwords_leave_no_word() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 3"):
        TokenSettings(data="d", max_length=2)


def test_a_streamed_training_is_looked_at_ten_times(make: Make, tmp_path: Path) -> None:
    save_data(tmp_path / "data")
    task = {"streaming": True, "labels": ["cold", "warm"]}
    run = fit(make(task=task, max_steps=40, early_stopping_patience=1, learning_rate=1e-12))
    assert load_recipe(run.folder.recipe).training.evaluate_every == 4
    lines = [json.loads(line) for line in run.folder.history.read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_score" in line][:2] == [4, 8]
    assert run.folder.read("metrics")["steps"] < 40
