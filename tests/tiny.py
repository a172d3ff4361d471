"""A tiny random BERT with a tokenizer, and data that it can learn, on disk."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

COLOURS = {"warm": ["good", "great", "fine", "lovely"], "cold": ["bad", "awful", "poor", "dull"]}
NOUNS = ["film", "song", "day", "meal"]
WORDS = [*COLOURS["warm"], *COLOURS["cold"], *NOUNS, "the", "was", "very", "and"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def save_tokenizer(folder: Path) -> None:
    """Saves a word-level tokenizer that marks texts and pairs as BERT's does."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


def bert_config(**changes: Any) -> BertConfig:
    """Returns the config of a two-block BERT."""
    values = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }
    return BertConfig(**{**values, **changes})


def save_backbone(folder: Path) -> Path:
    """Saves a random BERT with its tokenizer."""
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def sentences(count: int) -> list[dict[str, Any]]:
    """Returns rows whose label follows from one word, in both classes alternately."""
    rows = []
    for index in range(count):
        label = ("warm", "cold")[index % 2]
        word = COLOURS[label][index // 2 % 4]
        rows.append({"text": f"the {NOUNS[index // 8 % 4]} was {'very ' * (index % 3)}{word}", "label": label})
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes JSON lines, gzipped by the name."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes a CSV file with a header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def save_data(folder: Path, train: int = 48, validation: int = 16, test: int = 16) -> Path:
    """Writes a folder with the splits whose size is not 0."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in {"train": train, "validation": validation, "test": test}.items():
        if count:
            write_jsonl(folder / f"{name}.jsonl", sentences(count))
    return folder


def recipe_values(backbone: Path, data: Path, output: Path, **training: Any) -> dict[str, Any]:
    """Returns a small recipe that trains the whole tiny backbone; set `adapter` to attach one."""
    return {
        "name": "tiny",
        "backbone": str(backbone),
        "task": {"data": str(data), "head": "mean", "max_length": 16},
        "adapter": None,
        "training": {
            "epochs": 2,
            "batch_size": 8,
            "backbone_learning_rate": 1e-3,
            "log_every": 2,
            "seed": 7,
            "trackers": [],
        }
        | training,
        "output": str(output),
    }
