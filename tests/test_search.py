"""Studies: what they search, how trials are counted, killed, stopped and judged."""

from __future__ import annotations

import json
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
import yaml
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from cheap import KEY, Cheap, cheap_plan, ended, kill, start, value_of
from fits import GATED, Make
from pelton.cli.main import run as pelton
from pelton.cli.search import duration
from pelton.errors import PeltonError, StudyError
from pelton.search import patient, worker
from pelton.search.census import REASON, RETRIES, Census
from pelton.search.final import confirm
from pelton.search.patient import StorageAway
from pelton.search.plan import Budget, StudyPlan
from pelton.search.report import markdown, trial_table, write_report
from pelton.search.space import Choices, Range, Space, load_space, parse_space
from pelton.search.storage import Storage
from pelton.search.study import Study
from pelton.search.trial import Training
from pelton.search.variant import variant
from pelton.training.fit import fit
from pelton.training.loading import dump_recipe, load_recipe
from pelton.training.run import Run
from tiny import save_data

# The space


def test_a_space_is_read_and_written(tmp_path: Path) -> None:
    values = {
        "a.b": {"low": 1, "high": 8, "log": True},
        "c": {"low": 0.0, "high": 1.0},
        "d": {"choices": ["x", None]},
        "e": {"choices": [["q"], ["q", "v"]]},
        "f": 3,
        "g": {"other": 1},
    }
    space = parse_space(values, "test")
    assert space.searched == {
        "a.b": Range(1, 8, log=True),
        "c": Range(0.0, 1.0),
        "d": Choices(("x", None)),
        "e": Choices((["q"], ["q", "v"])),
    }
    assert space.fixed == {"f": 3, "g": {"other": 1}}
    assert parse_space(space.written(), "test") == space
    path = tmp_path / "space.yaml"
    path.write_text("default: false\ntraining.seed: 3\n")
    assert load_space(path) == (Space({}, {"training.seed": 3}), False)


def test_a_trial_draws_every_kind_of_value() -> None:
    space = parse_space({"a": {"low": 1, "high": 3}, "b": {"choices": [["q"], ["v"]]}, "c": 7}, "test")
    trial = optuna.trial.FixedTrial({"a": 2, "b": '["v"]'})
    assert space.suggest(trial) == {"c": 7, "a": 2, "b": ["v"]}  # type: ignore[arg-type]
    assert space.values({"a": 2, "b": '["v"]'}) == {"c": 7, "a": 2, "b": ["v"]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"low": 1}, "expected numbers as in"),
        ({"low": 0.1, "high": float("inf")}, "expected numbers as in"),
        ({"low": 2, "high": 1}, "`low < high` must hold, but got (low=2, high=1)"),
        ({"low": 0, "high": 1, "log": True}, "`low > 0` must hold where log is true"),
        ({"low": 1, "high": 2, "logg": True}, "has a key 'logg'. Did you mean 'log'?"),
        ({"choices": []}, "expected {choices: [a, b, …]}"),
        ({"low": "1e-4", "high": 1}, "expected numbers as in"),
    ],
)
def test_a_range_that_is_none(value: Any, message: str) -> None:
    with pytest.raises(StudyError, match=r"test: key") as error:
        parse_space({"key": value}, "test")
    assert message in str(error.value)


def test_the_default_space_is_what_the_recipe_has(make: Make) -> None:
    plan = StudyPlan.of(make(max_steps=6))
    assert set(plan.space.searched) == {
        "adapter.gate.temperature",
        "adapter.gate.init_std",
        "adapter.gate.entropy",
        "training.gate_warmup_steps",
        "training.gate_learning_rate",
        "adapter.methods.lora.rank",
        "adapter.methods.bottleneck.bottleneck_size",
        "adapter.methods.lora.dropout",
        "adapter.methods.bottleneck.dropout",
        "training.learning_rate",
        "training.head_learning_rate",
    }
    assert plan.space.searched["training.gate_warmup_steps"] == Range(0, 6)
    assert "adapter.methods.prefix.prefix_length is not searched: the adapter has no prefix." in plan.space.notes
    prefix = StudyPlan.of(make({"preset": "prefix"}))
    assert "adapter.methods.prefix.prefix_length" in prefix.space.searched
    assert "adapter.gate.temperature is not searched: a fixed gate learns nothing." in prefix.space.notes
    sigmoid = {**GATED, "gate": {"kind": "mlp", "activation": "sigmoid"}}
    assert "adapter.gate.l1" in StudyPlan.of(make(sigmoid)).space.searched
    assert list(StudyPlan.of(make(None)).space.searched) == [
        "training.head_learning_rate",
        "training.backbone_learning_rate",
    ]


