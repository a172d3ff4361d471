"""Runs that were copied in part and inputs without tokens: one sentence, which says what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fits import GATED
from pelton.cli.main import run as command
from pelton.errors import DataError, TrainingError
from pelton.insight.gates import gate_table
from pelton.tasks.causal import CausalLM
from pelton.tasks.causal_settings import CausalSettings
from pelton.tasks.seq2seq import Seq2SeqSettings, SequenceToSequence
from pelton.training.fit import fit
from pelton.training.folder import RunFolder
from pelton.training.loading import parse_recipe
from pelton.training.run import Run
from tiny import recipe_values, save_backbone, save_data

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One with an adapter, one whose backbone was trained with its adapter, one that was trained whole."""
    place = tmp_path_factory.mktemp("runs")
    backbone, data = save_backbone(place / "backbone"), save_data(place / "data")
    found = {}
    for name, adapter, both in (("adapter", GATED, False), ("both", GATED, True), ("whole", None, False)):
        values = recipe_values(backbone, data, place / name, epochs=1, **({"train_backbone": True} if both else {}))
        found[name] = fit(parse_recipe({**values, "adapter": adapter}, "test")).folder.path
    return found


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def wrote(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text)  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("of", "file", "harm", "message"),
    [
        ("adapter", "adapter", shutil.rmtree, r"adapter/adapter_config\.json is missing or broken \(no such file\)"),
        ("adapter", "adapter/adapter_config.json", Path.unlink, r"adapter/adapter_config\.json is missing or broken"),
        ("adapter", "adapter/adapter_config.json", wrote("{}"), r"adapter/adapter_config\.json .*'peft_type'"),
        ("adapter", "adapter/adapter_config.json", wrote('{"peft_type": "NOPE"}'), r"adapter_config\.json .*'NOPE'"),
        ("adapter", "adapter/adapter_config.json", wrote('{"peft_'), r"adapter is missing or broken \(JSONDecodeError"),
        ("adapter", f"adapter/{ADAPTER}", Path.unlink, r"adapter/adapter_model\.safetensors is missing or broken"),
        ("both", "model/model.safetensors", cut, r"model is missing or broken \(SafetensorError"),
        ("both", f"adapter/{ADAPTER}", Path.unlink, r"adapter/adapter_model\.safetensors is missing or broken"),
        ("whole", "model", shutil.rmtree, r"model/config\.json is missing or broken \(no such file\)"),
        ("whole", "model/model.safetensors", cut, r"model is missing or broken \(SafetensorError"),
        ("whole", "model/model.safetensors", Path.unlink, r"model is missing or broken \(OSError"),
        ("adapter", "state.json", wrote("{}"), r"state\.json is missing or broken \(expected a phase .*but got \{\}"),
        ("adapter", "state.json", wrote("[]"), r"state\.json is missing or broken \(expected a phase .*but got \[\]"),
        ("adapter", "task.json", wrote("{}"), r"task\.json is missing or broken \(it lacks 'names'"),
        ("adapter", "task.json", wrote("[]"), r"task\.json is missing or broken"),
    ],
)
def test_a_run_that_was_copied_in_part_says_what_is_missing(
    of: str,
    file: str,
    harm: Callable[[Path], None],
    message: str,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = Path(shutil.copytree(runs[of], tmp_path / "run"))
    harm(copy / file)
    with pytest.raises(TrainingError, match=rf"{message}.*Copy the run's folder again, whole"):
        Run.load(copy)
    assert command(["predict", str(copy), "--text", "good"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["{}", "[]", "[1]", '[{"block": "0"}]', '[{"blo'])
def test_a_broken_table_of_gates_is_said(
    text: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(runs["adapter"], tmp_path / "run"))
    (copy / "gates.json").write_text(text)
    with pytest.raises(TrainingError, match=r"gates\.json"):
        gate_table(copy)
    assert command(["gates", str(copy)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    folder = RunFolder.open(tmp_path)
    for step, state in ((5, "{}"), (10, '{"global_step": 10}'), (15, '{"global_st'), (20, "")):
        place = folder.checkpoints / f"checkpoint-{step}"
        place.mkdir(parents=True)
        (place / "trainer_state.json").write_text(state)
    newest = folder.last_checkpoint()
    assert newest is not None
    assert newest.name == "checkpoint-10"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["good", ""], "Text 2 is empty. Leave it out or fill it in."),
        (["  \n"], "Text 1 is empty"),
        (["bad \udcff"], "Text 1 is not UTF-8, from character 5 on: 'bad \\udcff'"),
    ],
)
def test_what_was_typed_is_checked(
    texts: list[str], message: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [part for text in texts for part in ("--text", text)]
    assert command(["predict", str(runs["adapter"]), *arguments]) == 2
    assert message in capsys.readouterr().err
    causal, reader = CausalLM(CausalSettings(input_column="input")), SequenceToSequence(Seq2SeqSettings())
    for task in (causal, reader):
        with pytest.raises(DataError, match=message.split(".")[0].split(":")[0]):
            task.from_texts(texts, None)
    with pytest.raises(DataError, match="Text 1: expected a text, but got int 3"):
        reader.from_texts([3], None)  # type: ignore[list-item]


def test_an_input_of_a_prompt_may_be_empty() -> None:
    causal = CausalLM(CausalSettings(input_column="input"))
    assert [prompt.context for prompt in causal.from_texts(["a", "b"], [" ", "c"])] == ["", "c"]
    with pytest.raises(DataError, match="Input 2 is not UTF-8"):
        causal.from_texts(["a", "b"], ["c", "\udcff"])


def test_nothing_is_said_of_nothing_and_of_what_has_no_tokens(runs: dict[str, Path]) -> None:
    run = Run.load(runs["adapter"])
    assert run.predict([]) == []
    assert run.outputs([]) == []
    bare = AutoTokenizer.from_pretrained(run.recipe.backbone)
    bare.backend_tokenizer.post_processor = None  # nothing stands before or behind a text
    run = Run(run.folder, run.recipe, run.task, bare, run.model)
    assert len(run.predict([("good",)])) == 1
    with pytest.raises(DataError, match="Input 2 has no tokens: it is empty, or the tokenizer knows nothing in it"):
        run.predict([("good",), ("",)])


def test_typed_texts_of_every_kind_are_looked_at() -> None:
    from pelton.tasks.answers import AnswerSettings, QuestionAnswering
    from pelton.tasks.labels import Labels
    from pelton.tasks.running import RunningText, RunningTextSettings
    from pelton.tasks.tokens import TokenClassification, TokenSettings

    tags = TokenClassification(TokenSettings(data="d"), Labels(("O", "B-X"), ids=False))
    questions = QuestionAnswering(AnswerSettings(data="d"))
    for make in (
        lambda text: tags.from_texts([text], None),
        lambda text: questions.from_texts([text], ["context"]),
        lambda text: questions.from_texts(["question"], [text]),
        lambda text: RunningText(RunningTextSettings(data="d")).from_texts([text], None),
    ):
        with pytest.raises(DataError, match=r"Text 1 is empty. Leave it out or fill it in"):
            make("  ")
        assert len(make("a b")) == 1
