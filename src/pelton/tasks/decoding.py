"""A language model over one batch: judged on responses that are given, or answering prompts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchEncoding

from pelton.tasks.completions import IGNORED
from pelton.tasks.packing import collate_packed, pad


class Judged(NamedTuple):
    """How well a model says one response: summed negative log-likelihood (nats), tokens, and likeliest tokens."""

    nll: float
    tokens: int
    right: int


class Answer(NamedTuple):
    """What a model says to one prompt, and whether it came to its end."""

    text: str
    finished: bool


class Prompts(BatchEncoding):  # type: ignore[misc]
    """A batch that is to be answered, padded on the left, with the tokenizer that reads the answers."""

    tokenizer: Any


def collate(features: Sequence[dict[str, Any]], tokenizer: Any) -> BatchEncoding:
    """Makes a batch: sequences to learn padded on the right, packed ones without a mask, prompts alone on the left."""
    if "position_ids" in features[0]:
        return BatchEncoding(collate_packed(features, tokenizer.pad_token_id))
    answered = "labels" in features[0]
    rows = [row["input_ids"] for row in features]
    batch = {
        "input_ids": pad(rows, tokenizer.pad_token_id, left=not answered),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, left=not answered),
    }
    if answered:
        return BatchEncoding({**batch, "labels": pad([row["labels"] for row in features], IGNORED)})
    prompts = Prompts(batch)
    prompts.tokenizer = tokenizer
    return prompts


def judge(model: Any, batch: Mapping[str, Any]) -> list[Judged]:
    """Runs one batch; logits exist only where some row of the batch has something to learn, and not for long."""
    targets: Tensor = batch["labels"][:, 1:]  # [B, T - 1]; the logits at t speak of the token at t + 1
    places = (targets != IGNORED).any(dim=0).nonzero()[:, 0]  # [K]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if _keeps_some(model):
        logits = model(**inputs, use_cache=False, logits_to_keep=places).logits  # [B, K, V]
    else:
        logits = model(**inputs, use_cache=False).logits[:, places]
    return [_judge_row(row, target) for row, target in zip(logits, targets[:, places], strict=True)]


def _judge_row(logits: Tensor, targets: Tensor) -> Judged:
    """Judges one row: logits [K, V], targets [K]."""
    learned = targets != IGNORED
    logits, targets = logits[learned].float(), targets[learned]
    nll = F.cross_entropy(logits, targets, reduction="sum")
    return Judged(float(nll), len(targets), int((logits.argmax(dim=-1) == targets).sum()))


def _keeps_some(model: Any) -> bool:
    """Tells whether a language model can compute the logits of some places alone."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def answer(model: Any, batch: Prompts, limit: int, temperature: float = 0.0) -> list[Answer]:
    """Generates greedily, or by draws at a temperature above 0; what follows the end of text is padding.

    Draws are seeded row by row, so that they are the same every time and with every neighbour.
    """
    tokenizer = batch.tokenizer
    end = tokenizer.eos_token_id
    options = {"max_new_tokens": limit, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    ids = (
        _drawn(model, batch, temperature, options)
        if temperature
        else model.generate(**batch, do_sample=False, **options).tolist()
    )
    answers = []
    for row in ids:
        said = row[batch["input_ids"].shape[1] :]
        finished = end in said
        text = tokenizer.decode(said[: said.index(end)] if finished else said, skip_special_tokens=True)
        answers.append(Answer(text, finished))
    return answers


def _drawn(model: Any, batch: Prompts, temperature: float, options: dict[str, Any]) -> list[list[int]]:
    rows = []
    for row in range(len(batch["input_ids"])):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            rows += model.generate(**one, do_sample=True, temperature=temperature, top_k=0, **options).tolist()
    return rows
