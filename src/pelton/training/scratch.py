"""A backbone that has learned nothing yet: `new:MODEL_TYPE`, with random weights and what its config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from pelton.errors import RecipeError, nearest, unknown
from pelton.tasks.base import Examples, Task
from pelton.tasks.heads import MeanPoolingClassifier

NEW = "new:"
"""What stands before the type of a model that is not loaded from anywhere."""


def is_new(backbone: str) -> bool:
    """Tells whether a recipe's backbone has random weights."""
    return backbone.startswith(NEW)


def new_config(backbone: str, values: Mapping[str, Any]) -> PreTrainedConfig:
    """Makes the config of a new backbone.

    Args:
        backbone: `new:MODEL_TYPE`, a type as in the `config.json` of its models.
        values: What differs from the type's defaults.

    Raises:
        RecipeError: a type or a value that does not exist or breaks a law.
    """
    kind = backbone.removeprefix(NEW)
    if kind not in CONFIG_MAPPING:
        few = ("bert", "llama", "minigpt", "recon", "vit")
        guess = nearest(kind, list(CONFIG_MAPPING))
        hint = f" Did you mean {NEW + guess!r}?" if guess else ""
        raise RecipeError(f"Unknown type of model {kind!r}.{hint} Expected a config's model_type, such as {few}.")
    known = CONFIG_MAPPING[kind]
    for key in values:
        names = [*known().to_dict(), *known.attribute_map]
        if key not in names:
            raise RecipeError(str(unknown(f"key of {kind}'s backbone_config:", key, names)))
    try:
        return AutoConfig.for_model(kind, **values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise RecipeError(f"backbone_config: {' '.join(str(error).split())}") from error


def new_backbone(
    backbone: str, values: Mapping[str, Any], task: Task[Any], examples: Examples, attention: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Makes a model of random weights under a task's head, and the tokenizer or image processor that goes with it.

    Args:
        backbone: `new:MODEL_TYPE`.
        values: Of its config.
        task: Chooses the head, and makes the processor.
        examples: Those of training, from which a tokenizer learns its vocabulary.
        attention: As in a recipe.

    Raises:
        RecipeError: the config breaks a law, or contradicts the task.
        DataError: the kind of task cannot make a processor.
    """
    config = new_config(backbone, values)
    processor = task.make_processor(config, examples)
    for key, value in {**task.model_options(), **task.config_options(processor)}.items():
        if key in values and values[key] != value:
            raise RecipeError(
                f"backbone_config.{key} is {values[key]!r}, but the task's data asks for {value!r}: leave it out."
            )
        setattr(config, key, value)
    mean = task.model_class is MeanPoolingClassifier
    kind = AutoModel if mean else task.model_class
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        model = kind.from_config(config, **options)
    except (ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise RecipeError(f"Backbone {backbone!r} cannot be made: {str(error).splitlines()[0]}") from error
    return (MeanPoolingClassifier(config, model) if mean else model), processor
