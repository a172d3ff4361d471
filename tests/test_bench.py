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
import torch
from transformers import TrainerState

from pelton.bench import protocol as protocols
from pelton.bench.grid import Grid
from pelton.bench.journal import Journal
from pelton.bench.protocol import EQUAL, METHODS, TASKS, Cell, Protocol
from pelton.bench.report import markdown, write
from pelton.bench.sentences import compared
from pelton.bench.statistics import best_single, cells, compare, complete, over_tasks, score_table
from pelton.bench.summary import summarise
from pelton.bench.worker import progress, work
from pelton.cli.main import run
from pelton.errors import DataError, PeltonError, TrainingError
from pelton.training.folder import RunFolder
from pelton.training.trainer import GatedTrainer
from tiny import save_backbone, sentences, write_jsonl

SCORES = {"full": 0.6, "lora": 0.5, "bottleneck": 0.55, "pelton": 0.7}


def record(grid: Grid, cell: Cell, test: float, validation: float | None = None) -> dict[str, Any]:
    values = {"validation": test if validation is None else validation, "test": test, "trainable": 10}
    names = {"task": cell.task, "examples": cell.examples, "method": cell.method, "rate": cell.rate, "seed": cell.seed}
    return {**names, **values, "train_seconds": 2.0, "fingerprint": grid.key(cell)}


def diverge(grid: Grid, cell: Cell) -> dict[str, Any]:
    lost = {"validation": None, "test": None, "failed": "the loss is nan"}
    return {key: value for key, value in (record(grid, cell, 0.0) | lost).items() if key != "train_seconds"}


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


def test_a_rate_that_diverged_is_never_chosen_and_holds_nothing_up() -> None:
    grid = Grid(Protocol("data"), ["cola", "rte"], [100], ["full", "lora"], range(2))
    records = finish(grid)
    first = grid.protocol.rates("full")[0]
    bad = Cell("cola", 100, "full", first, 0)
    broken = [diverge(grid, bad) if grid.key(bad) == r["fingerprint"] else r for r in records]
    assert grid.chosen(bad, grid.finished(broken)) == grid.protocol.rates("full")[1]
    later = Cell("cola", 100, "full", grid.protocol.rates("full")[1], 1)
    assert list(grid.open(broken)) == [later]
    whole = [*broken, record(grid, later, 0.4)]
    assert progress(grid, whole) == (len(whole), len(whole))
    assert "**55.25** " in markdown(grid, whole)
    assert "Diverged" not in markdown(grid, whole)
    lost = markdown(grid, [*broken, diverge(grid, later)])
    assert "Diverged at the chosen learning rate: full on cola at 100 examples, seed 1." in lost
    assert "Means over 2 tasks, 2 seeds (0, 1); cola has only seed 0." in lost
    assert "60.0 (1 seed)" in lost


def test_a_method_of_which_every_rate_diverged_is_named() -> None:
    grid = Grid(Protocol("data"), ["cola", "rte"], [100], ["full", "lora"], range(2))
    records = [
        diverge(grid, c) if (c.task, c.method) == ("rte", "full") else record(grid, c, 0.5) for c in grid.open([])
    ]
    records += [record(grid, cell, 0.5) for cell in grid.open(records)]
    assert progress(grid, records) == (len(records), len(records))
    text = markdown(grid, records)
    assert "Not finished with every method, and so not in the means: rte." in text
    assert "Diverged at every learning rate, and so without a result: full on rte at 100 examples." in text


def test_a_validation_score_that_is_no_number_is_the_worst() -> None:
    grid = Grid(Protocol("data"), ["cola"], [100], ["lora"], [0])
    first, second = grid.protocol.rates("lora")
    cells_ = [Cell("cola", 100, "lora", rate, 0) for rate in (first, second)]
    records = [record(grid, cells_[0], 0.5, math.nan), record(grid, cells_[1], 0.5, 0.1)]
    assert grid.chosen(cells_[0], grid.finished(records)) == second


def test_what_is_named_twice_counts_once() -> None:
    grid = Grid(Protocol("data"), ["cola", "cola"], [100, 100], ["lora", "full", "lora"], [0, 0])
    assert (grid.tasks, grid.examples, grid.methods, grid.seeds) == (["cola"], [100], ["lora", "full"], [0])


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
    with pytest.raises(DataError, match=r"line 2: expected a JSON object .* A line that a crash cut off can be rem"):
        Journal(path).records()


