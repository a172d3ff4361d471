"""LoRA in PEFT's format: from constant gates into a standard PEFT folder, and from such a folder under gates.

Both scale B A by alpha / r. A gate value g of Pelton becomes part of PEFT's alpha (`alpha_pattern`), a shrunk part its
own r (`rank_pattern`). Several parts of Pelton on slices of one fused layer become one LoRA, of the sum of their ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pelton.anatomy import Anatomy, find_anatomy
from pelton.compress.steps import adapter_of
from pelton.errors import AdapterError
from pelton.gates import FixedGate, StaticGate
from pelton.methods import LoRA
from pelton.methods.lora import LoRAPart
from pelton.tuner.atomic import atomic
from pelton.tuner.block import GatedBlock, gate_of
from pelton.tuner.config import WEIGHTS, GateLike, MethodLike, PeltonConfig
from pelton.tuner.merge import check_static
from pelton.tuner.model import PeltonModel
from pelton.tuner.store import draft_beside, exchange, write_whole

KEY = "base_model.model."
REFUSED = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
"""Options of PEFT's LoRA that make it more than W + scale · B A."""


@dataclass(frozen=True)
class _Pair:
    """A [r, I] and B [O, r] of one layer, and what their product is scaled by."""

    a: Tensor
    b: Tensor
    scale: float


def to_peft(model: nn.Module, folder: Path | str, *, adapter: str | None = None) -> Path:
    """Writes an adapter as a standard PEFT LoRA folder, which gives the same outputs without Pelton.

    Args:
        model: A model with an adapter of LoRA under constant gates.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` go.
        adapter: Its name; the active one when not given.

    Returns:
        The folder.

    Raises:
        AdapterError: gates read the input, or the adapter holds what is no LoRA; nothing is written.
    """
    tuner, name = adapter_of(model, adapter)
    pairs: dict[str, _Pair] = {}
    for path, gated in tuner.named_blocks():
        if name in gated.wirings:
            pairs |= _pairs(tuner, path, gated, name)
    if not pairs:
        raise AdapterError(f"Every LoRA of adapter {name!r} is closed, so there is nothing to write.")
    tensors = {f"{KEY}{layer}.lora_{part}.weight": value for layer, pair in pairs.items() for part, value in _ab(pair)}
    place = Path(folder)
    place.absolute().parent.mkdir(parents=True, exist_ok=True)
    with draft_beside(place) as draft:
        write_whole(draft / WEIGHTS, save({**tensors, **_heads(tuner, name)}, metadata={"format": "pt"}))
        _config(tuner, name, pairs).save_pretrained(str(draft))
        if place.exists():
            exchange(draft, place)
        else:
            draft.rename(place)
    return place


