"""The nine tasks of GLUE (Wang et al. 2018, arXiv 1804.07461): a row each, no code.

GLUE's test labels are hidden, so its validation rows are the test here; the rows that choose rates and checkpoints are
held back from training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import model_validator

from pelton.errors import DataError
from pelton.tasks.classification import ClassificationSettings
from pelton.tasks.opening import extension
from pelton.tasks.regression import RegressionSettings
from pelton.tasks.settings import TextSettings
from pelton.tasks.splits import looks_local, training_file

PAIR = ("sentence1", "sentence2")
ACCURACY = ("accuracy",)


@dataclass(frozen=True)
class GlueTask:
    """One row: its text columns, the metrics whose mean GLUE scores it by, the split that is its test, its classes."""

    columns: tuple[str, ...]
    score: tuple[str, ...]
    test: str = "validation"
    classes: int = 2


GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("matthews",)),
    "sst2": GlueTask(("sentence",), ACCURACY),
    "mrpc": GlueTask(PAIR, ("f1", "accuracy")),
    "stsb": GlueTask(PAIR, ("pearson", "spearman")),
    "qqp": GlueTask(("question1", "question2"), ("f1", "accuracy")),
    "mnli": GlueTask(("premise", "hypothesis"), ACCURACY, "validation_matched", 3),
    "qnli": GlueTask(("question", "sentence"), ACCURACY),
    "rte": GlueTask(PAIR, ACCURACY),
    "wnli": GlueTask(PAIR, ACCURACY),
}
HUB = "nyu-mll/glue"


class GlueSettings(TextSettings):
    """A GLUE task by its name, from the hub or a local folder; its columns follow from the name.

    Attributes:
        name: The task.
        data: A hub name, a folder with one folder for each task, or one task's folder.
        head: As in text classification.
        head_init: As in text classification; STS-B has no classes and starts at random.
    """

    kind: Literal["glue"] = "glue"
    name: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
    data: str | None = HUB
    score: tuple[str, ...] = ("glue",)
    head: Literal["pooler", "mean"] = "pooler"
    head_init: Literal["random", "class_means"] = "random"

    @model_validator(mode="after")
    def _columns_are_given(self) -> Self:
        for key in ("text_columns", "label_column"):
            if getattr(self, key) is not None:
                other = "text-regression" if self.name == "stsb" else "text-classification"
                raise ValueError(
                    f"{key} does not go with kind glue, whose columns are fixed: set kind={other} for others"
                )
        return self

    @model_validator(mode="after")
    def _means_need_the_mean(self) -> Self:
        if self.head_init == "random" or self.name == "stsb":
            return self
        if self.head != "mean":
            raise ValueError(f"head_init class_means needs head mean, but got head {self.head}")
        if self.streaming:
            raise ValueError("head_init class_means reads all training rows, which streaming never holds")
        return self

    def plain(self) -> ClassificationSettings | RegressionSettings:
        """Returns the classification or regression that this task is, with its columns, splits and score.

        Raises:
            DataError: the data are a file, or a folder that does not exist.
        """
        row = GLUE[self.name]
        values = self.model_dump(exclude={"kind", "name"} | ({"max_length"} - self.model_fields_set))
        values |= {"text_columns": row.columns, "label_column": "label", "data": self._place()}
        values |= {"train": self.train or "train", "test": self.test or row.test}
        values["validation"] = self.validation or values["train"]  # held back
        if self.subset is None and not Path(values["data"]).is_dir():
            values["subset"] = self.name
        if self.score == ("glue",):
            values["score"] = row.score
        if self.name == "stsb":
            values.pop("head_init")
            return RegressionSettings(**values)
        settings = ClassificationSettings(**values)
        return settings.model_copy(update={"labels": _numbers(settings, row.classes)})

    def _place(self) -> str:
        data = Path(str(self.data)).expanduser()
        if not data.is_dir() and (data.is_file() or looks_local(str(self.data))):
            raise DataError(
                f"{data} is no folder, which kind glue expects. Set task.data to a folder with {self.name}/train.jsonl "
                "(or another kind of file) and the like, or leave it out to read from the hub."
            )
        inside = data / self.name
        return str(inside) if inside.is_dir() else str(self.data)


def _numbers(settings: ClassificationSettings, classes: int) -> tuple[str, ...] | None:
    """Returns the classes of a local file that is streamed and states none: GLUE's labels are numbers from 0 on."""
    found = training_file(settings) if settings.streaming else None
    if found is None or found[1] is not None or extension(found[0]) == ".parquet":  # which may have names inside
        return None
    return tuple(str(number) for number in range(classes))


def glue_score(name: str, metrics: Mapping[str, Any]) -> float:
    """Returns a task's GLUE score from a run's metrics by split; MNLI's is the mean of matched and mismatched.

    Raises:
        KeyError: the run has no test.
    """
    splits = [metrics["test"], *([metrics["test_mismatched"]] if "test_mismatched" in metrics else [])]
    return float(np.mean([values[key] for values in splits for key in GLUE[name].score]))