def test_the_beginning_of_a_line_that_a_crash_left_costs_no_other_line(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    journal = Journal(path)
    journal.append({"number": 1})
    with path.open("a") as file:
        file.write('{"number": 2, "te')
    assert journal.records() == [{"number": 1}]
    journal.append({"number": 3})
    assert journal.records() == [{"number": 1}, {"number": 3}]
    path.write_text('{"number": 1}')  # an editor's last line, whole
    assert journal.records() == [{"number": 1}]
    journal.append({"number": 2})
    assert path.read_text() == '{"number": 1}\n{"number": 2}\n'
    path.write_text("somebody's notes")
    journal.append({"number": 2})
    assert path.read_text().startswith("somebody's notes\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]\n", "line 1: expected a JSON object with fingerprint, but got '\\[\\]'"),
        (b'\n{"fingerprint": "a"}\n{}\n', "line 3: expected a JSON object with fingerprint, but got '{}'"),
        (b'{"benchmark": "overhead"}', "line 1: expected a JSON object with fingerprint"),
        (b"\xff\xfe\x00", "line 1: expected a JSON object .*utf-8"),
        (b"notes", "line 1: expected a JSON object"),
    ],
)
def test_a_file_of_something_else_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        Journal(path, needs=["fingerprint"]).records()


def test_empty_lines_and_lines_of_something_else_are_passed_over(grid: Grid, tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_text('\n{"a": 1}\n\n')
    assert Journal(path).records() == [{"a": 1}]
    assert grid.finished(Journal(path).records()) == {}


def test_a_place_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "bench.jsonl"):
        with pytest.raises(DataError, match=r"cannot be written .* Name another file"):
            Journal(path).require_writable()


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
    found = compare(frame(values), "y", "x")
    assert found.difference == pytest.approx(1.0, abs=0.1)
    assert 0.8 < found.low < found.difference < found.high < 1.2
    assert found.better == 1.0
    same = compare(frame({key: value for key, value in values.items() if key[1] == "x"}), "x", "x")
    assert (same.difference, same.low, same.high, same.better) == (0.0, 0.0, 0.0, 0.5)


def test_a_task_that_is_drawn_twice_draws_its_seeds_twice() -> None:
    values = {(t, "y", s): d for t, (s, d) in itertools.product("abcdef", enumerate((-2.0, 0.0, 2.0)))}
    found = compare(frame(values | {(t, "x", s): 0.0 for t, _, s in values}), "y", "x")
    expected = 1.96 * math.sqrt(8 / 3 / 18)  # the deviation of the mean of 18 independent draws of -2, 0, 2
    assert found.high == pytest.approx(expected, rel=0.1)
    assert found.low == pytest.approx(-expected, rel=0.1)


def test_one_task_s_interval_is_student_s_and_one_run_has_none() -> None:
    values = {("a", "y", s): d for s, d in enumerate((1.0, 2.0, 3.0))} | {("a", "x", s): 0.0 for s in range(3)}
    found = compare(frame(values), "y", "x")
    half = 4.302653 / math.sqrt(3)  # t of two degrees of freedom, at a deviation of 1
    assert (found.low, found.high) == pytest.approx((2.0 - half, 2.0 + half))
    assert compared(found) == "y − x, the best single method, is +2.00 points (95 % interval -0.48 to +4.48, "\
        "Student's t of 3 seeds)."  # fmt: skip
    one = compare(frame({key: value for key, value in values.items() if key[2] == 0}), "y", "x")
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert compared(one).endswith("is +1.00 points (one run: no interval).")


def test_ties_are_ties_whatever_the_order_of_adding() -> None:
    scores = (50.903, 51.264, 55.596)
    values = {("rte", "x", s): v for s, v in enumerate(scores)}
    values |= {("rte", "y", s): scores[s - 1] for s in range(3)}
    assert over_tasks(frame(values))["rank"].to_dict() == {"x": 1.5, "y": 1.5}


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
    names = ["bench.md", "bench.csv", "bench-summary.csv", "bench-bars.png", "bench-curves.png"]
    assert [path.name for path in paths] == names
    rows = pd.read_csv(tmp_path / "bench.csv")
    assert len(rows) == len(grid.results(records))
    assert set(rows["rate"]) == {grid.protocol.rates(method)[0] for method in SCORES}  # 5e-5 is no 0.000


