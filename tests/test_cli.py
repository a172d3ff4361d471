"""The command line: what it prints, and that every mistake is one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pelton.cli.main import run as pelton
from pelton.insight.gates import block_labels, gate_table, methods_of, plot_gates
from pelton.training.fit import fit
from pelton.training.loading import parse_recipe, shipped_recipes
from pelton.version import __version__
from tiny import bert_config, recipe_values, save_backbone, save_data, write_jsonl

GATED = {"methods": ["lora", "bottleneck"], "gate": {"kind": "mlp"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_data(folder / "data")
    save_backbone(folder / "backbone")
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    values = recipe_values(place / "backbone", place / "data", place / "runs")
    return fit(parse_recipe({**values, "adapter": GATED}, "test")).folder.path


@pytest.fixture
def recipe(place: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({**recipe_values(place / "backbone", place / "data", tmp_path / "runs"), "adapter": GATED})
    )
    return path


def test_fit_prints_scores_share_gates_and_the_folder(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pelton(["fit", str(recipe), "--set", "training.epochs=1", "--output", str(recipe.parent / "out")]) == 0
    printed = capsys.readouterr().out
    (folder,) = (recipe.parent / "out").iterdir()
    assert str(folder) in printed.splitlines()[-1]
    for word in ("validation", "test", "accuracy", "trainable", "mean gate value", "lora", "bottleneck"):
        assert word in printed
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["training"]["epochs"] == 1


def test_fit_goes_on_with_a_run(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pelton.training import fit as module

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", crash)
        assert pelton(["fit", str(recipe)]) == 130
    line = capsys.readouterr().err.strip()
    command, _, folder = line.partition("pelton fit --resume ")
    assert command == "pelton: Interrupted. Go on with: "
    assert pelton(["fit", "--resume", folder]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_predict_prints_json_lines(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pelton(["predict", str(trained), "--text", "good film", "--text", "bad day"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["texts"] for line in lines] == [["good film"], ["bad day"]]
    assert all(line["label"] in line["probabilities"] for line in lines)
    file = write_jsonl(tmp_path / "new.jsonl", [{"text": "good film"}, {"text": "bad day"}])
    assert pelton(["predict", str(trained), "--file", str(file), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == lines


def test_eval_prints_the_runs_own_metrics(trained: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pelton(["eval", str(trained)]) == 0
    own = json.loads(capsys.readouterr().out)
    assert own == json.loads((trained / "metrics.json").read_text())["test"]
    assert pelton(["eval", str(trained), "--data", str(place / "data" / "test.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out) == own


def test_recipes_lists_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert pelton(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in shipped_recipes())


def test_gates_prints_the_table_and_draws_it(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "gates.png"
    assert pelton(["gates", str(trained), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("lora", "bottleneck", "sum", "requires_grad", "is_buffer"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = gate_table(trained)
    assert methods_of(table) == ["lora", "bottleneck"]
    assert block_labels(table) == ["0", "1"]


def test_a_method_that_a_block_lacks_is_left_blank(trained: Path, tmp_path: Path) -> None:
    from pelton.cli import show

    table = gate_table(trained)
    table.loc[0, "lora"] = float("nan")
    plot_gates(table, tmp_path / "gates.svg")
    show.gates(table)


def test_anatomy_prints_blocks_and_sites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert_config(num_hidden_layers=3).save_pretrained(tmp_path)
    assert pelton(["anatomy", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "encoder.layer.0 … encoder.layer.2 (3 blocks), bidirectional" in printed
    assert "attn.q" in printed
    assert "16 → 32" in printed


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert pelton(["--version"]) == 0
    assert capsys.readouterr().out == f"pelton {__version__}\n"
    assert pelton(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("fit", "predict", "eval", "recipes", "gates", "anatomy"))


def test_help_needs_no_deep_learning() -> None:
    code = (
        "import sys; from pelton.cli.main import run; run(['--help']); "
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'peft'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "give either a recipe or --resume RUN"),
        (["fit", "banking77", "--resume", "x"], "give either a recipe or --resume RUN"),
        (["fit", "--resume", "x", "--set", "a=b"], "--set and --output do not go with it"),
        (["fit", "bankin77"], "Unknown recipe 'bankin77'. Did you mean 'banking77'?"),
        (["fit", "banking77", "--set", "training.epoch=3"], "Did you mean 'training.epochs'?"),
        (["fit", "mrpc"], "Recipe mrpc needs data: --set task.data=DIR"),
        (["fit", "mrpc", "--set", "task.data=./nowhere"], "nowhere"),
        (["fit", "--resume", "nowhere"], "nowhere is not a run"),
        (["fti"], "No such command 'fti'"),
        (["fit", "banking77", "--st", "a=b"], "No such option"),
        (["predict", "nowhere", "--text", "x"], "nowhere is not a run"),
        (["predict", "x"], "give either --text or --file"),
        (["predict", "x", "--text", "a", "--text", "b", "--pair", "c"], "give one --pair for each --text"),
        (["eval"], "Missing argument"),
        (["gates", "nowhere"], "nowhere is not a run"),
        (["anatomy", "./nowhere"], "cannot be loaded"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pelton(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("pelton: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="Unknown recipe"):
        pelton(["fit", "bankin77", "--debug"])


def test_drift_names_blocks_in_a_narrow_terminal(
    trained: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert pelton(["drift", str(trained), "--data", str(place / "data" / "test.jsonl")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "lora" in line]
    assert [row[:2] for row in rows] == [["0", "lora"], ["1", "lora"]]


def test_convert_writes_over_nothing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in (trained / "adapter").iterdir()}
    assert pelton(["convert", str(trained), "--output", str(trained / "adapter")]) == 2
    assert f"{trained / 'adapter'} exists. Name a new folder with --output." in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (trained / "adapter").iterdir()} == before


def test_mistakes_with_a_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "bad.jsonl", [{"text": "good film", "label": "warmish"}])
    for arguments, message in (
        (["predict", str(trained), "--text", "a", "--pair", "b"], "has 1 text(s) (text), but got 2"),
        (["predict", str(trained), "--file", str(tmp_path / "none.jsonl")], "does not exist"),
        (
            ["eval", str(trained), "--data", str(file)],
            "line 1, column 'label': unseen label 'warmish'. Did you mean 'warm'?",
        ),
        (["gates", str(trained), "--plot", str(tmp_path / "a.xyz")], "cannot be drawn"),
        (
            ["predict", str(trained), "--text", "a", "--output", str(tmp_path / "no" / "where")],
            f"there is no folder {tmp_path / 'no'} for where. Make it, or name another --output",
        ),
        (["predict", str(trained), "--text", "a", "--output", str(tmp_path)], "is a folder: expected a file"),
        (["pictures", str(trained), "--output", str(tmp_path / "x")], "x is no picture's name: expected an ending"),
        (["pictures", str(trained), "--output", str(tmp_path / "x.pngg")], "expected an ending such as .png"),
        (["pictures", str(trained), "--output", str(tmp_path / "no" / "x.png")], "for x.png. Make it"),
    ):
        assert pelton(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
