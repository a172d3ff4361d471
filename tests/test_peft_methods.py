"""PEFT's layer methods as gated methods: what they equal, what they cost, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from law import PEFT_METHODS as CONFIGS
from law import attached, far, wake
from law import peft_method as spec
from pelton import (
    IA3,
    BitFit,
    Bottleneck,
    FixedGate,
    LoRA,
    MLPGate,
    PeltonConfig,
    ScalarGate,
    find_anatomy,
    fold,
    gated_blocks,
    prune,
    record_gates,
    set_methods,
    unfold,
)
from pelton.methods import LINEAR_SITES
from pelton.methods import METHODS as KINDS
from pelton.tuner.peft_part import StandIn
from zoo import ARCHS, Arch

ADDS = [kind for kind in CONFIGS if kind != "oft"]
ANYWHERE = ("attn.out", "ffn.out")
"""Sites that are whole layers in every architecture, where an input can be edited."""

FEW = ["bert", "llama", "t5", "swin"]


def sites_of(kind: str) -> tuple[str, ...]:
    return ANYWHERE if kind == "oft" else LINEAR_SITES


@pytest.fixture
def quiet_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    traces = logging.getLogger("torch.__trace")  # pytest would capture and format each of thousands of records
    monkeypatch.setattr(traces, "handlers", [])
    monkeypatch.setattr(traces, "addHandler", lambda handler: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- law 1: closed is the backbone, open is PEFT's own model ------------------------------------------------------


def whole(arch: Arch, sites: Sequence[str]) -> tuple[tuple[str, ...], dict[str, tuple[str, str, str]]]:
    """Returns the sites that are plain linear layers, and by layer the block, site and key of the part."""
    blocks = find_anatomy(arch.build()).blocks
    model = arch.build()
    layers: dict[str, tuple[str, str, str]] = {}
    kept = []
    for site in sites:
        places = [(block, i, place) for block in blocks for i, place in enumerate(block.sites.get(site, ()))]
        linear = [type(model.get_submodule(f"{b.name}.{p.path}")) is nn.Linear for b, _, p in places]
        if not places or any(p.start is not None for _, _, p in places) or not all(linear):
            continue
        kept.append(site)
        for block, i, place in places:
            key = site.replace(".", "_") + (f"_{i}" if len(block.sites[site]) > 1 else "")
            layers[f"{block.name}.{place.path}"] = (block.name, site, key)
    return tuple(kept), layers


def pefts_own(arch: Arch, kind: str, ours: Any, layers: dict[str, tuple[str, str, str]], **more: Any) -> Any:
    """PEFT's model of the method with the values of ours."""
    config = CONFIGS[kind]()
    for name, value in more.items():
        setattr(config, name, value)
    config.target_modules = set(layers)
    theirs = get_peft_model(arch.build(), config).eval()
    for path, (block, _, key) in layers.items():
        part = ours.get_base_model().get_submodule(block).pelton.methods["default"][kind][key]
        layer = theirs.get_base_model().get_submodule(path)
        there = {name.replace(".default", ".own"): p for name, p in layer.named_parameters() if ".default" in name}
        mine = dict(part.named_parameters())
        assert mine.keys() == there.keys()
        for name, parameter in mine.items():
            assert there[name].shape == parameter.shape
            there[name].data.copy_(parameter)
    return theirs


@pytest.mark.parametrize("kind", CONFIGS)
def test_closed_is_the_backbone_and_open_is_pefts_own(arch: Arch, kind: str) -> None:
    sites, layers = whole(arch, LINEAR_SITES)
    if not layers:
        pytest.skip("its layers are all fused or Conv1D; `merged` covers those")
    inputs = arch.inputs()
    with torch.no_grad():
        plain = arch.run(arch.build(), inputs)
        closed = attached(arch, FixedGate(0.0), [spec(kind, sites)])
        assert far(plain, arch.run(closed, inputs)) <= 1e-6
        ours = attached(arch, FixedGate(1.0), [spec(kind, sites)])
        out = arch.run(ours, inputs)
        assert far(plain, out) > 1e-5
        assert far(out, arch.run(pefts_own(arch, kind, ours, layers), inputs)) <= 1e-6


