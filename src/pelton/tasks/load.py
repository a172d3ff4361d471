"""A task's settings become the task and its splits: read, checked, held back, drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from pelton.errors import DataError
from pelton.tasks.answers import AnswerSettings, QuestionAnswering
from pelton.tasks.base import Examples, Task
from pelton.tasks.causal import CausalLM
from pelton.tasks.causal_settings import CausalSettings
from pelton.tasks.classification import ClassificationSettings, TextClassification
from pelton.tasks.drawing import (
    absent_classes,
    class_names,
    draw,
    fewer,
    held_back_for_test,
    judged_classes,
    leaving_some,
    require_classes,
)
from pelton.tasks.glue import GlueSettings
from pelton.tasks.images import ImageClassification, ImageSettings
from pelton.tasks.intents import IntentClassification, IntentSettings
from pelton.tasks.masked_images import MaskedImages, MaskedImageSettings
from pelton.tasks.regression import RegressionSettings, TextRegression
from pelton.tasks.running import RunningText, RunningTextSettings
from pelton.tasks.sampling import hold_back
from pelton.tasks.segmentation import SegmentationSettings, SemanticSegmentation
from pelton.tasks.seq2seq import Seq2SeqSettings, SequenceToSequence
from pelton.tasks.settings import TaskSettings
from pelton.tasks.splits import load_splits
from pelton.tasks.streams import TrainingStream, open_stream
from pelton.tasks.tokens import TokenClassification, TokenSettings

KINDS: dict[type[TaskSettings], type[Task[Any]]] = {
    ClassificationSettings: TextClassification,
    RegressionSettings: TextRegression,
    TokenSettings: TokenClassification,
    CausalSettings: CausalLM,
    ImageSettings: ImageClassification,
    IntentSettings: IntentClassification,
    AnswerSettings: QuestionAnswering,
    Seq2SeqSettings: SequenceToSequence,
    RunningTextSettings: RunningText,
    MaskedImageSettings: MaskedImages,
    SegmentationSettings: SemanticSegmentation,
}
"""The task that each kind of settings describes. GLUE's settings turn into one of these."""

AnySettings = Annotated[
    ClassificationSettings
    | RegressionSettings
    | TokenSettings
    | CausalSettings
    | GlueSettings
    | ImageSettings
    | IntentSettings
    | AnswerSettings
    | Seq2SeqSettings
    | RunningTextSettings
    | MaskedImageSettings
    | SegmentationSettings,
    Field(discriminator="kind"),
]
"""What a recipe may hold under `task`, told apart by `kind`."""

_SETTINGS: tuple[type[TaskSettings], ...] = (*KINDS, GlueSettings)
TASK_KINDS = {str(settings.model_fields["kind"].default): settings for settings in _SETTINGS}
"""Settings by what a recipe calls them."""


@dataclass(frozen=True)
class Loaded:
    """A task with its examples.

    Attributes:
        task: What is known of it beside the rows.
        splits: Examples of `train`, and of `validation`, `test` and `test_mismatched` where there are such.
        rows: For training and held-back validation, the 0-based rows of the training data they were drawn from.
        stream: The training rows where they are streamed; `splits` then has no `train`.
    """

    task: Task[Any]
    splits: dict[str, Examples]
    rows: Mapping[str, Sequence[int]]
    stream: TrainingStream | None = None

    def some(self) -> Examples:
        """Returns examples that were not trained on where there are any, or the first that were."""
        for split in ("test", "validation", "train"):
            if split in self.splits:
                return self.splits[split]
        assert self.stream is not None
        return next(self.stream.examples())

    def with_task(self, task: Task[Any]) -> Loaded:
        """Returns the same examples under a task with other settings."""
        return replace(self, task=task, stream=None if self.stream is None else replace(self.stream, task=task))

    def without_test(self) -> Loaded:
        """Returns the same without test rows."""
        return replace(self, splits={name: rows for name, rows in self.splits.items() if not name.startswith("test")})

    @property
    def notes(self) -> list[str]:
        """What was changed or left out, in sentences."""
        return list(dict.fromkeys(note for examples in self.splits.values() for note in examples.notes))

    def describe(self) -> dict[str, Any]:
        """Returns the sizes, the rows that were drawn and the notes, as JSON."""
        sizes = {split: len(examples) for split, examples in self.splits.items()}
        return {
            "examples": sizes,
            "rows": {split: list(rows) for split, rows in self.rows.items()},
            "notes": self.notes,
        }


