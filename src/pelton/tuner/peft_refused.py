"""Why a method of PEFT, or a value of its config, cannot be gated."""

from __future__ import annotations

from collections.abc import Sequence

from pelton.errors import SpecError

_SECOND = (
    "it multiplies the backbone's weight matrix again in every forward, which costs as much as a second pass of the "
    "layer"
)
_PROMPT = (
    "it is no method of a layer: it puts learned vectors before the input or into the attention. Use pelton.Prefix"
)
_CHANGES = "it changes the backbone's own weights, so a closed gate could not give the backbone"

METHODS: dict[str, str] = {
    "ADALORA": "its ranks are cut by PEFT's own training loop, which gates know nothing of. Use pelton.LoRA and "
    "pelton.shrink",
    "ADAPTION_PROMPT": _PROMPT,
    "BOFT": "it changes the layer's input and rescales the output of that, so a gate on one is not a gate on both; and "
    "it multiplies matrices as large as the weight in every forward. OFT is taken",
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "HRA": _SECOND,
    "IA3": "Pelton has it: use pelton.IA3",
    "LN_TUNING": "it trains norms, which are no linear layers. Name them in modules_to_save of PeltonConfig",
    "LORA": "Pelton has it, at a fraction of the cost: use pelton.LoRA (and pelton.from_peft for a saved one). With "
    "use_dora=True it is taken",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "OSF": _CHANGES,
    "P_TUNING": _PROMPT,
    "PELTON": "it is Pelton itself. Put its methods in the list",
    "POLY": "it mixes adapters by the task's number, which a layer is not told. Use gates instead",
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "SHADOW": "it is a model beside the backbone, not a layer's contribution",
    "TRAINABLE_TOKENS": "it trains rows of the embeddings, which are no linear layers",
    "XLORA": "it is a gate itself, over several LoRAs. Use pelton.LoRA under a gate",
}
"""Why a method of PEFT is not taken, by its name there."""

_SITES = "where a method goes is said by Peft(sites=…)"
_BLOCKS = "in which blocks it goes is said by Peft(layers=…)"
_PLACES = "Pelton's places have no names for it. Leave it out"
_WEIGHTS = "Pelton shows every weight as [out, in]. Leave it out"

FIELDS: dict[str, str] = {
    "target_modules": _SITES,
    "exclude_modules": _SITES,
    "target_parameters": _SITES,
    "layers_to_transform": _BLOCKS,
    "layers_pattern": _BLOCKS,
    "layer_replication": "it copies blocks of the backbone",
    "rank_pattern": _PLACES,
    "alpha_pattern": _PLACES,
    "n_frequency_pattern": _PLACES,
    "modules_to_save": "what is trained beside the methods is said by PeltonConfig(modules_to_save=…)",
    "trainable_token_indices": "what is trained beside the methods is said by PeltonConfig(modules_to_save=…)",
    "task_type": "the task is said by PeltonConfig(task_type=…)",
    "inference_mode": "whether it trains is said by PeltonConfig(inference_mode=…)",
    "bias": "biases are trained by pelton.BitFit, under a gate of their own",
    "fan_in_fan_out": _WEIGHTS,
    "use_effective_conv2d": "Pelton's sites are linear layers. Leave it out",
    "lora_dropout": "with dropout before it DoRA computes the backbone's product a second time. Use another method, or "
    "0",
    "coft": "it writes its own weights in every forward, and checkpointing runs a forward twice. Leave it out",
    "eps": "it belongs to coft, which is not taken. Leave it out",
    "module_dropout": "PEFT's layer takes no notice of it. Leave it out",
}
"""Why a key of PEFT's configs is not taken."""


def refused_method(name: str, known: Sequence[str]) -> SpecError:
    """Builds the error for a method of PEFT that cannot be gated, with the reason."""
    reason = METHODS.get(name, "nobody has verified yet that its contribution can be told from its layer's output")
    return SpecError(f"PEFT's {name} cannot be gated: {reason}. Gated can be: {', '.join(sorted(known))}.")


def refused_field(kind: str, name: str, value: object) -> SpecError:
    """Builds the error for a key of a config that cannot be taken, with the reason."""
    reason = FIELDS.get(name, "nobody has verified yet that the method can be gated with it")
    return SpecError(f"{name}={value!r} in the config of {kind!r} is not taken: {reason}.")