def test_a_space_goes_over_the_default_one(make: Make) -> None:
    mine = parse_space({"training.learning_rate": 1e-3, "adapter.methods.0.rank": {"low": 1, "high": 4}}, "test")
    plan = StudyPlan.of(make(), mine)
    assert plan.space.fixed == {"training.learning_rate": 1e-3}
    assert "training.learning_rate" not in plan.space.searched
    assert plan.space.searched["adapter.methods.0.rank"] == Range(1, 4)
    whole = parse_space({"adapter.methods.lora.dropout": {"low": 0, "high": 0.5}}, "test")
    assert list(StudyPlan.of(make(), whole, usual=False).space.searched) == ["adapter.methods.lora.dropout"]
    ends = parse_space({"adapter.gate.temperature": {"low": 1, "high": 2}}, "test")
    assert not StudyPlan.of(make(), ends, usual=False).space.searched["adapter.gate.temperature"].whole  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training.learnin_rate": 1e-3}, "Did you mean 'training.learning_rate'?"),
        ({"adapter.gate.temprature": {"low": 1.0, "high": 2.0}}, "Did you mean 'temperature'?"),
        ({"adapter.methods.lroa.rank": 4}, "the adapter has no 'lroa'. Did you mean 'lora'?"),
        ({"adapter.methods.prefix.prefix_length": 4}, "the adapter has no 'prefix'"),
        ({"adapter.methods.lora.rank": {"low": 0, "high": 4}}, "`rank > 0` must hold"),
        ({"adapter.methods.lora.rank": {"low": 1.5, "high": 4.0}}, "rank is a whole number"),
        ({"training.batch_size": {"choices": [4, 0]}}, "greater than or equal to 1"),
    ],
)
def test_a_key_or_value_that_cannot_be_trained(make: Make, values: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match="Space, key") as error:
        StudyPlan.of(make(), parse_space(values, "test"))
    assert message in str(error.value)


def test_what_a_plan_refuses(make: Make, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"has no validation rows.*task\.validation_fraction=0\.1"):
        StudyPlan.of(make(task={"data": str(save_data(tmp_path / "bare", validation=0)), "validation_fraction": 0.0}))
    with pytest.raises(StudyError, match=r"leaves nothing for methods: the head alone trains 34 parameters"):
        StudyPlan.of(make(), budget=Budget(params=34))
    with pytest.raises(StudyError, match=r"`budget_latency > 1` must hold, but got 1"):
        Budget(latency=1.0)
    with pytest.raises(StudyError, match="nothing to search"):
        StudyPlan.of(make(), Space({}), usual=False)
    with pytest.raises(PeltonError, match="Did you mean 'latency'"):
        cheap_plan(objectives=("quality", "latncy"))
    with pytest.raises(StudyError, match="named once each"):
        cheap_plan(objectives=("quality", "quality"))


# Counting


def _tries(*states: tuple[int, list[int], TrialState, dict[str, Any]]) -> Census:
    found: list[FrozenTrial] = []
    for number, history, state, attrs in states:
        system = {"failed_trial": history[0], "retry_history": history} if history else {}
        value = 1.0 if state == TrialState.COMPLETE else None
        trial = create_trial(state=state, value=value, user_attrs=attrs, system_attrs=system)
        trial.number = number
        found.append(trial)
    return Census.of(found)


def test_a_trial_and_its_retries_are_one() -> None:
    census = _tries(
        (0, [], TrialState.FAIL, {}),
        (1, [], TrialState.COMPLETE, {}),
        (2, [0], TrialState.FAIL, {}),
        (3, [0, 2], TrialState.COMPLETE, {}),
        (4, [0, 2], TrialState.WAITING, {}),  # another worker's retry of the same trial
    )
    assert [(one.root, one.state, len(one.tries)) for one in census.lineages] == [
        (0, "finished", 3),
        (1, "finished", 1),
    ]
    assert census.valid == {0, 1, 2, 3}


