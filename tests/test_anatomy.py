"""Anatomy: every block and site of every architecture, what is missing and why, and that a site is what it says."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import Tensor, nn

from law import wake
from pelton import FixedGate, LoRA, PeltonConfig, Prefix, find_anatomy
from pelton.anatomy import ROWS, Anatomy, Block
from pelton.anatomy.find import linear_sizes, row_of
from pelton.errors import AnatomyError, UnknownName
from pelton.methods import LINEAR_SITES, METHODS, SITES
from zoo import ARCHS, DECODER, TEXT, VISION, WIDTH, Arch


@dataclasses.dataclass(frozen=True)
class Expected:
    """Blocks by stack, causal stacks, layers behind `ffn.in`, and linear layers that are of no site."""

    stacks: dict[str, int]
    causal: tuple[str, ...] = ()
    ffn_in: int = 1
    apart: str = "$^"


EXPECTED = {
    "bert": Expected({"bert.encoder.layer": 2}),
    "roberta": Expected({"roberta.encoder.layer": 2}),
    "electra": Expected({"electra.encoder.layer": 2}),
    "albert": Expected({"albert.encoder.albert_layer_groups.0.albert_layers": 1}),
    "distilbert": Expected({"distilbert.transformer.layer": 2}),
    "deberta-v2": Expected({"deberta.encoder.layer": 2}, apart="pos_key_proj|pos_query_proj"),
    "modernbert": Expected({"model.layers": 2}),
    "gpt2": Expected({"transformer.h": 2}, causal=("transformer.h",)),
    "llama": Expected({"model.layers": 2}, causal=("model.layers",), ffn_in=2),
    "mistral": Expected({"model.layers": 2}, causal=("model.layers",), ffn_in=2),
    "qwen2": Expected({"model.layers": 2}, causal=("model.layers",), ffn_in=2),
    "qwen3": Expected({"model.layers": 2}, causal=("model.layers",), ffn_in=2),
    "gemma3": Expected({"model.layers": 2}, causal=("model.layers",), ffn_in=2),
    "phi3": Expected({"model.layers": 2}, causal=("model.layers",)),
    "minigpt": Expected({"model.layers": 2}, causal=("model.layers",)),
    "minigpt-alibi": Expected({"model.layers": 2}, causal=("model.layers",)),
    "minigpt-learned": Expected({"model.layers": 2}, causal=("model.layers",)),
    "t5": Expected({"encoder.block": 2, "decoder.block": 2}, causal=("decoder.block",)),
    "bart": Expected({"model.encoder.layers": 2, "model.decoder.layers": 2}, causal=("model.decoder.layers",)),
    "vit": Expected({"vit.layers": 2}),
    "swin": Expected({"swin.encoder.layers.0.blocks": 2, "swin.encoder.layers.1.blocks": 2}),
    "dinov2": Expected({"dinov2.encoder.layer": 2}),
    "beit": Expected({"beit.layers": 2}),
    "recon": Expected({"recon.layers": 2, "recon.decoder.layers": 1}),
    "recon-segmentation": Expected({"recon.layers": 2, "recon.decoder.layers": 1}),
    "whisper": Expected({"encoder.layers": 2, "decoder.layers": 2}, causal=("decoder.layers",)),
    "clip": Expected(
        {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 2}, causal=("text_model.encoder.layers",)
    ),
    "blip": Expected(
        {"vision_model.encoder.layers": 2, "text_encoder.encoder.layer": 2},
        causal=("text_encoder.encoder.layer",),  # it can decode, and does not say beforehand whether it will
    ),
}


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | tf.pytorch_utils.Conv1D)


def test_every_architecture_is_expected() -> None:
    assert list(EXPECTED) == list(ARCHS)


def test_all_blocks_are_found(arch: Arch) -> None:
    anatomy, expected = find_anatomy(arch.build()), EXPECTED[arch.name]
    stacks: dict[str, int] = {}
    for block in anatomy.blocks:
        stacks[block.stack] = stacks.get(block.stack, 0) + 1
    assert stacks == expected.stacks
    assert [b.index for b in anatomy.blocks] == list(range(len(anatomy.blocks)))
    assert len({b.name for b in anatomy.blocks}) == len(anatomy.blocks)
    assert {b.stack for b in anatomy.blocks if b.causal} == set(expected.causal)


def test_sites_have_the_sizes_of_their_layers(arch: Arch) -> None:
    model = arch.build()
    for block in find_anatomy(model).blocks:
        assert set(LINEAR_SITES) <= set(block.sites)
        module = model.get_submodule(block.name)
        for site, places in block.sites.items():
            assert len(places) == (EXPECTED[arch.name].ffn_in if site == "ffn.in" else 1)
            for place, shape in zip(places, block.shapes(site), strict=True):
                assert (shape.in_features, shape.out_features) == (place.in_features, place.out_features)
                if site != "attn":
                    size_in, size_out = linear_sizes(module.get_submodule(place.path))
                    assert place.in_features == size_in
                    assert place.out_features == (size_out if place.start is None else place.stop - place.start)
        sites = {site: places[0] for site, places in block.sites.items()}
        for reads in ("attn.q", "attn.k", "attn.v", "ffn.in"):
            assert sites[reads].in_features == block.hidden_size
        for writes in ("attn.out", "ffn.out"):
            assert sites[writes].out_features == block.hidden_size
        assert sites["attn.k"].out_features == sites["attn.v"].out_features
        assert sites["attn.out"].in_features == sites["attn.q"].out_features


def test_slices_tile_their_layer(arch: Arch) -> None:
    model = arch.build()
    for block in find_anatomy(model).blocks:
        slices: dict[str, list[Any]] = {}
        for site in ("attn.q", "attn.k", "attn.v"):
            for place in block.sites[site]:
                slices.setdefault(place.path, []).append(place)
        for path, places in slices.items():
            if len(places) > 1:
                ends = [0, *(p.stop for p in places)]
                assert [p.start for p in places] == ends[:-1]
                assert ends[-1] == linear_sizes(model.get_submodule(f"{block.name}.{path}"))[1]


def test_every_linear_layer_of_a_block_has_a_site(arch: Arch) -> None:
    model = arch.build()
    modules = dict(model.named_modules())
    for block in find_anatomy(model).blocks:
        sited = {place.path for places in block.sites.values() for place in places}
        apart = f"{row_of(f'{block.name}.{block.attention}.x', modules).cross}|{EXPECTED[arch.name].apart}"
        for path, module in model.get_submodule(block.name).named_modules():
            if _linear(module):
                assert (path in sited) != bool(re.search(apart, path)), path


def test_attention_knows_its_heads(arch: Arch) -> None:
    model = arch.build()
    for block in find_anatomy(model).blocks:
        if "attn" not in block.sites:
            assert not arch.prefix
            assert (block.kv_heads, block.head_dim) == (0, 0)
            continue
        assert block.kv_heads * block.head_dim == block.sites["attn.k"][0].out_features
        config: Any = model.get_submodule(f"{block.name}.{block.attention}").config
        grouped = getattr(config, "num_key_value_heads", None)
        if isinstance(grouped, int):
            assert block.kv_heads == grouped


def test_missing_sites_say_why(arch: Arch) -> None:
    anatomy = find_anatomy(arch.build())
    for block in anatomy.blocks:
        assert set(block.sites) | set(block.missing) == set(SITES)
        assert not set(block.sites) & set(block.missing)
        assert set(block.missing) == (set() if arch.prefix else {"attn"})
    if arch.prefix:
        anatomy.require(SITES, "prefix")
        return
    with pytest.raises(AnatomyError, match="outside transformers' attention interface") as error:
        anatomy.require(["attn"], "prefix")
    assert f"It has: {', '.join(LINEAR_SITES)}" in str(error.value)
    assert repr(anatomy.model_type) in str(error.value)


def test_the_meta_device_will_do(arch: Arch) -> None:
    with torch.device("meta"):
        model = arch.make()
    assert all(p.is_meta for p in model.parameters())
    assert find_anatomy(model) == find_anatomy(arch.build())


def test_attaching_does_not_change_the_anatomy(arch: Arch) -> None:
    model = arch.build()
    before = find_anatomy(model)
    methods = [LoRA(sites=LINEAR_SITES), *([Prefix()] if arch.prefix else [])]
    peft_model = get_peft_model(model, PeltonConfig(methods=methods))
    assert find_anatomy(model) == before
    assert len(find_anatomy(peft_model).blocks) == len(before.blocks)


BLOCKLESS = {
    "sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
    "empty": nn.Sequential,
    "convolutions": lambda: tf.ResNetModel(tf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
    "recurrent": lambda: nn.LSTM(4, 4),
}


@pytest.mark.parametrize("kind", BLOCKLESS)
def test_a_backbone_without_blocks_is_refused(kind: str) -> None:
    with pytest.raises(AnatomyError, match=r"No transformer blocks are known in .*: expected query projections"):
        find_anatomy(BLOCKLESS[kind]())


def test_unknown_sites_are_named() -> None:
    with pytest.raises(UnknownName, match=r"Unknown site 'attn.query'. Did you mean 'attn"):
        find_anatomy(ARCHS["bert"].build()).require(["attn.query"], "lora")


class _Linears:
    """What every linear layer of a model did in one forward: its input, what it gives alone, what came out."""

    def __init__(self, model: nn.Module) -> None:
        self.changed: dict[str, Tensor] = {}
        self.handles = [
            module.register_forward_hook(self._note(name))
            for name, module in model.named_modules()
            if _linear(module) and ".pelton." not in name
        ]

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            alone = module.forward(*args)
            self.changed[name] = (output - alone).abs().flatten(0, -2).amax(0)  # by feature

        return hook

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def _places(block: Block, site: str) -> dict[str, Any]:
    return {f"{block.name}.{place.path}": place for place in block.sites[site]}


@pytest.mark.parametrize("site", LINEAR_SITES)
def test_a_part_changes_its_layer_only(arch: Arch, site: str) -> None:
    """LoRA at one site of one block changes what those layers give, and of a fused layer only its slice."""
    model, inputs = arch.build(), arch.inputs()
    last = find_anatomy(model).blocks[-1]
    config = PeltonConfig(methods=[LoRA(sites=(site,), layers=(last.index,))], gate=FixedGate(1.0))
    wake(get_peft_model(model, config)).eval()
    linears = _Linears(model)
    with torch.no_grad():
        arch.run(model, inputs)
    linears.close()
    places = _places(last, site)
    assert {name for name, change in linears.changed.items() if change.max() > 0} == set(places)
    for name, place in places.items():
        change = linears.changed[name]
        if place.start is not None:
            inside = torch.zeros_like(change).bool()
            inside[place.start : place.stop] = True
            assert (change[inside] > 0).all()
            assert (change[~inside] == 0).all()
        else:
            assert (change > 0).all()


@pytest.mark.parametrize("site", LINEAR_SITES)
def test_a_site_is_in_every_block(arch: Arch, site: str) -> None:
    model = arch.build()
    places = [name for block in find_anatomy(model).blocks for name in _places(block, site)]
    wake(get_peft_model(model, PeltonConfig(methods=[LoRA(sites=(site,))], gate=FixedGate(1.0)))).eval()
    linears = _Linears(model)
    with torch.no_grad():
        arch.run(model, arch.inputs())
    linears.close()
    assert sorted(name for name, change in linears.changed.items() if change.max() > 0) == sorted(places)


# Architectures that the default row covers without being asked for

T5_GATED = dict(d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99)
MORE: dict[str, tuple[Any, int, int]] = {
    "t5 v1.1": (lambda: tf.T5Model(tf.T5Config(**T5_GATED, feed_forward_proj="gated-gelu")), 4, 2),
    "bert decoder": (lambda: tf.BertLMHeadModel(tf.BertConfig(**TEXT, is_decoder=True)), 2, 1),
    "xlm-roberta": (lambda: tf.XLMRobertaModel(tf.XLMRobertaConfig(**TEXT)), 2, 1),
    "gemma2": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, head_dim=8)), 2, 2),
    "olmo2": (lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**DECODER)), 2, 2),
    "siglip": (lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION)), 2, 1),
    "deit": (lambda: tf.DeiTModel(tf.DeiTConfig(**VISION)), 2, 1),
}
"""How to make it, how many blocks it has, and how many layers behind `ffn.in`."""


@pytest.mark.parametrize("name", MORE)
def test_structure_suffices_for_relatives(name: str) -> None:
    make, count, ffn_in = MORE[name]
    anatomy: Anatomy = find_anatomy(make())
    assert len(anatomy.blocks) == count
    for block in anatomy.blocks:
        assert len(block.sites["ffn.in"]) == ffn_in
        assert set(LINEAR_SITES) <= set(block.sites)
    if name == "bert decoder":
        assert all(block.causal for block in anatomy.blocks)


def test_rows_name_sites_and_compile() -> None:
    for row in ROWS.values():
        assert set(row.sites) <= set(LINEAR_SITES)
        for pattern in (*row.sites.values(), *row.fused, row.cross):
            re.compile(pattern)
        for fused in row.fused.values():
            assert set(fused) <= set(LINEAR_SITES)
    assert set(METHODS) >= {"lora", "bottleneck", "prefix", "ia3", "bitfit"}
