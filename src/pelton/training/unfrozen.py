"""A backbone that is trained together with its adapter: its weights are saved beside the adapter's and loaded again.

PEFT saves what is on the adapter and takes the backbone's weights to be the published ones. In a checkpoint the trained
ones are one file; in a finished run they are a model of transformers, which the adapter's config names as its base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pelton.training.optimizer import trained_groups

FILE = "backbone.safetensors"


def unfreeze(model: PeftModel) -> None:
    """Has the whole backbone learn, except for the originals of modules that the adapter trains copies of."""
    for name, parameter in model.named_parameters():
        if ".original_module." not in name and parameter.is_floating_point():
            parameter.requires_grad = True


def save_weights(model: PeftModel, folder: Path) -> None:
    """Writes the trained weights of the backbone into a checkpoint."""
    weights = {name: parameter.detach().contiguous() for name, parameter in trained_groups(model)["backbone"]}
    save_file(weights, folder / FILE, {"format": "pt"})


def load_weights(model: PeftModel, folder: Path) -> None:
    """Reads the weights of a checkpoint into the backbone."""
    saved = load_file(folder / FILE)
    with torch.no_grad():
        for name, parameter in trained_groups(model)["backbone"]:
            parameter.copy_(saved[name])


def load_whole(model: PreTrainedModel, folder: Path) -> None:
    """Reads a checkpoint into a model without an adapter, as `from_pretrained` does.

    The trainer of transformers 5.23 looks for the names that parameters have in memory, while `save_pretrained` writes
    those of older releases where they differ (ViT, CLIP …), and then leaves such weights as they are.
    """
    model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


def save_model(model: PeftModel, folder: Path) -> None:
    """Writes the backbone without what is attached, as transformers does."""
    plain = model.get_base_model()
    plain.save_pretrained(folder, state_dict=_plain_state(plain))
    model.active_peft_config.base_model_name_or_path = str(folder)


def _plain_state(model: Any) -> dict[str, Tensor]:
    """Returns a state dict as it was before anything was attached."""
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if ".pelton." not in key and ".modules_to_save." not in key:
            state[key.replace(".original_module.", ".")] = value
    return state
