"""What a recipe names, found, loaded and checked before a run's folder is made."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from pelton.errors import RecipeError
from pelton.tasks.base import Examples, Task
from pelton.tasks.load import Loaded, load_task
from pelton.tasks.positions import within
from pelton.tasks.sampling import spread
from pelton.tasks.splits import absolute_places
from pelton.training.backbone import (
    adapter_config,
    attach,
    freeze,
    head_modules,
    load_backbone,
    load_processor,
    locate,
    settled,
)
from pelton.training.feasible import require_adapter, require_objective, require_trackers
from pelton.training.features import require_streamable, streamed
from pelton.training.pruning import require_prunable
from pelton.training.recipe import Recipe, TrainingSettings
from pelton.training.scratch import is_new, new_backbone, new_config
from pelton.training.unfrozen import unfreeze
from pelton.tuner.config import WEIGHTS
from pelton.tuner.controls import tuners
from pelton.tuner.initialize import EXAMPLES, initialize_from_gradients
from pelton.version import __version__

JUDGED = ("validation", "test", "test_mismatched")
PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy")


@dataclass(frozen=True)
class Prepared:
    """All that a recipe names, found, loaded and checked."""

    recipe: Recipe
    data: Loaded
    processor: Any
    model: Any


def prepare(recipe: Recipe) -> Prepared:
    """Finds, loads and checks what a recipe names: adapter, data, tokenizer, backbone, in the order of their cost."""
    config = None if recipe.adapter is None else adapter_config(recipe.adapter)
    require_adapter(recipe, config)
    require_trackers(recipe)
    if recipe.task.data is None:
        raise RecipeError(
            f"Recipe {recipe.name} needs data: --set task.data=DIR with train, validation and test files."
        )
    locate(recipe.backbone)
    data = load_task(recipe.task, recipe.training.seed)
    require_feasible(recipe.training, data)
    require_objective(recipe.training, data)
    transformers.set_seed(recipe.training.seed)
    model, new, processor = _backbone(recipe, data)
    data = data.with_task(within(data.task, model))
    if data.stream is not None:
        recipe = recipe.model_copy(update={"training": streamed(recipe.training)})
    recipe = _resolve(recipe, data.task)
    whole = partial(_batches, data.task, _examples(data), processor, recipe.training.eval_batch_size)
    data.task.start(model, whole)
    for split in JUDGED:
        if split in data.splits:
            data.task.require_judgeable(split, data.splits[split], processor)
    config = settled(config, recipe.adapter, model.config)
    if config is not None:
        model = attach(model, config, new, data.task.peft_type)
        if recipe.training.train_backbone:
            unfreeze(model)
        if recipe.training.pruning is not None:
            require_prunable(recipe.training.pruning, model)
    elif recipe.adapter is not None:
        model = freeze(model, new)
    return Prepared(recipe, data, processor, model)


def _backbone(recipe: Recipe, data: Loaded) -> tuple[Any, list[str], Any]:
    """Loads or makes the model under the task's head; returns it, its modules that are new, and the processor."""
    task = data.task
    if is_new(recipe.backbone):
        model, processor = new_backbone(
            recipe.backbone, recipe.backbone_config, task, _examples(data), recipe.attention
        )
        return model, head_modules(model) if task.new_head else [], processor
    processor = load_processor(recipe.backbone, task)
    return *load_backbone(recipe.backbone, task, processor, recipe.attention), processor


def find_processor(recipe: Recipe, data: Loaded) -> Any:
    """Returns the tokenizer or image processor of a recipe's backbone."""
    if is_new(recipe.backbone):
        return data.task.make_processor(new_config(recipe.backbone, recipe.backbone_config), _examples(data))
    return load_processor(recipe.backbone, data.task)


def initialize(prepared: Prepared) -> float:
    """Gives a new adapter saved weights, or turns its factors along the loss's gradients, as the recipe asks for it.

    Returns:
        The seconds that it took, which are part of training's.
    """
    started = time.perf_counter()
    settings = prepared.recipe.adapter
    if settings is not None and settings.start is not None:
        _start_from(prepared.model, Path(settings.start).expanduser())
    elif settings is not None and settings.init == "gradient" and tuners(prepared.model):
        examples = _examples(prepared.data)
        some = examples.take(spread(len(examples), EXAMPLES))
        batches = _batches(prepared.data.task, some, prepared.processor, prepared.recipe.training.eval_batch_size)
        initialize_from_gradients(prepared.model, batches)
    return time.perf_counter() - started


def _start_from(model: Any, folder: Path) -> None:
    """Copies the weights of a saved adapter, its head included; all must be there and fit."""
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise RecipeError(f"adapter.start: {folder} holds no {WEIGHTS}. Name the folder of a saved adapter.")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise RecipeError(f"adapter.start: {weights} is no whole safetensors file: {error}.") from error
    set_peft_model_state_dict(model, tensors)


def _examples(data: Loaded) -> Examples:
    """Returns the training examples; of streamed ones the first."""
    return data.splits["train"] if data.stream is None else next(data.stream.examples())


def _batches(task: Task[Any], examples: Examples, processor: Any, size: int) -> Iterator[Mapping[str, Any]]:
    """Encodes and collates training examples."""
    rows, collate = task.encode(examples.inputs, processor, examples.targets), task.collator(processor)
    for start in range(0, len(rows), size):
        yield collate([rows[i] for i in range(start, min(start + size, len(rows)))])


def require_feasible(settings: TrainingSettings, data: Loaded) -> None:
    """Raises RecipeError where a recipe asks for what this data or this machine cannot give."""
    known = ("score", *data.task.metrics)
    if settings.metric_for_best not in known:
        raise RecipeError(
            f"training.metric_for_best {settings.metric_for_best!r} is no metric of this task. "
            f"Metrics: {', '.join(known)}."
        )
    chosen = data.task.settings.score if settings.metric_for_best == "score" else (settings.metric_for_best,)
    lost = set(data.task.unmeasurable(data.splits["validation"])) & {*chosen} if "validation" in data.splits else set()
    if lost:
        raise RecipeError(
            f"{' and '.join(sorted(lost))} cannot choose the checkpoint: a kind of row that it needs is missing in the "
            f"{len(data.splits['validation'])} validation rows. Hold other rows back, or choose by another metric "
            "(training.metric_for_best, task.score)."
        )
    if settings.early_stopping_patience is not None and "validation" not in data.splits:
        raise RecipeError("training.early_stopping_patience needs validation rows. Raise task.validation_fraction.")
    if data.stream is not None:
        require_streamable(settings)
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


def _resolve(recipe: Recipe, task: Task[Any]) -> Recipe:
    """Writes into a recipe what was found, so that its run can be resumed and used from any folder."""
    found = absolute_places(task.settings)
    backbone = recipe.backbone if recipe.backbone.startswith("pkg:") else locate(recipe.backbone)
    changes = {"task": task.settings.model_copy(update=found), "backbone": backbone}
    if recipe.adapter is not None and recipe.adapter.start is not None:
        start = str(Path(recipe.adapter.start).expanduser().resolve())
        changes["adapter"] = recipe.adapter.model_copy(update={"start": start})
    return recipe.model_copy(update=changes)
