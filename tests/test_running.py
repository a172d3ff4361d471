"""Running text: learned tokenizers, blocks that count each token once, training from scratch, bad input."""

from __future__ import annotations

import gzip
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from pelton.cli.main import run as command
from pelton.errors import DataError, PeltonError
from pelton.tasks.base import Examples
from pelton.tasks.blocks import to_judge, to_learn
from pelton.tasks.load import load_task
from pelton.tasks.running import RunningText, RunningTextSettings
from pelton.tasks.vocabulary import END, UNKNOWN, learn_tokenizer
from pelton.training.fit import fit
from pelton.training.loading import parse_recipe
from pelton.training.run import Run

TEXT = "the cat sat on the mat.\nthe dog sat on the log.\n" * 12
SHAKESPEARE = Path(__file__).parents[2] / "shared" / "data" / "tiny_shakespeare"
HELD = "the cat sat on the log.\nthe dog sat on the mat.\n" * 3
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}


def save_texts(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in {"train": TEXT, "validation": HELD, **texts}.items():
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    return folder


def recipe(folder: Path, data: Path, **changes: Any) -> Any:
    task = {"kind": "text-lm", "data": str(data), "block_size": 32, "max_new_tokens": 8} | changes.pop("task", {})
    training = {"epochs": 2, "batch_size": 4, "backbone_learning_rate": 1e-2, "trackers": [], "seed": 3}
    values = {
        "backbone": "new:minigpt",
        "backbone_config": SMALL,
        "task": task,
        "adapter": None,
        "training": training | changes.pop("training", {}),
        "output": str(folder / "runs"),
    }
    return parse_recipe(values | changes, "test")


def task_of(data: Path, **settings: Any) -> Any:
    return load_task(RunningTextSettings(data=str(data), **settings), 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("running")
    return fit(recipe(folder, save_texts(folder / "data"), training={"epochs": 8}))


# Tokenizers


def test_characters_are_tokens_and_others_are_unknown() -> None:
    tokenizer = learn_tokenizer(["abba\n c"], "char", None)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [END, UNKNOWN, "\n", " ", "a", "b", "c"]
    ids = tokenizer("ab\nç c", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "b", "\n", UNKNOWN, " ", "c"]
    assert tokenizer.decode(tokenizer("ab  ba\n\n c")["input_ids"]) == "ab  ba\n\n c"


def test_a_full_vocabulary_keeps_the_most_frequent_characters() -> None:
    tokenizer = learn_tokenizer(["aaabbc"], "char", 4)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [END, UNKNOWN, "a", "b"]


def test_pairs_of_bytes_know_every_text() -> None:
    tokenizer = learn_tokenizer([TEXT], "bpe", 280)
    assert 257 < len(tokenizer) <= 280
    text = "the cat\n\n  naïve 猫"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id is None
    assert len(ids) < len(text.encode())


@pytest.mark.parametrize(("kind", "size", "least"), [("char", 2, 3), ("bpe", 200, 257)])
def test_a_vocabulary_has_a_least_size(kind: Any, size: int, least: int) -> None:
    with pytest.raises(DataError, match=f"task.vocab_size is {size}, but {kind} needs {least} or more"):
        learn_tokenizer(["abc"], kind, size)


# Blocks


@pytest.mark.parametrize("length", [2, 9, 10, 11, 28, 29, 100])
@pytest.mark.parametrize("stride", [1, 4, 9])
def test_every_token_is_judged_once_and_with_what_context_there_is(length: int, stride: int) -> None:
    blocks = list(to_judge(range(length), 10, stride))
    judged = [place for _, first, end in blocks for place in range(first, end)]
    assert judged == list(range(1, length))
    for begin, first, end in blocks:
        assert 0 <= begin < first
        assert end - begin <= 10
        assert begin == 0 or end - begin == 10


@pytest.mark.parametrize("length", [10, 11, 28, 29, 100])
@pytest.mark.parametrize("stride", [1, 4, 9])
def test_every_token_is_learned_and_once_where_blocks_follow_each_other(length: int, stride: int) -> None:
    blocks = list(to_learn(range(length), 10, stride))
    learned = [place for begin, first, end in blocks for place in range(first, end)]
    assert {end - begin for begin, _, end in blocks} == {10}
    assert set(learned) == set(range(1, length))
    if stride == 9:
        assert len(learned) < length + 9  # the last block may reach back


def test_a_text_file_is_one_text_and_a_table_is_many(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (folder / "validation.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one", "two")))
    loaded = task_of(folder)
    assert loaded.splits["train"].inputs == [TEXT]
    assert loaded.splits["validation"].inputs == ["one", "two"]
    tokenizer = learn_tokenizer([TEXT, "onetw"], "char", None)
    ids = loaded.task.judged(loaded.splits["validation"], tokenizer)["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(row) for row in ids] == [[END, *"one", END, *"two"]]


# Training


def test_a_model_from_scratch_learns_and_is_the_next_runs_backbone(trained: Run, tmp_path: Path) -> None:
    metrics = trained.folder.read("metrics")["validation"]
    assert metrics["loss"] < 2.0 < math.log(len(trained.processor))
    plain = AutoModelForCausalLM.from_pretrained(trained.folder.model)
    tokenizer = AutoTokenizer.from_pretrained(trained.folder.model)
    assert plain.config.vocab_size == len(tokenizer) == len(set(TEXT)) + 2
    assert plain.config.eos_token_id == tokenizer.eos_token_id == 0
    other = save_texts(tmp_path / "other", train=TEXT.replace("cat", "cow") + "5%", validation=HELD)
    adapted = fit(
        recipe(tmp_path, other, backbone=str(trained.folder.model), backbone_config={}, adapter={"preset": "default"})
    )
    notes = adapted.folder.read("data")["notes"]
    assert any(
        f"characters that the tokenizer does not know: the model reads and learns each as {UNKNOWN}" in n for n in notes
    )
    with adapted.model.disable_adapter():  # what was there is still there, to the bit
        again = adapted.evaluate(Examples([HELD], [HELD]))
    assert again["loss"] == pytest.approx(metrics["loss"], abs=1e-6)


def test_the_metrics_are_over_every_token_and_character(trained: Run) -> None:
    text = HELD + "5%"
    found = trained.evaluate(Examples([text], [text]))
    tokenizer, model = trained.processor, trained.model
    ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nats, right, start = 0.0, 0, 0
    while start < len(ids) - 1:  # blocks of 32 that share one token; the last one reaches back
        end = min(start + 32, len(ids))
        begin = max(end - 32, 0)
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:end]])).logits[0, start - begin : -1]
        targets = torch.tensor(ids[start + 1 : end])
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        right += int((logits.argmax(-1) == targets).sum())
        start = end - 1
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-4)
    assert found["loss_per_char"] == pytest.approx(nats / len(text), rel=1e-4)
    assert found["bits_per_char"] == pytest.approx(nats / len(text) / math.log(2), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-3)
    assert found["token_accuracy"] == pytest.approx(right / (len(ids) - 1))
    assert found["unknown"] == pytest.approx(2 / len(text))


