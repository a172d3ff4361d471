"""A run with its trained model: predicts, evaluates, and shows its gates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from pelton.errors import PeltonError, TrainingError
from pelton.tasks.base import Examples, Task
from pelton.tasks.load import load_task, restore_task
from pelton.training.backbone import adapter_config, load_backbone, load_processor, load_trained, quiet
from pelton.training.folder import RunFolder
from pelton.training.inference import infer, pass_over, require_tokens
from pelton.training.loading import load_recipe
from pelton.training.recipe import Recipe
from pelton.training.scratch import is_new
from pelton.tuner.config import WEIGHTS


@dataclass(frozen=True)
class Run:
    """A trained model with all that is needed to use it."""

    folder: RunFolder
    recipe: Recipe
    task: Task[Any]
    processor: Any
    model: Any

    @classmethod
    def load(cls, path: Path | str) -> Run:
        """Loads a finished run from its folder.

        Raises:
            TrainingError: the folder is not a run, its training did not end, or a file of it is missing or broken.
        """
        folder = RunFolder.open(Path(path))
        if folder.phase not in ("trained", "finished"):
            raise TrainingError(f"{path} is not finished ({folder.phase}). Go on with: pelton fit --resume {path}")
        recipe = load_recipe(folder.recipe)
        task = _restore(folder, recipe)
        with quiet():
            processor = load_processor(str(folder.model) if is_new(recipe.backbone) else recipe.backbone, task)
            model = _load_model(folder, recipe, task, processor)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(folder, recipe, task, processor, model.to(device))

    def examples(self) -> Examples:
        """Reads the examples that the run was judged by: its test split, else its validation split."""
        splits = load_task(self.recipe.task, self.recipe.training.seed).splits
        judged = splits.get("test") or splits.get("validation")
        if judged is None:
            raise TrainingError(f"{self.folder.path} has no test or validation split. Give a labelled file.")
        return judged

    def predict(self, inputs: Sequence[Any]) -> list[Any]:
        """Returns what the model says about each input, as the task's own dataclass.

        Args:
            inputs: What the task reads: for texts one tuple an example, of as many texts as the task has columns.

        Raises:
            DataError: an input has no tokens.
        """
        if not len(inputs):
            return []
        features = self.task.encode(inputs, self.processor)
        require_tokens(features)
        return self.task.predict(inputs, features, self._infer(features))

    def evaluate(self, examples: Examples, features: Any = None) -> dict[str, float]:
        """Computes the task's metrics on labelled examples, and their `score`.

        Args:
            examples: As `Task.check` gives them.
            features: What `Task.judged` made of them, where that is at hand.
        """
        if features is None:
            features = self.task.judged(examples, self.processor)
        values = self.task.evaluate(examples, features, self._infer(features))
        return {**values, "score": self.task.score(values)}

    def calibrated(self, examples: Examples, features: Any) -> Run:
        """Returns the run with what its task chooses on validation examples, and writes that into its folder.

        Args:
            examples: As `Task.check` gives them.
            features: What `Task.judged` made of them.
        """
        task = self.task.calibrate(examples, features, self._infer(features))
        self.folder.write("task", task.stored())
        return replace(self, task=task)

    def outputs(self, inputs: Sequence[Any], *, sort: bool = True) -> list[Any]:
        """Returns what the task keeps of a forward, such as logits, for each feature of the inputs.

        Args:
            inputs: The examples.
            sort: Batches examples of like length, which saves padding; off where the order of forwards matters.
        """
        return self._infer(self.task.encode(inputs, self.processor), sort=sort) if len(inputs) else []

    def forward(self, features: Any) -> None:
        """Runs the model once over features, in their order, for what hooks see of it.

        Args:
            features: As `Task.judged` or `Task.encode` gives them.
        """
        pass_over(self.model, self.task, features, self.processor, **self._options())

    def _infer(self, features: Any, sort: bool = True) -> list[Any]:
        return infer(self.model, self.task, features, self.processor, sort=sort, **self._options())

    def _options(self) -> dict[str, Any]:
        settings = self.recipe.training
        return {"batch_size": settings.eval_batch_size, "precision": settings.precision}


def _restore(folder: RunFolder, recipe: Recipe) -> Task[Any]:
    stored = folder.read("task")
    try:
        return restore_task(recipe.task, stored)
    except KeyError as error:
        raise folder.broken("task.json", f"it lacks {error}") from error
    except TypeError as error:
        raise folder.broken("task.json", error) from error


def _load_model(folder: RunFolder, recipe: Recipe, task: Task[Any], processor: Any) -> Any:
    plain = recipe.adapter is None or adapter_config(recipe.adapter) is None
    if plain or recipe.training.train_backbone:
        with _read(folder, folder.model, CONFIG_NAME):
            model = load_trained(task, folder.model, recipe.attention)
    else:
        model, _ = load_backbone(recipe.backbone, task, processor, recipe.attention)
    if plain:
        return model
    with _read(folder, folder.adapter, "adapter_config.json", WEIGHTS):
        return PeftModel.from_pretrained(model, folder.adapter)


@contextmanager
def _read(folder: RunFolder, place: Path, *names: str) -> Iterator[None]:
    """Says which file or folder of a run is missing or broken where its model cannot be read from it."""
    for name in names:
        if not (place / name).is_file():
            raise folder.broken(f"{place.name}/{name}", "no such file")
    try:
        yield
    except PeltonError:
        raise
    except KeyError as error:  # of what PEFT and transformers look up in a config
        raise folder.broken(f"{place.name}/{names[0]}", f"unknown or missing {error}") from error
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise folder.broken(place.name, repr(error)) from error
