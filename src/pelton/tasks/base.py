"""What a kind of task is: checked rows, what a model reads of them, what it says, and how good that is."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np

from pelton.errors import DataError
from pelton.tasks.settings import TaskSettings
from pelton.tasks.tables import Table

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "rmse", "loss_per_char", "bits_per_char", "unknown"})
"""Metrics of which less is more; of all others, more is."""

Collator = Callable[[list[dict[str, Any]]], Any]
SettingsT = TypeVar("SettingsT", bound=TaskSettings)


@dataclass(frozen=True)
class Examples:
    """Checked rows: what the model reads, what it is to say, and what was changed or left out on the way."""

    inputs: list[Any]
    targets: list[Any]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.inputs)

    def take(self, rows: Sequence[int]) -> Examples:
        """Returns some of the examples."""
        return Examples([self.inputs[row] for row in rows], [self.targets[row] for row in rows], self.notes)


def as_json(prediction: Any) -> dict[str, Any]:
    """Returns a prediction's values as JSON, without arrays, which are there to be drawn (`field(repr=False)`)."""
    shown = {field.name for field in dataclasses.fields(prediction) if field.repr}
    return {name: value for name, value in dataclasses.asdict(prediction).items() if name in shown}


@dataclass(frozen=True)
class Task(ABC, Generic[SettingsT]):
    """A kind of task whose columns and classes are known: enough to read, check, encode and judge rows.

    A subclass is one kind. Everything else in Pelton knows a task by these methods only.

    Attributes:
        settings: What the recipe says, with the columns that were found.
    """

    settings: SettingsT

    peft_type: ClassVar[str | None] = None
    """PEFT's name of the kind, where its wrapper adds something (`generate`, the labels of a language model)."""
    new_head: ClassVar[bool] = True
    """Whether the head has no pretrained weights, and is trained and saved beside the adapter."""
    streams: ClassVar[bool] = False
    """Whether training rows can be checked and encoded some at a time, once `plan` has seen the first."""
    draws: ClassVar[bool] = False
    """Whether predictions are pictures, beside their numbers."""
    loss_counts_tokens: ClassVar[bool] = False
    """Whether the model's loss is a mean over tokens: accumulated batches are then averaged over all their tokens."""

    @classmethod
    @abstractmethod
    def plan(cls, settings: SettingsT, table: Table) -> Self:
        """Finds columns and classes in the training rows."""

    @classmethod
    def restore(cls, settings: SettingsT, stored: Mapping[str, Any]) -> Self:
        """Rebuilds a task from a run's resolved settings and what `stored` gave."""
        return cls(settings)

    def stored(self) -> dict[str, Any]:
        """Returns what is known beside the settings, as JSON: the classes."""
        return {}

    @property
    @abstractmethod
    def model_class(self) -> Any:
        """The class whose `from_pretrained` loads the backbone under this task's head."""

    def model_options(self) -> dict[str, Any]:
        """Returns what the model's config must say: classes and their names."""
        return {}

    def load_processor(self, load: Callable[[Any], Any]) -> Any:
        """Loads what turns inputs into tensors: the backbone's tokenizer, unless a kind wants another."""
        from transformers import AutoTokenizer

        return load(AutoTokenizer)

    def make_processor(self, config: Any, examples: Examples) -> Any:
        """Makes what turns inputs into tensors for a backbone that starts from random weights.

        Args:
            config: The backbone's.
            examples: Those of training.

        Raises:
            DataError: this kind needs the processor of a pretrained backbone.
        """
        raise DataError(
            f"{self.settings.kind} reads its inputs with the tokenizer of a pretrained backbone, and a new one has "
            "none. Name a pretrained backbone."
        )

    def config_options(self, processor: Any) -> dict[str, Any]:
        """Returns what a new backbone's config must say of the processor that was made: sizes and special tokens."""
        return {}

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of what `evaluate` gives."""

    @abstractmethod
    def check(self, table: Table) -> Examples:
        """Turns a table into examples; what is wrong is a DataError that names the file, the row and the column."""

    @abstractmethod
    def check_inputs(self, table: Table) -> list[Any]:
        """Turns a table without targets into inputs."""

    @abstractmethod
    def from_texts(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Any]:
        """Makes inputs of what was typed on a command line."""

    def strata(self, examples: Examples) -> list[Hashable]:
        """Returns each example's class, for drawing in proportion."""
        return [None] * len(examples)

    def classes(self, examples: Examples) -> tuple[str, set[Any]] | None:
        """Returns the column of the classes and those that occur; None for kinds without classes."""
        return None

    def class_counts(self, targets: Sequence[Any]) -> Any:
        """Returns how often each class occurs, [classes]; None where targets are classes themselves, or have none."""
        return None

    def scores(self, logits: Any, labels: Any) -> Any:
        """Returns logits as a loss of classes reads them, [..., classes], for labels [...]."""
        return logits

    def learned(self, examples: Examples) -> tuple[list[int], str]:
        """Returns the rows that may be trained on, and why the others are only judged."""
        return list(range(len(examples))), ""

    def require_splits(self, splits: Mapping[str, Examples]) -> None:
        """Raises DataError where the splits together are not enough for what the settings ask for."""

    def start(self, model: Any, batches: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Gives a new head its first weights; `batches` encodes and collates the training examples."""

    @abstractmethod
    def encode(self, inputs: Sequence[Any], processor: Any, targets: Sequence[Any] | None = None) -> Any:
        """Returns a `datasets.Dataset` of features, in the order of the inputs; padding is left to the collator.

        Where an input makes several features (windows), the column `example` says which input each belongs to.
        """

    def judged(self, examples: Examples, processor: Any) -> Any:
        """Returns the features that evaluation runs on: inputs alone, unless a kind needs targets in its outputs."""
        return self.encode(examples.inputs, processor)

    @property
    def packs(self) -> bool:
        """Whether `encode` puts several examples into one feature, and so has to see all of them together."""
        return False

    def left_out(self, examples: Examples, features: Any, split: str = "training") -> tuple[str, ...]:
        """Returns, in sentences, what was left out of a split's examples by `encode`, or by `judged` of others."""
        return ()

    def require_judgeable(self, split: str, examples: Examples, processor: Any) -> None:
        """Raises DataError where nothing of a split's examples could be judged."""

    def unmeasurable(self, examples: Examples) -> tuple[str, ...]:
        """Returns the metrics that do not exist on these examples, whatever is predicted: they would be NaN."""
        return ()

    @abstractmethod
    def collator(self, processor: Any) -> Collator:
        """Returns what makes one batch of features."""

    @abstractmethod
    def outputs(self, model: Any, batch: Mapping[str, Any]) -> list[Any]:
        """Runs one batch without labels and returns what is needed of each feature, on the CPU."""

    @abstractmethod
    def evaluate(self, examples: Examples, features: Any, outputs: Sequence[Any]) -> dict[str, float]:
        """Computes the metrics, in the order of `metrics`.

        Args:
            examples: What was encoded.
            features: What `judged` made of it.
            outputs: What `outputs` gave for each feature, in order.
        """

    @abstractmethod
    def predict(self, inputs: Sequence[Any], features: Any, outputs: Sequence[Any]) -> list[Any]:
        """Returns one dataclass an input: what the model says about it."""

    @property
    def calibrates(self) -> bool:
        """Whether something is chosen on validation rows once the weights are learned."""
        return False

    def calibrate(self, examples: Examples, features: Any, outputs: Sequence[Any]) -> Self:
        """Returns the task with what is chosen on validation rows after training; takes what `evaluate` takes."""
        return self

    def score(self, values: Mapping[str, float]) -> float:
        """Returns the one number that compares runs, more is better: the mean of the metrics in `settings.score`.

        Metrics of which less is better count negatively.
        """
        return float(np.mean([-values[n] if n in LOWER_IS_BETTER else values[n] for n in self.settings.score]))

    def require_metrics(self) -> None:
        """Raises DataError where `settings.score` names a metric that this task does not give."""
        for name in self.settings.score:
            if name not in self.metrics:
                raise DataError(
                    f"task.score names {name!r}, which this task does not give. Metrics: {', '.join(self.metrics)}."
                )
