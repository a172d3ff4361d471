"""Intents with texts that belong to none: what is trained on, the threshold, and the metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, recall_score, roc_auc_score

from pelton.errors import DataError
from pelton.tasks.base import Examples
from pelton.tasks.intents import OUT, IntentClassification, IntentPrediction, IntentSettings, best_threshold
from pelton.tasks.labels import Labels
from pelton.tasks.load import load_task
from pelton.tasks.metrics import softmax
from pelton.training.fit import fit
from pelton.training.loading import parse_recipe
from pelton.training.run import Run
from tiny import recipe_values, save_backbone, sentences, write_jsonl

CLINC = Path(__file__).parents[2] / "shared" / "data" / "clinc150"
NEITHER = ["the and the", "very very very", "and the very and", "the the the the"]


def rows(count: int, outside: int, label: str = "oos") -> list[dict[str, Any]]:
    return sentences(count) + [{"text": NEITHER[i % 4], "label": label} for i in range(outside)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, (count, outside) in {"train": (48, 6), "validation": (16, 8), "test": (16, 8)}.items():
        write_jsonl(folder / f"{split}.jsonl", rows(count, outside))
    return folder


def settings(data: Path, **values: Any) -> IntentSettings:
    return IntentSettings.model_validate({"data": str(data), **values})


def recipe(backbone: Path, data: Path, output: Path, **task: Any) -> Any:
    values = recipe_values(backbone, data, output, epochs=6)
    values["task"] |= {"kind": "intent-classification", **task}
    return parse_recipe(values, "test")


# ---- rows --------------------------------------------------------------------------------------------------------


def test_rows_out_of_scope_are_judged_and_not_trained_on(data: Path) -> None:
    loaded = load_task(settings(data), seed=0)
    assert loaded.task.labels.names == ("cold", "warm")
    assert len(loaded.splits["train"]) == 48
    assert OUT not in loaded.splits["train"].targets
    assert loaded.splits["test"].targets.count(OUT) == 8
    assert loaded.notes == [
        f"{data / 'train.jsonl'}: 6 rows are left out of training, since their label is 'oos' (task.oos_label)."
    ]


def test_held_back_rows_keep_what_is_out_of_scope(data: Path) -> None:
    (data / "validation.jsonl").unlink()
    loaded = load_task(settings(data, validation_examples=9, shots=4), seed=0)
    assert loaded.splits["validation"].targets.count(OUT) == 1
    assert sorted(loaded.splits["train"].targets) == [0] * 4 + [1] * 4
    assert "5 rows are left out" in loaded.notes[0]
    assert not set(loaded.rows["train"]) & {*range(48, 54), *loaded.rows["validation"]}


def test_class_ids_stay_those_of_the_data(data: Path) -> None:
    for split in ("train", "validation", "test"):
        path = data / f"{split}.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()]
        write_jsonl(path, [{**row, "label": ["cold", "oos", "warm"].index(row["label"])} for row in found])
    (data / "label_names.json").write_text('["cold", "oos", "warm"]')
    loaded = load_task(settings(data), seed=0)
    assert loaded.task.labels.names == ("cold", "warm")
    assert loaded.splits["test"].targets == [1, 0] * 8 + [OUT] * 8
    restored = IntentClassification.restore(loaded.task.settings, loaded.task.stored())
    assert restored == loaded.task


def test_what_cannot_choose_a_threshold_is_refused(data: Path) -> None:
    write_jsonl(data / "validation.jsonl", sentences(8))
    with pytest.raises(DataError, match=r"oos_threshold auto needs validation rows of 'oos' and of intents, but got 8"):
        load_task(settings(data), seed=0)
    with pytest.raises(DataError, match=r"task.score oos_auroc needs validation rows of 'oos'"):
        load_task(settings(data, oos_threshold=0.5), seed=0)
    assert load_task(settings(data, oos_threshold=0.5, score="accuracy"), seed=0).task.threshold == 0.5
    (data / "validation.jsonl").unlink()
    with pytest.raises(DataError, match=r"oos_threshold auto needs validation rows .* but got 0 rows"):
        load_task(settings(data, validation_fraction=0.0), seed=0)
    write_jsonl(data / "train.jsonl", [row for row in rows(8, 4) if row["label"] != "warm"])
    with pytest.raises(DataError, match=r"'label': expected two or more intents beside task.oos_label 'oos'"):
        load_task(settings(data), seed=0)


def test_an_unseen_intent_is_named(data: Path) -> None:
    write_jsonl(data / "test.jsonl", [*rows(2, 1), {"text": "a", "label": "wrm"}])
    with pytest.raises(DataError, match=r"test.jsonl, line 4, column 'label': unseen label 'wrm'. Did you mean 'warm'"):
        load_task(settings(data), seed=0)


# ---- threshold and metrics ---------------------------------------------------------------------------------------


def random_rows(seed: int, count: int = 200, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(seed)
    targets = source.integers(-1, classes, count)
    logits = source.normal(size=(count, classes)).round(1)  # some ties
    logits[np.arange(count), targets] += np.where(targets == OUT, 0.0, 2.0)
    return logits, targets


@pytest.mark.parametrize("seed", range(6))
def test_the_threshold_is_the_best_of_all(seed: int) -> None:
    logits, targets = random_rows(seed)
    probabilities = softmax(logits)

    def right(threshold: float) -> int:
        rejected = probabilities.max(axis=1) < threshold
        return int(((targets == OUT) & rejected).sum() + ((probabilities.argmax(axis=1) == targets) & ~rejected).sum())

    largest = probabilities.max(axis=1)
    every = [0.0, 1.0, *largest, *(largest + 1e-12)]
    assert right(best_threshold(probabilities, targets)) == max(map(right, every))


def test_thresholds_of_one_sided_rows() -> None:
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7]])
    assert best_threshold(probabilities, np.array([0, 1])) == 0.0
    assert best_threshold(probabilities, np.array([OUT, OUT])) == 1.0
    assert best_threshold(probabilities, np.array([0, OUT])) == pytest.approx(0.8)


@pytest.mark.parametrize("threshold", [0.0, 0.45, 0.8, 1.0])
def test_metrics_equal_scikit_learn(threshold: float) -> None:
    logits, targets = random_rows(11)
    labels = Labels(tuple("abcde"), ids=False)
    task = IntentClassification(IntentSettings(), labels, 5, threshold)
    values = task.evaluate(Examples([None] * len(targets), targets.tolist()), None, list(logits))
    probabilities = softmax(logits)
    names = np.array([*"abcde", "oos"])
    predicted = np.where(probabilities.max(axis=1) < threshold, "oos", names[probabilities.argmax(axis=1)])
    true, inside = names[targets], targets != OUT
    assert tuple(values) == task.metrics
    assert values["accuracy"] == pytest.approx(accuracy_score(true[inside], predicted[inside]))
    assert values["in_scope_accuracy"] == pytest.approx(
        accuracy_score(true[inside], names[probabilities.argmax(axis=1)][inside])
    )
    assert values["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro", zero_division=0.0))
    assert values["oos_recall"] == pytest.approx(recall_score(true == "oos", predicted == "oos"))
    assert values["oos_auroc"] == pytest.approx(roc_auc_score(true == "oos", -probabilities.max(axis=1)))


def test_rows_of_one_side_have_no_metrics_of_the_other() -> None:
    task = IntentClassification(IntentSettings(), Labels(("a", "b"), ids=False), 2, 0.6)
    inside = task.evaluate(Examples([None] * 2, [0, 1]), None, [np.array([2.0, 0.0]), np.array([0.0, 0.1])])
    assert inside["accuracy"] == 0.5
    assert inside["in_scope_accuracy"] == 1.0
    assert np.isnan([inside["oos_recall"], inside["oos_auroc"]]).all()
    outside = task.evaluate(Examples([None] * 2, [OUT, OUT]), None, [np.array([2.0, 0.0]), np.array([0.0, 0.1])])
    assert outside["oos_recall"] == 0.5
    assert np.isnan([outside["accuracy"], outside["loss"]]).all()


# ---- a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", ["auto", 0.9])
def test_a_run_keeps_its_threshold(data: Path, tmp_path: Path, threshold: Any) -> None:
    run = fit(recipe(save_backbone(tmp_path / "bert"), data, tmp_path / "runs", oos_threshold=threshold))
    loaded = Run.load(run.folder.path)
    assert loaded.task == run.task
    assert loaded.task.threshold == run.folder.read("task")["threshold"]
    splits = load_task(run.recipe.task, run.recipe.training.seed).splits
    validation = splits["validation"]
    if threshold == "auto":
        probabilities = softmax(np.asarray(loaded.outputs(validation.inputs), dtype=np.float64))
        assert loaded.task.threshold == pytest.approx(best_threshold(probabilities, np.asarray(validation.targets)))
    else:
        assert loaded.task.threshold == 0.9
    metrics = run.folder.read("metrics")
    assert metrics["test"] == loaded.evaluate(loaded.examples())
    assert metrics["validation"] == loaded.evaluate(validation)
    found = loaded.predict([*splits["test"].inputs])
    assert all(isinstance(one, IntentPrediction) for one in found)
    for one in found:
        assert one.oos_score == pytest.approx(1.0 - max(one.probabilities.values()))
        assert (one.label == "oos") == (max(one.probabilities.values()) < loaded.task.threshold)
    true = ["oos" if t == OUT else run.task.labels.names[t] for t in splits["test"].targets]
    pairs = [(t, one.label) for t, one in zip(true, found, strict=True) if t == "oos"]
    assert metrics["test"]["oos_recall"] == pytest.approx(sum(t == p for t, p in pairs) / len(pairs))


@pytest.mark.skipif(not CLINC.is_dir(), reason="the shared data is not here")
def test_clinc150_is_read_as_published() -> None:
    loaded = load_task(settings(CLINC), seed=0)
    assert len(loaded.task.labels) == 150
    assert loaded.describe()["examples"] == {"train": 15000, "validation": 3100, "test": 5500}
    assert loaded.splits["test"].targets.count(OUT) == 1000
    assert "250 rows are left out of training" in loaded.notes[0]
