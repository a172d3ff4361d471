"""A run with its trained model: predicts, evaluates, and shows its gates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import DataCollatorWithPadding

from pelton.errors import TrainingError
from pelton.tasks.classification import Examples, TextClassification, load_task
from pelton.tasks.columns import Columns
from pelton.tasks.labels import Labels
from pelton.tasks.metrics import classification_metrics
from pelton.training.backbone import load_backbone, load_tokenizer, load_trained, quiet
from pelton.training.folder import RunFolder
from pelton.training.loading import load_recipe
from pelton.training.recipe import Recipe

Texts = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Prediction:
    """What a model says about one example: the likeliest class, and every class's probability."""

    texts: tuple[str, ...]
    label: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Run:
    """A trained model with all that is needed to use it."""

    folder: RunFolder
    recipe: Recipe
    task: TextClassification
    tokenizer: Any
    model: Any

    @classmethod
    def load(cls, path: Path | str) -> Run:
        """Loads a finished run from its folder.

        Raises:
            TrainingError: the folder is not a run, or its training did not end.
        """
        folder = RunFolder.open(Path(path))
        if folder.phase not in ("trained", "finished"):
            raise TrainingError(f"{path} is not finished ({folder.phase}). Go on with: pelton fit --resume {path}")
        recipe = load_recipe(folder.recipe)
        stored = folder.read("labels")
        labels = Labels(tuple(stored["names"]), stored["ids"])
        with quiet():
            tokenizer = load_tokenizer(recipe.backbone)
            model = _load_model(folder, recipe, labels, tokenizer)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(folder, recipe, restore_task(recipe, labels), tokenizer, model.to(device))

    def examples(self) -> Examples:
        """Reads the examples that the run was judged by: its test split, else its validation split."""
        _, splits = load_task(self.recipe.task, self.recipe.training.seed)
        judged = splits.get("test") or splits.get("validation")
        if judged is None:
            raise TrainingError(f"{self.folder.path} has no test or validation split. Give a labelled file.")
        return judged

    def predict(self, texts: Texts) -> list[Prediction]:
        """Classifies texts: one tuple an example, of as many texts as the task has columns."""
        wanted = len(self.task.columns.texts)
        for example in texts:
            if len(example) != wanted:
                columns = ", ".join(self.task.columns.texts)
                raise TrainingError(
                    f"An example of this task has {wanted} text(s) ({columns}), but got {len(example)}."
                )
        names = self.task.labels.names
        logits = torch.from_numpy(self.logits(texts))
        return [
            Prediction(tuple(example), names[int(row.argmax())], dict(zip(names, row.tolist(), strict=True)))
            for example, row in zip(texts, logits.softmax(dim=-1), strict=True)
        ]

    def evaluate(self, examples: Examples) -> dict[str, float]:
        """Computes the task's metrics on labelled examples."""
        return classification_metrics(self.logits(examples.texts), np.asarray(examples.labels))

    def logits(self, texts: Texts, *, sort: bool = True) -> NDArray[np.float32]:
        """Runs the model without gradients and returns its logits [len(texts), classes] in the order of `texts`.

        Args:
            texts: The examples.
            sort: Batches examples of like length, which saves padding; off where the order of forwards matters.
        """
        encoded = self.task.encode(texts, self.tokenizer)
        order = sorted(range(len(texts)), key=lambda i: len(encoded[i]["input_ids"])) if sort else range(len(texts))
        device = next(self.model.parameters()).device
        results = np.zeros((len(texts), len(self.task.labels)), dtype=np.float32)
        self.model.eval()
        with torch.inference_mode():
            for rows, batch in self._batches(encoded, order):
                results[rows] = self.model(**batch.to(device)).logits.float().cpu().numpy()
        return results

    def _batches(self, encoded: Any, order: Sequence[int]) -> Iterator[tuple[list[int], Any]]:
        collate, size = DataCollatorWithPadding(self.tokenizer), self.recipe.training.eval_batch_size
        for start in range(0, len(order), size):
            rows = list(order[start : start + size])
            yield rows, collate([encoded[row] for row in rows])


def restore_task(recipe: Recipe, labels: Labels) -> TextClassification:
    """Rebuilds a task from a resolved recipe, which holds the columns that were found."""
    settings = recipe.task
    if settings.text_columns is None or settings.label_column is None:
        raise TrainingError("The run's recipe.yaml lacks task.text_columns or task.label_column. Was it edited?")
    return TextClassification(Columns(settings.text_columns, settings.label_column), labels, settings.max_length)


def _load_model(folder: RunFolder, recipe: Recipe, labels: Labels, tokenizer: Any) -> Any:
    if recipe.adapter is None:
        return load_trained(recipe, folder.model)
    model, _ = load_backbone(recipe, labels, tokenizer)
    return PeftModel.from_pretrained(model, folder.adapter)
