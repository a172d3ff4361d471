"""What a folder in PEFT's format holds: A, B and scale of every place that its LoRA goes to, and whole modules.

What cannot be taken over is refused, since outputs would differ without a word: every tensor must find its place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pelton.anatomy import Anatomy
from pelton.errors import AdapterError
from pelton.tuner.config import WEIGHTS

KEY = "base_model.model."
CONFIG = "adapter_config.json"
REFUSED = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
"""Options of PEFT's LoRA that make it more than W + scale · B A."""

CONVERTED, QUANTISED = ("pissa", "olora", "corda", "lora_ga"), "loftq"
"""Starts of PEFT's `init_lora_weights` that take scale · B A out of W, and the one that puts a quantised W there."""

Place = tuple[int, str, str]
"""A block's number, a site and the key of a part."""


@dataclass(frozen=True)
class Pair:
    """A [r, I] and B [O, r] of one layer, and what their product is scaled by."""

    a: Tensor
    b: Tensor
    scale: float


def read_config(place: Path) -> LoraConfig:
    """Returns the config of a folder that holds a plain LoRA on the weights of its backbone.

    Raises:
        AdapterError: files are missing or broken, or it is something else.
    """
    if not (place / CONFIG).is_file() or not (place / WEIGHTS).is_file():
        raise AdapterError(f"{place} is no PEFT adapter: expected {CONFIG} and {WEIGHTS} (safetensors) in it.")
    try:
        _require_own_weights(place, json.loads((place / CONFIG).read_text(encoding="utf-8")))
        found = PeftConfig.from_pretrained(str(place))
    except AdapterError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{place / CONFIG} cannot be read ({error!r}). Copy it again.") from error
    if not isinstance(found, LoraConfig):
        raise AdapterError(f"{place} holds {found.peft_type}, but only LoRA can be taken over. Load it with PeftModel.")
    more = [name for name in REFUSED if getattr(found, name, None)]
    if more or found.bias != "none":
        what = ", ".join(more) or f"bias={found.bias!r}"
        raise AdapterError(
            f"{place} is more than a LoRA ({what}), which Pelton's lora cannot say. Load it with PeftModel."
        )
    return found


def read_tensors(place: Path) -> dict[str, Tensor]:
    """Returns the tensors of a folder by their names.

    Raises:
        AdapterError: the file is broken.
    """
    try:
        return load_file(place / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{place / WEIGHTS} cannot be read ({error}). Copy it again.") from error


def read_parts(anatomy: Anatomy, config: LoraConfig, tensors: Mapping[str, Tensor]) -> dict[Place, Pair]:
    """Returns A, B and scale for every place that the LoRA goes to.

    Raises:
        AdapterError: it goes where Pelton has no site, to layers of another size, or lacks an A or a B.
    """
    places = _places(anatomy)
    layers = lora_layers(tensors)
    strange = [layer for layer in layers if layer not in places]
    strange += [key.removeprefix(KEY) for key in tensors if "lora_embedding_" in key]
    if strange or not layers:
        what = f"goes to {', '.join(strange[:3])}" if strange else "goes to no layer"
        raise AdapterError(f"The LoRA {what}, where Pelton has no site on this backbone. Load it with PeftModel.")
    parts = {}
    for layer in layers:
        a, b = (_tensor(tensors, f"{layer}.lora_{part}.weight").float() for part in "AB")
        alpha = _pattern(config.alpha_pattern, layer, config.lora_alpha)
        scale = alpha / (math.sqrt(a.shape[0]) if config.use_rslora else a.shape[0])
        for index, site, key, place in places[layer]:
            rows = b if place.start is None else b[place.start : place.start + place.out_features]
            if a.shape[1] != place.in_features or rows.shape[0] != place.out_features:
                raise AdapterError(
                    f"The LoRA of {layer} is [{b.shape[0]}, {a.shape[1]}], but the layer is [{place.out_features}, "
                    f"{place.in_features}]. Take the backbone that it was trained on."
                )
            parts[index, site, key] = Pair(a, rows, scale)
    return parts


def fill_modules(modules: Mapping[str, Mapping[str, Tensor]], tensors: Mapping[str, Tensor]) -> None:
    """Copies what a folder has beside its LoRA into the modules that an adapter holds whole.

    Args:
        modules: Their tensors, by their paths.
        tensors: The folder's.

    Raises:
        AdapterError: a tensor is missing, or one is left that belongs to none of them.
    """
    taken = {f"{KEY}{layer}.lora_{part}.weight" for layer in lora_layers(tensors) for part in "AB"}
    for path, values in modules.items():
        for key, value in values.items():
            value.copy_(_tensor(tensors, f"{path}.{key}"))
            taken.add(f"{KEY}{path}.{key}")
    left = sorted(tensors.keys() - taken)
    if left:
        raise AdapterError(
            f"{len(left)} tensors are no part of a LoRA, such as {left[0].removeprefix(KEY)}, so outputs would differ "
            "without them. Load the folder with PeftModel, or save it again with save_embedding_layers=False if they "
            "are the backbone's own embeddings."
        )


def lora_layers(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the paths of the layers that have an A."""
    end = ".lora_A.weight"
    return [key[len(KEY) : -len(end)] for key in tensors if key.startswith(KEY) and key.endswith(end)]


def _require_own_weights(place: Path, config: Mapping[str, Any]) -> None:
    """Raises AdapterError where training began by changing the backbone's weights, to which A and B belong."""
    start = str(config.get("init_lora_weights")).lower()
    if not start.startswith((*CONVERTED, QUANTISED)):
        return
    what = f"{place} was trained on changed weights of its backbone (init_lora_weights={start!r})"
    if start == QUANTISED:
        raise AdapterError(
            f"{what}. Save the backbone that it was trained on with its changed weights, set init_lora_weights to true "
            f"in {CONFIG}, and attach the LoRA to that backbone."
        )
    raise AdapterError(
        f"{what}, but Pelton attaches to the original ones. Load it with PeftModel, or make a plain LoRA of it where "
        "it was trained: save the adapter before its first step with init_lora_weights=True in its config, and after "
        "training model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion=THAT_FOLDER)."
    )


def _places(anatomy: Anatomy) -> dict[str, list[tuple[int, str, str, Any]]]:
    """Returns block number, site, key and place of all that a layer holds, by the layer's path."""
    places: dict[str, list[tuple[int, str, str, Any]]] = {}
    for block in anatomy.blocks:
        for site, here in block.sites.items():
            for number, place in enumerate(here if site != "attn" else ()):
                key = site.replace(".", "_") + (f"_{number}" if len(here) > 1 else "")
                places.setdefault(f"{block.name}.{place.path}", []).append((block.index, site, key, place))
    return places


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if KEY + name not in tensors:
        raise AdapterError(f"{WEIGHTS} lacks {name}, which {CONFIG} asks for. Copy the folder again.")
    return tensors[KEY + name]


def _pattern(table: dict[str, Any], layer: str, default: float) -> float:
    return float(table.get(get_pattern_key(list(table), layer), default))
