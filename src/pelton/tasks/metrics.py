"""How good predictions are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score


def classification_metrics(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> dict[str, float]:
    """Returns accuracy and macro F1, and with two classes the F1 of class 1.

    Args:
        logits: [B, classes].
        labels: [B].
    """
    predicted = logits.argmax(axis=-1)
    scores = {
        "accuracy": accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro", zero_division=0.0),
    }
    if logits.shape[-1] == 2:
        scores["f1"] = f1_score(labels, predicted, average="binary", zero_division=0.0)
    return {name: float(score) for name, score in scores.items()}
