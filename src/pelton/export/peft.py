"""LoRA in PEFT's format: from constant gates into a standard PEFT folder, and from such a folder under gates.

Both scale B A by alpha / r. A gate value g of Pelton becomes part of PEFT's alpha (`alpha_pattern`), a shrunk part its
own r (`rank_pattern`). Several parts of Pelton on slices of one fused layer become one LoRA, of the sum of their ranks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pelton.anatomy import find_anatomy
from pelton.compress.steps import adapter_of
from pelton.errors import AdapterError
from pelton.export.peft_folder import CONFIG, KEY, Pair, fill_modules, read_config, read_parts, read_tensors
from pelton.gates import FixedGate, StaticGate
from pelton.methods import LoRA
from pelton.methods.lora import LoRAPart
from pelton.tuner.atomic import atomic
from pelton.tuner.block import GatedBlock, gate_of
from pelton.tuner.config import WEIGHTS, GateLike, MethodLike, PeltonConfig
from pelton.tuner.merge import check_static
from pelton.tuner.model import PeltonModel
from pelton.tuner.store import draft_beside, exchange, write_whole


def to_peft(model: nn.Module, folder: Path | str, *, adapter: str | None = None) -> Path:
    """Writes an adapter as a standard PEFT LoRA folder, which gives the same outputs without Pelton.

    Args:
        model: A model with an adapter of LoRA under constant gates.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` go.
        adapter: Its name; the active one when not given.

    Returns:
        The folder.

    Raises:
        AdapterError: gates read the input, the adapter holds what is no LoRA, or the folder holds another kind of
            adapter; nothing is written.
    """
    place = Path(folder)
    _require_no_other(place)
    tuner, name = adapter_of(model, adapter)
    pairs: dict[str, Pair] = {}
    for path, gated in tuner.named_blocks():
        if name in gated.wirings:
            pairs |= _pairs(tuner, path, gated, name)
    if not pairs:
        raise AdapterError(f"Every LoRA of adapter {name!r} is closed or off, so there is nothing to write.")
    tensors = {f"{KEY}{layer}.lora_{part}.weight": value for layer, pair in pairs.items() for part, value in _ab(pair)}
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
        AdapterError: the folder is no LoRA, or more than one, or goes to layers that are no sites, or belongs to
            changed weights of the backbone; nothing is attached.
    """
    place = Path(folder)
    found = read_config(place)
    tensors = read_tensors(place)
    parts = read_parts(find_anatomy(backbone), found, tensors)
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
        fill_modules(_modules(tuner, adapter_name), tensors)
    return model


def _require_no_other(place: Path) -> None:
    """Raises AdapterError where a folder holds an adapter that is no LoRA, such as a run's own."""
    if not (place / CONFIG).is_file():
        return
    try:
        kind = json.loads((place / CONFIG).read_text(encoding="utf-8"))["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = "something unknown"
    if kind != "LORA":
        raise AdapterError(f"{place} holds an adapter that is no LoRA ({kind}) and would be lost. Name a new folder.")


def _pairs(tuner: PeltonModel, path: str, gated: GatedBlock, name: str) -> dict[str, Pair]:
    """Returns A, B and scale of every layer of a block that has LoRA; what is closed or off is left out."""
    check_static(gated, name)
    other = [spec.kind for spec in gated.wirings[name].methods if spec.kind not in {LoRA.kind, *gated.off}]
    if other:
        raise AdapterError(
            f"Adapter {name!r} holds {', '.join(other)} in block {gated.block.index}, which PEFT's LoRA cannot say. "
            "Prune them, or fold the adapter into the backbone and save that."
        )
    gate = gate_of(gated, name)
    assert isinstance(gate, StaticGate)
    values, found = gate.values().detach(), dict[str, Pair]()
    if LoRA.kind in gated.off:
        return found
    for (layer_path, _), edits in gated.wirings[name].edits.items():
        layer = tuner.model.get_submodule(f"{path}.{layer_path}")
        width = layer.weight.shape[1] if isinstance(layer, Conv1D) else cast(nn.Linear, layer).out_features
        ours = [edit for edit in edits if edit.kind == LoRA.kind]
        if not ours:
            continue
        parts = [(edit, cast(LoRAPart, gated.part(name, edit.kind, edit.key))) for edit in ours]
        scale = float(values[ours[0].number]) * parts[0][1].scaling
        if scale == 0:
            continue
        a = torch.cat([part.A.detach().cpu() for _, part in parts])
        b, column = torch.zeros(width, a.shape[0]), 0
        for edit, part in parts:
            rank = part.A.shape[0]
            b[edit.start : edit.stop, column : column + rank] = part.B.detach().cpu()
            column += rank
        found[f"{path}.{layer_path}"] = Pair(a, b, scale)
    return found


def _ab(pair: Pair) -> list[tuple[str, Tensor]]:
    return [("A", pair.a.contiguous()), ("B", pair.b.contiguous())]


def _modules(tuner: PeltonModel, name: str) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of the modules that an adapter holds whole, by their paths; others' are left out."""
    wrappers = {
        path: module for path, module in tuner.model.named_modules() if isinstance(module, ModulesToSaveWrapper)
    }
    return {
        path: cast(Any, module.modules_to_save)[name].state_dict()
        for path, module in wrappers.items()
        if name in cast(Any, module.modules_to_save)
    }


def _heads(tuner: PeltonModel, name: str) -> dict[str, Tensor]:
    return {
        f"{KEY}{path}.{key}": value.detach().cpu().contiguous()
        for path, values in _modules(tuner, name).items()
        for key, value in values.items()
    }


def _config(tuner: PeltonModel, name: str, pairs: dict[str, Pair]) -> LoraConfig:
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
