"""How good predictions are, by scikit-learn, SciPy and seqeval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score as entity_precision
from seqeval.metrics import recall_score as entity_recall
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, roc_auc_score


def softmax(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Returns probabilities [B, classes]."""
    return np.exp(log_softmax(logits, axis=-1))  # type: ignore[no-any-return]


BINARY = ("f1", "matthews", "auroc")


def class_metric_names(classes: int) -> tuple[str, ...]:
    """Returns what `class_metrics` gives for a number of classes."""
    return ("accuracy", "macro_f1", *(BINARY if classes == 2 else ()), "loss")


def class_metrics(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> dict[str, float]:
    """Returns accuracy, macro F1 and mean cross-entropy; of two classes also F1 of class 1, Matthews and the ROC area.

    The area needs no threshold; where only one class occurs it does not exist, and is NaN.

    Args:
        logits: [B, classes].
        labels: [B].
    """
    predicted = logits.argmax(axis=-1)
    values = {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
    }
    if logits.shape[1] == 2:
        both = np.unique(labels).size == 2
        values["f1"] = float(f1_score(labels, predicted, average="binary", zero_division=0.0))
        values["matthews"] = float(matthews_corrcoef(labels, predicted))
        values["auroc"] = float(roc_auc_score(labels, logits[:, 1] - logits[:, 0])) if both else float("nan")
    return {**values, "loss": cross_entropy(logits, labels)}


def scope_metrics(
    probabilities: NDArray[np.floating], targets: NDArray[np.integer], threshold: float, out: int
) -> dict[str, float]:
    """Returns how well rows are classified, and those that belong to no class rejected.

    A row is rejected when its largest probability is below `threshold`. `accuracy` and `in_scope_accuracy` are shares
    of the rows in scope that are predicted right, with rejected ones wrong and with none rejected; `macro_f1` is over
    all rows, with rejection as one more class; `oos_recall` is the share of rows out of scope that are rejected, and
    `oos_auroc` the area under the ROC curve of one minus the largest probability, which needs no threshold. What needs
    rows in (or out of) scope is NaN where there are none.

    Args:
        probabilities: [B, classes].
        targets: [B], `out` for rows out of scope.
        threshold: Rows below are rejected.
        out: Marks what belongs to no class.
    """
    largest, likeliest = probabilities.max(axis=1), probabilities.argmax(axis=1)
    predicted, inside = np.where(largest < threshold, out, likeliest), targets != out
    some_in, some_out = bool(inside.any()), bool((~inside).any())
    nan = float("nan")
    return {
        "accuracy": float(accuracy_score(targets[inside], predicted[inside])) if some_in else nan,
        "in_scope_accuracy": float(accuracy_score(targets[inside], likeliest[inside])) if some_in else nan,
        "macro_f1": float(f1_score(targets, predicted, average="macro", zero_division=0.0)),
        "oos_recall": float((predicted[~inside] == out).mean()) if some_out else nan,
        "oos_auroc": float(roc_auc_score(~inside, 1.0 - largest)) if some_in and some_out else nan,
    }


def regression_metrics(values: NDArray[np.floating], targets: NDArray[np.floating]) -> dict[str, float]:
    """Returns Pearson's and Spearman's correlations and the root mean squared error.

    A correlation with constant predictions (or targets) does not exist; it counts as 0.
    """
    constant = np.ptp(values) == 0 or np.ptp(targets) == 0
    return {
        "pearson": 0.0 if constant else float(pearsonr(values, targets).statistic),
        "spearman": 0.0 if constant else float(spearmanr(values, targets).statistic),
        "rmse": float(np.sqrt(np.mean((values - targets) ** 2))),
    }


def pixel_counts(labels: NDArray[np.integer], predicted: NDArray[np.integer], classes: int) -> NDArray[np.integer]:
    """Counts pixels by their class (rows) and the class they are taken for (columns), [classes, classes].

    Args:
        labels: Any shape; negative ones do not count.
        predicted: As many.
        classes: How many there are.
    """
    seen = labels >= 0
    pairs = labels[seen] * classes + predicted[seen]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def region_metric_names(names: Sequence[str]) -> tuple[str, ...]:
    """Returns what `region_metrics` gives for classes."""
    return ("mean_iou", "pixel_accuracy", "loss", *(f"iou_{name}" for name in names))


def region_metrics(counts: NDArray[np.integer], loss: float, names: Sequence[str]) -> dict[str, float]:
    """Returns how well pixels are classified.

    The IoU of a class is the number of pixels that are it and are taken for it, over that of pixels that are or are
    taken for it; of a class that is neither it does not exist, and is NaN. The mean is over those that exist.

    Args:
        counts: What `pixel_counts` gave, summed over a set.
        loss: Sum of the pixels' cross-entropies.
        names: Of the classes.
    """
    right, either = np.diag(counts), counts.sum(axis=0) + counts.sum(axis=1) - np.diag(counts)
    total = int(counts.sum())
    ious = np.full(len(names), np.nan)
    np.divide(right, either, out=ious, where=either > 0)
    values = {
        "mean_iou": float(np.nanmean(ious)) if total else float("nan"),
        "pixel_accuracy": float(right.sum() / total) if total else float("nan"),
        "loss": loss / total if total else float("nan"),
    }
    return {**values, **{f"iou_{name}": float(iou) for name, iou in zip(names, ious, strict=True)}}


def cross_entropy_sum(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Sums the negative log-likelihoods of labels [Y, X] under logits [classes, Y, X]; negative labels do not count."""
    seen = labels >= 0
    rows = logits[:, seen].astype(np.float64)  # [classes, pixels]
    return float(-log_softmax(rows, axis=0)[labels[seen], np.arange(rows.shape[1])].sum())


def cross_entropy(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Returns the mean negative log-likelihood of labels [B] under logits [B, classes], in nats."""
    return float(-log_softmax(logits.astype(np.float64), axis=-1)[np.arange(len(labels)), labels].mean())


def tag_metrics(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], entities: bool) -> dict[str, float]:
    """Returns the scores of tags, one list a sentence.

    Args:
        true: The right tags.
        predicted: The model's, as many.
        entities: Whether tags mark entities, which are scored as conlleval does (micro F1 over whole entities).
    """
    flat_true = [tag for tags in true for tag in tags]
    flat = [tag for tags in predicted for tag in tags]
    accuracy = {"accuracy": float(accuracy_score(flat_true, flat))}
    if not entities:
        return {"macro_f1": float(f1_score(flat_true, flat, average="macro", zero_division=0.0)), **accuracy}
    both = [list(map(list, true)), list(map(list, predicted))]
    return {
        "f1": float(entity_f1(*both, zero_division=0)),
        "precision": float(entity_precision(*both, zero_division=0)),
        "recall": float(entity_recall(*both, zero_division=0)),
        **accuracy,
    }
