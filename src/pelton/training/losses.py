"""Losses for classes that are not equally frequent or equally hard: class weights, focal loss, label smoothing.

Letters: N examples or tokens, C classes. q is the label's distribution (smoothed: 1 − ε on the label, ε/C everywhere),
w the classes' weights, p the model's probabilities:

    loss = Σ_n Σ_c q_nc w_c (1 − p_nc)^γ (−log p_nc) / Σ_n w_y(n)

γ = 0 is PyTorch's cross-entropy with weights and smoothing; γ > 0 is the focal loss of Lin et al. 2017 (arXiv
1708.02002, equation 5). What the labels mark with −100 does not count.

Beside it, for regions of images, the soft Dice loss (Milletari et al. 2016, arXiv 1606.04797, section 3, with sums in
place of squares): over all pixels n of a batch, and the mean over the classes that occur in its labels,

    1 − mean_c (2 Σ_n p_nc [y_n = c]) / (Σ_n p_nc + Σ_n [y_n = c])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pelton.errors import RecipeError
from pelton.tasks.base import Task
from pelton.training.sections import LossSettings

IGNORED = -100
LANGUAGE = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
REGIONS = "semantic-segmentation"
_TINY = 1e-7


class ClassLoss:
    """The loss of a recipe, for logits and labels of classes."""

    def __init__(
        self,
        settings: LossSettings,
        weights: Tensor | None,
        scores: Callable[[Tensor, Tensor], Tensor] = lambda logits, labels: logits,
    ) -> None:
        """Makes the loss.

        Args:
            settings: The recipe's.
            weights: [C], how much each class counts; all alike when None.
            scores: Makes of a model's logits and the labels [...] the logits [..., C].
        """
        self.scores, self.dice = scores, settings.dice
        self.gamma = settings.gamma if settings.kind == "focal" else 0.0
        self.smoothing = settings.label_smoothing
        self.weights = weights

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss, float32.

        Args:
            logits: [..., C], or what `scores` makes that of.
            labels: [...], ids of classes or −100.
        """
        rows, classes = self.scores(logits, labels).float().flatten(0, -2), labels.flatten()  # [N, C], [N]
        loss = self._of_classes(rows, classes)
        return loss + self.dice * dice(rows, classes) if self.dice else loss

    def _of_classes(self, rows: Tensor, classes: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights.to(rows.device)
        options: dict[str, Any] = {"ignore_index": IGNORED, "reduction": "sum"}
        total = _total(classes, weights)
        if not self.gamma:
            return F.cross_entropy(rows, classes, weights, label_smoothing=self.smoothing, **options) / total
        log_p = rows.log_softmax(dim=-1)
        log_p = (1 - log_p.exp()).clamp_min(_TINY) ** self.gamma * log_p
        loss = F.nll_loss(log_p, classes, weights, **options)
        if self.smoothing:
            loss = (1 - self.smoothing) * loss + self.smoothing * _spread(log_p, classes, weights)
        return loss / total


def _total(labels: Tensor, weights: Tensor | None) -> Tensor:
    """Returns what a sum over labels is divided by, their weights; a batch without any label has no loss."""
    kept = labels[labels != IGNORED]
    total = torch.ones_like(kept, dtype=torch.float32) if weights is None else weights[kept]
    return total.sum().clamp_min(_TINY)


def _spread(log_p: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the sum of the losses under labels that are spread evenly over all classes."""
    each = torch.ones_like(log_p[0]) if weights is None else weights
    return -(log_p[labels != IGNORED] * each).mean(dim=-1).sum()


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the soft Dice loss of logits [N, C] and labels [N]; 0 where no label counts."""
    seen = labels != IGNORED
    share, true = logits[seen].softmax(dim=-1), F.one_hot(labels[seen], logits.shape[-1])  # [n, C] each
    both, sizes = (share * true).sum(dim=0), share.sum(dim=0) + true.sum(dim=0)
    occurs = true.sum(dim=0) > 0
    score = 2 * both / sizes.clamp_min(_TINY)
    return ((1 - score) * occurs).sum() / occurs.sum().clamp_min(1)


def make_loss(settings: LossSettings, task: Task[Any], targets: Sequence[Any]) -> ClassLoss | None:
    """Makes the loss that a recipe asks for; None where the model's own is wanted, or the task has no classes.

    Args:
        settings: The recipe's.
        task: Says which classes there are.
        targets: The class of each training example, or the classes of its words.
    """
    classes = class_count(task)
    if settings.is_plain or classes is None:
        return None
    if settings.class_weights == "none":
        return ClassLoss(settings, None, task.scores)
    counted = task.class_counts(targets)
    weights = inverse_frequency(count_classes(targets, classes) if counted is None else counted)
    return ClassLoss(settings, torch.tensor(weights, dtype=torch.float32), task.scores)


def count_classes(targets: Sequence[Any], classes: int) -> NDArray[np.integer]:
    """Returns how often each class occurs, [C]."""
    listed = len(targets) > 0 and isinstance(targets[0], Sequence)
    labels = np.fromiter(chain.from_iterable(targets) if listed else targets, dtype=np.int64)
    return np.bincount(labels[labels >= 0], minlength=classes)


def inverse_frequency(counts: NDArray[np.integer]) -> NDArray[np.floating]:
    """Returns weights [C] in proportion to 1 / count, whose mean is 1; a class that does not occur weighs 1."""
    weights = np.ones(len(counts))
    seen = counts > 0
    weights[seen] = 1 / counts[seen]
    weights[seen] /= weights[seen].mean()
    return weights


def class_count(task: Task[Any]) -> int | None:
    """Returns how many classes a task tells apart; None where its targets are no classes."""
    names = task.model_options().get("id2label")
    return None if names is None else len(names)


def require_loss(settings: LossSettings, task: Task[Any]) -> None:
    """Raises RecipeError where a loss makes no sense for a kind of task."""
    kind = task.settings.kind
    if settings.dice and kind != REGIONS:
        raise RecipeError(f"training.loss.dice compares regions of images, and {kind} has none: leave it out.")
    if settings.is_plain or class_count(task) is not None:
        return
    if task.peft_type not in LANGUAGE:
        raise RecipeError(f"training.loss is for classes, and {kind} has none: leave training.loss out.")
    if settings.needs_classes:
        key = "kind=focal" if settings.kind == "focal" else "class_weights=inverse"
        raise RecipeError(
            f"training.loss.{key} is for a few classes, but {kind} predicts the tokens of a vocabulary, most of which "
            "never occur in the data. Of training.loss only label_smoothing applies to it."
        )
