"""The nine tasks of GLUE (Wang et al. 2018, arXiv 1804.07461): a row each, no code.

GLUE's test labels are hidden, so its validation rows are the test here; the rows that choose rates and checkpoints are
held back from training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pelton.tasks.classification import ClassificationSettings
from pelton.tasks.regression import RegressionSettings
from pelton.tasks.settings import TextSettings

PAIR = ("sentence1", "sentence2")
ACCURACY = ("accuracy",)


@dataclass(frozen=True)
class GlueTask:
    """One row: its text columns, the metrics whose mean GLUE scores it by, and the split that is its test."""

    columns: tuple[str, ...]
    score: tuple[str, ...]
    test: str = "validation"


GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("matthews",)),
    "sst2": GlueTask(("sentence",), ACCURACY),
    "mrpc": GlueTask(PAIR, ("f1", "accuracy")),
    "stsb": GlueTask(PAIR, ("pearson", "spearman")),
    "qqp": GlueTask(("question1", "question2"), ("f1", "accuracy")),
    "mnli": GlueTask(("premise", "hypothesis"), ACCURACY, "validation_matched"),
    "qnli": GlueTask(("question", "sentence"), ACCURACY),
    "rte": GlueTask(PAIR, ACCURACY),
    "wnli": GlueTask(PAIR, ACCURACY),
}
HUB = "nyu-mll/glue"


class GlueSettings(TextSettings):
    """A GLUE task by its name, from the hub or a local folder.

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

    def plain(self) -> ClassificationSettings | RegressionSettings:
        """Returns the classification or regression that this task is, with its columns, splits and score."""
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
        return ClassificationSettings(**values)

    def _place(self) -> str:
        inside = Path(str(self.data)).expanduser() / self.name
        return str(inside) if inside.is_dir() else str(self.data)


def glue_score(name: str, metrics: Mapping[str, Any]) -> float:
    """Returns a task's GLUE score from a run's metrics by split; MNLI's is the mean of matched and mismatched.

    Raises:
        KeyError: the run has no test.
    """
    splits = [metrics["test"], *([metrics["test_mismatched"]] if "test_mismatched" in metrics else [])]
    return float(np.mean([values[key] for values in splits for key in GLUE[name].score]))