def test_more_context_is_no_other_text(trained: Run) -> None:
    task = RunningText(trained.task.settings.model_copy(update={"eval_stride": 4}))
    features = task.judged(Examples([HELD], [HELD]), trained.processor)
    counted = sum(label != -100 for labels in features["labels"] for label in labels)
    assert counted == len(HELD)


def test_a_text_is_continued(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["predict", str(trained.folder.path), "--text", "the cat sat", "--text", "ünd the dog"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["prompt"] == "the cat sat"
    assert len(first["completion"]) == 8
    assert (first["cut"], first["unknown"], second["unknown"]) == (0, 0, 1)
    long = trained.predict(["the cat sat on the mat. the cat"])[0]
    assert long.cut == 1 + 31 - 24
    with pytest.raises(DataError, match="without a second"):
        trained.task.from_texts(["a"], ["b"])


def test_draws_are_the_same_every_time_and_with_every_neighbour(trained: Run) -> None:
    task = RunningText(trained.task.settings.model_copy(update={"temperature": 1.0}))
    warm = Run(trained.folder, trained.recipe, task, trained.processor, trained.model)
    together = warm.predict(["the cat", "the dog sat on", "the"])
    assert [warm.predict([one.prompt])[0] for one in together] == together
    assert together != trained.predict([one.prompt for one in together])


def test_a_loaded_run_keeps_its_tokenizer(trained: Run) -> None:
    again = Run.load(trained.folder.path)
    assert again.predict(["the cat sat"]) == trained.predict(["the cat sat"])
    assert again.evaluate(Examples([HELD], [HELD])) == trained.evaluate(Examples([HELD], [HELD]))


def test_pairs_of_bytes_are_learned_too(tmp_path: Path) -> None:
    task = {"tokenizer": "bpe", "vocab_size": 280}
    run = fit(recipe(tmp_path, save_texts(tmp_path / "data"), task=task))
    metrics = run.folder.read("metrics")["validation"]
    assert metrics["loss_per_char"] < metrics["loss"]
    assert metrics["unknown"] == 0


# Bad input


def refused(folder: Path, message: str, data: Path, **changes: Any) -> None:
    with pytest.raises(PeltonError, match=message):
        fit(recipe(folder, data, **changes))
    assert not (folder / "runs").exists()


def test_bad_texts_are_refused_before_anything_is_made(tmp_path: Path, trained: Run) -> None:
    data = save_texts(tmp_path / "data")
    refused(tmp_path, r"train.txt, line 1, column 'text': the text is empty", save_texts(tmp_path / "e", train=""))
    short = save_texts(tmp_path / "s", train="short")
    refused(tmp_path, r"training text has 6 tokens, which is less than one block of task.block_size=32", short)
    refused(tmp_path, r"task.block_size is 64, but the backbone has 32 positions", data, task={"block_size": 64})
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "train.txt").write_text(TEXT)
    refused(tmp_path, r"No part of 1 training text\(s\) can be held back", alone)
    for name in ("stride", "eval_stride", "max_new_tokens"):
        refused(tmp_path, rf"{name} < block_size must hold, but got 32 and 32", data, task={name: 32})
    refused(tmp_path, "vocab_size is for a learned tokenizer", data, task={"vocab_size": 99})
    (tmp_path / "data" / "train.txt").write_bytes(b"caf\xe9")
    refused(tmp_path, r"train.txt, line 1, column 'text': broken UTF-8 at character 4", data)


def test_a_pretrained_backbone_has_its_own_tokenizer(tmp_path: Path, trained: Run) -> None:
    changes: dict[str, Any] = {
        "backbone": str(trained.folder.model),
        "backbone_config": {},
        "adapter": {"preset": "lora"},
    }
    data = save_texts(tmp_path / "data")
    refused(
        tmp_path,
        "task.tokenizer is 'bpe', but the backbone comes with 'char'",
        data,
        task={"tokenizer": "bpe"},
        **changes,
    )


def test_a_vocabulary_of_another_size_contradicts_the_text(tmp_path: Path) -> None:
    config = SMALL | {"vocab_size": 999}
    refused(tmp_path, "backbone_config.vocab_size is 999", save_texts(tmp_path / "data"), backbone_config=config)


# What ships


def test_the_recipes_run_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"--set=backbone_config.{key}={value}" for key, value in SMALL.items()]
    short = ["--set=task.block_size=32", "--set=task.max_new_tokens=8", "--set=training.max_steps=4"]
    short += ["--set=task.stride=null", "--set=training.evaluate_every=4", "--set=training.trackers=none"]
    data, out = f"--set=task.data={save_texts(tmp_path / 'data')}", ["--output", str(tmp_path / "runs")]
    assert command(["fit", "minigpt-shakespeare", data, *small, *short, *out]) == 0
    assert "loss_per_char" in capsys.readouterr().out
    (first,) = (tmp_path / "runs").iterdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{TEXT[:60]}{n}?"}) + "\n" for n in range(20)))
    changes = [f"--set=backbone={first / 'model'}", f"--set=task.data={rows}", "--set=task.text_column=question"]
    assert command(["fit", "minigpt-adapt", *changes, *short, *out]) == 0
    (second,) = (path for path in (tmp_path / "runs").iterdir() if path != first)
    assert json.loads((second / "data.json").read_text())["examples"] == {"train": 18, "validation": 2}


