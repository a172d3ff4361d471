"""Lengths: how many tokens a backbone reads, what is cut to fit, and what asks for more than there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

from fits import Make
from pelton.errors import DataError
from pelton.tasks.classification import ClassificationSettings, TextClassification
from pelton.tasks.labels import Labels
from pelton.tasks.positions import room, within
from pelton.tasks.texts import tokenise
from pelton.training.fit import fit
from pelton.training.loading import parse_recipe
from pelton.training.prepare import prepare
from pelton.training.run import Run
from tiny import recipe_values, save_data, save_tokenizer, write_jsonl

SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def test_a_model_reads_as_many_tokens_as_it_has_positions() -> None:
    assert room(RobertaModel(RobertaConfig(max_position_embeddings=34, pad_token_id=1, **SMALL))) == 32
    assert room(DebertaV2Model(DebertaV2Config(max_position_embeddings=34, **SMALL))) == 34
    relative = DebertaV2Config(
        max_position_embeddings=34, position_biased_input=False, relative_attention=True, **SMALL
    )
    assert room(DebertaV2Model(relative)) is None
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    assert room(BartModel(BartConfig(vocab_size=20, d_model=8, max_position_embeddings=34, **sizes))) == 34
    assert room(T5Model(T5Config(vocab_size=20, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2))) is None


def long_texts(folder: Path) -> Path:
    save_data(folder)
    for split in ("train", "validation", "test"):
        rows = [{"text": " ".join(["good", "film"] * 40), "label": "warm"}, {"text": "bad film", "label": "cold"}] * 8
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def test_texts_are_cut_where_positions_end(make: Make, backbone: Path, tmp_path: Path) -> None:
    values = recipe_values(backbone, long_texts(tmp_path / "long"), tmp_path / "runs", max_steps=1)
    del values["task"]["max_length"]
    run = fit(parse_recipe(values, "test"))  # the backbone has 32 positions
    assert Run.load(run.folder.path).task.settings.max_length == 32
    assert any("training texts fill task.max_length" in note for note in run.folder.read("data")["notes"])
    with pytest.raises(DataError, match=r"task.max_length is 40, but the backbone has 32 positions"):
        prepare(make(task={"data": str(tmp_path / "long"), "max_length": 40}))


@pytest.mark.parametrize("shorten", ["longest", "first", "second"])
@pytest.mark.parametrize("keep", ["head", "tail"])
def test_one_text_of_a_pair_is_cut_and_both_where_it_must_be(tmp_path: Path, shorten: Any, keep: Any) -> None:
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    settings = ClassificationSettings(data="d", max_length=10, shorten=shorten, keep=keep)
    pairs = [
        ("good", "bad"),
        (" ".join(["good"] * 12), "bad bad"),
        ("good", " ".join(["bad"] * 12)),
        (" ".join(["good"] * 12), " ".join(["bad"] * 12)),
    ]
    found = tokenise(pairs, tokenizer, settings)["input_ids"]
    assert [len(ids) for ids in found] == [5, 10, 10, 10]
    good, bad = (tokenizer.convert_tokens_to_ids(word) for word in ("good", "bad"))
    counts = [(ids.count(good), ids.count(bad)) for ids in found]
    assert counts[:3] == [(1, 1), (5, 2), (1, 6)]  # the long text is cut, whichever is to be: the other has no room
    assert sum(counts[3]) == 7
    few = tokenise([("good good good", "bad bad bad bad bad")], tokenizer, settings)["input_ids"][0]
    assert (few.count(good), few.count(bad)) == {"longest": (3, 4), "first": (2, 5), "second": (3, 4)}[shorten]


def test_computed_positions_go_on_where_training_ended() -> None:
    settings = ClassificationSettings(data="d", max_length=40)
    task = TextClassification(settings, Labels(("a", "b"), ids=False))
    small = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    rotary = LlamaModel(LlamaConfig(vocab_size=20, max_position_embeddings=32, **small))
    assert within(task, rotary) is task
    usual = TextClassification(ClassificationSettings(data="d"), task.labels)
    assert within(usual, rotary).settings.max_length == 32
    for learned in (
        RobertaModel(RobertaConfig(max_position_embeddings=34, pad_token_id=1, **SMALL)),
        GPT2Model(GPT2Config(vocab_size=20, n_positions=32, n_embd=8, n_layer=1, n_head=2)),
    ):
        with pytest.raises(DataError, match=r"task.max_length is 40, but the backbone has 32 positions"):
            within(task, learned)