def load_task(settings: TaskSettings, seed: int) -> Loaded:
    """Reads and checks all splits; holds validation rows back, then draws the few examples from what stays.

    Args:
        settings: What the recipe says.
        seed: Chooses the held-back rows and the examples.

    Raises:
        DataError: what is wrong with the data, by file, row and column; or fewer rows than were asked for.
    """
    settings = plain(settings)
    if settings.streaming:
        return _load_stream(settings, seed)
    tables = load_splits(settings)
    task = KINDS[type(settings)].plan(settings, tables["train"])
    task.require_metrics()
    splits = {split: task.check(table) for split, table in tables.items()}
    everything, rows = splits["train"], list(range(len(splits["train"])))
    drawn: dict[str, Sequence[int]] = {}
    strata = task.strata(everything)
    name = tables["train"].name
    if "validation" not in splits:
        rows, held = _hold_back(settings, task, everything, seed, name)
        if held:
            drawn["validation"] = held
            splits["validation"] = everything.take(held)
    else:
        splits["validation"] = fewer(settings, task, splits["validation"], seed, tables["validation"].name)
    learned, reason = task.learned(everything)
    rows, left_out = sorted({*rows} & {*learned}), len({*rows} - {*learned})
    names = class_names(task, strata)
    chosen = draw(settings, [strata[row] for row in rows], seed, names, name)
    drawn["train"] = [rows[place] for place in chosen]
    splits["train"] = everything.take(drawn["train"])
    notes = [f"{name}: {left_out} rows are left out of training, since {reason}."] if left_out else []
    notes += [*absent_classes(names, strata, name), *held_back_for_test(settings, tables)]
    notes += _too_few(settings, splits, len(everything), name)
    splits["train"] = replace(splits["train"], notes=(*splits["train"].notes, *notes))
    task.require_splits(splits)
    require_classes(task, everything, splits["train"], name)
    return Loaded(task, judged_classes(task, splits, tables), drawn)


def _hold_back(
    settings: TaskSettings, task: Task[Any], everything: Examples, seed: int, name: str
) -> tuple[list[int], list[int]]:
    """Splits the training rows into those that stay and those that are held back: of few rows one, if it is spared."""
    strata, wanted = task.strata(everything), settings.validation_examples
    count = int(len(everything) * settings.validation_fraction) if wanted is None else wanted
    if count == 0 and wanted is None and settings.validation_fraction > 0 and len(everything) > 1:
        rows, held = hold_back(strata, 1, seed)
        if _suffice(settings, task, everything, rows):
            return rows, held
    return hold_back(strata, leaving_some(count, len(everything), name), seed)


def _suffice(settings: TaskSettings, task: Task[Any], everything: Examples, rows: list[int]) -> bool:
    """Says whether rows that stay have all classes, and are enough to draw from."""
    stay, learned = everything.take(rows), {*task.learned(everything)[0]} & {*rows}
    strata = task.strata(everything)
    least = min(Counter(strata[row] for row in learned).values(), default=0)
    enough = len(learned) >= (settings.examples or 1) and least >= (settings.shots or 1)
    return enough and task.classes(stay) == task.classes(everything)


def _too_few(settings: TaskSettings, splits: Mapping[str, Examples], count: int, name: str) -> list[str]:
    """Says that there is no validation where a share of the rows was to be held back."""
    if "validation" in splits or settings.validation_examples is not None or not settings.validation_fraction:
        return []
    return [
        f"{name}: {count} training rows are too few to hold one back, so there is no validation and the last weights "
        "are kept. Name other rows with task.validation, or set task.validation_fraction=0."
    ]


def _load_stream(settings: TaskSettings, seed: int) -> Loaded:
    """Loads all splits but the training rows, of which only the first are read."""
    stream = open_stream(settings, KINDS[type(settings)])
    task = stream.task
    task.require_metrics()
    tables = load_splits(settings)
    splits = {split: task.check(table) for split, table in tables.items()}
    if "validation" in splits:
        splits["validation"] = fewer(settings, task, splits["validation"], seed, tables["validation"].name)
    elif settings.validation_fraction if settings.validation_examples is None else settings.validation_examples:
        raise DataError(
            "task.streaming cannot hold validation rows back. Name a split or file with task.validation that is not "
            "trained on, or set task.validation_examples=0 to do without."
        )
    task.require_splits(splits)
    return Loaded(task, judged_classes(task, splits, tables), {}, stream)


def restore_task(settings: TaskSettings, stored: Mapping[str, Any]) -> Task[Any]:
    """Rebuilds a run's task from its resolved settings and its classes, without reading data."""
    settings = plain(settings)
    return KINDS[type(settings)].restore(settings, stored)


def plain(settings: TaskSettings) -> TaskSettings:
    """Returns the kind of task that a named benchmark's settings stand for; others as they are."""
    return settings.plain() if isinstance(settings, GlueSettings) else settings