def test_what_lost_its_worker_is_tried_again_and_what_failed_is_not() -> None:
    census = _tries(
        (0, [], TrialState.FAIL, {}),
        (1, [], TrialState.FAIL, {REASON: "the loss is nan"}),
        (2, [], TrialState.PRUNED, {}),
        (3, [], TrialState.FAIL, {"surplus": True}),
    )
    assert [one.state for one in census.lineages] == ["lost", "failed", "stopped"]
    history: list[int] = []
    dying = []
    for number in range(RETRIES + 1):
        dying.append((number, list(history), TrialState.FAIL, {}))
        history.append(number)
    last = _tries(*dying).lineages[0]
    assert (last.state, last.reason) == ("failed", f"its worker died {RETRIES + 1} times")


def test_a_study_has_as_many_trials_as_were_asked_for(tmp_path: Path) -> None:
    study = Study.start(tmp_path / "study", cheap_plan())
    study.run(6, objective=Cheap(0.0))
    assert [one.state for one in study.trials()] == ["finished"] * 4 + ["stopped"] + ["finished"]
    study.run(6, objective=Cheap(0.0))
    assert len(study.trials()) == 6
    Study.open(tmp_path / "study").run(8, objective=Cheap(0.0))
    assert len(study.trials()) == 8
    assert Study.open(tmp_path / "study").wanted == 8
    best = study.best()[0]
    assert best.last.values == [max(one.last.values[0] for one in study.trials() if one.state == "finished")]
    study.run(seconds=0.0, objective=Cheap(0.0))
    assert len(study.trials()) == 8


def test_a_trial_too_many_ends_at_once(tmp_path: Path) -> None:
    study = Study.start(tmp_path / "study", cheap_plan())
    study.run(2, objective=Cheap(0.0))
    with study.as_optuna() as trials:
        one_too_many = trials.ask()
    told: list[Any] = []
    storage = study._storage()
    try:
        with worker.quiet_optuna():
            worker.Worker(study._load(storage), storage, Cheap(0.0), told.append).attempt(2)
    finally:
        storage.close()
    assert [one.root for one in study.trials()] == [0, 1, one_too_many.number]
    assert told == []


# Being killed


def test_a_killed_study_goes_on_and_loses_nothing(tmp_path: Path) -> None:
    """Killed at random moments, inside transactions too: what was finished stays, what was running is tried again."""
    study = Study.start(tmp_path / "study", cheap_plan())
    log = tmp_path / "log"
    log.touch()
    before: dict[int, Any] = {}
    chance = random.Random(0)
    for _ in range(4):
        begun = len(log.read_text().splitlines())
        process = start(str(study.folder), 40, Cheap(0.1, str(log)))
        until = begun + chance.randint(1, 3)
        while len(log.read_text().splitlines()) < until:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.3)
        kill(process)
        now = ended(study)
        assert {number: now.get(number) for number in before} == before
        before = now
    process = start(str(study.folder), 40, Cheap(0.0, str(log)))
    process.join()
    assert process.exitcode == 0
    trials = study.trials()
    assert len(trials) == 40
    assert {one.state for one in trials} == {"finished", "stopped"}
    assert {number: ended(study)[number] for number in before} == before
    for one in trials:  # a try again has the values of the first
        assert all(try_.params.get(KEY, one.last.params[KEY]) == one.last.params[KEY] for try_ in one.tries)
    assert list((study.folder / "workers").iterdir()) == []


def test_a_trial_whose_worker_is_alive_is_left_alone(tmp_path: Path) -> None:
    study = Study.start(tmp_path / "study", cheap_plan())
    with study._connected() as (trials, mine), study._connected() as (_, other):
        trial = trials.ask()
        with mine.claim(trial):
            other.fail_dead(trials)
            assert trials.trials[0].state == TrialState.RUNNING
        mine.close()
        other.fail_dead(trials)
        assert trials.trials[0].state == TrialState.FAIL


def test_a_worker_taken_for_dead_does_not_count_twice(tmp_path: Path) -> None:
    study = Study.start(tmp_path / "study", cheap_plan())

    def outlived(trial: optuna.Trial, place: int) -> list[float]:
        trial.suggest_float(KEY, 1e-4, 1e-2, log=True)
        if trial.number == 0:
            trial.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return [float(trial.number)]

    study.run(2, objective=outlived)
    assert [(one.root, one.last.values) for one in study.trials()] == [(0, [1.0]), (1, None)] or [
        (one.root, one.last.values) for one in study.trials()
    ] == [(0, [1.0]), (2, [2.0])]


