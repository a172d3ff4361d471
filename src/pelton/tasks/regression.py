"""Text and text-pair regression: one number for each example, such as the similarity of two sentences."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import datasets
import numpy as np

from pelton.errors import DataError
from pelton.tasks.base import Collator, Examples, Task
from pelton.tasks.metrics import regression_metrics
from pelton.tasks.settings import TextSettings
from pelton.tasks.tables import Table
from pelton.tasks.texts import (
    Texts,
    check_texts,
    columns_of,
    full_texts,
    pad_texts,
    resolve_columns,
    sequence_model,
    tokenise,
    typed_texts,
)

STRATA = 5


class RegressionSettings(TextSettings):
    """A number for a text or a pair of texts.

    Attributes:
        head: `pooler` is transformers' own sequence classifier with one output; `mean` averages the last hidden states.
    """

    kind: Literal["text-regression"] = "text-regression"
    score: tuple[str, ...] = ("pearson", "spearman")
    head: Literal["pooler", "mean"] = "pooler"


@dataclass(frozen=True)
class ValuePrediction:
    """What a model says about one example."""

    texts: Texts
    value: float


@dataclass(frozen=True)
class TextRegression(Task[RegressionSettings]):
    """Texts with one number each.

    The model learns numbers of mean 0 and deviation 1; predictions are in the data's own units.
    """

    mean: float
    deviation: float

    streams: ClassVar[bool] = True

    @classmethod
    def plan(cls, settings: RegressionSettings, table: Table) -> Self:
        """Finds the columns, and the scale of the training rows' targets."""
        settings = resolve_columns(settings, table)
        return cls(settings, *find_scale(table, columns_of(settings).label))

    @classmethod
    def restore(cls, settings: RegressionSettings, stored: Mapping[str, Any]) -> Self:
        """Rebuilds the task with a run's scale."""
        columns_of(settings)
        return cls(settings, stored["mean"], stored["deviation"])

    def stored(self) -> dict[str, Any]:
        """Returns the scale of the targets."""
        return {"mean": self.mean, "deviation": self.deviation}

    @property
    def model_class(self) -> Any:
        """The classifier of transformers with one output, or mean pooling."""
        return sequence_model(self.settings.head)

    def model_options(self) -> dict[str, Any]:
        """Says one output, judged by its squared error."""
        return {"num_labels": 1, "problem_type": "regression"}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Correlations, root mean squared error (in the data's units) and loss."""
        return ("pearson", "spearman", "rmse", "loss")

    def check(self, table: Table) -> Examples:
        """Turns a table into examples.

        Raises:
            DataError: a column is missing, a text is empty, a target is no finite number, or there are no rows.
        """
        columns = columns_of(self.settings)
        return Examples(list(check_texts(table, columns.texts)), check_values(table, columns.label))

    def check_inputs(self, table: Table) -> list[Texts]:
        """Reads texts alone, for prediction."""
        return check_texts(table, columns_of(self.settings).texts)

    def from_texts(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Texts]:
        """One text an example, or two."""
        return typed_texts(self.settings, texts, pairs)

    def strata(self, examples: Examples) -> list[Hashable]:
        """Returns the fifth of the range that each target is in."""
        values = np.asarray(examples.targets)
        low, span = values.min(), np.ptp(values) or 1.0
        return [min(int((value - low) / span * STRATA), STRATA - 1) for value in values.tolist()]

    def encode(self, inputs: Sequence[Texts], processor: Any, targets: Sequence[float] | None = None) -> Any:
        """Tokenises texts and scales targets."""
        encoded = tokenise(inputs, processor, self.settings)
        if targets is not None:
            encoded["labels"] = [(value - self.mean) / self.deviation for value in targets]
        return datasets.Dataset.from_dict(encoded)

    def left_out(self, examples: Examples, features: Any, split: str = "training") -> tuple[str, ...]:
        """Counts the texts that were probably cut."""
        return full_texts(features, self.settings, split)

    def collator(self, processor: Any) -> Collator:
        """Pads to the longest text of a batch."""
        return pad_texts(processor)

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> list[Any]:
        """Returns one number for each row, of the model's scale."""
        return list(model(**batch).logits.float().squeeze(-1).cpu().numpy())

    def evaluate(self, examples: Examples, features: Any, outputs: Sequence[Any]) -> dict[str, float]:
        """Computes the metrics of `metrics`."""
        values = np.asarray(outputs) * self.deviation + self.mean
        found = regression_metrics(values, np.asarray(examples.targets))
        return {**found, "loss": (found["rmse"] / self.deviation) ** 2}

    def predict(self, inputs: Sequence[Texts], features: Any, outputs: Sequence[Any]) -> list[ValuePrediction]:
        """Returns numbers in the data's units."""
        values = [float(output) * self.deviation + self.mean for output in outputs]
        return [ValuePrediction(tuple(texts), value) for texts, value in zip(inputs, values, strict=True)]


def check_values(table: Table, column: str) -> list[float]:
    """Returns a column of numbers; what is no finite number is an error that names its cell."""
    values = []
    for row, value in enumerate(table.column(column)):
        number = _number(value)
        if number is None or not math.isfinite(number):
            got = f"{value!r:.40}"
            raise DataError(f"{table.where(row, column)}: expected a finite number, but got {got}. Remove the row.")
        values.append(number)
    return values


def find_scale(table: Table, column: str) -> tuple[float, float]:
    """Returns mean and deviation of a column of numbers; of equal numbers the deviation is 1.

    Raises:
        DataError: a target is no finite number, or so large that mean or deviation is none.
    """
    values = check_values(table, column)
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = float(np.mean(values)), float(np.std(values))
    if values and not (math.isfinite(mean) and math.isfinite(deviation)):
        row = int(np.argmax(np.abs(values)))
        raise DataError(
            f"{table.where(row, column)}: the targets are too far apart for a finite mean and deviation, and "
            f"{values[row]!r} is the farthest from 0. Scale the targets, or remove the row."
        )
    return mean, deviation or 1.0


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):  # the last is of whole numbers of hundreds of digits
        return None