@pytest.mark.parametrize("name", ["gpt2", "modernbert", "phi3", "blip"])
@pytest.mark.parametrize("kind", ADDS)
def test_fused_layers_take_it_slice_by_slice(name: str, kind: str) -> None:
    arch = ARCHS[name]
    with torch.no_grad():
        plain = arch.run(arch.build(), arch.inputs())
        assert far(plain, arch.run(attached(arch, FixedGate(0.0), [spec(kind)]), arch.inputs())) <= 1e-6
        assert far(plain, arch.run(attached(arch, FixedGate(1.0), [spec(kind)]), arch.inputs())) > 1e-5


@pytest.mark.parametrize("kind", CONFIGS)
def test_fresh_equals_the_backbone(kind: str) -> None:
    """Among them DoRA, whose norms are taken from the layers, also from slices and transposed ones."""
    for arch in (ARCHS["bert"], ARCHS["gpt2"]):
        method = spec(kind, sites_of(kind))
        if kind == "fourierft":  # PEFT starts it with random frequencies unless it is asked not to
            method = dataclasses.replace(method, config=method.config | {"init_weights": True})
        model = get_peft_model(arch.build(), PeltonConfig(methods=[method], gate=FixedGate(1.0))).eval()
        with torch.no_grad():
            assert far(arch.run(arch.build(), arch.inputs()), arch.run(model, arch.inputs())) <= 1e-6


@pytest.mark.parametrize("name", ["gpt2", "modernbert", "phi3", "bert"])
def test_dora_starts_at_the_norms_of_its_own_rows(name: str) -> None:
    model = get_peft_model(ARCHS[name].build(), PeltonConfig(methods=[spec("dora")]))
    for gated in gated_blocks(model):
        block = model.get_base_model().get_submodule(gated.block.name)
        for site in LINEAR_SITES:
            for i, place in enumerate(gated.block.sites[site]):
                key = site.replace(".", "_") + (f"_{i}" if len(gated.block.sites[site]) > 1 else "")
                weight = block.get_submodule(place.path).weight
                rows = (weight.t() if name == "gpt2" else weight)[place.start : place.stop]
                part = gated.methods["default"]["dora"][key]
                magnitude = part.lora_magnitude_vector["own"].weight
                assert far(magnitude, rows.norm(dim=1)) <= 1e-6
                assert magnitude.requires_grad


@pytest.mark.parametrize("kind", ["vera", "dora", "fourierft"])  # those that PEFT puts there
def test_open_is_pefts_own_in_transposed_layers(kind: str) -> None:
    arch = ARCHS["gpt2"]
    sites = {"attn.out": "attn.c_proj", "ffn.in": "mlp.c_fc", "ffn.out": "mlp.c_proj"}
    ours = attached(arch, FixedGate(1.0), [spec(kind, tuple(sites))])
    layers = {
        f"{gated.block.name}.{path}": (gated.block.name, site, site.replace(".", "_"))
        for gated in gated_blocks(ours)
        for site, path in sites.items()
    }
    with torch.no_grad():
        theirs = pefts_own(arch, kind, ours, layers, fan_in_fan_out=True)
        assert far(arch.run(ours, arch.inputs()), arch.run(theirs, arch.inputs())) <= 1e-6


def test_half_a_gate_is_half_the_contribution() -> None:
    """Said of one layer, where nothing follows that is not linear."""
    arch = ARCHS["bert"]
    for kind in CONFIGS:
        outputs = []
        for g in (0.0, 0.5, 1.0):
            model = attached(arch, FixedGate(g), [spec(kind, ["attn.v"])])
            seen: list[Any] = []
            layer = model.get_base_model().bert.encoder.layer[0].attention.self.value
            layer.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
            with torch.no_grad():
                arch.run(model, arch.inputs())
            outputs.append(seen[0])
        assert far(outputs[1], (outputs[0] + outputs[2]) / 2) <= 1e-6
        assert far(outputs[0], outputs[2]) > 1e-5


