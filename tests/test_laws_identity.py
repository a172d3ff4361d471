"""Laws 1, 2, 3: closed gates, open gates, the start, and unloading."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from law import GATES, METHODS, arch_methods, attached, far, together, wake
from pelton import IA3, FixedGate, LoRA, PeltonConfig, find_anatomy
from pelton.methods import LINEAR_SITES
from zoo import ARCHS, Arch


@pytest.mark.parametrize("method", METHODS)
def test_closed_gate_is_the_backbone_and_open_gate_is_not(arch: Arch, method: str) -> None:
    if method not in arch_methods(arch):
        pytest.skip(f"{arch.name} has no site for it")
    inputs = arch.inputs()
    with torch.no_grad():
        plain = arch.run(arch.build(), inputs)
        closed = arch.run(attached(arch, FixedGate(0.0), [METHODS[method]]), inputs)
        opened = arch.run(attached(arch, FixedGate(1.0), [METHODS[method]]), inputs)
    assert far(plain, closed) <= 1e-6
    assert far(plain, opened) > 1e-5


@pytest.mark.parametrize("gate", GATES)
def test_start_equals_the_backbone(arch: Arch, gate: str) -> None:
    methods = [m for m in together(arch) if m.kind not in ("prefix", "dilated")]  # open at once, whatever they hold
    inputs = arch.inputs()
    with torch.no_grad():
        model = arch.build()
        plain = arch.run(model, inputs)
        fresh = get_peft_model(model, PeltonConfig(methods=methods, gate=GATES[gate])).eval()
        assert far(plain, arch.run(fresh, inputs)) <= 1e-6


def _whole_layers(arch: Arch, sites: tuple[str, ...]) -> list[str]:
    blocks = find_anatomy(arch.build()).blocks
    return [f"{b.name}.{p.path}" for b in blocks for s in sites for p in b.sites.get(s, ()) if p.start is None]


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "llama", "qwen3", "gemma3", "t5", "bart", "vit", "swin"]
)
def test_open_lora_equals_pefts(name: str) -> None:
    arch, inputs = ARCHS[name], ARCHS[name].inputs()
    spec = LoRA(rank=4, alpha=12, sites=LINEAR_SITES)
    ours = attached(arch, FixedGate(1.0), [spec], std=0.1)
    layers = _whole_layers(arch, LINEAR_SITES)
    theirs = get_peft_model(arch.build(), LoraConfig(r=4, lora_alpha=12, target_modules=layers)).eval()
    blocks = find_anatomy(arch.build()).blocks
    for block in blocks:
        gated = ours.get_base_model().get_submodule(block.name).pelton
        for site in LINEAR_SITES:
            for i, place in enumerate(block.sites[site]):
                key = site.replace(".", "_") + (f"_{i}" if len(block.sites[site]) > 1 else "")
                layer = theirs.get_base_model().get_submodule(f"{block.name}.{place.path}")
                part = gated.methods["default"]["lora"][key]
                layer.lora_A["default"].weight.data.copy_(part.A)
                layer.lora_B["default"].weight.data.copy_(part.B)
    with torch.no_grad():
        assert far(arch.run(ours, inputs), arch.run(theirs, inputs)) <= 1e-6


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "llama", "qwen3", "gemma3", "t5", "bart", "vit", "swin"]
)
def test_open_ia3_equals_pefts(name: str) -> None:
    arch, inputs = ARCHS[name], ARCHS[name].inputs()
    sites = ("attn.k", "attn.v", "ffn.out")
    ours = attached(arch, FixedGate(1.0), [IA3(sites=sites)], std=0.1)
    config = IA3Config(target_modules=_whole_layers(arch, sites), feedforward_modules=_whole_layers(arch, ("ffn.out",)))
    theirs = get_peft_model(arch.build(), config).eval()
    for block in find_anatomy(arch.build()).blocks:
        gated = ours.get_base_model().get_submodule(block.name).pelton
        for site in sites:
            layer = theirs.get_base_model().get_submodule(f"{block.name}.{block.sites[site][0].path}")
            vector = gated.methods["default"]["ia3"][site.replace(".", "_")].l
            layer.ia3_l["default"].data.copy_(vector.view_as(layer.ia3_l["default"]))
    with torch.no_grad():
        assert far(arch.run(ours, inputs), arch.run(theirs, inputs)) <= 1e-6


def _tree(model: Any) -> list[tuple[str, type, int, int]]:
    return [(name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]


def test_unload_is_bitwise_identity(arch: Arch) -> None:
    model, inputs = arch.build(), arch.inputs()
    with torch.no_grad():
        before = arch.run(model, inputs)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    tree, config, attributes = _tree(model), model.config.to_dict(), set(vars(model))
    implementations = [getattr(getattr(m, "config", None), "_attn_implementation", None) for m in model.modules()]
    peft_model = wake(get_peft_model(model, PeltonConfig(methods=together(arch))))
    with torch.no_grad():
        arch.run(peft_model.eval(), inputs)
    back = peft_model.unload()
    assert back is model
    with torch.no_grad():
        assert torch.equal(before, arch.run(back, inputs))
    assert list(state) == list(back.state_dict())
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in state.items())
    assert _tree(back) == tree
    assert back.config.to_dict() == config
    assert set(vars(back)) == attributes
    after = [getattr(getattr(m, "config", None), "_attn_implementation", None) for m in back.modules()]
    assert after == implementations


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(arch: Arch, way: str) -> None:
    model, inputs = attached(arch), arch.inputs()
    arch.run(model, inputs)  # with gradients: what a forward leaves must not get in the way
    with torch.no_grad():
        before = arch.run(model, inputs)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(before, arch.run(twin, inputs))
        wake(twin, seed=9)
        assert far(before, arch.run(twin, inputs)) > 1e-5
        assert torch.equal(before, arch.run(model, inputs))
