"""Passes over runs of every kind of task: which training rows they read, and how."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fits import Make
from pelton.compress.rows import ROWS, training_batches
from pelton.compress.runs import freeze_run, prune_run
from pelton.insight.sheets import save_predictions
from pelton.tasks.load import load_task
from pelton.training.fit import fit
from pelton.training.run import Run
from tiny import WORDS, sentences, write_jsonl

SPECIAL = ["<pad>", "<unk>", "</s>"]
VOCABULARY = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
TOKENS = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": 2}
HEADLESS = {"head": None, "max_length": None}


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**TOKENS, **sizes))


def bart() -> Any:
    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    widths = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
    special = {"bos_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    return BartForConditionalGeneration(BartConfig(**TOKENS, **sides, **widths, **special))


def llama() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**TOKENS, **sizes, max_position_embeddings=64, bos_token_id=None))


def saved(folder: Path, build: Any) -> Path:
    torch.manual_seed(0)
    build().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    inputs = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names).save_pretrained(folder)
    return folder


@pytest.fixture
def learn(make: Make, tmp_path: Path) -> Any:
    """Trains one epoch of a kind of task on one of the models above."""

    def run(build: Any, **task: Any) -> Run:
        data, folder = tmp_path / "pairs", saved(tmp_path / "model", build)
        data.mkdir()
        for name, count in (("train", 24), ("validation", 8)):
            rows = sentences(count)
            pairs = [{"source": row["text"], "target": "good great film"} for row in rows]
            asked = [{"prompt": row["text"], "response": "very good"} for row in rows]
            if task["kind"] == "text-lm":
                (data / f"{name}.txt").write_text(" ".join(row["text"] for row in rows))
            else:
                write_jsonl(data / f"{name}.jsonl", pairs if task["kind"] == "seq2seq" else asked)
        recipe = make(task={**HEADLESS, "data": str(data), **task}, epochs=1)
        return fit(recipe.model_copy(update={"backbone": str(folder)}))

    return run


def batches(run: Run, *, labelled: bool = False) -> list[Any]:
    run = Run.load(run.folder.path)
    return list(training_batches(run, load_task(run.recipe.task, run.recipe.training.seed), labelled=labelled))


def passes(run: Run) -> None:
    """Every pass that reads training rows runs."""
    prune_run(run.folder.path, by="taylor", keep=6)
    prune_run(run.folder.path, by="taylor", budget_latency=1000.0)
    freeze_run(run.folder.path)
    freeze_run(run.folder.path, "fit")
    assert Run.load(run.folder.path).model.peft_config["default"].gate_spec.kind == "frozen"


@pytest.mark.parametrize("build", [t5, bart])
def test_a_decoder_reads_the_targets(build: Any, learn: Any) -> None:
    run = learn(build, kind="seq2seq", max_source_length=16, max_target_length=8, max_new_tokens=3)
    wanted = [VOCABULARY[word] for word in ("good", "great", "film")]
    assert all(row[:3].tolist() == wanted for batch in batches(run) for row in batch["labels"])
    passes(run)


def test_prompts_are_read_with_their_responses(learn: Any) -> None:
    run = learn(llama, kind="causal-lm", max_length=24, max_new_tokens=3, packing=True)
    found = batches(run)
    assert sum(len(batch["input_ids"]) for batch in found) == 24  # a row each, though training packs them
    good = VOCABULARY["good"]
    assert all(
        good in row[labels != -100] for b in found for row, labels in zip(b["input_ids"], b["labels"], strict=True)
    )
    passes(run)


def test_running_text_is_read_in_blocks(learn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = learn(llama, kind="text-lm", block_size=8, max_new_tokens=4)
    whole = batches(run)
    assert sum(len(batch["input_ids"]) for batch in whole) > 10
    passes(run)
    monkeypatch.setattr("pelton.compress.rows.ROWS", 3)
    few = batches(run)
    assert sum(len(batch["input_ids"]) for batch in few) == 3
    assert few[0]["input_ids"][0].tolist() == whole[0]["input_ids"][0].tolist()


def test_rows_that_are_sorted_by_class_are_read_at_equal_distances(make: Make, tmp_path: Path) -> None:
    recipe = make(epochs=1, batch_size=64, max_steps=1)
    rows = sorted(sentences(2 * ROWS + 8), key=lambda row: str(row["label"]))
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    run = fit(recipe)
    found = Counter(label for batch in batches(run, labelled=True) for label in batch["labels"].tolist())
    assert dict(found) == {0: ROWS // 2, 1: ROWS // 2}
    assert sum(len(batch["input_ids"]) for batch in batches(run)) == ROWS


# ---- pictures of predictions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    what: str


@pytest.mark.parametrize(
    ("stems", "names"),
    [
        (["a", "a", "a-2"], ["a", "a-3", "a-2"]),
        (["a-2", "a", "a", "a"], ["a-2", "a", "a-3", "a-4"]),
        (["a", "b", "a"], ["a", "b", "a-2"]),
        (["a", "a", "a-2", "a-2"], ["a", "a-3", "a-2", "a-2-2"]),
    ],
)
def test_pictures_of_one_name_are_told_apart(
    stems: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    monkeypatch.setattr("pelton.insight.sheets.drawn", lambda picture, prediction: {"mask": pixels})
    inputs: list[Any] = [SimpleNamespace(stem=stem) for stem in stems]
    written = save_predictions(inputs, [Said("something")] * len(stems), tmp_path)
    assert [path.name for path in written[1:]] == [f"{name}-mask.png" for name in names]
