"""The best spans of a context, over the windows that it was cut into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Places = NDArray[np.integer]


class Span(NamedTuple):
    """Characters `start` to `end` of a context, with the sum of the logits of its first and last token."""

    start: int
    end: int
    score: float


class Window(NamedTuple):
    """What a model says of one window.

    Attributes:
        logits: [T, 2] for the start and the end of an answer.
        begins: [T] the character of the context at which each token begins, -1 where a token is not of the context.
        ends: [T] the character behind it.
        null: The token that stands for "no answer here".
    """

    logits: Array
    begins: Places
    ends: Places
    null: int


def best_spans(context: str, windows: Sequence[Window], count: int, longest: int) -> list[Span]:
    """Returns the best different spans over the windows of a context, best first, without white space around them.

    Args:
        context: The text.
        windows: One or more that cover it.
        count: How many spans are wanted.
        longest: Tokens that a span may have.
    """
    found: dict[tuple[int, int], float] = {}
    for window in windows:
        for start, end, score in zip(*_best_of(window, count, longest), strict=True):
            text = context[start:end]
            start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
            if start < end:  # overlapping windows have spans in common
                found[start, end] = max(score, found.get((start, end), -np.inf))
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return [Span(start, end, score) for (start, end), score in ranked[:count]]


def null_score(windows: Sequence[Window]) -> float:
    """Returns how much the windows speak for no answer: what the one that does so least gives it."""
    return min(float(window.logits[window.null].sum()) for window in windows)


def _best_of(window: Window, count: int, longest: int) -> tuple[list[int], list[int], list[float]]:
    """Returns begins, ends and scores of a window's best spans."""
    places = np.flatnonzero(window.begins >= 0)
    if not places.size:  # the tokenizer made nothing of this part of the context
        return [], [], []
    starts, ends = window.logits[places].astype(np.float64).T
    width = min(longest, len(places))
    behind = np.concatenate([ends, np.full(width - 1, -np.inf)])
    # [tokens, width]: the span from token i to token i + k; what reaches out of the window is -inf
    scores = starts[:, None] + np.lib.stride_tricks.sliding_window_view(behind, width)
    flat = scores.ravel()
    best = np.argpartition(-flat, min(count, flat.size) - 1)[:count]
    best = best[np.isfinite(flat[best])]
    first, length = np.divmod(best, width)
    begins, stops = window.begins[places[first]], window.ends[places[first + length]]
    return begins.tolist(), stops.tolist(), flat[best].tolist()