def test_ctrl_c_leaves_a_trial_that_is_tried_again(tmp_path: Path) -> None:
    study = Study.start(tmp_path / "study", cheap_plan())
    seen = []

    def interrupted(trial: optuna.Trial, place: int) -> list[float]:
        seen.append(trial.suggest_float(KEY, 1e-4, 1e-2, log=True))
        if len(seen) == 1:
            raise KeyboardInterrupt
        return [value_of(seen[-1])]

    with pytest.raises(KeyboardInterrupt):
        study.run(2, objective=interrupted)
    study.run(2, objective=interrupted)
    assert seen[0] == seen[1]
    assert [len(one.tries) for one in study.trials()] == [2, 1]


def test_a_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is killed between the end of its run and that of its trial leaves its result in a folder."""
    study = Study.start(tmp_path / "study", cheap_plan())
    training = Training(study.plan, study.folder / "trials")
    found = {"quality": 0.5, "parameters": 3}
    trained = []

    def die(self: Training, trial: optuna.Trial, values: dict[str, Any], root: int) -> dict[str, Any]:
        trained.append(root)
        folder = study.folder / "trials" / f"trial-{root:04d}-now"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"values": values, "found": found}))
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_train", die)
    with pytest.raises(KeyboardInterrupt):
        study.run(1, objective=training)
    study.run(1, objective=training)
    assert trained == [0]
    assert study.trials()[0].last.values == [0.5]


# Bad input


def test_another_study_of_the_same_name(tmp_path: Path) -> None:
    Study.start(tmp_path / "study", cheap_plan())
    Study.start(tmp_path / "study", cheap_plan())
    other = StudyPlan(cheap_plan().recipe, Space({KEY: Range(1e-5, 1e-2, log=True)}))
    with pytest.raises(StudyError, match=rf"another one: space\.{KEY}\.low: 0\.0001 → 1e-05"):
        Study.start(tmp_path / "study", other)
    with pytest.raises(StudyError, match=r"objectives: \['quality'\] → \['quality', 'parameters'\]"):
        Study.start(tmp_path / "study", cheap_plan(objectives=("quality", "parameters")))
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    Study.start(tmp_path / "one", cheap_plan(), name="shared", storage=url)
    with pytest.raises(StudyError, match=r"another one: objectives.*another --name"):
        Study.start(tmp_path / "two", cheap_plan(objectives=("parameters",)), name="shared", storage=url)


def test_values_that_are_no_numbers_fail_a_trial_and_not_the_study(tmp_path: Path) -> None:
    study = Study.start(tmp_path / "study", cheap_plan())

    def sometimes(trial: optuna.Trial, place: int) -> list[float]:
        x = trial.suggest_float(KEY, 1e-4, 1e-2, log=True)
        if place == 1:
            raise ValueError("two\nlines")
        return [float("nan") if place == 0 else value_of(x)]

    study.run(3, objective=sometimes)
    states = [(one.state, one.reason) for one in study.trials()]
    assert states == [
        ("failed", "its values are no numbers: nan"),
        ("failed", "ValueError: two lines"),
        ("finished", ""),
    ]
    table = trial_table(study)
    assert list(table["state"]) == ["failed", "failed", "finished"]
    assert "its values are no numbers" in markdown(table)


def test_a_study_that_only_fails_ends_early(tmp_path: Path) -> None:
    study = Study.start(tmp_path / "study", cheap_plan())

    def never(trial: optuna.Trial, place: int) -> list[float]:
        raise ValueError("no luck")

    with pytest.raises(StudyError, match=r"5 trials of the study failed.*ValueError: no luck\. Change the recipe"):
        study.run(50, objective=never)
    with pytest.raises(StudyError, match=r"None of the study's 5 trials finished\. The last one: trial 4: ValueError"):
        write_report(study)
    assert (study.folder / "trials.csv").is_file()
    with pytest.raises(StudyError, match="has no trials yet"):
        Study.start(tmp_path / "new", cheap_plan()).best()


def test_what_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="is not a study"):
        Study.open(tmp_path)
    (tmp_path / "study.yaml").write_text("a: 1")
    with pytest.raises(StudyError, match="expected a name, a storage"):
        Study.open(tmp_path)
    with pytest.raises(StudyError, match="is no URL of a database"):
        Storage("nonsense")
    with pytest.raises(StudyError, match="of an unknown kind"):
        Storage("nonsense://host/name")
    with pytest.raises(
        StudyError, match=r"user:\*\*\*@host/name needs a driver that is not installed: pip install 'mysqlclient'"
    ):
        Storage("mysql://user:secret@host/name")


def test_a_password_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(tmp_path, "secret", cheap_plan(), "postgresql://user:secret@host/name")
    study._write()
    assert "secret@" not in (tmp_path / "study.yaml").read_text()
    with pytest.raises(StudyError, match=r"user:\*\*\*@host/name has a password.*give --storage again"):
        Study.open(tmp_path)
    assert Study.open(tmp_path, storage="postgresql://user:secret@host/name").url.endswith("user:secret@host/name")


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient, "PATIENCE", 0.4)
    monkeypatch.setattr(patient.PatientStorage.__init__, "__defaults__", (0.4,))


def _away(*_: Any, **__: Any) -> None:
    raise sqlalchemy.exc.OperationalError("SELECT 1", {}, sqlite3.OperationalError("the disk is gone"))


@pytest.mark.usefixtures("_impatient")
def test_a_storage_that_comes_back_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study.start(tmp_path / "study", cheap_plan())
    real, calls = RDBStorage._set_trial_value_without_commit, []

    def flaky(self: Any, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) < 4:
            _away()
        real(self, *arguments)

    monkeypatch.setattr(RDBStorage, "_set_trial_value_without_commit", flaky)
    study.run(1, objective=Cheap(0.0))
    assert [one.state for one in study.trials()] == ["finished"]
    assert len(calls) == 4


@pytest.mark.usefixtures("_impatient")
def test_a_storage_that_stays_away_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study.start(tmp_path / "study", cheap_plan())
    study.run(2, objective=Cheap(0.0))
    with monkeypatch.context() as patch:
        patch.setattr(RDBStorage, "_set_trial_value_without_commit", _away)
        with pytest.raises(StorageAway, match=r"could not be reached for 0\.4 seconds \(.*the disk is gone"):
            study.run(4, objective=Cheap(0.0))
    assert len(ended(study)) == 2
    study.run(4, objective=Cheap(0.0))
    assert [len(one.tries) for one in study.trials()] == [1, 1, 2, 1]


# Real trainings

SPACE = {
    "adapter.methods.lora.rank": {"low": 1, "high": 4},
    "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
}


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of examples that models were run on for judgement or gates."""
    from pelton.training import fit as module

    seen: list[int] = []
    evaluate, record = Run.evaluate, module.record_run_gates

    def noting(self: Run, examples: Any, features: Any = None) -> dict[str, float]:
        seen.append(len(examples))
        return evaluate(self, examples, features)

    def recording(run: Run, examples: Any) -> None:
        seen.append(len(examples))
        record(run, examples)

    monkeypatch.setattr(Run, "evaluate", noting)
    monkeypatch.setattr(module, "record_run_gates", recording)
    return seen


