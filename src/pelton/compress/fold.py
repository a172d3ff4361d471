"""Folding: LoRA, (IA)³ and BitFit go into the backbone's weights, at no cost at inference; what cannot stays, constant.

    LoRA     W + g · (alpha / rank) · B A
    (IA)³    rows of W and b, or columns of W, times 1 + g · (l − 1)
    BitFit   b + g · Δb

Where all of an adapter folds, what is left is the backbone's own module tree: an ordinary model. Otherwise bottlenecks
and prefixes stay under constant gates; a prefix becomes keys and values. `unfold` brings the gated model back.
Quantised weights are quantised again, which `fold` has to be asked for.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import Tensor, nn

from pelton.compress.folded import Folded, hashes, heads_back, record, turn_off, whole
from pelton.compress.steps import adapter_of
from pelton.errors import AdapterError
from pelton.methods import MethodSpec, Prefix, PrefixPart
from pelton.tuner.atomic import as_before
from pelton.tuner.block import gate_of
from pelton.tuner.config import PeltonConfig
from pelton.tuner.controls import tuners
from pelton.tuner.cut import static_values
from pelton.tuner.merge import Change, check_layers, check_static, check_untied, fold_block
from pelton.tuner.model import PeltonModel
from pelton.tuner.prefixes import Projection
from pelton.tuner.quantised import Lost, lost, scheme_of, stored
from pelton.tuner.recast import adapter_tensors, recast, with_changes
from pelton.tuner.store import digest

RECORD = "pelton_folded"


def fold(model: nn.Module, *, adapter: str | None = None, requantize: bool = False) -> nn.Module:
    """Folds an adapter into the backbone's weights, in place.

    Quantised weights are read, changed and quantised again as they were, which is not exact. `folded_loss` says what
    that took.

    Args:
        model: A model with one adapter whose gates are constant.
        adapter: Its name; the active one when not given.
        requantize: Folds into quantised weights too, although rounding takes a part of what the adapter changes.

    Returns:
        The plain backbone, with its trained head, where all of the adapter folds; else `model`, whose adapter holds
        what does not.

    Raises:
        AdapterError: gates read the input, nothing folds, there are several adapters, a layer cannot take the methods
            in, a weight is tied to another layer, or weights are quantised and `requantize` was not asked for; nothing
            is changed.
    """
    tuner, name = adapter_of(model, adapter)
    if len(tuner.peft_config) > 1:
        others = ", ".join(other for other in tuner.peft_config if other != name)
        raise AdapterError(
            f"Folding {name!r} would change what {others} were trained on. Delete them first, or load anew."
        )
    blocks = {path: gated for path, gated in tuner.named_blocks() if name in gated.wirings}
    for path, gated in blocks.items():
        check_static(gated, name)
        check_layers(gated, tuner.model.get_submodule(path), name)
    kinds = {spec.kind: spec.foldable for gated in blocks.values() for spec in gated.wirings[name].methods}
    if not any(kinds.values()):
        raise AdapterError(
            f"Nothing of adapter {name!r} folds: it holds {', '.join(kinds)}. It is as small as it gets."
        )
    found = [
        change
        for path, gated in blocks.items()
        for change in fold_block(gated, tuner.model.get_submodule(path), [name], check=True)
    ]
    check_untied(tuner.model, [change.parameter for change in found])
    rounded = lost(change.rounding for change in found)
    if rounded is not None and not requantize:
        raise AdapterError(
            f"The weights that adapter {name!r} folds into are quantised: {rounded}. Fold with requantize=True if that "
            "will do, or keep the adapter attached."
        )
    keys = {id(p): key for key, p in tuner.model.named_parameters()}
    changes = {keys[id(change.parameter)]: change for change in found}
    way_back = record(tuner, name, {key: change.kept() for key, change in changes.items()}, rounded)
    rest = None if all(kinds.values()) else _rest(tuner, name)
    with as_before(model) as before:
        before.write(list(changes.values()))
        now = digest(stored(tuner.model, changes))
        if rest is not None:
            config, tensors = rest
            config.steps = ()
            config.folded = {"weights": sorted(changes), "digest": now}
            recast(tuner, name, config, tensors)
        left = hashes(adapter_tensors(tuner, name)) if rest is not None else {}
        plain: nn.Module = model if rest is not None else tuner.unload_trained()
        setattr(plain, RECORD, dataclasses.replace(way_back, digest=now, rest=left))
        return plain


def folded_loss(model: nn.Module) -> Lost | None:
    """Returns what rounding took when `fold` made this model; None where every weight is exact.

    Raises:
        AdapterError: the model was not folded here.
    """
    return _folded(model).lost


def unfold(model: nn.Module) -> nn.Module:
    """Brings back the gated model that `fold` made this one of, to the bit; in place.

    What did not fold and was trained since, and a trained head, stay as they are now.

    Returns:
        The model with its adapter attached.

    Raises:
        AdapterError: the model was not folded here, its folded weights have changed since, or what did not fold was
            made smaller or, as a prefix, trained since; nothing is changed.
    """
    way_back = _folded(model)
    found = tuners(model)
    backbone: nn.Module = found[0].model if found else model
    if digest(stored(backbone, way_back.weights)) != way_back.digest:
        raise AdapterError("The folded weights have changed since: unfolding would lose what they learned.")
    tensors = whole(found[0], way_back) if found else way_back.tensors
    changes = [_change_back(backbone, key, value) for key, value in way_back.weights.items()]
    with as_before(model) as before:
        before.write(changes)
        if not found:
            return _attached(model, way_back)
        recast(found[0], way_back.adapter, way_back.config, tensors)
        turn_off(found[0], way_back)
        del model.__dict__[RECORD]
        return model


def _change_back(backbone: nn.Module, key: str, value: Tensor) -> Change:
    path, _, slot = key.rpartition(".")
    layer = backbone.get_submodule(path)
    return Change(layer, slot, value, scheme_of(layer, path))


def _attached(model: nn.Module, way_back: Folded) -> nn.Module:
    """Attaches an adapter that was folded whole."""
    del model.__dict__[RECORD]
    gated = get_peft_model(cast(Any, model), copy.copy(way_back.config), adapter_name=way_back.adapter)
    tuner, name = adapter_of(gated, way_back.adapter)
    recast(tuner, name, way_back.config, way_back.tensors)
    turn_off(tuner, way_back)
    heads_back(tuner, way_back)
    gated.train(model.training)
    return cast(nn.Module, gated)


def _folded(model: nn.Module) -> Folded:
    found = cast(Folded | None, model.__dict__.get(RECORD))
    if found is None:
        raise AdapterError(
            f"This {type(model).__name__} was not folded, or it was saved and loaded since: there is no way back."
        )
    return found


@torch.no_grad()
def _rest(tuner: PeltonModel, name: str) -> tuple[PeltonConfig, dict[str, Tensor]]:
    """Returns config and tensors of what does not fold; prefixes as constant keys and values."""
    config = tuner.peft_config[name]
    methods = tuple(_constant(spec) for spec in config.specs if not spec.foldable)
    kept, tensors = {spec.kind for spec in methods}, adapter_tensors(tuner, name)
    for path, gated in tuner.named_blocks():
        here = {spec.kind for spec in gated.wirings[name].methods}
        lost = tuple(f"{path}.methods.{kind}." for kind in here - kept)
        tensors = {key: value for key, value in tensors.items() if not lost or not key.startswith(lost)}
        tensors = static_values(tensors, path, gate_of(gated, name), here - kept, not here & kept)
        if Prefix.kind in here:
            attention = tuner.model.get_submodule(path).get_submodule(gated.block.attention)
            place = f"{path}.methods.{Prefix.kind}.attn"
            part = cast(PrefixPart, gated.part(name, Prefix.kind, "attn"))
            keys, values = part.flat(Projection(attention, gated))
            tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{place}.")}
            tensors |= {f"{place}.keys": keys, f"{place}.values": values}
    sizes = {key: size for key, size in config.sizes.items() if key.split(".")[1] in kept}
    return with_changes(config, methods=methods, sizes=sizes), tensors


def _constant(spec: MethodSpec) -> MethodSpec:
    return dataclasses.replace(spec, parametrisation="kv") if isinstance(spec, Prefix) else spec
