"""Sequence to sequence: columns, losses and exact match, generation, whole runs of T5 and BART."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from peft import PeftModelForSeq2SeqLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from pelton import PeltonConfig, record_gates
from pelton.cli.main import run as pelton
from pelton.errors import DataError, RecipeError
from pelton.tasks.seq2seq import IGNORED, Seq2SeqSettings, SequenceToSequence, TextPrediction
from pelton.tasks.tables import Table
from pelton.training.backbone import attach
from pelton.training.fit import fit
from pelton.training.inference import infer
from pelton.training.loading import parse_recipe
from pelton.training.run import Run
from tiny import write_jsonl

LETTERS = ["a", "b", "c", "d", "e", "f"]
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>", "copy", "swap", ":"]
GATED = {
    "methods": [{"kind": "lora", "rank": 4}, {"kind": "bottleneck", "bottleneck_size": 8}],
    "gate": {"kind": "mlp"},
}


def save_tokenizer(folder: Path) -> None:
    """Saves a word-level tokenizer that ends texts as T5's does."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(SPECIAL) + len(LETTERS),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            dropout_rate=0.0,
        )
    )


def bart() -> BartForConditionalGeneration:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(SPECIAL) + len(LETTERS),
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=32,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=3,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
            dropout=0.0,
        )
    )


BUILD: dict[str, Callable[[], Any]] = {"t5": t5, "bart": bart}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    for name, build in BUILD.items():
        torch.manual_seed(0)
        build().save_pretrained(folder / name)
        save_tokenizer(folder / name)
    return folder


@pytest.fixture(scope="module")
def tokenizer(backbones: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(backbones / "t5")


def rows(count: int) -> list[dict[str, str]]:
    """Two letters to be swapped."""
    rng = random.Random(1)
    pairs = [rng.choices(LETTERS, k=rng.choice([2, 2, 3])) for _ in range(count)]
    return [{"source": " ".join(pair), "target": " ".join(reversed(pair))} for pair in pairs]


def table(*made: dict[str, Any]) -> Table:
    return Table("f.jsonl", {name: [one[name] for one in made] for name in made[0]}, range(1, len(made) + 1))


def plan(**settings: Any) -> SequenceToSequence:
    columns = {"source_column": "source", "target_column": "target"}
    return SequenceToSequence(
        Seq2SeqSettings(**{**columns, "max_source_length": 12, "max_target_length": 8, **settings})
    )


@pytest.fixture
def make(backbones: Path, tmp_path: Path) -> Callable[..., Any]:
    def build(name: str = "t5", adapter: Any = GATED, task: dict[str, Any] | None = None, **training: Any) -> Any:
        folder = tmp_path / "data"
        if not folder.exists():
            folder.mkdir()
            write_jsonl(folder / "train.jsonl", rows(64))
            write_jsonl(folder / "validation.jsonl", rows(12))
        limits = {"max_source_length": 12, "max_target_length": 8, "max_new_tokens": 5}
        settings = {"epochs": 1, "batch_size": 16, "learning_rate": 5e-3, "backbone_learning_rate": 5e-3, "seed": 7}
        return parse_recipe(
            {
                "name": name,
                "backbone": str(backbones / name),
                "task": {"kind": "seq2seq", "data": str(folder), "prompt": "swap : ", **limits, **(task or {})},
                "adapter": adapter,
                "training": settings | training,
                "output": str(tmp_path / "runs"),
            },
            "test",
        )

    return build


# ---- columns and bad data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("target", "id", "source"), ("source", "target")),
        (("summary", "text"), ("text", "summary")),
        (("document", "summary"), ("document", "summary")),
        (("question", "answer"), ("question", "answer")),
        (("input", "output"), ("input", "output")),
    ],
)
def test_usual_columns_are_found(names: tuple[str, ...], expected: tuple[str, str]) -> None:
    found = SequenceToSequence.plan(Seq2SeqSettings(), table(dict.fromkeys(names, "a"))).settings
    assert (found.source_column, found.target_column) == expected


def test_a_named_column_finds_its_partner_or_asks() -> None:
    made = table({"text": "a", "summary": "b", "question": "c", "answer": "d"})
    found = SequenceToSequence.plan(Seq2SeqSettings(source_column="question"), made).settings
    assert found.target_column == "answer"
    with pytest.raises(DataError, match=r"holds the source text\? Set task\.source_column"):
        SequenceToSequence.plan(Seq2SeqSettings(), table({"en": "a", "de": "b"}))
    with pytest.raises(DataError, match=r"holds the target text\? Set task\.target_column"):
        SequenceToSequence.plan(Seq2SeqSettings(source_column="en"), table({"en": "a", "de": "b"}))
    with pytest.raises(DataError, match=r"no column 'sumary'. Did you mean 'summary'"):
        SequenceToSequence.plan(Seq2SeqSettings(source_column="text", target_column="sumary"), made)


