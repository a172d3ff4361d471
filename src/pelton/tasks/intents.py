"""Intent classification where some texts belong to none of the intents (Larson et al. 2019, arXiv 1909.02027).

Out-of-scope rows are not trained on. The model rejects a text when its largest probability is below a threshold (their
"oos-threshold", section 4), which is chosen on validation rows after training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pelton.errors import DataError
from pelton.tasks.base import Examples
from pelton.tasks.classification import ClassificationSettings, TextClassification
from pelton.tasks.labels import Labels
from pelton.tasks.metrics import cross_entropy, scope_metrics, softmax
from pelton.tasks.tables import Table
from pelton.tasks.texts import Texts, columns_of

OUT = -1
"""The target of an out-of-scope row."""
ABOUT_OUT = ("oos_recall", "oos_auroc")


class IntentSettings(ClassificationSettings):
    """One of several intents for a text, or none.

    Attributes:
        oos_label: The class of the texts that belong to no intent.
        oos_threshold: The largest probability below which a text is rejected; `auto` takes what gives the highest
            accuracy over all validation rows, in scope and out of it.
    """

    kind: Literal["intent-classification"] = "intent-classification"  # type: ignore[assignment]
    score: tuple[str, ...] = ("in_scope_accuracy", "oos_auroc")
    oos_label: Annotated[str, Field(min_length=1)] = "oos"
    oos_threshold: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"] = "auto"


@dataclass(frozen=True)
class IntentPrediction:
    """What a model says about one text.

    Attributes:
        texts: The text.
        label: The likeliest intent, or the out-of-scope label where its probability is below the threshold.
        intent: The likeliest intent, rejected or not.
        oos_score: One minus the largest probability.
        threshold: What the largest probability was held against.
        probabilities: Of every intent.
    """

    texts: Texts
    label: str
    intent: str
    oos_score: float
    threshold: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class IntentClassification(TextClassification):
    """Texts with one intent each, or none; `labels` are the intents in scope.

    Attributes:
        out: The place of the out-of-scope label among the classes of the data.
        threshold: Where the model rejects; None until it is chosen.
    """

    settings: IntentSettings
    out: int
    threshold: float | None

    @classmethod
    def plan(cls, settings: ClassificationSettings, table: Table) -> Self:
        """Finds the columns, and the intents of the training rows."""
        assert isinstance(settings, IntentSettings)
        found = TextClassification.plan(settings, table)
        names = found.labels.names
        out = names.index(settings.oos_label) if settings.oos_label in names else len(names)
        labels = Labels(tuple(name for name in names if name != settings.oos_label), found.labels.ids)
        if len(labels) < 2:
            raise DataError(
                f"{table.name}, column {found.settings.label_column!r}: expected two or more intents beside "
                f"task.oos_label {settings.oos_label!r}, but got {list(labels.names)}."
            )
        given = None if settings.oos_threshold == "auto" else settings.oos_threshold
        return cls(cast(IntentSettings, found.settings), labels, out, given)

    @classmethod
    def restore(cls, settings: ClassificationSettings, stored: Mapping[str, Any]) -> Self:
        """Rebuilds the task with a run's intents and threshold."""
        columns_of(settings)
        labels = Labels.restored(stored)
        return cls(cast(IntentSettings, settings), labels, stored["out"], stored["threshold"])

    def stored(self) -> dict[str, Any]:
        """Returns the intents, the place of the out-of-scope label, and the threshold."""
        return {**super().stored(), "out": self.out, "threshold": self.threshold}

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `scope_metrics` gives, and the loss of rows in scope."""
        return ("accuracy", "in_scope_accuracy", "macro_f1", "oos_recall", "oos_auroc", "loss")

    def check(self, table: Table) -> Examples:
        """Turns a table into examples; the target of an out-of-scope row is -1.

        Raises:
            DataError: a column is missing, a text is empty, or a label is neither an intent nor out of scope.
        """
        names = self.labels.names
        known = Labels((*names[: self.out], self.settings.oos_label, *names[self.out :]), self.labels.ids)
        found = known.encode(table, columns_of(self.settings).label)
        return Examples(list(self.check_inputs(table)), [self._target(place) for place in found])

    def _target(self, place: int) -> int:
        if place == self.out:
            return OUT
        return place - (place > self.out)

    def learned(self, examples: Examples) -> tuple[list[int], str]:
        """Returns the rows in scope."""
        rows = [row for row, target in enumerate(examples.targets) if target != OUT]
        return rows, f"their label is {self.settings.oos_label!r} (task.oos_label)"

    def classes(self, examples: Examples) -> tuple[str, set[Any]]:
        """Returns the label column and the intents that occur."""
        column, found = super().classes(examples)
        return column, found - {OUT}

    def require_splits(self, splits: Mapping[str, Examples]) -> None:
        """Refuses validation rows that cannot choose a threshold or a checkpoint."""
        validation = splits["validation"].targets if "validation" in splits else []
        about_out = [name for name in self.settings.score if name in ABOUT_OUT] if validation else []
        wants = "task.oos_threshold auto" if self.calibrates else f"task.score {about_out[0]}" if about_out else ""
        if wants and (OUT not in validation or set(validation) == {OUT}):
            raise DataError(
                f"{wants} needs validation rows of {self.settings.oos_label!r} and of intents, but got "
                f"{len(validation)} rows without one of them. Hold more rows back (task.validation_fraction), name "
                "such a split with task.validation, or set task.oos_threshold to a number and task.score to "
                "in_scope_accuracy."
            )

    def unmeasurable(self, examples: Examples) -> tuple[str, ...]:
        """Names the metrics of rows in or out of scope where there are none."""
        out = {target == OUT for target in examples.targets}
        if out == {False}:
            return ABOUT_OUT
        return ("accuracy", "in_scope_accuracy", "oos_auroc", "loss") if out == {True} else ()

    @property
    def calibrates(self) -> bool:
        """Whether the threshold is chosen on validation rows."""
        return self.settings.oos_threshold == "auto"

    def calibrate(self, examples: Examples, features: Any, outputs: Sequence[Any]) -> Self:
        """Returns the task with the threshold that is best on these rows."""
        return replace(self, threshold=best_threshold(_probabilities(outputs), np.asarray(examples.targets)))

    def evaluate(self, examples: Examples, features: Any, outputs: Sequence[Any]) -> dict[str, float]:
        """Computes the metrics of `metrics`; until the threshold is chosen, at the one that is best on these rows.

        That is so on validation rows while training lasts, and never on a test.
        """
        logits, targets = np.asarray(outputs), np.asarray(examples.targets)
        probabilities = _probabilities(outputs)
        threshold = best_threshold(probabilities, targets) if self.threshold is None else self.threshold
        inside = targets != OUT
        loss = cross_entropy(logits[inside], targets[inside]) if inside.any() else float("nan")
        return {**scope_metrics(probabilities, targets, threshold, OUT), "loss": loss}

    def predict(self, inputs: Sequence[Texts], features: Any, outputs: Sequence[Any]) -> list[Any]:
        """Returns the likeliest intent of each text, or the out-of-scope label."""
        if self.threshold is None:
            raise DataError("This task has no threshold yet: it is chosen at the end of training. Go on with the run.")
        names, found = self.labels.names, []
        for texts, row in zip(inputs, _probabilities(outputs), strict=True):
            largest, intent = float(row.max()), names[int(row.argmax())]
            label = self.settings.oos_label if largest < self.threshold else intent
            every = dict(zip(names, row.tolist(), strict=True))
            found.append(IntentPrediction(tuple(texts), label, intent, 1.0 - largest, self.threshold, every))
        return found


def best_threshold(probabilities: NDArray[np.floating], targets: NDArray[np.integer]) -> float:
    """Returns the threshold on the largest probability that gives the most right rows.

    A row in scope is right when it is predicted right and not rejected, one out of scope when it is rejected. Between
    two neighbouring probabilities the middle is taken; of equally good ones the lowest.

    Args:
        probabilities: [B, intents].
        targets: [B], -1 for rows out of scope.
    """
    largest, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    order = np.argsort(largest, kind="stable")
    sorted_largest = largest[order]
    # Rejecting the first k rows wins those out of scope among them and loses those that were right.
    gain = np.where(targets[order] == OUT, 1, -right[order].astype(int))
    total = np.concatenate([[0], np.cumsum(gain)])  # [B + 1], for k = 0 … B
    below, above = sorted_largest[:-1], sorted_largest[1:]
    middle = (below + above) / 2
    edges = np.concatenate([[0.0], np.where(middle > below, middle, above), [1.0]])
    possible = np.concatenate([[True], below < above, [bool(sorted_largest[-1] < 1.0)]])
    return float(edges[np.where(possible, total, total.min() - 1).argmax()])


def _probabilities(outputs: Sequence[Any]) -> NDArray[np.floating]:
    return softmax(np.asarray(outputs, dtype=np.float64))
