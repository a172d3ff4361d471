"""The benchmark: which cells it trains, how it shares and resumes them, and what it says about them."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pelton.bench import protocol as protocols
from pelton.bench.grid import Grid
from pelton.bench.journal import Journal
from pelton.bench.protocol import EQUAL, METHODS, TASKS, Cell, Protocol
from pelton.bench.report import markdown, write
from pelton.bench.statistics import best_single, cells, complete, over_tasks, paired_bootstrap, score_table
from pelton.bench.worker import progress, work
from pelton.cli.main import run
from pelton.errors import DataError, PeltonError
from tiny import save_backbone, sentences, write_jsonl

SCORES = {"full": 0.6, "lora": 0.5, "bottleneck": 0.55, "pelton": 0.7}


def record(grid: Grid, cell: Cell, test: float, validation: float | None = None) -> dict[str, Any]:
    values = {"validation": test if validation is None else validation, "test": test, "trainable": 10}
    names = {"task": cell.task, "examples": cell.examples, "method": cell.method, "rate": cell.rate, "seed": cell.seed}
    return {**names, **values, "train_seconds": 2.0, "fingerprint": grid.key(cell)}


def finish(grid: Grid) -> list[dict[str, Any]]:
    """Trains nothing: gives every open cell its method's score, the higher rate a little less on held-back rows."""
    records: list[dict[str, Any]] = []
    while cells_ := list(grid.open(records)):
        for cell in cells_:
            rates = grid.protocol.rates(cell.method)
            records.append(record(grid, cell, SCORES[cell.method] + cell.seed / 100, 0.5 - rates.index(cell.rate) / 10))
    return records


@pytest.fixture
def grid() -> Grid:
    return Grid(Protocol("data"), ["cola", "rte"], [100, 500], list(SCORES), range(3))


# ---- the grid ----------------------------------------------------------------------------------------------------


def test_rates_are_chosen_on_held_back_rows_at_the_first_seed(grid: Grid) -> None:
    opened = list(grid.open([]))
    assert {cell.seed for cell in opened} == {0}
    assert len(opened) == 2 * 2 * len(SCORES) * 2
    lora = [cell for cell in opened if (cell.task, cell.examples, cell.method) == ("cola", 100, "lora")]
    records = [record(grid, lora[0], test=0.9, validation=0.1), record(grid, lora[1], test=0.1, validation=0.2)]
    later = {cell for cell in grid.open(records) if (cell.task, cell.examples, cell.method) == ("cola", 100, "lora")}
    assert later == {Cell("cola", 100, "lora", lora[1].rate, seed) for seed in (1, 2)}
    assert grid.results(records) == [records[1]]


def test_a_finished_benchmark_has_one_result_a_cell(grid: Grid) -> None:
    records = finish(grid)
    assert len(records) == 2 * 2 * len(SCORES) * (3 + 1)
    assert len(grid.results(records)) == 2 * 2 * len(SCORES) * 3
    assert progress(grid, records) == (len(records), len(records))
    done, every = progress(grid, records[:5])
    assert (done, every) == (5, len(records))


