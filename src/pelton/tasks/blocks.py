"""Running text as one stream of tokens, cut into blocks: to learn from, and to judge every token once.

The stream has the end-of-text token in front of each text. The first token of a block is never learned or judged, since
nothing comes before it, so blocks share tokens: one that follows another without overlap begins with its last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pelton.tasks.completions import IGNORED, as_dataset


def stream(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """Returns all texts as one list of tokens, the end of text in front of each."""
    tokens: list[int] = []
    for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]:
        tokens += [tokenizer.eos_token_id, *ids]
    return tokens


def to_learn(tokens: Sequence[int], size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields blocks as (begin, first that counts, end): one every `stride` tokens, and one that ends with the text."""
    starts = [*range(0, len(tokens) - size, stride), max(len(tokens) - size, 0)]
    for begin in starts:
        yield begin, begin + 1, min(begin + size, len(tokens))


def to_judge(tokens: Sequence[int], size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields blocks likewise, in which every token but the text's first counts once.

    All but the first block count their last `stride` tokens: what is before these is context.
    """
    first = 1
    while first < len(tokens):
        end = min(first + (size - 1 if first == 1 else stride), len(tokens))
        yield max(end - size, 0), first, end
        first = end


def features(tokens: Sequence[int], blocks: Iterator[tuple[int, int, int]], unknown: int | None) -> Any:
    """Returns blocks as a `datasets.Dataset`: tokens, labels, and how many of those that count are `unknown`."""
    found: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "unknown": []}
    for begin, first, end in blocks:
        ids, counted = list(tokens[begin:end]), list(tokens[first:end])
        found["input_ids"].append(ids)
        found["labels"].append([IGNORED] * (first - begin) + counted)
        found["unknown"].append([counted.count(unknown) if unknown is not None else 0])
    return as_dataset(found)
