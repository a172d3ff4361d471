"""A small language model from scratch, then taught another kind of text: Pelton's default, LoRA alone, all weights.

A Llama-shaped model of about a million parameters learns Shakespeare's plays, then to answer questions of primary
school mathematics (GSM8K; loss on the answer only). Everything goes through recipes and `fit`, as in `pelton fit`.
Every method has the same examples, steps and batches; of two learning rates each, the one with the lower loss on
held-back training rows is reported on test rows. One JSON object a line: the backbone, the backbone on the questions
before it has seen any, every run, and each method's chosen one.

    python benchmarks/reference_lm.py --data FOLDER [--pretrain-steps 600] [--steps 150] [--out FILE.jsonl]

FOLDER has tiny_shakespeare/{train,validation}.txt.gz and gsm8k/{train,test}.jsonl.gz.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from pelton.training.fit import fit
from pelton.training.loading import parse_recipe
from pelton.training.prepare import prepare
from pelton.training.run import Run

PLAYS, QUESTIONS, VOCABULARY, END = 256, 384, 1024, "<|end|>"
"""Tokens of a sequence of either kind of text, and the tokenizer's."""
PIECE, TRAIN, VALIDATION, TEST = 500, 2000, 100, 200
"""Characters of a piece of a play, and how many questions are used."""

METHODS: dict[str, tuple[dict[str, Any] | None, str, tuple[float, float]]] = {
    "pelton": ({"preset": "default"}, "learning_rate", (3e-3, 1e-2)),
    "lora": ({"preset": "lora"}, "learning_rate", (3e-3, 1e-2)),
    "full": (None, "backbone_learning_rate", (1e-3, 3e-3)),
}
"""The adapter of each method, and the rates that it chooses from."""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder, options.out.open("a", buffering=1, encoding="utf-8") as file:
        for line in study(options, Path(folder)):
            print(json.dumps(line), flush=True)
            file.write(json.dumps(line) + "\n")


def study(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Trains the backbone and adapts it; yields what was measured."""
    plays = write_plays(options.data / "tiny_shakespeare", folder / "plays")
    questions = write_questions(options.data / "gsm8k", folder / "questions")
    random = write_backbone(folder / "random", plays / "train.jsonl")
    settings = {"max_steps": options.pretrain_steps, "backbone_learning_rate": 3e-3, "batch_size": 8}
    task = {"kind": "causal-lm", "data": str(plays), "max_length": PLAYS, "packing": True}
    run = fit(parse_recipe(_recipe("plays", random, task, None, settings, folder), "plays"))
    PreTrainedTokenizerFast.from_pretrained(random).save_pretrained(run.folder.model)
    yield {"stage": "backbone", **_measured(run)}
    task = {"kind": "causal-lm", "data": str(questions), "max_length": QUESTIONS, "keep": "tail"}
    recipe = _recipe("before", run.folder.model, task, None, {}, folder)
    yield {"stage": "before", **judge_untrained(recipe)}
    for method, (_, _, rates) in METHODS.items():
        lines = []
        for rate in rates:
            lines.append(one(method, rate, run.folder.model, task, options, folder))
            yield lines[-1]
        yield {**min(lines, key=lambda line: line["validation"]["loss"]), "stage": "chosen"}


def one(
    method: str, rate: float, backbone: Path, task: dict[str, Any], options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Adapts the backbone with one method at one rate."""
    adapter, key, _ = METHODS[method]
    settings = {"max_steps": options.steps, key: rate, "batch_size": 8}
    run = fit(parse_recipe(_recipe(method, backbone, task, adapter, settings, folder), method))
    return {"stage": "adapted", "method": method, "rate": rate, **_measured(run)}


def judge_untrained(values: dict[str, Any]) -> dict[str, Any]:
    """Judges the backbone on what it has not been taught yet."""
    prepared = prepare(parse_recipe(values, "before"))
    run = Run(None, prepared.recipe, prepared.data.task, prepared.processor, prepared.model)  # type: ignore[arg-type]
    return {split: run.evaluate(prepared.data.splits[split]) for split in ("validation", "test")}


def write_plays(source: Path, folder: Path) -> Path:
    """Writes pieces of plays: whole lines, up to `PIECE` characters."""
    for split in ("train", "validation"):
        with gzip.open(source / f"{split}.txt.gz", "rt", encoding="utf-8") as file:
            pieces = [""]
            for line in file:
                if len(pieces[-1]) + len(line) > PIECE:
                    pieces.append("")
                pieces[-1] += line
        _write(folder / f"{split}.jsonl", ({"text": piece} for piece in pieces if piece.strip()))
    return folder


def write_questions(source: Path, folder: Path) -> Path:
    """Writes the first rows of GSM8K: its training rows give training and validation, its test rows the test."""
    rows = {split: _read(source / f"{split}.jsonl.gz") for split in ("train", "test")}
    parts = {
        "train": rows["train"][:TRAIN],
        "validation": rows["train"][TRAIN : TRAIN + VALIDATION],
        "test": rows["test"][:TEST],
    }
    for split, some in parts.items():
        _write(folder / f"{split}.jsonl", some)
    return folder


def write_backbone(folder: Path, text: Path) -> Path:
    """Writes a random model, and a byte-level tokenizer made from the text that it will learn first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["text"] for row in _read(text)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _recipe(
    name: str,
    backbone: Path,
    task: dict[str, Any],
    adapter: dict[str, Any] | None,
    training: dict[str, Any],
    output: Path,
) -> dict[str, Any]:
    return {
        "name": name,
        "backbone": str(backbone),
        "task": task,
        "adapter": adapter,
        "training": {"schedule": "cosine", "evaluate_every": 75, "seed": 0, "eval_batch_size": 16} | training,
        "output": str(output / "runs"),
    }


def _measured(run: Run) -> dict[str, Any]:
    metrics = run.folder.read("metrics")
    kept = ("validation", "test", "steps", "best_step", "parameters", "train_seconds")
    return {name: metrics[name] for name in kept if name in metrics} | {"notes": run.folder.read("data")["notes"]}


def _read(path: Path) -> list[dict[str, Any]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.decode("utf-8").splitlines()]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A small language model, adapted three ways.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path(os.devnull))
    return parser.parse_args()


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(json.dumps({"stage": "done", "seconds": round(time.perf_counter() - start)}))
