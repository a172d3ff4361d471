"""GLUE's nine tasks, regression, and the metrics of both against scikit-learn and SciPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax as scipy_softmax
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics as sk

from pelton.errors import DataError, RecipeError
from pelton.tasks.glue import GLUE, GlueSettings, glue_score
from pelton.tasks.load import load_task
from pelton.tasks.metrics import class_metrics, regression_metrics, softmax
from pelton.tasks.regression import RegressionSettings
from pelton.training.fit import fit
from pelton.training.loading import parse_recipe
from pelton.training.run import Run
from tiny import save_backbone, sentences, write_jsonl

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not on this machine")
ROWS = {"cola": 8551, "sst2": 67349, "mrpc": 3668, "stsb": 5749, "qqp": 8999, "mnli": 9999, "qnli": 9999, "rte": 2490,
        "wnli": 635}  # fmt: skip
TESTS = {"cola": 1043, "sst2": 872, "mrpc": 408, "stsb": 1500, "qqp": 1000, "mnli": 9815, "qnli": 5463, "rte": 277,
         "wnli": 71}  # fmt: skip


@needs_data
@pytest.mark.parametrize("name", sorted(GLUE))
def test_every_task_loads_from_a_folder(name: str) -> None:
    loaded = load_task(GlueSettings(name=name, data=str(DATA), validation_examples=100, examples=40), seed=0)  # type: ignore[arg-type]
    splits = loaded.splits
    assert {split: len(examples) for split, examples in splits.items()} == {
        "train": 40, "validation": 100, "test": TESTS[name],
    }  # fmt: skip
    assert len(splits["train"].inputs[0]) == len(GLUE[name].columns)
    drawn, held = set(loaded.rows["train"]), set(loaded.rows["validation"])
    assert not drawn & held
    assert max(drawn | held) < ROWS[name]
    assert loaded.task.settings.score == GLUE[name].score
    if name == "mnli":
        assert len(loaded.task.labels) == 3  # type: ignore[attr-defined]


def test_the_hub_is_asked_for_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, subset: str, **_: Any) -> Any:
        asked.append((name, subset))
        classes = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
        columns = {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string"), "label": classes}

        def split(labels: list[int]) -> Any:
            rows = {"premise": [f"p {i}" for i in range(len(labels))], "hypothesis": ["h"] * len(labels)}
            return datasets.Dataset.from_dict({**rows, "label": labels}, features=datasets.Features(columns))

        return {
            "train": split([0, 1, 2] * 10),
            "validation_matched": split([0, 1]),
            "validation_mismatched": split([2]),
            "test_matched": split([-1]),
            "test_mismatched": split([-1]),
        }

    monkeypatch.setattr(datasets, "load_dataset", load)
    loaded = load_task(GlueSettings(name="mnli", validation_examples=6), seed=0)
    assert asked == [("nyu-mll/glue", "mnli")]
    sizes = {split: len(examples) for split, examples in loaded.splits.items()}
    assert sizes == {"train": 24, "validation": 6, "test": 2, "test_mismatched": 1}
    assert loaded.task.labels.names == ("entailment", "neutral", "contradiction")  # type: ignore[attr-defined]


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(RecipeError, match=r"task.name: input should be 'cola', 'sst2'.*but got 'colla'"):
        parse_recipe({"backbone": "x", "task": {"kind": "glue", "name": "colla"}}, "test")
    with pytest.raises(RecipeError, match=r"Unknown task.kind 'gleu'. Did you mean 'glue'\?"):
        parse_recipe({"backbone": "x", "task": {"kind": "gleu"}}, "test")
    with pytest.raises(RecipeError, match=r"unknown key 'task.nam'. Did you mean 'task.name'\?"):
        parse_recipe({"backbone": "x", "task": {"kind": "glue", "name": "cola", "nam": 1}}, "test")


def test_the_glue_score_is_the_mean_of_each_tasks_metrics() -> None:
    runs = {
        "mrpc": {"test": {"f1": 0.8, "accuracy": 0.7, "loss": 9.0}},
        "cola": {"test": {"matthews": 0.4, "accuracy": 0.9}},
        "mnli": {"test": {"accuracy": 0.5}, "test_mismatched": {"accuracy": 0.7}, "validation": {"accuracy": 0.1}},
    }
    assert [glue_score(name, metrics) for name, metrics in runs.items()] == pytest.approx([0.75, 0.4, 0.6])


@pytest.mark.parametrize("asked", [{"text_columns": ["s2"]}, {"label_column": "y"}])
@pytest.mark.parametrize(("name", "kind"), [("rte", "text-classification"), ("stsb", "text-regression")])
def test_columns_are_not_asked_for(asked: dict[str, Any], name: str, kind: str) -> None:
    with pytest.raises(RecipeError, match=rf"{next(iter(asked))} does not go with kind glue.*set kind={kind}"):
        parse_recipe({"backbone": "x", "task": {"kind": "glue", "name": name, **asked}}, "test")


def test_class_means_need_what_they_need_in_text_classification() -> None:
    def settings(**values: Any) -> GlueSettings:
        found = parse_recipe({"backbone": "x", "task": {"kind": "glue", "head_init": "class_means", **values}}, "test")
        assert isinstance(found.task, GlueSettings)
        return found.task

    with pytest.raises(RecipeError, match="head_init class_means needs head mean, but got head pooler"):
        settings(name="rte")
    with pytest.raises(RecipeError, match="head_init class_means reads all training rows, which streaming never holds"):
        settings(name="rte", head="mean", streaming=True)
    assert settings(name="rte", head="mean").plain().head == "mean"
    assert isinstance(settings(name="stsb").plain(), RegressionSettings)


def test_a_folder_is_asked_for(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "train.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 0}])
    for data in (file, tmp_path / "nowhere", tmp_path / "gone.csv"):
        with pytest.raises(DataError, match=rf"{data.name} is no folder, which kind glue expects. Set task.data to"):
            load_task(GlueSettings(name="rte", data=str(data)), seed=0)


def test_a_folder_is_streamed(tmp_path: Path) -> None:
    for name in ("rte", "mnli"):
        columns = GLUE[name].columns
        (tmp_path / name).mkdir()
        for split in ("train", GLUE[name].test):
            rows = [{**dict.fromkeys(columns, "a"), "label": i % 2} for i in range(8)]
            write_jsonl(tmp_path / name / f"{split}.jsonl", rows)
        settings = GlueSettings(name=name, data=str(tmp_path), streaming=True, validation_examples=0)  # type: ignore[arg-type]
        loaded = load_task(settings, seed=0)
        assert loaded.task.labels.names == ("0", "1", "2")[: GLUE[name].classes]  # type: ignore[attr-defined]
        assert set(loaded.splits) == {"test"}
    with pytest.raises(DataError, match=r"task.streaming cannot hold validation rows back"):
        load_task(GlueSettings(name="rte", data=str(tmp_path), streaming=True), seed=0)
    (tmp_path / "rte" / "label_names.json").write_text('["yes", "no"]')
    settings = GlueSettings(name="rte", data=str(tmp_path), streaming=True, validation_examples=0)
    assert load_task(settings, seed=0).task.labels.names == ("yes", "no")  # type: ignore[attr-defined]


# ---- metrics -----------------------------------------------------------------------------------------------------


def test_classification_metrics_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 2)), rng.integers(2, size=200)
    predicted, probability = logits.argmax(-1), scipy_softmax(logits, axis=-1)
    np.testing.assert_allclose(softmax(logits), probability)
    found = class_metrics(logits, labels)
    assert found == pytest.approx({
        "accuracy": sk.accuracy_score(labels, predicted),
        "macro_f1": sk.f1_score(labels, predicted, average="macro"),
        "loss": sk.log_loss(labels, probability),
        "f1": sk.f1_score(labels, predicted),
        "matthews": sk.matthews_corrcoef(labels, predicted),
        "auroc": sk.roc_auc_score(labels, probability[:, 1]),
    })  # fmt: skip
    assert np.isnan(class_metrics(logits, np.zeros(200, dtype=int))["auroc"])


def test_regression_metrics_are_scipys() -> None:
    rng = np.random.default_rng(0)
    values, targets = rng.normal(size=50), rng.normal(size=50)
    assert regression_metrics(values, targets) == pytest.approx({
        "pearson": pearsonr(values, targets).statistic,
        "spearman": spearmanr(values, targets).statistic,
        "rmse": sk.root_mean_squared_error(targets, values),
    })  # fmt: skip
    assert regression_metrics(np.ones(5), np.arange(5.0))["pearson"] == 0.0


# ---- regression --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["mean", "pooler"])
def test_regression_learns_and_answers_in_the_datas_units(tmp_path: Path, head: str) -> None:
    save_backbone(tmp_path / "backbone")
    rows = [{"text": row["text"], "label": 900.0 if row["label"] == "warm" else 100.0} for row in sentences(64)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows[:32])
    values = {
        "backbone": str(tmp_path / "backbone"),
        "task": {"kind": "text-regression", "data": str(tmp_path), "head": head, "validation_examples": 8},
        "adapter": {"methods": [{"kind": "lora", "rank": 4}, {"kind": "bottleneck", "bottleneck_size": 8}]},
        "training": {"epochs": 15, "batch_size": 8, "learning_rate": 3e-2, "seed": 0, "trackers": []},
        "output": str(tmp_path / "runs"),
    }
    run = fit(parse_recipe(values, "test"))
    scores = run.folder.read("metrics")["test"]
    assert set(scores) == {"pearson", "spearman", "rmse", "loss", "score"}
    assert scores["pearson"] > 0.6
    loaded = Run.load(run.folder.path)
    assert loaded.evaluate(loaded.examples()) == pytest.approx(scores, abs=1e-4)
    found = [one.value for one in loaded.predict([(row["text"],) for row in rows[:16]])]
    assert np.corrcoef(found, [row["label"] for row in rows[:16]])[0, 1] > 0.5
    assert 0.0 < np.mean(found) < 1000.0


@pytest.mark.parametrize("value", [float("nan"), "much", None, float("inf")])
def test_a_target_that_is_no_number_is_named(tmp_path: Path, value: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": 1.0}, {"text": "b", "label": value}])
    with pytest.raises(DataError, match=r"train.jsonl, line 2, column 'label': expected a finite number, but got"):
        load_task(RegressionSettings(data=str(tmp_path)), seed=0)
