"""Text and text-pair classification."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import datasets
import numpy as np
from pydantic import field_validator, model_validator

from pelton.tasks.base import Collator, Examples, Task
from pelton.tasks.labels import Labels, find_labels
from pelton.tasks.metrics import class_metric_names, class_metrics, softmax
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


class ClassificationSettings(TextSettings):
    """One of several classes for a text or a pair of texts.

    Attributes:
        labels: The classes in the order of their ids; found in the data when not given.
        head: `pooler` is transformers' own sequence classifier; `mean` averages the last hidden states.
        head_init: What the head starts from: `random` weights, or (with `mean`) the `class_means` of the training
            examples.
    """

    kind: Literal["text-classification"] = "text-classification"
    score: tuple[str, ...] = ("accuracy",)
    labels: tuple[str, ...] | None = None
    head: Literal["pooler", "mean"] = "pooler"
    head_init: Literal["random", "class_means"] = "random"

    @model_validator(mode="after")
    def _means_need_the_mean(self) -> Self:
        if self.head_init == "class_means" and self.head != "mean":
            raise ValueError(f"head_init class_means needs head mean, but got head {self.head}")
        if self.head_init == "class_means" and self.streaming:
            raise ValueError("head_init class_means reads all training rows, which streaming never holds")
        return self

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Takes `labels: [1, 2]` too: a number may be a name."""
        return [str(name) for name in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class ClassPrediction:
    """What a model says about one example: the likeliest class, and every class's probability."""

    texts: Texts
    label: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class TextClassification(Task[ClassificationSettings]):
    """Texts with one class each."""

    labels: Labels

    streams: ClassVar[bool] = True

    @classmethod
    def plan(cls, settings: ClassificationSettings, table: Table) -> Self:
        """Finds the columns, and the classes of the training rows."""
        settings = resolve_columns(settings, table)
        return cls(settings, find_labels(table, columns_of(settings).label, settings.labels, settings.streaming))

    @classmethod
    def restore(cls, settings: ClassificationSettings, stored: Mapping[str, Any]) -> Self:
        """Rebuilds the task with a run's classes."""
        columns_of(settings)
        return cls(settings, Labels.restored(stored))

    def stored(self) -> dict[str, Any]:
        """Returns the classes."""
        return self.labels.stored()

    @property
    def model_class(self) -> Any:
        """The classifier of transformers, or mean pooling."""
        return sequence_model(self.settings.head)

    def model_options(self) -> dict[str, Any]:
        """Returns the classes."""
        return self.labels.model_options()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Accuracy, macro F1 and loss; with two classes F1, Matthews and the area under the curve."""
        return class_metric_names(len(self.labels))

    def check(self, table: Table) -> Examples:
        """Turns a table into examples.

        Raises:
            DataError: a column is missing, a text is empty, a label is unseen, or there are no rows.
        """
        columns = columns_of(self.settings)
        return Examples(list(check_texts(table, columns.texts)), self.labels.encode(table, columns.label))

    def check_inputs(self, table: Table) -> list[Texts]:
        """Reads texts alone, for prediction."""
        return check_texts(table, columns_of(self.settings).texts)

    def from_texts(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Texts]:
        """One text an example, or two."""
        return typed_texts(self.settings, texts, pairs)

    def strata(self, examples: Examples) -> list[Hashable]:
        """Returns the classes."""
        return list(examples.targets)

    def classes(self, examples: Examples) -> tuple[str, set[Any]]:
        """Returns the label column and the classes that occur."""
        return str(self.settings.label_column), set(examples.targets)

    def start(self, model: Any, batches: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Starts the head from class means where the recipe asks for it."""
        if self.settings.head_init == "class_means":
            model.start_from_class_means(batches())

    def encode(self, inputs: Sequence[Texts], processor: Any, targets: Sequence[int] | None = None) -> Any:
        """Tokenises texts."""
        encoded = tokenise(inputs, processor, self.settings)
        return datasets.Dataset.from_dict(encoded if targets is None else {**encoded, "labels": list(targets)})

    def left_out(self, examples: Examples, features: Any, split: str = "training") -> tuple[str, ...]:
        """Counts the texts that were probably cut."""
        return full_texts(features, self.settings, split)

    def collator(self, processor: Any) -> Collator:
        """Pads to the longest text of a batch."""
        return pad_texts(processor)

    def outputs(self, model: Any, batch: Mapping[str, Any]) -> list[Any]:
        """Returns logits [classes] for each row."""
        return list(model(**batch).logits.float().cpu().numpy())

    def evaluate(self, examples: Examples, features: Any, outputs: Sequence[Any]) -> dict[str, float]:
        """Computes the metrics of `metrics`."""
        return class_metrics(np.asarray(outputs), np.asarray(examples.targets))

    def unmeasurable(self, examples: Examples) -> tuple[str, ...]:
        """Names the ROC area where only one of two classes occurs."""
        return ("auroc",) if "auroc" in self.metrics and len(set(examples.targets)) < 2 else ()

    def predict(self, inputs: Sequence[Texts], features: Any, outputs: Sequence[Any]) -> list[ClassPrediction]:
        """Returns the classes by probability."""
        names = self.labels.names
        return [
            ClassPrediction(tuple(texts), names[int(row.argmax())], dict(zip(names, row.tolist(), strict=True)))
            for texts, row in zip(inputs, softmax(np.asarray(outputs)), strict=True)
        ]
