"""Finding the blocks of any backbone: by the names of its layers where they suffice, by a row where they don't."""

from __future__ import annotations

import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import cast

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from pelton.anatomy.blocks import Anatomy, Block, Place
from pelton.anatomy.grids import grid_of
from pelton.anatomy.rows import DEFAULT, ROWS, Row
from pelton.errors import AnatomyError
from pelton.methods import LINEAR_SITES

_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")
_MASKS = ("attention_mask", "mask")
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
_ROUTED = re.compile(r"(^|\.)experts\.")
"""Experts see the tokens that are routed to them, in an order of their own: gates would not fit."""


def find_anatomy(model: nn.Module) -> Anatomy:
    """Finds the blocks and sites of a model; reads only names and sizes, so the meta device will do.

    Raises:
        AnatomyError: nothing in the model looks like a transformer block.
    """
    modules = dict(model.named_modules())
    queries: dict[str, str] = {}
    for name, module in modules.items():
        if _is_linear(module) and _is_query(name, modules):
            queries.setdefault(_block_of(name, modules), name)
    model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if not queries:
        linear = [re.sub(r"\.\d+(?=\.|$)", ".N", n) for n, m in modules.items() if n and _is_linear(m)]
        found = f"linear layers {', '.join(dict.fromkeys(linear[:200]))}" if linear else "no linear layers"
        raise AnatomyError(
            f"No transformer blocks are known in {type(model).__name__} ({model_type!r}): expected query projections "
            f"(such as q_proj or query) inside repeated blocks, found {found[:400]}. Where this is a Transformer, add "
            "a row that names its layers to pelton.anatomy.rows."
        )
    names = sorted(queries, key=list(modules).index)
    blocks = (_describe(name, index, queries[name], modules) for index, name in enumerate(names))
    return Anatomy(model_type, tuple(blocks))


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Returns the in and out features of a linear layer of any class (Conv1D and quantised ones too)."""
    for names in (("in_features", "out_features"), ("nx", "nf")):  # the latter: transformers' Conv1D
        if all(hasattr(module, name) for name in names):
            size_in, size_out = (cast(int, getattr(module, name)) for name in names)
            return size_in, size_out
    raise AnatomyError(f"{type(module).__name__} is not a linear layer: expected in_features and out_features.")


def _is_linear(module: nn.Module) -> bool:
    return (hasattr(module, "in_features") and hasattr(module, "out_features")) or type(module).__name__ == "Conv1D"


def _is_query(name: str, modules: dict[str, nn.Module]) -> bool:
    row = row_of(name, modules)
    if re.search(row.cross, name):
        return False
    tail = ".".join(name.split(".")[-2:])
    return any(re.fullmatch(p, tail) or re.fullmatch(p, name) for p in (row.sites["attn.q"], *row.fused))


def row_of(name: str, modules: dict[str, nn.Module]) -> Row:
    """Returns the row of the nearest module around `name` that holds a config."""
    while name:
        name = name.rpartition(".")[0]
        model_type = getattr(getattr(modules[name], "config", None), "model_type", None)
        if model_type is not None:
            return ROWS.get(model_type, DEFAULT)
    return DEFAULT


def _block_of(query: str, modules: dict[str, nn.Module]) -> str:
    """Returns the name of the block around a query projection: a checkpointed layer, or an item of a module list."""
    around = list(_parents(query))
    for name in around:
        if isinstance(modules[name], GradientCheckpointingLayer):
            return name
    for name in around:
        if isinstance(modules[name.rpartition(".")[0]], nn.ModuleList):
            return name
    return around[0]


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _describe(name: str, index: int, query: str, modules: dict[str, nn.Module]) -> Block:
    row, block = row_of(query, modules), modules[name]
    attention = query.removeprefix(name + ".").rpartition(".")[0]
    attn = block.get_submodule(attention)
    sites = _find_sites(block, row, attn)
    missing = {site: "no layer of that role was found" for site in LINEAR_SITES if site not in sites}
    refused = _reason(row.refused, attn)
    if refused:
        raise AnatomyError(f"Nothing can be attached to {type(attn).__name__} in {name!r}: {refused}.")
    head_dim = next((int(getattr(attn, a)) for a in _HEAD_DIM if getattr(attn, a, None)), 0)
    interface = hasattr(attn, "config") and "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(attn).__module__])
    if "attn.k" in sites and interface and head_dim:
        key = sites["attn.k"][0]
        sites["attn"] = (Place(attention, key.in_features, key.out_features),)
    else:
        missing["attn"] = f"{type(attn).__name__} computes its attention outside transformers' attention interface"
    config = getattr(attn, "config", None)
    arguments = inspect.signature(attn.forward).parameters
    causal = _is_causal(attn, arguments) if row.causal is None else row.causal
    mask = next((m for m in _MASKS if m in arguments), None) if row.padding else None
    masked = row.padding is None or (mask is None and row.padding and any("mask" in argument for argument in arguments))
    kv_heads = sites["attn"][0].out_features // head_dim if "attn" in sites else 0
    groups = getattr(attn, "num_key_value_groups", None)
    return Block(
        name=name,
        index=index,
        stack=name.rpartition(".")[0],
        attention=attention,
        hidden_size=sites["attn.out"][0].out_features if "attn.out" in sites else _width(query, modules),
        causal=causal,
        sites=sites,
        missing=missing,
        kv_heads=kv_heads,
        head_dim=head_dim if "attn" in sites else 0,
        norm=row.norm,
        mask=mask,
        pools=not causal and not masked,
        static=_reason(row.static, attn),
        heads=kv_heads * groups if groups else sites["attn.q"][0].out_features // head_dim if kv_heads else 0,
        grid=grid_of(row, config, name, modules),
    )


def _reason(reasons: Mapping[str, str], attn: nn.Module) -> str:
    return next((reason for pattern, reason in reasons.items() if re.search(pattern, type(attn).__name__)), "")


def _is_causal(attn: nn.Module, arguments: Mapping[str, object]) -> bool:
    """Tells whether an attention is causal: it says so, or it is nowhere said that it is not and it keeps a cache."""
    config = getattr(attn, "config", None)
    said = [getattr(attn, flag) for flag in ("is_causal", "is_decoder") if isinstance(getattr(attn, flag, None), bool)]
    if said or getattr(config, "is_decoder", False):
        return any(said) or not said
    return any(name in arguments for name in _CACHES)


def _width(query: str, modules: dict[str, nn.Module]) -> int:
    return linear_sizes(modules[query])[0]


def _find_sites(block: nn.Module, row: Row, attn: nn.Module) -> dict[str, tuple[Place, ...]]:
    found: dict[str, list[Place]] = defaultdict(list)
    for path, module in block.named_modules():
        if not _is_linear(module) or re.search(row.cross, path) or _ROUTED.search(path):
            continue
        for site, pattern in row.sites.items():
            if re.fullmatch(pattern, path):
                found[site].append(Place(path, *linear_sizes(module)))
        for pattern, parts in row.fused.items():
            if parts and re.fullmatch(pattern, path):
                for site, place in zip(parts, _slices(path, module, attn), strict=True):
                    found[site].append(place)
    return {site: tuple(found[site]) for site in LINEAR_SITES if site in found}


def _slices(path: str, module: nn.Module, attn: nn.Module) -> list[Place]:
    """Queries, keys and values in a fused layer: Q heads first, then as many features for keys as for values."""
    size_in, size_out = linear_sizes(module)
    config = getattr(attn, "config", None)
    heads = next((n for n in (getattr(attn, "num_heads", 0), getattr(config, "num_attention_heads", 0)) if n), 0)
    head_dim = next((int(getattr(attn, a)) for a in _HEAD_DIM if hasattr(attn, a)), 0)
    query = int(heads) * head_dim or size_out // 3  # without a word of heads: as many for each
    key = (size_out - query) // 2
    return [Place(path, size_in, n, start) for n, start in ((query, 0), (key, query), (key, query + key))]