def test_results_of_another_default_or_protocol_are_other_cells(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("cola", 100, "pelton", 1e-3, 0)
    lora = Cell("cola", 100, "lora", 1e-3, 0)
    before, plain = Protocol("data").fingerprint(cell), Protocol("data").fingerprint(lora)
    assert Protocol("elsewhere").fingerprint(cell) == before
    assert Protocol("data", precision="bf16").fingerprint(cell) != before
    from pelton import LoRA
    from pelton.tuner import config

    monkeypatch.setattr(config, "default_methods", lambda: (LoRA(rank=4),))
    assert Protocol("data").fingerprint(cell) != before
    assert Protocol("data").fingerprint(lora) == plain


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("method", [*METHODS, EQUAL])
def test_every_cell_is_a_valid_recipe(task: str, method: str) -> None:
    rate = Protocol("data").rates(method)[0]
    recipe = Protocol("data").recipe(Cell(task, 100, method, rate, 0), "out")
    assert recipe.task.examples == 100
    assert recipe.training.max_steps == 300
    assert recipe.training.max_steps % recipe.training.evaluate_every == 0  # type: ignore[operator]


def test_without_a_folder_glue_is_the_hubs_and_banking77_pelton_s() -> None:
    place = lambda task: Protocol(None).recipe(Cell(task, 100, "lora", 1e-3, 0), "out").task.data  # noqa: E731
    assert [place(task) for task in ("cola", "stsb", "banking77")] == [
        "nyu-mll/glue",
        "nyu-mll/glue",
        "pelton:banking77",
    ]
    assert Protocol(None).fingerprint(Cell("cola", 100, "lora", 1e-3, 0)) == Protocol("data").fingerprint(
        Cell("cola", 100, "lora", 1e-3, 0)
    )
    Protocol(None).require_data(["cola", "banking77"])
    with pytest.raises(DataError, match="conll2003 cannot be had without a folder: give --data DIR"):
        Protocol(None).require_data(["cola", "conll2003"])


def test_equal_parameters_are_equal_to_half_a_rank() -> None:
    from pelton import LoRA, PeltonConfig

    count = lambda rank: protocols._count(  # noqa: E731
        protocols.MINILM, PeltonConfig.single(LoRA(rank=rank, sites=protocols.LINEAR_SITES))
    )
    ours = protocols._count(protocols.MINILM, PeltonConfig())
    rank = protocols.equal_rank(protocols.MINILM)
    assert abs(count(rank) - ours) <= count(1) / 2


@pytest.mark.parametrize(
    ("tasks", "methods", "message"),
    [
        (["colla"], ["lora"], "Unknown task 'colla'. Did you mean 'cola'?"),
        (["cola"], ["lorra"], "Unknown method 'lorra'. Did you mean 'lora'?"),
        ([], ["lora"], "A benchmark needs at least one of tasks."),
    ],
)
def test_mistakes_name_the_nearest(tasks: list[str], methods: list[str], message: str) -> None:
    with pytest.raises(PeltonError) as error:
        Grid(Protocol("data"), tasks, [100], methods, [0])
    assert message in str(error.value)


# ---- the journal -------------------------------------------------------------------------------------------------


def _append(path: Path, numbers: list[int]) -> None:
    for number in numbers:
        Journal(path).append({"number": number})


def _hold(path: Path, ready: Any, leave: Any) -> None:
    with Journal(path).claim("cell") as mine:
        assert mine
        ready.set()
        leave.wait(30)


def test_processes_share_a_journal(tmp_path: Path) -> None:
    path, spawn = tmp_path / "bench.jsonl", multiprocessing.get_context("fork")
    parts = [list(range(n, 60, 3)) for n in range(3)]
    workers = [spawn.Process(target=_append, args=(path, part)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert sorted(line["number"] for line in Journal(path).records()) == list(range(60))


def test_a_claim_is_held_by_one_and_freed_by_death(tmp_path: Path) -> None:
    path, fork = tmp_path / "bench.jsonl", multiprocessing.get_context("fork")
    ready, leave = fork.Event(), fork.Event()
    worker = fork.Process(target=_hold, args=(path, ready, leave))
    worker.start()
    assert ready.wait(30)
    with Journal(path).claim("cell") as mine:
        assert not mine
    with Journal(path).claim("other") as mine:
        assert mine
    worker.kill()
    worker.join(30)
    with Journal(path).claim("cell") as mine:
        assert mine


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(DataError, match=r"bench.jsonl, line 2: expected a JSON object"):
        Journal(path).records()


# ---- what it says ------------------------------------------------------------------------------------------------


def frame(values: dict[tuple[str, str, int], float]) -> pd.DataFrame:
    rows = [{"task": t, "method": m, "seed": s, "score": v, "examples": 100} for (t, m, s), v in values.items()]
    return pd.DataFrame(rows)


def test_means_deviations_and_ranks() -> None:
    table = frame({("a", "x", 0): 1.0, ("a", "x", 1): 3.0, ("a", "y", 0): 4.0, ("a", "y", 1): 6.0,
                   ("b", "x", 0): 9.0, ("b", "x", 1): 9.0, ("b", "y", 0): 5.0, ("b", "y", 1): 5.0})  # fmt: skip
    found = cells(table)
    assert (found["a", "x"].mean, found["a", "x"].seeds) == (2.0, 2)
    assert found["a", "x"].std == pytest.approx(np.std([1, 3], ddof=1))
    summary = over_tasks(table)
    assert summary["mean"].to_dict() == {"x": 5.5, "y": 5.0}
    assert summary["rank"].to_dict() == {"x": 1.5, "y": 1.5}
    assert summary["std"]["x"] == pytest.approx(np.std([5.0, 6.0], ddof=1))
    last = (table["task"] == table["task"].iloc[-1]) & (table["seed"] == table["seed"].max())
    assert over_tasks(table[~last])["std"].isna().all()  # one seed is left that has every task
    assert np.isnan(cells(table[table["seed"] == 0])["a", "x"].std)


def test_only_what_every_method_finished_is_compared() -> None:
    table = frame({("a", "x", 0): 1.0, ("a", "y", 0): 2.0, ("a", "x", 1): 9.0, ("b", "x", 0): 7.0})
    part = complete(table, ["x", "y"], ["a", "b"], 100)
    assert sorted(part["score"]) == [1.0, 2.0]


def test_the_bootstrap_pairs_runs() -> None:
    random = np.random.default_rng(0)
    noise = {(task, seed): 20 * random.standard_normal() for task, seed in itertools.product("abcdef", range(5))}
    values = {(t, "x", s): n for (t, s), n in noise.items()}
    values |= {(t, "y", s): n + 1.0 + 0.1 * random.standard_normal() for (t, s), n in noise.items()}
    found = paired_bootstrap(frame(values), "y", "x")
    assert found.difference == pytest.approx(1.0, abs=0.1)
    assert 0.8 < found.low < found.difference < found.high < 1.2
    assert found.better == 1.0
    same = paired_bootstrap(frame({key: value for key, value in values.items() if key[1] == "x"}), "x", "x")
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)


def test_a_task_that_is_drawn_twice_draws_its_seeds_twice() -> None:
    values = {(t, "y", s): d for t, (s, d) in itertools.product("abcdef", enumerate((-2.0, 0.0, 2.0)))}
    found = paired_bootstrap(frame(values | {(t, "x", s): 0.0 for t, _, s in values}), "y", "x")
    expected = 1.96 * math.sqrt(8 / 3 / 18)  # the deviation of the mean of 18 independent draws of -2, 0, 2
    assert found.high == pytest.approx(expected, rel=0.1)
    assert found.low == pytest.approx(-expected, rel=0.1)


def test_the_best_single_method_is_no_combination(grid: Grid) -> None:
    table = score_table(grid.results(finish(grid)))
    assert best_single(complete(table, grid.methods, grid.tasks, 100)) == "bottleneck"


def test_the_report_says_what_is_there(grid: Grid, tmp_path: Path) -> None:
    records = finish(grid)
    text = markdown(grid, records)
    assert "### 100 training examples" in text
    assert "| pelton | 71.0 ± 1.0 | 71.0 ± 1.0 | **71.00** ± 1.00 | 1.0 | 71.00 | 10 | 1.00× |" in text
    assert "pelton − bottleneck, the best single method, is +15.00 points" in text
    assert "pelton − full is +10.00 points" in text
    few = [r for r in records if (r["task"], r["method"]) != ("rte", "lora")]
    assert "Not finished with every method, and so not in the means: rte." in markdown(grid, few)
    assert markdown(grid, []).startswith("No method has a result yet")
    paths = write(grid, records, tmp_path)
    assert [path.name for path in paths] == ["bench.md", "bench.csv", "bench-bars.png", "bench-curves.png"]
    assert len(pd.read_csv(tmp_path / "bench.csv")) == len(grid.results(records))


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone, and CoLA's layout with sentences that it can learn."""
    folder = tmp_path_factory.mktemp("bench")
    save_backbone(folder / "backbone")
    rows = [{"sentence": row["text"], "label": int(row["label"] == "warm")} for row in sentences(260)]
    (folder / "data" / "cola").mkdir(parents=True)
    write_jsonl(folder / "data" / "cola" / "train.jsonl", rows)
    write_jsonl(folder / "data" / "cola" / "validation.jsonl", rows[:24])
    return folder


def test_an_interrupted_benchmark_goes_on_where_it_stopped(place: Path, tmp_path: Path) -> None:
    grid = Grid(
        Protocol(str(place / "data"), str(place / "backbone"), fixed_steps=5), ["cola"], [8], ["head", "pelton"], [0, 1]
    )
    journal, told = Journal(tmp_path / "bench.jsonl"), list[str]()
    assert work(grid, journal, told.append, limit=1).trained == 1
    first = journal.records()[0]
    assert work(grid, journal, told.append).trained == 5
    assert journal.records()[0] == first
    assert progress(grid, journal.records()) == (6, 6)
    assert work(grid, journal, told.append).trained == 0
    assert len(told) == 6
    head, pelton = (next(r for r in journal.records() if r["method"] == name) for name in ("head", "pelton"))
    assert head["trainable"] < pelton["trainable"]
    assert set(pelton["metrics"]) >= {"matthews", "accuracy"}
    assert pelton["test"] == pelton["metrics"]["matthews"]


def test_a_run_that_fails_stops_no_other(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.jsonl"
    options = ["--data", str(place / "data"), "--backbone", str(place / "backbone"), "--tasks", "cola", "--steps", "5"]
    options += ["--examples", "8,5000", "--methods", "head", "--seeds", "1", "--out", str(out)]
    assert run(["bench", *options]) == 1
    said = capsys.readouterr()
    assert [json.loads(line)["examples"] for line in out.read_text().splitlines()] == [8, 8]
    assert "### 8 training examples" in said.out
    assert "cola 5000 head 0.001 seed 0 failed: " in said.err
    assert "2 runs could not be trained: " in said.err
    assert "The same command tries again." in said.err


def test_from_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.jsonl"
    options = ["--data", str(place / "data"), "--backbone", str(place / "backbone"), "--tasks", "cola"]
    options += ["--steps", "7", "--examples", "8", "--methods", "lora", "--seeds", "1", "--out", str(out)]
    assert run(["bench", *options, "--limit", "1"]) == 0
    said = capsys.readouterr()
    assert "[1/2] cola 8 lora" in said.err
    assert "No method has a result yet" in said.out
    assert json.loads(out.read_text())["method"] == "lora"
    assert run(["bench", *options]) == 0
    assert "### 8 training examples" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 2
    assert run(["bench", "--methods", "lorra", "--limit", "0"]) == 2
    assert "Did you mean 'lora'?" in capsys.readouterr().err
    assert run(["bench", "--examples", "many"]) == 2
    assert run(["bench", "--tasks", "conll2003", "--out", str(tmp_path / "new.jsonl")]) == 2
    assert "conll2003 cannot be had without a folder" in capsys.readouterr().err
    capsys.readouterr()
    assert run(["bench", "--data", str(place / "data"), "--tasks", "cola,rte", "--methods", "lora"]) == 2
    assert "has no folder 'rte' with that task's train and test files (folders: cola)" in capsys.readouterr().err