def test_the_benchmark_writes_its_table() -> None:
    module = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "minigpt.py"))
    line = {"stage": "adapted", "method": "lora", "forgetting_off": 0.0, "trainable": 1234}
    lines = [
        {"stage": "before", "new": 2.5, "old": 1.5, "unknown": 0.02},
        line | {"rate": 1e-3, "seed": 0, "validation": 2.0, "new": 2.1, "forgetting": 0.5},
        line | {"rate": 3e-3, "seed": 0, "validation": 1.9, "new": 2.0, "forgetting": 0.3},
        line | {"rate": 3e-3, "seed": 1, "validation": 2.2, "new": 2.2, "forgetting": 0.5},
    ]
    table = module["table"](lines)
    assert "Before: 2.500 nats a character on the questions (2.0% of them unknown), 1.500 on the plays." in table
    assert table.splitlines()[-1] == "| lora | 0.003 | 2.100 ± 0.141 | 0.400 ± 0.141 | 0 | 2 | 1,234 |"


@pytest.mark.skipif(not SHAKESPEARE.is_dir(), reason="the text is not on this machine")
def test_shakespeares_characters() -> None:
    loaded = task_of(SHAKESPEARE)
    tokenizer = loaded.task.make_processor(None, loaded.splits["train"])
    assert len(tokenizer) == 65 + 2
    features = loaded.task.judged(loaded.splits["validation"], tokenizer)
    counted = sum(label != -100 for labels in features["labels"] for label in labels)
    assert counted == len(loaded.splits["validation"].inputs[0]) == 55770
    assert sum(count for counts in features["unknown"] for count in counts) == 0
