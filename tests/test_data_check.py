"""`pelton data check`: what it finds in data, for each kind, and what broken data are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from pelton.cli.main import run
from pelton.errors import DataError
from pelton.tasks.answers import AnswerSettings
from pelton.tasks.causal_settings import CausalSettings
from pelton.tasks.check import check_data
from pelton.tasks.classification import ClassificationSettings
from pelton.tasks.guess import guess
from pelton.tasks.intents import IntentSettings
from pelton.tasks.seq2seq import Seq2SeqSettings
from pelton.tasks.tables import Table
from pelton.training.examine import examine
from tiny import save_backbone, save_data, save_tokenizer, sentences, write_csv, write_jsonl

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    train = [{"text": f"the {word} was good", "label": "warm", "source": "x", "note": ""} for word in "abcdef"]
    train += [{"text": f"the {word} was bad", "label": "cold", "source": "x", "note": None} for word in "ab"]
    train += [{"text": " The  A was GOOD", "label": "cold", "source": "x", "note": " "}]  # conflicts with line 1
    train += [{"text": "the b was good", "label": "warm", "source": "x", "note": ""}]  # repeats line 2
    train += [{"text": "very " * 20, "label": "cold", "source": "x", "note": ""}]
    write_jsonl(folder / "train.jsonl", train)
    test = [{"text": "THE A was bad", "label": "cold"}, {"text": "the z was bad", "label": "warm"}]
    write_jsonl(folder / "test.jsonl", test)
    return folder


def test_classification(data: Path) -> None:
    report = examine(str(data))
    assert report.kind == "text-classification"
    train = report.splits["train"]
    assert (train.rows, train.duplicates, train.conflicts) == (11, 2, 1)
    assert train.examples[0].text == "the a was good"
    assert train.examples[0].targets == ("warm", "cold")
    assert train.examples[0].places == ("line 1", "line 9")
    assert train.empty == ("note",)
    assert train.constant == ("source",)
    assert train.balance is not None
    assert train.balance.counts == {"warm": 7, "cold": 4}
    assert train.balance.rarest == ("cold", 4 / 11)
    assert train.lengths is not None
    assert (train.lengths.unit, train.lengths.smallest, train.lengths.median, train.lengths.largest) == (
        "words",
        4,
        4,
        20,
    )
    assert list(report.overlaps) == ["test"]
    assert report.overlaps["test"].rows == 1
    assert report.overlaps["test"].share == 0.5
    assert report.overlaps["test"].places == ("line 1",)


def test_tokens_of_a_backbone(data: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    settings = ClassificationSettings(data=str(data), max_length=8)
    found = check_data(settings, lambda task: tokenizer).splits["train"].lengths
    assert found is not None
    assert (found.unit, found.smallest, found.largest, found.max_length) == ("tokens", 6, 22, 8)
    assert found.cut == pytest.approx(1 / 11)
    assert tokenizer.truncation_side == "right"


def test_a_recipe_counts_its_own_backbone(data: Path, tmp_path: Path) -> None:
    backbone = save_backbone(tmp_path / "bert")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"backbone": str(backbone), "task": {"data": str(data), "max_length": 5}}))
    found = examine(str(recipe)).splits["train"].lengths
    assert found is not None
    assert (found.unit, found.cut) == ("tokens", 1.0)
    assert examine("mrpc", [f"task.data={data}", f"backbone={backbone}", "task.text_columns=[text]"]).kind


def test_regression(tmp_path: Path) -> None:
    rows = [{"sentence1": f"a {i}", "sentence2": "b", "label": i / 2} for i in range(5)]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {**rows[0], "label": 4.0}])
    report = examine(str(path))
    train = report.splits["train"]
    assert report.kind == "text-regression"
    assert train.balance is None
    assert train.values is not None
    assert (train.values.smallest, train.values.largest) == (0.0, 4.0)
    assert train.values.mean == pytest.approx(1.5)
    assert train.examples[0].targets == ("0.0", "4.0")
    assert train.constant == ("sentence2",)


def test_tags_and_intents(tmp_path: Path) -> None:
    rows = [{"tokens": ["Ann", "ran"], "ner_tags": ["B-PER", "O"]}, {"tokens": ["ann", "ran"], "ner_tags": ["O", "O"]}]
    report = examine(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert report.kind == "token-classification"
    train = report.splits["train"]
    assert train.balance is not None
    assert train.balance.counts == {"O": 3, "B-PER": 1}
    assert train.examples[0].targets == ("B-PER O", "O O")
    path = write_jsonl(tmp_path / "b.jsonl", [*sentences(4), {"text": "x", "label": "oos"}])
    balance = check_data(IntentSettings(data=str(path))).splits["train"].balance
    assert balance is not None
    assert balance.counts == {"warm": 2, "cold": 2, "oos": 1}


def test_glue_and_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "rte").mkdir()
    rows = [{"sentence1": f"a {i}", "sentence2": "b", "label": i % 2} for i in range(6)]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "rte" / f"{split}.jsonl", rows)
    report = examine(str(tmp_path), ["task.kind=glue", "task.name=rte"])
    assert report.overlaps["test"].share == 1.0
    for name, colour in (("blue", (0, 0, 9)), ("red", (9, 0, 0))):
        (tmp_path / "pictures" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), colour).save(tmp_path / "pictures" / "train" / name / "a.png")
    report = examine(str(tmp_path / "pictures"))
    assert report.kind == "image-classification"
    train = report.splits["train"]
    assert (train.rows, train.duplicates, train.lengths) == (2, None, None)
    assert train.balance is not None
    assert train.balance.counts == {"blue": 1, "red": 1}
    assert report.notes == ("Lengths, repeated rows and overlaps are not measured for image-classification.",)


def test_questions_are_compared_by_what_they_ask_and_of_what(tmp_path: Path) -> None:
    def asked(name: str, question: str, *answers: str) -> dict[str, Any]:
        context = "the film was good and the song was bad"
        starts = [context.index(answer) for answer in answers]
        cell = {"text": list(answers), "answer_start": starts}
        return {"id": name, "context": context, "question": question, "answers": cell}

    train = [asked("1", "was it good", "good"), asked("2", "Was it  good", "film was good", "good")]
    train += [asked("3", "was it bad", "bad"), asked("4", "was it bad", "good"), asked("5", "was it bad")]
    write_jsonl(tmp_path / "train.jsonl", train)
    write_jsonl(tmp_path / "dev.jsonl", [asked("6", "was it BAD", "bad"), asked("7", "who", "film")])
    report = examine(str(tmp_path), ["task.max_length=8"])
    found = report.splits["train"]
    assert (report.kind, found.duplicates, found.conflicts) == ("question-answering", 3, 1)
    assert found.examples[0].targets == ("bad", "good", "no answer")  # both answers to the first question hold "good"
    assert found.examples[0].text == "was it bad | the film was good and the song was bad"
    assert found.lengths is not None
    assert (found.lengths.unit, found.lengths.smallest, found.lengths.largest) == ("words", 12, 12)
    assert report.overlaps["validation"].rows == 1
    assert report.notes == ("Contexts beyond task.max_length are read in windows: nothing of them is lost.",)
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    settings = AnswerSettings(data=str(tmp_path), max_length=14)
    lengths = check_data(settings, lambda task: tokenizer).splits["validation"].lengths
    assert lengths is not None
    assert (lengths.unit, lengths.smallest, lengths.largest, lengths.cut) == ("tokens", 13, 15, 0.5)


INSTRUCTED = [
    {"instruction": "name a colour", "input": "", "output": "red"},
    {"instruction": "Name a  colour", "input": None, "output": "blue and\ngreen"},
    {"instruction": "name a colour", "input": "of the sky", "output": "blue"},
    {"instruction": "name a colour", "input": "of the sky", "output": "Blue"},
]


def test_prompts_with_responses(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", INSTRUCTED)
    write_jsonl(tmp_path / "test.jsonl", [INSTRUCTED[3], {**INSTRUCTED[3], "instruction": "name two"}])
    report = examine(str(tmp_path))
    train = report.splits["train"]
    assert (report.kind, train.duplicates, train.conflicts) == ("causal-lm", 2, 1)
    assert train.examples[0].targets == ("red", "blue and green")
    assert train.lengths is not None
    assert (train.lengths.smallest, train.lengths.largest, train.lengths.max_length) == (4, 7, 512)
    assert train.target_lengths is None
    assert report.overlaps["test"].rows == 1
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", eos_token="[SEP]")
    settings = CausalSettings(data=str(tmp_path), format="{prompt} {response}", max_length=6, max_new_tokens=2)
    lengths = check_data(settings, lambda task: tokenizer).splits["train"].lengths
    assert lengths is not None  # [CLS], three words, the response, [SEP]; with an input three more
    assert (lengths.unit, lengths.smallest, lengths.largest, lengths.cut) == ("tokens", 6, 8, 0.25)


def test_conversations_and_plain_texts(tmp_path: Path) -> None:
    def talk(*said: str) -> dict[str, Any]:
        roles = ("user", "assistant") * 2
        return {"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]}

    path = write_jsonl(tmp_path / "a.jsonl", [talk("a b", "c"), talk("A b", "d"), talk("a b", "c", "e", "f")])
    report = examine(str(path))
    train = report.splits["train"]
    assert (report.kind, train.duplicates, train.conflicts) == ("causal-lm", 1, 1)
    assert train.examples[0].text == "a b"
    assert train.lengths is not None
    assert (train.lengths.smallest, train.lengths.largest) == (3, 5)
    report = examine(str(write_jsonl(tmp_path / "b.jsonl", [{"text": "a b"}, {"text": "A b"}, {"text": "c"}])))
    train = report.splits["train"]
    assert (report.kind, train.duplicates, train.conflicts) == ("causal-lm", 1, 0)
    (tmp_path / "c.txt").write_text("to be or not to be")
    assert examine(str(tmp_path / "c.txt")).kind == "text-lm"


def test_sources_and_targets_are_each_held_against_their_limit(tmp_path: Path) -> None:
    rows = [{"source": "a b c", "target": "d"}, {"source": "A b c", "target": "d e f"}, {"source": "g", "target": "h"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    report = examine(str(path), ["task.max_target_length=2"])
    train = report.splits["train"]
    assert (report.kind, train.duplicates, train.conflicts) == ("seq2seq", 1, 1)
    assert train.lengths is not None
    assert train.target_lengths is not None
    assert (train.lengths.smallest, train.lengths.largest, train.lengths.max_length) == (1, 3, 512)
    assert (train.target_lengths.largest, train.target_lengths.cut) == (3, pytest.approx(1 / 3))
    assert report.notes == (
        "train: targets have 1 to 3 words (median 1); at least 33.3% are longer than task.max_target_length=2.",
    )
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    settings = Seq2SeqSettings(data=str(path), prompt="very ", max_source_length=5, max_target_length=4)
    train = check_data(settings, lambda task: tokenizer).splits["train"]
    assert train.lengths is not None
    assert train.target_lengths is not None
    assert (train.lengths.unit, train.lengths.largest, train.lengths.cut) == ("tokens", 6, pytest.approx(2 / 3))
    assert (train.target_lengths.largest, train.target_lengths.cut) == (5, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, "causal-lm"),
        ({"instruction": "a", "response": "c", "category": "d"}, "causal-lm"),
        ({"prompt": "a", "completion": "c", "text": "a c"}, "causal-lm"),
        ({"prompt": "a", "response": "c"}, "causal-lm"),
        ({"question": "a", "answer": "c"}, "causal-lm"),
        ({"question": "a", "answer": "c", "label": 1}, "text-classification"),
        ({"article": "a", "highlights": "c", "id": 1}, "seq2seq"),
        ({"input": "a", "output": "c"}, "seq2seq"),
        ({"text": "a", "summary": "c", "label": 1}, "text-classification"),
        ({"text": "a", "label": 1}, "text-classification"),
        ({"text": "a", "label": "0.5"}, "text-regression"),
        ({"text": "a", "label": "0.0"}, "text-classification"),
        ({"text": "a", "label": "nan"}, "text-classification"),
        ({"text": "a", "label": "v1.5"}, "text-classification"),
        ({"text": "a", "label": True}, "text-classification"),
        ({"text": "a", "intent": "x", "score": 0.5}, "text-classification"),
        ({"question": "a", "context": "b", "answers": {}}, "question-answering"),
        ({"text": "a", "topic": "b"}, "text-classification"),
    ],
)
def test_kinds_are_guessed_by_columns(columns: dict[str, Any], kind: str) -> None:
    assert guess(Table("a.jsonl", {name: [cell] * 3 for name, cell in columns.items()})) == {"kind": kind}


def test_numbers_in_text_files_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"sentence1": f"a {i}", "sentence2": "b", "label": i / 2} for i in range(5)]
    train = examine(str(write_csv(tmp_path / "a.csv", rows))).splits["train"]
    assert train.values is not None
    assert (train.values.smallest, train.values.largest) == (0.0, 2.0)
    rows = [{"text": f"a {i}", "score": i / 2} for i in range(5)]
    path = write_jsonl(tmp_path / "b.jsonl", [*rows, {"text": "a 0", "score": None}])
    with pytest.raises(DataError, match=r"line 6, column 'score': expected a finite number, but got None"):
        examine(str(path))
    write_jsonl(path, rows)
    assert run(["data", "check", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "read as text-regression" in shown
    assert "Read with task.label_column=score, which a recipe has to say as well." in shown
    report = examine(str(path), ["task.label_column=score"])
    assert (report.kind, report.notes) == ("text-regression", ())
    with pytest.raises(DataError, match=r"has no column 'scores'. Did you mean 'score'"):
        examine(str(path), ["task.label_column=scores"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data are not beside the repository")
@pytest.mark.parametrize(
    ("name", "kind", "duplicates", "longest"),
    [
        ("alpaca_2k", "causal-lm", 0, 604),
        ("gsm8k", "causal-lm", 0, 334),
        ("squad_v1_dev_resplit", "question-answering", 31, 651),
    ],
)
def test_real_data(name: str, kind: str, duplicates: int, longest: int) -> None:
    report = examine(str(SHARED / name))
    train = report.splits["train"]
    assert (report.kind, train.duplicates) == (kind, duplicates)
    assert train.lengths is not None
    assert train.lengths.largest == longest
    assert all(overlap.rows == 0 for overlap in report.overlaps.values())


# ---- the command -------------------------------------------------------------------------------------------------


def test_the_command_prints_tables_and_json(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "check", str(data)]) == 0
    shown = capsys.readouterr().out
    for part in ("read as text-classification", "rows", "7 (63.6%)", "repeated inputs", "has one value in all rows"):
        assert part in shown
    assert "'the a was good' has the targets warm, cold (line 1, line 9)" in shown
    assert run(["data", "check", str(data), "--json", "--set", "task.label_column=label"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["train"]["duplicates"] == 2
    assert found["overlaps"]["test"]["rows"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["broken.jsonl"], "broken.jsonl, line 2: malformed JSON"),
        (["nothing.jsonl"], "nothing.jsonl does not exist"),
        (["/nothing/at/all"], "/nothing/at/all does not exist"),
        (["mrpcc"], "Unknown recipe 'mrpcc'. Did you mean 'mrpc'?"),
        (["good", "--set", "label_column=x"], "An override of data looks like task.label_column=topic"),
        (["good", "--set", "task.train=["], "The value of 'task.train=[' is not YAML"),
        (["good", "--set", "task.shots=0"], "task.shots: input should be greater than or equal to 1, but got 0"),
        (["good", "--set", "task.labl_column=x"], "unknown key 'task.labl_column'. Did you mean 'task.label_column'?"),
    ],
)
def test_broken_data_and_mistakes_exit_with_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": 1}\n{"text"\n')
    save_data(tmp_path / "good")
    assert run(["data", "check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_is_quick_to_import() -> None:
    heavy = ("torch", "transformers", "datasets", "numpy")
    code = f"import sys, pelton.cli.data; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