def test_costs_are_of_what_every_method_has() -> None:
    grid = Grid(Protocol("data"), ["cola", "banking77"], [100], ["full", "lora"], [0])
    seconds = {("cola", "full"): 10.0, ("cola", "lora"): 5.0, ("banking77", "full"): 10.0}
    records = [
        record(grid, c, 0.5) | {"train_seconds": seconds[c.task, c.method], "trainable": 7 if c.task == "cola" else 9}
        for c in grid.open([])
        if (c.task, c.method) in seconds
    ]
    text = markdown(grid, records)
    assert "| full | 50.0 | 50.0 | **50.00** | 1.5 | 7 | 1.00× |" in text
    assert "| lora | 50.0 | – | **50.00** | 1.5 | 7 | 0.50× |" in text
    alone = [r for r in records if r["method"] == "full"]
    assert "| full | 50.0 | 50.0 | – | – | – | – |" in markdown(grid, alone)
    assert "| 7 | – |" in markdown(grid, [r | {"train_seconds": 0.0} for r in records])


def test_the_report_says_what_is_missing(grid: Grid) -> None:
    records = finish(grid)
    gone = [r for r in records if r["examples"] == 100 and not (r["task"] == "rte" and r["seed"] == 2)]
    text = markdown(grid, gone)
    assert "70.5 ± 0.7 (2 seeds)" in text
    assert "Means over 2 tasks, 3 seeds (0, 1, 2); rte has only seeds 0, 1." in text
    assert "No result yet at 500 training examples." in text
    assert "| GLUE (2 of 9) |" in text
    assert "GLUE" not in markdown(grid, [r for r in records if r["task"] == "cola"])


def test_a_journal_of_other_settings_is_said_to_be_one(grid: Grid) -> None:
    other = Protocol("data", precision="bf16")
    theirs = [r | {"protocol": other.describe()} for r in finish(Grid(other, ["cola"], [100], ["lora"], [0]))]
    assert markdown(grid, theirs) == (
        "No method has a result yet: the journal's 2 runs are of other settings, such as precision bf16 (here fp32)."
    )
    ours = finish(Grid(Protocol("data"), ["sst2"], [100], ["lora"], [0]))
    assert "none of the journal's 2 runs is of these tasks" in markdown(grid, ours)


def test_a_summary_has_a_row_a_cell_and_the_means(grid: Grid, tmp_path: Path) -> None:
    records = [r for r in finish(grid) if r["examples"] == 100 and not (r["task"] == "rte" and r["seed"] == 2)]
    records = [r for r in records if (r["task"], r["method"], r["seed"]) != ("rte", "full", 1)]
    write(grid, records, tmp_path)
    table = pd.read_csv(tmp_path / "bench-summary.csv").set_index(["task", "method"])
    assert len(table) == 3 * len(SCORES)
    lora = table.loc["cola", "lora"]
    assert (lora["mean"], lora["std"], lora["seeds"]) == pytest.approx((51.0, 1.0, 3))
    assert (lora["rank"], lora["time_ratio"], lora["trainable"], lora["lead"]) == pytest.approx((4, 1, 10, 20))
    assert (lora["low"], lora["high"]) == pytest.approx((20.0, 20.0))
    assert table.loc[("rte", "full"), "seeds"] == 1
    assert np.isnan(table.loc[("rte", "lora"), "low"])  # full has one seed of it
    mean = table.loc["mean", "lora"]
    assert (mean["mean"], mean["seeds"], mean["rank"]) == pytest.approx((50.5, 1, 4))
    assert np.isnan(table.loc[("mean", "pelton"), "lead"])


def test_pictures_of_a_part_and_below_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(Protocol("data"), ["cola", "rte"], [100, 500], ["full", "lora"], [0])
    cells_ = [c for c in grid.open([]) if (c.task, c.examples) in (("cola", 100), ("rte", 500))]
    paths = write(grid, [record(grid, c, -0.03) for c in cells_], tmp_path)
    assert [path.name for path in paths[3:]] == ["bench-bars.png"]
    seen = []
    monkeypatch.setattr("pelton.bench.plots._save", lambda figure, path: seen.append(figure.axes[0]) or path)
    write(grid, [record(grid, c, {"full": -0.5, "lora": 0.2}[c.method]) for c in cells_], tmp_path)
    assert seen[0].get_xlim()[0] == -60.0
    assert seen[0].get_xlim()[1] > 20.0
    assert seen[0].get_xlabel() == "mean score over 1 task, 500 examples"


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