def test_a_trial_never_sees_test_rows(make: Make, tmp_path: Path, judged: list[int]) -> None:
    """The test split has 16 rows, and so has the validation split unless the recipe takes 12 of it."""
    plan = StudyPlan.of(make(max_steps=2, task={"validation_examples": 12}), parse_space(SPACE, "test"), usual=False)
    study = Study.start(tmp_path / "study", plan)
    study.run(2)
    assert set(judged) == {12}
    trials = study.trials()
    assert [one.state for one in trials] == ["finished", "finished"]
    for one in trials:
        run = study.folder / "trials" / one.last.user_attrs["run"]
        metrics = json.loads((run / "metrics.json").read_text())
        assert "test" not in metrics
        assert metrics["validation"]["score"] == one.last.values[0]
        assert not (run / "adapter").exists()
        assert not (run / "checkpoints").exists()
        assert load_recipe(run / "recipe.yaml").adapter == study.recipe_of(one.last).adapter
    final = confirm(study, 2)
    assert set(judged) == {12, 16}
    assert final.seeds == (8, 9)
    assert final.test is not None
    assert len(list((study.folder / "final").iterdir())) == 2
    judged.clear()
    assert confirm(study, 2) == final  # nothing is trained again
    assert judged == []


def test_the_command_line_from_search_to_fit(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, space = tmp_path / "recipe.yaml", tmp_path / "space.yaml"
    recipe.write_text(dump_recipe(make(max_steps=2)))
    space.write_text(yaml.safe_dump({"default": False, **SPACE}))
    arguments = ["search", str(recipe), "--space", str(space), "--output", str(tmp_path / "studies")]
    assert pelton([*arguments, "--trials", "3", "--fresh-seeds", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("trial ") == 3
    assert all(word in printed.out for word in ("trials", "best", "with 1 fresh seeds", "chosen for being high"))
    folder = tmp_path / "studies" / "tiny"
    found = {path.name for path in folder.iterdir()}
    assert {"study.yaml", "study.db", "trials.csv", "trials.md", "best.yaml", "final.json", "history.png"} <= found
    assert pelton(["search", "--resume", str(folder), "--trials", "3", "--fresh-seeds", "0"]) == 0
    assert "trial " not in capsys.readouterr().err
    assert pelton(["fit", str(folder / "best.yaml")]) == 0
    assert "validation" in capsys.readouterr().out


def test_a_trial_that_falls_behind_ends_cleanly(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(max_steps=6, evaluate_every=2, trackers=["tensorboard"])
    plan = StudyPlan.of(recipe, parse_space(SPACE, "test"), usual=False)
    study = Study.start(tmp_path / "study", plan)
    monkeypatch.setattr(
        optuna.Trial, "should_prune", lambda self: len(self.study.trials[self.number].intermediate_values) == 2
    )
    study.run(1)
    one = study.trials()[0]
    assert (one.state, one.reason) == ("stopped", "it was behind after 2 evaluations (4 steps)")
    assert list(one.last.intermediate_values) == [1, 2]
    run = next((study.folder / "trials").iterdir())
    assert json.loads((run / "state.json").read_text()) == {"phase": "stopped"}
    assert not (run / "metrics.json").exists()
    assert not (run / "checkpoints").exists()


def test_a_front_of_several_objectives(make: Make, tmp_path: Path) -> None:
    plan = StudyPlan.of(
        make(max_steps=2),
        parse_space(SPACE, "test"),
        usual=False,
        objectives=("quality", "latency", "parameters"),
        budget=Budget(params=3000, latency=1000.0),
    )
    assert not plan.stops
    study = Study.start(tmp_path / "study", plan)
    assert study.plan.directions == ["maximize", "minimize", "minimize"]
    with study.as_optuna() as trials:
        for rank in (1, 4, 2):
            trials.enqueue_trial({"adapter.methods.lora.rank": rank, "training.learning_rate": 1e-3})
    study.run(3)
    states = {one.last.params["adapter.methods.lora.rank"]: one for one in study.trials()}
    assert {rank: one.reason for rank, one in states.items() if rank != 4} == {1: "", 2: ""}
    assert states[1].last.values[2] < states[2].last.values[2] <= 3000
    assert states[1].last.values[1] > 1.0 or states[1].last.user_attrs["latency_spread"] > 0
    assert states[4].state == "stopped"
    assert "of 3,000 trainable parameters" in states[4].reason
    assert {one.root for one in study.best()} <= {0, 2}
    paths = write_report(study)
    assert {path.name for path in paths} >= {"trials.csv", "best.yaml", "pareto.png"}
    front = sorted((study.folder / "front").glob("*.yaml"))
    assert [path.stem for path in front] == sorted(f"trial-{one.root:04d}" for one in study.best())
    assert load_recipe(front[0]).adapter == study.recipe_of(study.best()[0].last).adapter or len(front) > 1


def test_a_blind_run_is_an_ordinary_one_otherwise(make: Make) -> None:
    metrics = fit(make(max_steps=1), blind=True).folder.read("metrics")
    assert "validation" in metrics
    assert "test" not in metrics


def test_a_variant_changes_what_its_key_names(make: Make) -> None:
    recipe = variant(make(), {"adapter.methods.bottleneck.bottleneck_size": 8, "training.seed": 3})
    assert recipe.adapter is not None
    assert recipe.adapter.methods == [GATED["methods"][0], {"kind": "bottleneck", "bottleneck_size": 8}]  # type: ignore[index]
    assert recipe.training.seed == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search"], "give either a recipe or --resume FOLDER"),
        (["search", "banking77", "--resume", "x"], "give either a recipe or --resume FOLDER"),
        (["search", "--resume", "x", "--set", "a=b"], "only --trials, --time, --storage and --fresh-seeds go with it"),
        (["search", "--resume", "x", "--objectives", "latency"], "goes on as the study began"),
        (["search", "--resume", "nowhere"], "nowhere is not a study"),
        (["search", "banking77", "--time", "2 hours"], "expected a time such as 2h"),
        (["search", "banking77", "--space", "nowhere.yaml"], "Space nowhere.yaml cannot be read"),
        (["search", "banking77"], "Recipe banking77 has no validation rows"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pelton(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("pelton: ")
    assert captured.err.count("\n") == 1


def test_times() -> None:
    assert [duration(text) for text in ("2h", "90m", "1h30m", "45s", "1.5h")] == [7200, 5400, 5400, 45, 5400]