@pytest.mark.parametrize("column", ["source", "target"])
@pytest.mark.parametrize(("cell", "expected"), [(" ", "the text is empty"), (None, "got nothing"), (3, "got int 3")])
def test_empty_texts_are_named(column: str, cell: Any, expected: str) -> None:
    bad = table({"source": "a", "target": "b"}, {"source": "a", "target": "b", column: cell})
    with pytest.raises(DataError, match=rf"f\.jsonl, line 2, column '{column}': .*{expected}"):
        plan().check(bad)


def test_settings_that_cannot_be_are_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="set examples instead"):
        make(task={"shots": 3})
    with pytest.raises(DataError, match=r"task\.score names 'exact_match'.*Metrics: loss, perplexity"):
        fit(make(task={"generate": False, "score": "exact_match"}))
    with pytest.raises(DataError, match=r"task\.max_source_length is 64, but the backbone has 32 positions"):
        fit(make("bart", task={"max_source_length": 64}))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(DataError, match="--pair"):
        plan().from_texts(["a"], ["b"])


# ---- encoding ----------------------------------------------------------------------------------------------------


def test_prompts_stand_in_front_and_targets_are_padded_with_what_is_ignored(tokenizer: PreTrainedTokenizerFast) -> None:
    task = plan(prompt="copy : ")
    features = task.encode(["a b", "c"], tokenizer, ["a b", "c"])
    assert tokenizer.decode(features[0]["input_ids"]) == "copy : a b </s>"
    assert tokenizer.decode(features[1]["labels"]) == "c </s>"
    batch = task.collator(tokenizer)(list(features))
    assert batch["labels"].tolist()[1][-1] == IGNORED
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert "labels" not in task.collator(tokenizer)(list(task.encode(["a b", "c"], tokenizer)))


def test_targets_are_never_padded_in_front(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "padding_side", "left")
    task = plan()
    batch = task.collator(tokenizer)(list(task.encode(["a b", "c"], tokenizer, ["a b", "c"])))
    assert batch["attention_mask"].tolist()[1] == [0, 1, 1]
    assert batch["labels"].tolist()[1][-1] == IGNORED


def test_long_texts_are_cut_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    task = plan()
    made = [{"source": "a " * 40, "target": "b " * 40}, {"source": "a", "target": "b"}]
    examples = task.check(table(*made))
    features = task.encode(examples.inputs, tokenizer, examples.targets)
    assert [len(ids) for ids in features["labels"]] == [8, 2]
    assert task.left_out(examples, features) == (
        "1 of 2 training sources fill task.max_source_length; what is longer was cut",
        "1 of 2 training targets fill task.max_target_length; what is longer was cut",
    )
    assert task.left_out(examples.take([1]), features.select([1])) == ()


# ---- metrics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("size", [1, 4, 12])
def test_loss_is_the_mean_over_target_tokens_whatever_the_batches(
    tokenizer: PreTrainedTokenizerFast, name: str, size: int
) -> None:
    torch.manual_seed(0)
    model, task = BUILD[name]().eval(), plan(generate=False)
    examples = task.check(table(*rows(12)))
    features = task.judged(examples, tokenizer)
    values = task.evaluate(examples, features, infer(model, task, features, tokenizer, batch_size=size))
    total = tokens = 0.0
    for source, target in zip(examples.inputs, examples.targets, strict=True):  # transformers' own loss, row by row
        labels = tokenizer(target, return_tensors="pt")["input_ids"]
        total += model(**tokenizer(source, return_tensors="pt"), labels=labels).loss.item() * labels.numel()
        tokens += labels.numel()
    assert set(values) == {"loss", "perplexity"} == set(task.metrics)
    assert values["loss"] == pytest.approx(total / tokens, abs=1e-5)
    assert values["perplexity"] == pytest.approx(np.exp(total / tokens), rel=1e-4)


def test_exact_match_ignores_white_space_around_texts_alone() -> None:
    from pelton.tasks.base import Examples
    from pelton.tasks.seq2seq import Written

    task = plan()
    examples = Examples(["1", "2", "3", "4"], [" a b ", "a b", "a  b", "A b"])
    values = task.evaluate(examples, None, [Written("a b", 1.0, 2)] * 4)
    assert (values["exact_match"], values["loss"]) == (0.5, 0.5)
    assert task.metrics == tuple(values)
    assert task.score(values) == -0.5  # less loss is better
    assert plan(score="exact_match").score(values) == 0.5


# ---- models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("beams", [1, 3])
def test_adapted_models_write_what_the_plain_ones_do(tokenizer: PreTrainedTokenizerFast, name: str, beams: int) -> None:
    """A fresh LoRA and bottleneck add nothing, so that generation through PEFT must agree with plain generation."""
    torch.manual_seed(0)
    model, task = BUILD[name]().eval(), plan(num_beams=beams, max_new_tokens=4)
    model.generation_config.suppress_tokens = list(range(len(SPECIAL)))  # letters alone: no empty texts
    sources = [row["source"] for row in rows(6)]
    features = task.encode(sources, tokenizer)
    expected = [one.text for one in infer(model, task, features, tokenizer, batch_size=6)]
    assert all(expected)
    config = PeltonConfig(methods=GATED["methods"], gate=GATED["gate"])
    adapted = attach(model, config, [], SequenceToSequence.peft_type)
    assert isinstance(adapted, PeftModelForSeq2SeqLM)
    assert [one.text for one in infer(adapted, task, features, tokenizer, batch_size=6)] == expected
    plain = model.generate(**tokenizer(sources[0], return_tensors="pt"), num_beams=beams, max_new_tokens=4)
    assert tokenizer.decode(plain[0], skip_special_tokens=True).strip() == expected[0]