def test_vera_shares_one_pair_that_is_pefts_own() -> None:
    arch = ARCHS["bert"]
    ours = attached(arch, FixedGate(1.0), [spec("vera")])
    parts = [p for b in gated_blocks(ours) for p in b.methods["default"]["vera"].values()]
    assert len({id(p.vera_A) for p in parts}) == len({id(p.layer.vera_B) for p in parts}) == 1
    theirs = pefts_own(arch, "vera", ours, whole(arch, LINEAR_SITES)[1])
    assert torch.equal(parts[0].vera_A["own"], theirs.base_model.vera_A["default"])
    assert torch.equal(parts[0].vera_B["own"], theirs.base_model.vera_B["default"])
    twin = copy.deepcopy(ours)
    twins = [p for b in gated_blocks(twin) for p in b.methods["default"]["vera"].values()]
    assert len({id(p.vera_A) for p in twins} | {id(parts[0].vera_A)}) == 2


def test_vera_keeps_its_pair_when_its_widest_layers_are_pruned(tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    model = attached(arch, ScalarGate(0.5), [spec("vera"), Bottleneck(bottleneck_size=4)])
    set_methods(model, vera=True)
    before = prune(
        model, importance={"0": {"vera": 0.0, "bottleneck": 1.0}, "1": {"vera": 1.0, "bottleneck": 1.0}}, threshold=0.1
    )
    assert before
    with torch.no_grad():
        out = arch.run(model, arch.inputs())
        model.save_pretrained(tmp_path)
        assert torch.equal(out, arch.run(PeftModel.from_pretrained(arch.build(), tmp_path).eval(), arch.inputs()))


# ---- no second forward of the base --------------------------------------------------------------------------------


def calls_of(model: Any, arch: Arch) -> dict[str, int]:
    """Counts the forwards of every linear layer of the backbone in one forward of the model."""
    counts: dict[str, int] = {}
    handles = [
        module.register_forward_hook(lambda m, a, o, n=name: counts.update({n: counts.get(n, 0) + 1}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, StandIn) and ".pelton." not in name
    ]
    with torch.no_grad():
        arch.run(model, arch.inputs())
    for handle in handles:
        handle.remove()
    return counts


def flops_of(model: Any, arch: Arch) -> int:
    with FlopCounterMode(display=False) as counter:
        arch.run(model, arch.inputs())
    return int(counter.get_total_flops())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_backbones_layers_run_once(name: str, kind: str, training: bool) -> None:
    """By hooks on the layers, and by counted operations: exactly those of PEFT's own model."""
    arch = ARCHS[name]
    ours = attached(arch, FixedGate(1.0), [spec(kind)]).train(training)
    counts = calls_of(ours, arch)
    assert counts
    assert set(counts.values()) == {1}
    theirs = pefts_own(arch, kind, ours, whole(arch, LINEAR_SITES)[1]).train(training)
    plain, mine, pefts = (flops_of(model, arch) for model in (arch.build().train(training), ours, theirs))
    assert plain < mine == pefts


def test_counted_operations_tell_a_second_forward() -> None:
    """What the test above would see: DoRA's path with dropout, which is refused for it."""
    arch = ARCHS["bert"]
    config = {"r": 3, "use_dora": True, "target_modules": ["query"]}
    once = flops_of(get_peft_model(arch.build(), LoraConfig(**config)).train(), arch)
    twice = flops_of(get_peft_model(arch.build(), LoraConfig(**config, lora_dropout=0.1)).train(), arch)
    tokens, width = arch.inputs()["input_ids"].numel(), 32
    assert twice - once == 2 * 2 * tokens * width * width  # two layers


# ---- gradients, precision, checkpointing --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", CONFIGS)
def test_only_the_adapter_gets_gradients_and_all_of_it(name: str, kind: str) -> None:
    arch = ARCHS[name]
    model = attached(arch, MLPGate(hidden_size=8, init_std=0.5), [spec(kind, sites_of(kind)), LoRA(rank=2)])
    arch.run(model.train(), arch.inputs()).square().sum().backward()
    for key, parameter in model.named_parameters():
        if ".pelton." in key:
            assert parameter.dtype == torch.float32
            assert parameter.requires_grad
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key
        else:
            assert parameter.grad is None, key


COUNTS = {
    "loha": lambda i, o: 3 * 2 * (i + o),
    "oft": lambda i, o: i // 8 * 28,
    "vera": lambda i, o: 6 + o,
    "dora": lambda i, o: 3 * (i + o) + o,
    "fourierft": lambda i, o: 60,
}


@pytest.mark.parametrize("kind", COUNTS)
def test_trainable_parameters_are_the_formula(kind: str) -> None:
    config = PeltonConfig(methods=[spec(kind, ["attn.q", "ffn.in"])], gate=FixedGate())
    model = get_peft_model(ARCHS["bert"].build(), config)
    assert model.get_nb_trainable_parameters()[0] == 2 * (COUNTS[kind](32, 32) + COUNTS[kind](32, 48))


@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpointed_gradients_equal_plain_ones(kind: str) -> None:
    arch = ARCHS["bert"]
    model = attached(arch, MLPGate(hidden_size=8, init_std=0.5), [spec(kind), LoRA(rank=2)]).train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        first, second = arch.run(model, arch.inputs(seed=1)), arch.run(model, arch.inputs(seed=2))
        (first.square().mean() + second.square().mean()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert plain.keys() == again.keys()
    scale = max(float(g.abs().max()) for g in plain.values())
    assert max(float((plain[key] - again[key]).abs().max()) for key in plain) <= 1e-5 * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_low_precision_backbones_run(kind: str, dtype: torch.dtype) -> None:
    for arch in (ARCHS["bert"], ARCHS["gpt2"]):
        config = PeltonConfig(methods=[spec(kind, sites_of(kind))])
        model = wake(get_peft_model(arch.build().to(dtype), config), std=0.1)
        out = arch.run(model, arch.inputs())
        assert out.dtype == dtype
        out.float().square().mean().backward()
        for name, parameter in model.named_parameters():
            if ".pelton." in name:
                assert parameter.dtype == torch.float32
                assert parameter.grad is not None, name
                assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(
    ("kind", "values"),
    [("loha", {"rank_dropout": 0.5}), ("lokr", {"module_dropout": 0.5}), ("vera", {"vera_dropout": 0.5})],
)
def test_dropout_works_in_training_only(kind: str, values: dict[str, float]) -> None:
    arch, inputs = ARCHS["vit"], ARCHS["vit"].inputs()
    model = attached(arch, FixedGate(1.0), [KINDS[kind](config={"r": 3, **values}, sites=LINEAR_SITES)])
    with torch.no_grad():
        assert torch.equal(arch.run(model, inputs), arch.run(model, inputs))
        model.train()
        assert far(arch.run(model, inputs), arch.run(model, inputs)) > 1e-6
        model.eval()
        assert torch.equal(arch.run(model, inputs), arch.run(model, inputs))


# ---- copies, files, several adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_copies_are_equal_and_independent(kind: str, way: str) -> None:
    arch = ARCHS["bert"]
    model = attached(arch, FixedGate(0.6), [spec(kind)])
    arch.run(model, arch.inputs())
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        before = arch.run(model, arch.inputs())
        assert torch.equal(before, arch.run(twin, arch.inputs()))
        wake(twin, seed=9)
        assert far(before, arch.run(twin, arch.inputs())) > 1e-5
        if kind == "dora":  # the copy reads the norms of its own layers
            for p in twin.get_base_model().bert.encoder.parameters():
                p.mul_(2)
        assert torch.equal(before, arch.run(model, arch.inputs()))
    if kind == "dora":
        part = gated_blocks(twin)[0].methods["default"]["dora"]["attn_q"]
        assert part.layer.base_layer.seen.layer is twin.get_base_model().bert.encoder.layer[0].attention.self.query


@pytest.mark.parametrize("kind", CONFIGS)
def test_unload_is_bitwise_identity(kind: str) -> None:
    arch = ARCHS["bert"]
    model = arch.build()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    tree = [(n, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    gated = wake(get_peft_model(model, PeltonConfig(methods=[spec(kind)]))).eval()
    arch.run(gated, arch.inputs())
    back = gated.unload()
    assert back is model
    assert list(state) == list(back.state_dict())
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in state.items())
    assert tree == [(n, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in back.named_modules()]


TENSORS = {
    "loha": {"hada_w1_a.own", "hada_w1_b.own", "hada_w2_a.own", "hada_w2_b.own"},
    "lokr": {"lokr_w1.own", "lokr_w1_a.own", "lokr_w1_b.own", "lokr_w2_a.own", "lokr_w2_b.own"},
    "oft": {"oft_R.own.weight"},
    "vera": {"vera_lambda_b.own", "vera_lambda_d.own"},
    "dora": {"lora_A.own.weight", "lora_B.own.weight", "lora_magnitude_vector.own.weight"},
    "fourierft": {"fourierft_spectrum.own"},
}


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_and_loaded_gives_the_same(kind: str, low_memory: bool, tmp_path: Path) -> None:
    arch = ARCHS["gpt2" if kind == "dora" else "bert"]
    model = attached(arch, "mlp-sigmoid" if arch.name == "bert" else FixedGate(0.7), [spec(kind), BitFit()])
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        found = {
            key.partition(f".methods.{kind}.")[2].partition(".")[2] for key in list(file.keys()) if f".{kind}." in key
        }
    assert found == TENSORS[kind]
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["methods"][0]
    assert saved == {"kind": kind, "config": spec(kind).config, "sites": list(LINEAR_SITES), "layers": None}
    for name in ("default", "other"):
        again = PeftModel.from_pretrained(arch.build(), tmp_path, adapter_name=name, low_cpu_mem_usage=low_memory)
        with torch.no_grad():
            assert torch.equal(arch.run(model, arch.inputs()), arch.run(again.eval(), arch.inputs()))


@pytest.mark.parametrize("name", FEW)
def test_two_adapters_and_mixed_batches(name: str) -> None:
    arch, inputs = ARCHS[name], ARCHS[name].inputs()
    first = PeltonConfig(methods=[spec("loha"), spec("oft", ANYWHERE), LoRA(rank=2)])
    second = PeltonConfig(methods=[spec("dora"), spec("vera"), spec("lokr")], gate=ScalarGate(0.4))
    model = get_peft_model(arch.build(), first, adapter_name="a")
    model.add_adapter("b", second)
    wake(model, "a", 1)
    wake(model, "b", 2).eval()
    alone = wake(get_peft_model(arch.build(), first, adapter_name="a"), "a", 1).eval()
    names = ["b", "__base__", "a"]
    with torch.no_grad():
        assert torch.equal(arch.run(model, inputs), arch.run(alone, inputs))
        with model.disable_adapter():
            assert far(arch.run(model, inputs), arch.run(arch.build(), inputs)) == 0
        assert torch.equal(arch.run(model, inputs), arch.run(alone, inputs))
        mixed = arch.run(model, inputs, adapter_names=names)
        for row, adapter in enumerate(names):
            one = {k: v[row : row + 1] for k, v in inputs.items()}
            if adapter == "__base__":
                out = arch.run(arch.build(), one)
            else:
                model.set_adapter(adapter)
                out = arch.run(model, one)
            assert far(mixed[row : row + 1], out) <= 1e-6, adapter
    model.set_adapter("b")
    model.delete_adapter("a")
    assert not [n for n, _ in model.named_parameters() if ".a." in n]


def test_all_of_them_together_go_by_their_kinds(tmp_path: Path) -> None:
    """Gates are recorded, switched and pruned under each method's own kind."""
    arch = ARCHS["bert"]
    model = attached(arch, ScalarGate(0.5), [spec(kind) for kind in CONFIGS])
    with torch.no_grad(), record_gates(model) as log:
        before = arch.run(model, arch.inputs())
    assert set(log.to_frame().method) == set(CONFIGS)
    with torch.no_grad():
        for kind in CONFIGS:
            set_methods(model, **{kind: False})
            assert far(before, arch.run(model, arch.inputs())) > 1e-7, kind
            set_methods(model, **{kind: True})
        set_methods(model, loha=False, dora=False)
        without = arch.run(model, arch.inputs())
        set_methods(model, loha=True, dora=True)
        shut = {str(b): {kind: float(kind not in ("loha", "dora")) for kind in CONFIGS} for b in (0, 1)}
        gone = prune(model, importance=shut, threshold=0.1)
        assert {entry.kind for entry in gone} == {"loha", "dora"}
        assert torch.equal(without, arch.run(model, arch.inputs()))
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(arch.build(), tmp_path).eval()
        assert torch.equal(without, arch.run(again, arch.inputs()))


# ---- folding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_equals_attached(arch: Arch, kind: str) -> None:
    model = attached(arch, FixedGate(0.6), [spec(kind, sites_of(kind))])
    with torch.no_grad():
        before = arch.run(model, arch.inputs())
        plain = model.merge_and_unload(safe_merge=True)
        assert far(before, arch.run(plain, arch.inputs())) <= 1e-5
        assert far(before, arch.run(arch.build(), arch.inputs())) > 1e-5
    assert plain.state_dict().keys() == arch.build().state_dict().keys()


@pytest.mark.parametrize("name", [*FEW, "gpt2", "modernbert"])
def test_folding_them_with_others_is_exact_and_comes_back(name: str) -> None:
    arch = ARCHS[name]
    methods = [spec("dora"), spec("loha"), spec("oft", ANYWHERE), IA3(), LoRA(rank=2, sites=LINEAR_SITES)]
    methods += [BitFit()] if name in ("bert", "gpt2") else []
    model = attached(arch, ScalarGate(0.6), [*methods, Bottleneck(bottleneck_size=4)], std=0.2)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        before = arch.run(model, arch.inputs())
        plain = fold(model)
        assert far(before, arch.run(plain, arch.inputs())) <= 1e-5
        back = unfold(plain)
        assert torch.equal(before, arch.run(back, arch.inputs()))
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in tensors.items())


def test_folding_in_training_mode_drops_nothing() -> None:
    arch = ARCHS["bert"]
    dropping = KINDS["loha"](config={"r": 3, "rank_dropout": 0.5}, sites=LINEAR_SITES)
    model = attached(arch, FixedGate(0.6), [dropping])
    with torch.no_grad():
        before = arch.run(model, arch.inputs())
        plain = model.train().merge_and_unload().eval()
        assert far(before, arch.run(plain, arch.inputs())) <= 1e-5


# ---- compiled -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet_dynamo")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own, at LoHa's product
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiled_without_breaks_equals_eager(training: bool) -> None:
    arch = ARCHS["vit"]  # drops nothing itself
    methods = [spec(kind, ["attn.v", "ffn.out"]) for kind in CONFIGS]
    model = attached(arch, MLPGate(hidden_size=8, init_std=0.5), methods).train(training)
    inputs = arch.inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert far(arch.run(model, inputs), arch.run(compiled, inputs)) <= 1e-4


def test_exported_equals_eager() -> None:
    arch = ARCHS["vit"]
    model = attached(
        arch, MLPGate(hidden_size=8, init_std=0.5), [spec(kind, ["attn.v", "ffn.out"]) for kind in CONFIGS]
    )
    pixels = arch.inputs()["pixel_values"]
    with torch.no_grad():
        free = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
        exported = torch.export.export(
            model.get_base_model(), (), {"pixel_values": pixels}, dynamic_shapes=free, strict=False
        ).module()
        for some in (pixels, pixels[:2]):
            assert far(arch.run(model, {"pixel_values": some}), exported(pixel_values=some).logits) <= 1e-4
