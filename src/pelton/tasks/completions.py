"""Rendered prompts and responses become tokens, cut to what fits, with the labels that are learned.

Labels follow transformers: one a token, shifted by the model, -100 where nothing is learned. The first token of a
sequence is never learned, since nothing comes before it: packed sequences stay apart, and the labels that are left are
exactly the predictions that count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets

from pelton.tasks.conversations import Prompt
from pelton.tasks.templates import Template

IGNORED = -100


@dataclass(frozen=True)
class Limits:
    """How long a sequence may be, which end of a longer one is kept, and whether the prompt is learned too."""

    max_length: int
    keep: Literal["head", "tail"]
    learn_prompt: bool


@dataclass(frozen=True)
class Completion:
    """Tokens of a prompt and its response.

    Attributes:
        ids: The tokens.
        labels: What is learned of them.
        cut: How many tokens were cut off.
        lost: How many of these were the response's.
    """

    ids: list[int]
    labels: list[int]
    cut: int
    lost: int

    @property
    def learned(self) -> int:
        """The number of tokens that are learned."""
        return sum(label != IGNORED for label in self.labels)


def complete(
    prompts: Sequence[Prompt], responses: Sequence[str], tokenizer: Any, template: Template, limits: Limits
) -> list[Completion]:
    """Tokenises prompts and their responses; every response ends with the end of text.

    Prompt and response are tokenised apart, as in prediction, where only the prompt is there.
    """
    rendered = [template.render(*pair, tokenizer) for pair in zip(prompts, responses, strict=True)]
    start = start_tokens(tokenizer) if template.starts else []
    given = _tokenise(tokenizer, [before for before, _ in rendered])
    learned = _tokenise(tokenizer, [after for _, after in rendered])
    end = [tokenizer.eos_token_id]
    return [_cut(start, before, after + end, limits) for before, after in zip(given, learned, strict=True)]


def ask(prompts: Sequence[Prompt], tokenizer: Any, template: Template, room: int) -> tuple[list[list[int]], list[int]]:
    """Tokenises prompts alone, for prediction.

    Args:
        prompts: What is to be answered.
        tokenizer: The backbone's.
        template: As in training.
        room: Tokens that a prompt may have; of a longer one the end is kept, which the answer follows.

    Returns:
        The tokens, and how many of each prompt were cut off.
    """
    start = start_tokens(tokenizer) if template.starts else []
    given = _tokenise(tokenizer, [template.render(prompt, None, tokenizer)[0] for prompt in prompts])
    room = max(room - len(start), 1)
    return [start + ids[-room:] for ids in given], [max(len(ids) - room, 0) for ids in given]


def start_tokens(tokenizer: Any) -> list[int]:
    """Returns what the tokenizer puts in front of every text, such as `<s>`."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    places = [place for place in range(len(whole)) if whole[place : place + len(bare)] == bare]
    return list(whole[: places[0]]) if bare and places else []


def _tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def _cut(start: list[int], given: list[int], learned: list[int], limits: Limits) -> Completion:
    """Cuts a sequence; the start of text stays whichever end is kept."""
    body = given + learned
    known = [limits.learn_prompt] * len(given) + [True] * len(learned)
    room = max(limits.max_length - len(start), 1)
    cut = max(len(body) - room, 0)
    if limits.keep == "tail":
        lost = max(cut - len(given), 0)
        body, known = body[cut:], known[cut:]
    else:
        lost = min(cut, len(learned))
        body, known = body[:room], known[:room]
    labels = [token if learn else IGNORED for token, learn in zip(body, known, strict=True)]
    ids, labels = start + body, [IGNORED] * len(start) + labels
    return Completion(ids, [IGNORED, *labels[1:]], cut, lost)


def columns(completions: Sequence[Completion]) -> dict[str, list[list[int]]]:
    """Returns the columns of sequences one by one: tokens, labels, and how much each lost."""
    return {
        "input_ids": [one.ids for one in completions],
        "labels": [one.labels for one in completions],
        "cut": [[one.cut] for one in completions],
        "lost": [[one.lost] for one in completions],
    }


def as_dataset(found: dict[str, list[list[int]]]) -> Any:
    """Returns columns as a `datasets.Dataset`, whose types are the same where there are no rows."""
    kind = datasets.Features({name: datasets.Sequence(datasets.Value("int64")) for name in found})
    return datasets.Dataset.from_dict(found, features=kind)
