"""A recipe to start from, by the benchmark's results."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from pelton.bench.grid import Grid
from pelton.bench.journal import Journal
from pelton.bench.protocol import METHODS, TASKS, Cell, Protocol
from pelton.bench.summary import COLUMNS, summarise, write_summary
from pelton.cli.main import run as pelton
from pelton.errors import StudyError, UnknownName
from pelton.search import recommend as module
from pelton.search.recommend import evidence, kind_of, recommend
from pelton.training.loading import load_recipe
from tiny import save_backbone, save_data

JOURNAL = Path(__file__).parents[1] / "docs" / "data" / "bench.jsonl"


def _rows(*rows: tuple[str, int, str, int, float]) -> pd.DataFrame:
    values = [(task, size, method, seed, 1e-3, score, 1000) for task, size, method, seed, score in rows]
    return pd.DataFrame(values, columns=list(COLUMNS))


def test_what_ships_is_what_the_rule_needs() -> None:
    rows = evidence()
    assert list(rows.columns) == list(COLUMNS)
    assert set(rows["task"]) <= set(TASKS)
    assert set(rows["method"]) <= set(METHODS)
    assert not rows.duplicated(["task", "examples", "method", "seed"]).any()


def test_a_summary_keeps_the_chosen_rate(tmp_path: Path) -> None:
    protocol = Protocol(None)
    grid = Grid(protocol, ["sst2"], [100], ["lora"], range(2))
    records = []
    for rate, validation in ((1e-3, 0.7), (3e-3, 0.8)):
        for seed in (0, 1):
            cell = Cell("sst2", 100, "lora", rate, seed)
            records.append({
                "task": "sst2", "examples": 100, "method": "lora", "rate": rate, "seed": seed, "test": validation,
                "validation": validation, "trainable": 5, "train_seconds": 1.0, "protocol": protocol.describe(),
                "fingerprint": grid.key(cell),
            })  # fmt: skip
    table = summarise(records)
    assert list(table["rate"]) == [3e-3, 3e-3]
    assert list(table["score"]) == [80.0, 80.0]
    write_summary(records, tmp_path / "new" / "bench.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "new" / "bench.csv"), table, check_dtype=False)
    assert summarise([]).empty


@pytest.mark.skipif(not JOURNAL.is_file(), reason="the benchmark's journal is in the repository, not in the package")
def test_what_ships_comes_from_the_journal() -> None:
    """Every shipped row is a result of the journal; the journal may have grown since."""
    found = {(r["task"], r["examples"], r["method"], r["seed"], r["rate"]): r for r in Journal(JOURNAL).records()}
    for row in evidence().to_dict("records"):
        record = found[row["task"], row["examples"], row["method"], row["seed"], row["rate"]]
        assert row["trainable"] == record["trainable"]


def test_methods_are_compared_on_what_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(
        ("sst2", 100, "lora", 0, 70.0),
        ("sst2", 100, "lora", 1, 72.0),
        ("sst2", 100, "full", 0, 73.0),
        ("sst2", 100, "full", 1, 70.0),
        ("cola", 100, "lora", 0, 10.0),
        ("cola", 100, "full", 0, 30.0),
        ("cola", 100, "ia3", 0, 99.0),  # on one of three pairs: left out
        ("mrpc", 100, "full", 0, 0.0),  # lora has not finished it
        ("sst2", 500, "full", 0, 99.0),  # alone there
        ("conll2003", 100, "lora", 0, 60.0),
        ("conll2003", 100, "bitfit", 0, 50.0),
    )
    monkeypatch.setattr(module, "evidence", lambda: rows)
    found = recommend("text-classification", 400)
    assert list(found.rows.index) == ["full", "lora"]
    assert list(found.rows["score"]) == [(71.5 + 30.0) / 2, (71.0 + 10.0) / 2]
    assert "100, on cola, sst2 (3 pairs" in found.rule[1]
    assert found.recipe.adapter is None
    assert found.recipe.training.backbone_learning_rate == 1e-3
    assert list(recommend("sst2", 100).rows["score"]) == [71.5, 71.0]
    assert "Not told apart from it by one standard error: lora." in recommend("sst2", 100).rule
    assert recommend("conll2003", 9).rows.index[0] == "lora"
    guess = recommend("causal-lm", 100, "other")
    assert "No causal-lm task was measured" in guess.rule[0]
    assert "All rows were measured on all-MiniLM-L6-v2" in guess.rule[-1]


def test_a_single_pair_has_no_error_and_waits_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(
        ("cola", 1000, "lora", 0, 9.0),
        ("cola", 1000, "full", 0, 1.0),
        ("conll2003", 100, "lora", 0, 60.0),
        ("conll2003", 100, "bitfit", 0, 50.0),
    )
    monkeypatch.setattr(module, "evidence", lambda: rows)
    single = recommend("cola", 1000)
    assert single.rows["error"].isna().all()
    assert "One run each tells no methods apart: take the highest as a guess." in single.rule
    assert "(1 pair of task and seed" in single.rule[1]
    smaller = [("cola", 100, method, seed, 5.0 + seed) for method in ("lora", "full") for seed in (0, 1)]
    rows = pd.concat([rows, _rows(*smaller)])
    assert "1,000 examples: 100, on cola (2 pairs" in recommend("cola", 1000).rule[1]
    assert recommend("cola", 1000).rows["error"].notna().all()
    assert recommend("conll2003", 100).rows.index[0] == "lora"  # nothing like it has two
    rows = pd.concat([rows[rows["examples"] == 1000], _rows(*[("sst2", *row[1:]) for row in smaller])])
    alike = recommend("cola", 1000)
    assert "text-classification tasks, which cola is like" in alike.rule[0]


@pytest.mark.parametrize("task", ["sst2", "stsb", "conll2003", "banking77", "text-classification", "seq2seq"])
def test_every_recommendation_is_a_recipe(task: str, tmp_path: Path) -> None:
    found = recommend(task, 300)
    module.write_recommendation(found, tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == found.recipe
    assert again.training.max_steps == 450
    assert kind_of(task) in (again.task.kind, "text-classification", "text-regression")
    assert (tmp_path / "recipe.yaml").read_text().startswith("# ")


def test_pelton_fit_runs_what_is_recommended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, data = tmp_path / "start.yaml", save_data(tmp_path / "data")
    arguments = ["recommend", "--task", "text-classification", "--examples", "48", "--output", str(file)]
    assert pelton([*arguments, "--backbone", str(save_backbone(tmp_path / "backbone"))]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("Highest mean", "method", "trainable", f"pelton fit {file}"))
    few = [f"--set=training.{key}" for key in ("max_steps=2", "evaluate_every=1")]
    assert pelton(["fit", str(file), f"--set=task.data={data}", *few, "--output", str(tmp_path / "runs")]) == 0
    capsys.readouterr()
    assert pelton([*arguments]) == 2
    assert "exists. Name another file with --output" in capsys.readouterr().err


def test_what_is_not_known() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'text-classification'"):
        recommend("text-clasification", 100)
    with pytest.raises(UnknownName, match="Did you mean 'conll2003'"):
        recommend("conll", 100)
    with pytest.raises(StudyError, match="`examples >= 1` must hold"):
        recommend("sst2", 0)
