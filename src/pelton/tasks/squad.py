"""How good answers are: exact match and F1 as the official SQuAD scripts compute them, from 0 to 1.

Rajpurkar et al. 2016 (arXiv 1606.05250), `evaluate-v1.1.py`; and 2018 (arXiv 1806.03822), `evaluate-v2.0.py`, where a
question may have no answer. They differ where nothing is left of a text: version 1.1 gives an F1 of 0 also to two of
those, version 2.0 gives them 1, and leaves right answers out that are nothing but articles and punctuation.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Returns a text in lower case, without ASCII punctuation, articles and surplus white space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, right: str) -> float:
    """Returns 1 where two answers are the same once normalised, else 0."""
    return float(normalise(answer) == normalise(right))


def word_f1(answer: str, right: str, *, empty: float = 0.0) -> float:
    """Returns the F1 of an answer's words; `empty` is what two answers without words get."""
    said, wanted = normalise(answer).split(), normalise(right).split()
    if not said and not wanted:
        return empty
    same = sum((Counter(said) & Counter(wanted)).values())
    return 2 * same / (len(said) + len(wanted))


def squad_metrics(answers: Sequence[str], right: Sequence[Sequence[str]], unanswerable: bool) -> dict[str, float]:
    """Returns the means over questions of the best exact match and F1 over the right answers.

    Args:
        answers: One a question; empty where the model gives none.
        right: The right answers of each; none where the question has no answer.
        unanswerable: Whether questions may have no answer. Then version 2.0 holds, and both kinds of questions have
            scores of their own; those of a kind that does not occur are NaN.
    """
    answered = np.array([bool(texts) for texts in right])
    if unanswerable:
        right = [[text for text in texts if normalise(text)] or [""] for texts in right]
    pairs = list(zip(answers, right, strict=True))
    exact = np.array([max(exact_match(said, text) for text in texts) for said, texts in pairs])
    empty = float(unanswerable)
    f1 = np.array([max(word_f1(said, text, empty=empty) for text in texts) for said, texts in pairs])
    values = {"exact_match": float(exact.mean()), "f1": float(f1.mean())}
    if not unanswerable:
        return values
    return {
        **values,
        "answered_exact_match": _mean(exact[answered]),
        "answered_f1": _mean(f1[answered]),
        "unanswered_exact_match": _mean(exact[~answered]),
    }


def _mean(values: NDArray[np.floating]) -> float:
    return float(values.mean()) if values.size else float("nan")