@atomic
def from_peft(
    backbone: nn.Module,
    folder: Path | str,
    *,
    methods: Sequence[MethodLike] = (),
    gate: GateLike | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Attaches a PEFT LoRA folder as Pelton's `lora`, alone and open, or under a gate with other methods.

    Args:
        backbone: The model that the LoRA was trained on.
        folder: With `adapter_config.json` and `adapter_model.safetensors`.
        methods: What else is attached.
        gate: Over all of them; open (`FixedGate(1.0)`) when not given, which gives PEFT's own outputs.
        adapter_name: Under which name.

    Raises:
        AdapterError: the folder is no LoRA, or more than one, or goes to layers that are no sites; nothing is attached.
    """
    place = Path(folder)
    found = _read_config(place)
    tensors = load_file(place / WEIGHTS)
    parts = _parts(find_anatomy(backbone), found, tensors)
    ranks = Counter(pair.a.shape[0] for pair in parts.values())
    rank, scale = max(ranks), Counter(pair.scale for pair in parts.values()).most_common(1)[0][0]
    sites = tuple(dict.fromkeys(site for _, site, _ in parts))
    lora = LoRA(rank=rank, alpha=scale * rank, dropout=found.lora_dropout, sites=sites)
    config = PeltonConfig(
        task_type=found.task_type,
        methods=[lora, *methods],
        gate=FixedGate(1.0) if gate is None else gate,
        modules_to_save=found.modules_to_save,
        base_model_name_or_path=found.base_model_name_or_path,
        sizes={f"{i}.lora.{key}": pair.a.shape[0] for (i, _, key), pair in parts.items() if pair.a.shape[0] != rank},
    )
    model = cast(PeftModel, get_peft_model(cast(Any, backbone), config, adapter_name=adapter_name))
    tuner, _ = adapter_of(model, adapter_name)
    blocks = {gated.block.index: gated for gated in tuner.blocks()}
    with torch.no_grad():
        for (index, _, key), pair in parts.items():
            part = cast(LoRAPart, blocks[index].part(adapter_name, LoRA.kind, key))
            part.A.copy_(pair.a)
            part.B.copy_(pair.b * (pair.scale / scale))
        for path, module in tuner.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                for key, value in cast(Any, module.modules_to_save)[adapter_name].state_dict().items():
                    value.copy_(tensors[f"{KEY}{path}.{key}"])
    return model


def _pairs(tuner: PeltonModel, path: str, gated: GatedBlock, name: str) -> dict[str, _Pair]:
    """Returns A, B and scale of every layer of a block that has LoRA; closed ones are left out."""
    check_static(gated, name)
    other = [spec.kind for spec in gated.wirings[name].methods if spec.kind != LoRA.kind]
    if other:
        raise AdapterError(
            f"Adapter {name!r} holds {', '.join(other)} in block {gated.block.index}, which PEFT's LoRA cannot say. "
            "Prune them, or fold the adapter into the backbone and save that."
        )
    gate = gate_of(gated, name)
    assert isinstance(gate, StaticGate)
    values, found = gate.values().detach(), {}
    for (layer_path, _), edits in gated.wirings[name].edits.items():
        layer = tuner.model.get_submodule(f"{path}.{layer_path}")
        width = layer.weight.shape[1] if isinstance(layer, Conv1D) else cast(nn.Linear, layer).out_features
        parts = [(edit, cast(LoRAPart, gated.part(name, edit.kind, edit.key))) for edit in edits]
        scale = float(values[edits[0].number]) * parts[0][1].scaling
        if scale == 0:
            continue
        a = torch.cat([part.A.detach().cpu() for _, part in parts])
        b, column = torch.zeros(width, a.shape[0]), 0
        for edit, part in parts:
            rank = part.A.shape[0]
            b[edit.start : edit.stop, column : column + rank] = part.B.detach().cpu()
            column += rank
        found[f"{path}.{layer_path}"] = _Pair(a, b, scale)
    return found


def _ab(pair: _Pair) -> list[tuple[str, Tensor]]:
    return [("A", pair.a.contiguous()), ("B", pair.b.contiguous())]


def _heads(tuner: PeltonModel, name: str) -> dict[str, Tensor]:
    return {
        f"{KEY}{path}.{key}": value.detach().cpu().contiguous()
        for path, module in tuner.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for key, value in cast(Any, module.modules_to_save)[name].state_dict().items()
    }


def _config(tuner: PeltonModel, name: str, pairs: dict[str, _Pair]) -> LoraConfig:
    ours = tuner.peft_config[name]
    ranks = {layer: pair.a.shape[0] for layer, pair in pairs.items()}
    alphas = {layer: pair.scale * ranks[layer] for layer, pair in pairs.items()}
    rank, alpha = (Counter(table.values()).most_common(1)[0][0] for table in (ranks, alphas))
    flipped = any(isinstance(tuner.model.get_submodule(layer), Conv1D) for layer in pairs)
    return LoraConfig(
        task_type=ours.task_type,
        r=int(rank),
        lora_alpha=alpha,
        target_modules=list(pairs),
        rank_pattern={layer: value for layer, value in ranks.items() if value != rank},
        alpha_pattern={layer: value for layer, value in alphas.items() if value != alpha},
        fan_in_fan_out=flipped,
        modules_to_save=ours.modules_to_save,
        base_model_name_or_path=ours.base_model_name_or_path,
        inference_mode=True,
    )


def _read_config(place: Path) -> LoraConfig:
    if not (place / "adapter_config.json").is_file() or not (place / WEIGHTS).is_file():
        raise AdapterError(
            f"{place} is no PEFT adapter: expected adapter_config.json and {WEIGHTS} (safetensors) in it."
        )
    found = PeftConfig.from_pretrained(str(place))
    if not isinstance(found, LoraConfig):
        raise AdapterError(f"{place} holds {found.peft_type}, but only LoRA can be taken over. Load it with PeftModel.")
    more = [name for name in REFUSED if getattr(found, name, None)]
    if more or found.bias != "none":
        what = ", ".join(more) or f"bias={found.bias!r}"
        raise AdapterError(
            f"{place} is more than a LoRA ({what}), which Pelton's lora cannot say. Load it with PeftModel."
        )
    return found


def _parts(anatomy: Anatomy, config: LoraConfig, tensors: dict[str, Tensor]) -> dict[tuple[int, str, str], _Pair]:
    """Returns A, B and scale by block number, site and key, for every place that the LoRA goes to."""
    places: dict[str, list[tuple[int, str, str, Any]]] = {}
    for block in anatomy.blocks:
        for site, here in block.sites.items():
            for number, place in enumerate(here if site != "attn" else ()):
                key = site.replace(".", "_") + (f"_{number}" if len(here) > 1 else "")
                places.setdefault(f"{block.name}.{place.path}", []).append((block.index, site, key, place))
    layers = [key.removeprefix(KEY).removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    strange = [layer for layer in layers if layer not in places]
    if strange or not layers:
        what = f"goes to {', '.join(strange[:3])}" if strange else "goes to no layer"
        raise AdapterError(f"The LoRA {what}, where Pelton has no site on this backbone. Load it with PeftModel.")
    parts = {}
    for layer in layers:
        a, b = tensors[f"{KEY}{layer}.lora_A.weight"].float(), tensors[f"{KEY}{layer}.lora_B.weight"].float()
        alpha = _pattern(config.alpha_pattern, layer, config.lora_alpha)
        scale = alpha / (math.sqrt(a.shape[0]) if config.use_rslora else a.shape[0])
        for index, site, key, place in places[layer]:
            rows = b if place.start is None else b[place.start : place.start + place.out_features]
            if a.shape[1] != place.in_features or rows.shape[0] != place.out_features:
                raise AdapterError(
                    f"The LoRA of {layer} is [{b.shape[0]}, {a.shape[1]}], but the layer is [{place.out_features}, "
                    f"{place.in_features}]. Take the backbone that it was trained on."
                )
            parts[index, site, key] = _Pair(a, rows, scale)
    return parts


def _pattern(table: dict[str, Any], layer: str, default: float) -> float:
    from peft.utils.other import get_pattern_key

    return float(table.get(get_pattern_key(list(table), layer), default))
