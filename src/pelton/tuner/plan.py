"""From a config and an anatomy to what each block gets; everything is checked here, before a model is touched."""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from pelton.anatomy import Anatomy, Block
from pelton.anatomy import Place as Site
from pelton.errors import AdapterError, AnatomyError, SpecError
from pelton.gates import Gate, Place
from pelton.methods import DilatedAttention, DilatedPart, MethodSpec, Part, PrefixPart
from pelton.tuner.config import PeltonConfig
from pelton.tuner.products import together
from pelton.tuner.refused import check_candidates, check_dilated, check_prefix, check_sizes, check_units

Edits = Literal["input", "output"]
EDITS: tuple[Edits, ...] = ("input", "output")


@dataclasses.dataclass(frozen=True)
class Edit:
    """One part as its layer's hook finds it.

    Attributes:
        kind: the method's kind.
        number: its number among the gate values.
        key: the part's key.
        start: where the slice of the layer's output begins that it edits; None for all of it.
        stop: where the slice ends.
        order: see `Part.order`.
    """

    kind: str
    number: int
    key: str
    start: int | None
    stop: int | None
    order: int


@dataclasses.dataclass(frozen=True)
class Wiring:
    """Where the parts of one adapter go in one block.

    Attributes:
        methods: the specs of the parts that are here.
        numbers: their numbers among the gate values; a gate may have values for methods that were pruned.
        edits: for a layer's path and its input or output, the parts that edit it, in order.
        together: for a part's kind and key, the keys of all parts whose products with their layers' common input are
            computed as one.
        origins: for a layer's path, the site under whose name its input is kept for parts that read it elsewhere.
    """

    methods: tuple[MethodSpec, ...]
    numbers: tuple[int, ...]
    edits: dict[tuple[str, Edits], tuple[Edit, ...]]
    origins: dict[str, str]
    together: dict[tuple[str, str], tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """What one adapter adds to one block.

    Attributes:
        block: the block.
        gate: its gate.
        parts: part by kind and key; the keys are sites, numbered where a site has several layers.
        wiring: where the parts go.
    """

    block: Block
    gate: Gate
    parts: dict[str, dict[str, nn.Module]]
    wiring: Wiring


def device_of(block: nn.Module, anatomy: Block) -> torch.device:
    """Returns the device of a transformer block's layers, where its parts belong."""
    layer = block.get_submodule(next(iter(anatomy.sites.values()))[0].path)
    return next(layer.parameters()).device


def make_plan(config: PeltonConfig, anatomy: Anatomy) -> list[BlockPlan]:
    """Decides what each block gets and builds it, without touching the model.

    Raises:
        AdapterError: the config was saved for another backbone.
        AnatomyError: a site or a block that the config names does not exist.
        SpecError: a gate's law is broken, such as a pooled gate in a causal block.
    """
    _check_backbone(config, anatomy)
    _check_cuts(config, anatomy)
    check_candidates(config)
    plans = []
    for block in anatomy.blocks:
        here = (s for s in config.specs if s.layers is None or block.index in s.layers)
        methods = tuple(s for s in here if any(site in block.sites for site in s.sites))
        for spec in methods:
            if isinstance(spec, DilatedAttention):
                check_dilated(spec, block, anatomy.model_type)
        if any(m.kind not in config.pruned_from(block.index) for m in methods):
            plans.append(_plan_block(config, block, methods))
    parts = ((plan.block.index, kind, key) for plan in plans for kind, some in plan.parts.items() for key in some)
    check_sizes(config, {f"{index}.{kind}.{key}" for index, kind, key in parts})
    _share(config, anatomy, plans)
    return plans


def bind_parts(plans: Sequence[BlockPlan], model: nn.Module) -> None:
    """Lets every planned part see the layer that it will edit; the model is not touched.

    Raises:
        AdapterError: a layer that a method cannot work with.
    """
    for plan in plans:
        block = model.get_submodule(plan.block.name)
        for (path, _), edits in plan.wiring.edits.items():
            for edit in edits:
                part = cast(Part, plan.parts[edit.kind][edit.key])
                part.bind(block.get_submodule(path), slice(edit.start, edit.stop))


def _share(config: PeltonConfig, anatomy: Anatomy, plans: Sequence[BlockPlan]) -> None:
    for spec in config.specs:
        parts = [part for plan in plans for part in plan.parts.get(spec.kind, {}).values()]
        here = [block for block in anatomy.blocks if spec.layers is None or block.index in spec.layers]
        shapes = [s for block in here for site in spec.sites if site in block.sites for s in block.shapes(site)]
        if parts:
            spec.share(shapes, parts)


def fingerprint(anatomy: Anatomy) -> dict[str, Any]:
    """Returns what an adapter must find again in the backbone it is loaded onto."""
    return {"model_type": anatomy.model_type, "hidden_sizes": list(anatomy.hidden_sizes)}


def _check_backbone(config: PeltonConfig, anatomy: Anatomy) -> None:
    found = fingerprint(anatomy)
    if config.backbone is not None and config.backbone != found:
        raise AdapterError(
            f"The adapter was made for {_describe(config.backbone)}, but the backbone is {_describe(found)}. "
            "Load it onto the backbone it was trained with."
        )


def _check_cuts(config: PeltonConfig, anatomy: Anatomy) -> None:
    """Refuses pruned blocks and shrunk parts that the backbone does not have."""
    known = {str(block.index) for block in anatomy.blocks}
    for key in (*config.pruned, *(key.split(".")[0] for key in config.sizes)):
        if key not in known:
            raise AdapterError(f"The adapter's config prunes block {key!r}, but the backbone has {len(known)} blocks.")


def _describe(backbone: dict[str, Any]) -> str:
    sizes = backbone.get("hidden_sizes", [])
    return f"{backbone.get('model_type')!r} with {len(sizes)} blocks of width {sorted(set(sizes))}"


def fitting_methods(config: PeltonConfig, anatomy: Anatomy) -> tuple[MethodSpec, ...]:
    """Returns the methods at the sites that the backbone has; of those that the user named, all must be there."""
    count = len(anatomy.blocks)
    for spec in config.specs:
        for index in spec.layers or ():
            if not 0 <= index < count:
                raise AnatomyError(
                    f"`0 <= layer < {count}` must hold, but got layer={index} for {spec.kind!r}: "
                    f"{anatomy.model_type!r} has {count} blocks."
                )
    if config.methods is not None:
        for spec in config.specs:
            anatomy.require(spec.sites, spec.kind)
        return config.specs
    specs = []
    there = {site for block in anatomy.blocks for site in block.sites}
    for spec in config.specs:
        sites = tuple(site for site in spec.sites if site in there)
        if sites:
            specs.append(dataclasses.replace(cast(Any, spec), sites=sites) if sites != spec.sites else spec)
        else:
            reason = anatomy.blocks[0].missing.get(spec.sites[0], "it has no such site")
            warnings.warn(f"Left {spec.kind!r} out of the default on {anatomy.model_type!r}: {reason}.", stacklevel=2)
    return tuple(specs)


def _plan_block(config: PeltonConfig, block: Block, methods: tuple[MethodSpec, ...]) -> BlockPlan:
    left = tuple(m for m in methods if m.kind not in config.pruned_from(block.index))
    gated = left if config.gate_spec.static else methods  # a softmax over fewer methods would be another gate
    if block.static and not config.gate_spec.static:
        raise AnatomyError(
            f"Gates in {block.name!r} cannot read the input, since {block.static}. Use one that does not: 'scalar', or "
            "FixedGate."
        )
    if not (block.pools or block.causal) and getattr(config.gate_spec, "granularity", None) == "example":
        raise AnatomyError(
            f"`granularity != 'example'` must hold in {block.name!r}, whose attention does not tell padding in a known "
            "way: a pooled gate would see it. Use granularity='token' (or 'auto')."
        )
    kinds = tuple(m.kind for m in gated)
    gate = config.gate_spec.build(Place(kinds, block.hidden_size, not block.pools, block.index))
    if block.windowed and gate.granularity == "token":
        raise SpecError(
            f"`granularity != 'token'` must hold where attention runs in windows, but got granularity='token' for "
            f"{block.name!r}. Use granularity='example'."
        )
    parts: dict[str, dict[str, nn.Module]] = {}
    edits: dict[tuple[str, Edits], list[Edit]] = defaultdict(list)
    origins: dict[str, str] = {}
    numbers = tuple(gated.index(spec) for spec in left)
    for number, spec in zip(numbers, left, strict=True):
        parts[spec.kind] = {}
        for site in spec.sites:
            places = block.sites.get(site, ())
            for i, (place, shape) in enumerate(zip(places, block.shapes(site) if places else (), strict=True)):
                key = site.replace(".", "_") + (f"_{i}" if len(places) > 1 else "")
                size = config.sizes.get(f"{block.index}.{spec.kind}.{key}")
                check_units(spec, gate, size)
                part = parts[spec.kind][key] = (spec if size is None else spec.resized(size)).build(shape)
                if isinstance(part, PrefixPart):
                    check_prefix(spec.kind, part, gate)
                elif isinstance(part, DilatedPart):
                    continue  # the attention function finds it
                elif isinstance(part, Part):
                    _check_slice(part, spec.kind, site, place, block)
                    edit = Edit(spec.kind, number, key, place.start, place.stop, part.order)
                    edits[place.path, part.edits].append(edit)
                    if part.origin:
                        origins[_origin(block, part.origin)] = part.origin
                else:
                    raise SpecError(f"{spec.kind!r} built a {type(part).__name__}; expected a Part.")
    ordered = {where: tuple(sorted(some, key=lambda e: e.order)) for where, some in edits.items()}
    own = {edit.key for (_, what), some in ordered.items() if what == "input" for edit in some}
    return BlockPlan(block, gate, parts, Wiring(left, numbers, ordered, origins, together(parts, own)))


def _origin(block: Block, site: str) -> str:
    if site not in block.sites:
        raise AnatomyError(f"A parallel bottleneck reads the input of {site!r}, which {block.name!r} lacks.")
    return block.sites[site][0].path


def _check_slice(part: Part, kind: str, site: str, place: Site, block: Block) -> None:
    if part.edits == "input" and place.start is not None:
        raise AnatomyError(
            f"{kind!r} edits the input of its layer, but {site!r} of {block.name!r} is a slice of {place.path!r}, "
            "whose other slices read that input too. Name other sites."
        )