@pytest.mark.parametrize("name", BUILD)
def test_gates_are_recorded_of_tokens_and_not_of_padding(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    torch.manual_seed(0)
    task = plan()
    model = attach(BUILD[name](), PeltonConfig(methods=GATED["methods"], gate=GATED["gate"]), [], task.peft_type)
    batch = task.collator(tokenizer)(list(task.encode(["a b", "c"], tokenizer, ["a b d", "c"])))
    with record_gates(model) as log:
        model.eval()(**batch)
    frame = log.to_frame()
    decoded = frame[frame.block.str.contains("decoder")]
    assert decoded.groupby("example").token.nunique().tolist() == [4, 2]


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("adapter", [GATED, None], ids=["gated", "whole"])
def test_a_loaded_run_writes_what_the_trained_one_does(
    make: Callable[..., Any], name: str, adapter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(make(name, adapter, {"num_beams": 2}))
    folder = run.folder
    assert folder.phase == "finished"
    assert yaml.safe_load(folder.recipe.read_text())["task"]["source_column"] == "source"
    metrics = folder.read("metrics")
    assert set(metrics["validation"]) == {"exact_match", "loss", "perplexity", "score"}
    if adapter is not None:
        assert metrics["parameters"]["share"] < 0.5
        frame = pd.read_parquet(folder.gate_values)
        assert sorted(set(frame["example"])) == list(range(12))
        assert {"encoder" in block for block in frame["block"]} == {True, False}
    loaded = Run.load(folder.path)
    sources = [row["source"] for row in rows(12)]
    found = loaded.predict(sources)
    assert found == run.predict(sources)
    assert all(isinstance(one, TextPrediction) for one in found)
    assert [one.source for one in found] == sources
    assert loaded.evaluate(loaded.examples()) == pytest.approx(metrics["validation"], abs=1e-6)
    capsys.readouterr()
    assert pelton(["predict", str(folder.path), "--text", sources[0], "--text", sources[1]]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == [one.text for one in found[:2]]
    assert pelton(["eval", str(folder.path)]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(metrics["validation"]["loss"], abs=1e-6)


def test_evaluation_may_leave_generation_out(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be generated")

    recipe = make(task={"generate": False})
    with monkeypatch.context() as patch:
        patch.setattr("pelton.tasks.seq2seq.SequenceToSequence._write", refuse)
        run = fit(recipe)
    assert set(run.folder.read("metrics")["validation"]) == {"loss", "perplexity", "score"}
    monkeypatch.setattr("pelton.tasks.seq2seq.SequenceToSequence._write", lambda *_: ["written"])
    assert run.predict(["a b"]) == [TextPrediction("a b", "written")]  # prediction writes all the same


def test_the_best_checkpoint_is_that_of_the_lowest_loss(make: Callable[..., Any]) -> None:
    run = fit(make(task={"generate": False}, epochs=3))
    history = [json.loads(line) for line in run.folder.history.read_text().splitlines()]
    judged = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    metrics = run.folder.read("metrics")
    assert metrics["best_step"] == min(judged, key=judged.__getitem__)
    assert metrics["validation"]["loss"] == pytest.approx(min(judged.values()), abs=1e-5)


def test_an_adapter_lowers_the_loss(make: Callable[..., Any]) -> None:
    run = fit(make(task={"generate": False}, epochs=8, learning_rate=1e-2))
    history = [json.loads(line) for line in run.folder.history.read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert run.folder.read("metrics")["validation"]["loss"] < 0.7 * losses[0], losses


@pytest.mark.parametrize("way", [{"memory_map": True}, {"streaming": True, "validation": "validation"}])
def test_training_rows_may_stay_on_disk(make: Callable[..., Any], way: dict[str, Any]) -> None:
    run = fit(make(task={"generate": False, **way}, max_steps=3))
    assert run.folder.read("metrics")["steps"] == 3
    with pytest.raises(RecipeError, match=r"oversample draws examples by their class, and those of seq2seq do not"):
        fit(make(batching={"oversample": True}))


def test_a_whole_model_learns_to_swap(make: Callable[..., Any]) -> None:
    run = fit(make(adapter=None, epochs=20, evaluate_every=40))
    values = run.folder.read("metrics")["validation"]
    assert values["exact_match"] > 0.6, values


def test_rows_are_judged_alike_alone_and_together(make: Callable[..., Any]) -> None:
    run = fit(make())
    examples = run.examples()
    features = run.task.judged(examples, run.processor)
    together = run._infer(features)
    alone = [run._infer(features.select([place]))[0] for place in range(len(examples))]
    np.testing.assert_allclose([one.loss for one in together], [one.loss for one in alone], atol=1e-5)
    assert [one.text for one in together] == [one.text for one in alone]
