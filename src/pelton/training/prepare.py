"""What a recipe names, found, loaded and checked before a run's folder is made."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DataCollatorWithPadding

from pelton.errors import RecipeError
from pelton.tasks.classification import Examples, TextClassification, load_task
from pelton.training.backbone import adapter_config, attach, load_backbone, load_tokenizer, locate
from pelton.training.recipe import Recipe, TrainingSettings
from pelton.version import __version__

PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy")


@dataclass(frozen=True)
class Prepared:
    """All that a recipe names, found, loaded and checked."""

    recipe: Recipe
    task: TextClassification
    splits: Mapping[str, Examples]
    tokenizer: Any
    model: Any


def prepare(recipe: Recipe) -> Prepared:
    """Finds, loads and checks what a recipe names: adapter, data, tokenizer, backbone, in the order of their cost."""
    config = None if recipe.adapter is None else adapter_config(recipe.adapter)
    if recipe.task.data is None:
        raise RecipeError(
            f"Recipe {recipe.name} needs data: --set task.data=DIR with train, validation and test files."
        )
    locate(recipe.backbone)
    task, splits = load_task(recipe.task, recipe.training.seed)
    _require_feasible(recipe.training, task, splits)
    recipe = _resolve(recipe, task)
    transformers.set_seed(recipe.training.seed)
    tokenizer = load_tokenizer(recipe.backbone)
    model, new = load_backbone(recipe, task.labels, tokenizer)
    if recipe.task.head_init == "class_means":
        rows = task.encode(splits["train"].texts, tokenizer, splits["train"].labels)
        collate, size = DataCollatorWithPadding(tokenizer), recipe.training.eval_batch_size
        model.start_from_class_means(
            collate([rows[i] for i in range(start, min(start + size, len(rows)))])
            for start in range(0, len(rows), size)
        )
    if config is not None:
        model = attach(model, config, new)
    return Prepared(recipe, task, splits, tokenizer, model)


def _require_feasible(settings: TrainingSettings, task: TextClassification, splits: Mapping[str, Examples]) -> None:
    """Raises RecipeError where a recipe asks for what this data or this machine cannot give."""
    if settings.metric_for_best == "f1" and len(task.labels) != 2:
        raise RecipeError(f"training.metric_for_best f1 needs two classes, but got {len(task.labels)}. Use macro_f1.")
    if settings.early_stopping_patience is not None and "validation" not in splits:
        raise RecipeError("training.early_stopping_patience needs validation rows. Raise task.validation_fraction.")
    if settings.precision == "fp16" and not torch.cuda.is_available():
        raise RecipeError("training.precision fp16 needs a GPU, and there is none. Use fp32 or bf16.")


def environment() -> dict[str, Any]:
    """Returns the versions and the machine that a run's numbers belong to."""
    return {
        "pelton": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def _resolve(recipe: Recipe, task: TextClassification) -> Recipe:
    """Writes into a recipe what was found, so that its run can be resumed and used from any folder."""
    data = Path(str(recipe.task.data)).expanduser()
    found = {
        "data": str(data.resolve()) if data.exists() else recipe.task.data,
        "text_columns": task.columns.texts,
        "label_column": task.columns.label,
    }
    backbone = recipe.backbone if recipe.backbone.startswith("pkg:") else locate(recipe.backbone)
    return recipe.model_copy(update={"task": recipe.task.model_copy(update=found), "backbone": backbone})