def test_a_training_that_diverges_is_a_result(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At this rate the weights stay finite, and the outputs on validation rows do not."""
    monkeypatch.setitem(protocols.METHODS, "full", protocols.Method(None, (5e-5, 1e4), single=False))
    protocol = Protocol(str(place / "data"), str(place / "backbone"), fixed_steps=10)
    grid = Grid(protocol, ["cola"], [8], ["full"], range(2))
    journal, told = Journal(tmp_path / "bench.jsonl"), list[str]()
    found = work(grid, journal, told.append)
    assert (found.trained, found.failed) == (3, {})
    lost = next(line for line in journal.records() if line["rate"] == 1e4)
    assert lost["validation"] is None
    assert "no numbers" in lost["failed"]
    assert told[1] == f"cola 8 full 10000 seed 0 has no score: {lost['failed']}"
    assert progress(grid, journal.records()) == (3, 3)
    assert len(summarise(journal.records())) == 2
    assert "Means over 1 task, 2 seeds (0, 1)." in markdown(grid, journal.records())


@pytest.mark.parametrize("outcome", [math.nan, ValueError("Input contains NaN."), ValueError("a mistake")])
def test_outputs_that_are_no_numbers_stop_an_evaluation(outcome: float | ValueError, tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, bad: bool) -> dict[str, torch.Tensor]:
            return {"logits": torch.tensor([math.nan if bad else -math.inf])}

    trainer = GatedTrainer.__new__(GatedTrainer)
    trainer.model, trainer.folder = Model(), RunFolder(tmp_path)
    trainer.state = TrainerState()

    def judge(bad: bool) -> dict[str, float]:
        trainer.model(bad)
        if isinstance(outcome, ValueError):
            raise outcome
        return {"auroc": outcome, "loss": 1.0}

    with pytest.raises(TrainingError, match="outputs on the validation rows are no numbers"):
        trainer._judged(lambda: judge(bad=True))
    with pytest.raises(TrainingError, match="no numbers"):
        trainer._judged(lambda: {"loss": math.inf})
    assert math.isnan(trainer._judged(lambda: {"loss": math.nan})["loss"])  # rows may lack what it needs
    if isinstance(outcome, ValueError):
        with pytest.raises(ValueError, match=str(outcome)):
            trainer._judged(lambda: judge(bad=False))
    else:  # an area under a curve may not exist
        assert trainer._judged(lambda: judge(bad=False))["loss"] == 1.0
    assert not trainer.model._forward_hooks


def test_a_run_without_memory_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(Protocol(None), ["cola"], [100], ["full", "lora"], [0])

    def train(grid: Grid, cell: Cell) -> dict[str, Any]:
        if cell.method == "full":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation.")
        return record(grid, cell, 0.5) | {"seconds": 1.0}

    monkeypatch.setattr("pelton.bench.worker.train", train)
    journal, told = Journal(tmp_path / "bench.jsonl"), list[str]()
    found = work(grid, journal, told.append)
    assert found.trained == 2
    assert set(found.failed.values()) == {"CUDA out of memory. Tried to allocate 2 GiB."}
    assert [line["method"] for line in journal.records()] == ["lora", "lora"]

    def mistaken(grid: Grid, cell: Cell) -> dict[str, Any]:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("pelton.bench.worker.train", mistaken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        work(grid, journal, told.append)


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
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    assert run(["bench", *options, "--report", str(tmp_path / "file")]) == 2
    assert "is no folder and cannot become one" in capsys.readouterr().err
    assert run(["bench", *options, "--out", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert run(["bench", *options, "--out", str(tmp_path / "none.jsonl"), "--limit", "0"]) == 0
    assert "none.jsonl is no file yet: no run is finished." in capsys.readouterr().err
    assert not (tmp_path / "none.jsonl").exists()
    twice = ["--methods", "lora,lora", "--tasks", "cola,cola", "--examples", "8,8"]
    assert run(["bench", *options, *twice]) == 0
    assert capsys.readouterr().out.count("| lora |") == 1
    assert run(["bench", "--tasks", "conll2003", "--out", str(tmp_path / "new.jsonl")]) == 2
    assert "conll2003 cannot be had without a folder" in capsys.readouterr().err
    capsys.readouterr()
    assert run(["bench", "--data", str(place / "data"), "--tasks", "cola,rte", "--methods", "lora"]) == 2
    assert "has no folder 'rte' with that task's train and test files (folders: cola)" in capsys.readouterr().err
