"""Adapters over 8- and 4-bit weights, and into them: laws 1, 2, 3, 8 and 10, and what is refused.

Each backend is skipped where its package is not installed.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from law import METHODS, attached, far, wake
from pelton import FixedGate, LoRA, PeltonConfig, fold, folded_loss, unfold
from pelton.errors import AdapterError
from pelton.methods import LINEAR_SITES, MethodSpec
from pelton.tuner.quantised import Lost, Rounding, lost, stored
from zoo import ARCHS, DECODER, TEXT, Arch

SIZES = dict(hidden_size=64, intermediate_size=128)


def replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and ".layer" in name:
            model.set_submodule(name, make(layer).eval())


def bitsandbytes_8bit(model: nn.Module) -> None:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    def make(layer: nn.Linear) -> nn.Module:
        new = Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
        new.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False).to("cpu")
        new.bias = layer.bias
        return new

    replace(model, make)


def bitsandbytes_4bit(quant_type: str, nested: bool) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        from bitsandbytes.nn import Linear4bit, Params4bit

        def make(layer: nn.Linear) -> nn.Module:
            new = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
            weight = Params4bit(layer.weight.data, False, quant_type=quant_type, compress_statistics=nested, module=new)
            new.weight, new.bias = weight.to("cpu"), layer.bias
            return new

        replace(model, make)

    return quantise


def torchao(config: str, **settings: Any) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        import torchao.quantization as ao

        more = {key: getattr(ao, value) if isinstance(value, str) else value for key, value in settings.items()}
        if "group" in more:
            more["granularity"] = ao.PerGroup(more.pop("group"))
        wanted = getattr(ao, config)(**more)
        ao.quantize_(model, wanted, filter_fn=lambda layer, name: type(layer) is nn.Linear and ".layer" in name)

    return quantise


def quanto(weights: str) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        from optimum import quanto

        quanto.quantize(model, weights=weights, include="*.layer*")
        quanto.freeze(model)

    return quantise


BACKENDS: dict[str, tuple[str, float, Callable[[nn.Module], None]]] = {
    "bitsandbytes-8bit": ("bitsandbytes", 0.01, bitsandbytes_8bit),
    "bitsandbytes-nf4": ("bitsandbytes", 0.2, bitsandbytes_4bit("nf4", True)),
    "bitsandbytes-fp4": ("bitsandbytes", 0.25, bitsandbytes_4bit("fp4", False)),
    "torchao-int8": ("torchao", 0.01, torchao("Int8WeightOnlyConfig")),
    "torchao-int8-groups": ("torchao", 0.01, torchao("Int8WeightOnlyConfig", group=16)),
    "torchao-int8-dynamic": ("torchao", 0.01, torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao-int4": ("torchao", 0.2, torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, group=16)),
    "quanto-int8": ("optimum.quanto", 0.01, quanto("qint8")),
    "quanto-int4": ("optimum.quanto", 0.2, quanto("qint4")),
}
"""By name: the package, by which share the norm of weights may be off after rounding, and what quantises a model."""


def installed(package: str) -> bool:
    return find_spec(package.split(".")[0]) is not None and find_spec(package) is not None


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    package = BACKENDS[request.param][0]
    if not installed(package):
        pytest.skip(f"{package} is not installed")
    if request.param == "quanto-int4" and shutil.which("c++") is None:
        pytest.skip("quanto compiles what unpacks 4-bit weights, and there is no C++ compiler")
    return str(request.param)


WIDE = {  # blocks of 64 weights must fit into a row
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT | SIZES)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER | SIZES)),
}


@pytest.fixture(params=list(WIDE))
def arch(request: pytest.FixtureRequest) -> Arch:
    return wide(request.param)


def wide(name: str) -> Arch:
    return dataclasses.replace(ARCHS[name], make=WIDE[name])


def build(arch: Arch, backend: str) -> Any:
    model = arch.build()
    BACKENDS[backend][2](model)
    assert not all(type(p) is nn.Parameter for p in model.parameters())
    return model


def methods(arch: Arch) -> list[MethodSpec]:
    kinds = ("lora", "ia3", "bitfit") if arch.name == "bert" else ("lora", "ia3")
    return [METHODS[kind] for kind in kinds]


def gated(arch: Arch, backend: str, specs: list[MethodSpec] | None = None, gate: Any = None, std: float = 0.1) -> Any:
    config = PeltonConfig(methods=methods(arch) if specs is None else specs, gate=gate or FixedGate(0.6))
    return wake(get_peft_model(build(arch, backend), config), std=std).eval()


def output(arch: Arch, model: Any) -> Tensor:
    with torch.no_grad():
        return arch.run(model, arch.inputs())


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every plain tensor inside a model's parameters."""
    found = stored(model, [name for name, _ in model.named_parameters()])
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


# ---- the laws ----------------------------------------------------------------------------------------------------


def test_closed_gates_and_fresh_adapters_are_the_backbone(arch: Arch, backend: str) -> None:
    plain = output(arch, build(arch, backend))
    everything = [*methods(arch), METHODS["bottleneck"], METHODS["prefix-kv"]]
    assert far(plain, output(arch, gated(arch, backend, everything, FixedGate(0.0)))) <= 1e-6
    model = get_peft_model(build(arch, backend), PeltonConfig(methods=methods(arch), gate="mlp")).eval()
    assert far(plain, output(arch, model)) <= 1e-6


def test_only_the_adapter_learns_and_all_of_it(arch: Arch, backend: str) -> None:
    model = gated(arch, backend, gate="scalar")
    arch.run(model, arch.inputs()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".pelton." in name), name


def test_attached_and_taken_off_the_bits_are_the_same(arch: Arch, backend: str) -> None:
    model = build(arch, backend)
    before, said = bits(model), output(arch, model)
    plain = wake(get_peft_model(model, PeltonConfig(methods=methods(arch)))).unload()
    assert_same_bits(bits(plain), before)
    assert torch.equal(output(arch, plain), said)


# ---- folding -----------------------------------------------------------------------------------------------------


def test_folding_has_to_be_asked_for(arch: Arch, backend: str) -> None:
    model = gated(arch, backend)
    before, said = bits(model), output(arch, model)
    with pytest.raises(AdapterError, match=r"are quantised: rounding moves .*Fold with requantize=True"):
        fold(model)
    assert_same_bits(bits(model), before)
    assert torch.equal(output(arch, model), said)


def test_folded_weights_are_the_wanted_ones_to_rounding_and_come_back(arch: Arch, backend: str) -> None:
    model, backbone = gated(arch, backend), build(arch, backend)
    before, said = bits(model), output(arch, model)
    plain = fold(model, requantize=True)
    found = folded_loss(plain)
    assert isinstance(found, Lost)
    assert found.layers == len([n for n in bits(arch.build()) if ".layer" in n and n.endswith("proj.weight")]) or (
        arch.name == "bert" and found.layers == 12
    )
    assert 0 < found.relative < BACKENDS[backend][1]
    assert 0 < found.largest < 1
    assert 0 < found.of_change < 1
    assert type(plain) is type(backbone)
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in backbone.named_modules()]
    assert [type(m) for m in plain.modules()] == [type(m) for m in backbone.modules()]
    assert [(k, v.dtype, v.shape) for k, v in bits(plain).items()] == [
        (k, v.dtype, v.shape) for k, v in bits(backbone).items()
    ]
    gap, change = far(said, output(arch, plain)), far(said, output(arch, backbone))
    assert gap < change, "folding must be nearer to the gated model than the backbone is"
    again = unfold(plain)
    assert_same_bits(bits(again), before)
    assert torch.equal(output(arch, again), said)


def test_folding_twice_gives_the_same_bits(arch: Arch, backend: str) -> None:
    """Also behind a forward, which moves scales or repacks weights in bitsandbytes' layers."""
    model, twin = gated(arch, backend), gated(arch, backend)
    output(arch, model), output(arch, twin)
    one = bits(fold(model, requantize=True))
    two = fold(twin, requantize=True)
    output(arch, two)
    assert_same_bits(bits(two), one)
    assert_same_bits(bits(fold(unfold(two), requantize=True)), one)


def test_what_does_not_fold_stays_and_finds_its_weights_again(backend: str, tmp_path: Path) -> None:
    arch = wide("bert")
    specs = [METHODS["lora"], METHODS["bottleneck"]]
    model = gated(arch, backend, specs)
    before, said = bits(model), output(arch, model)
    assert fold(model, requantize=True) is model
    small = output(arch, model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="Part of this adapter was folded"):
        PeftModel.from_pretrained(build(arch, backend), tmp_path / "adapter")
    twin = gated(arch, backend, specs)
    output(arch, twin)
    again = PeftModel.from_pretrained(fold(twin, requantize=True).unload(), tmp_path / "adapter")
    assert torch.equal(output(arch, again.eval()), small)
    assert_same_bits(bits(unfold(model)), before)
    assert torch.equal(output(arch, model), said)


def test_weights_that_nothing_changes_are_left_alone(backend: str) -> None:
    """BitFit folds into quantised layers exactly: their biases are float."""
    arch = wide("bert")
    model = gated(arch, backend, [METHODS["bitfit"]])
    weights, said = {n: b for n, b in bits(model).items() if "weight" in n}, output(arch, model)
    plain = fold(model)
    assert folded_loss(plain) is None
    assert far(said, output(arch, plain)) <= 1e-5
    folded = bits(plain)
    assert all(torch.equal(folded[n.removeprefix("base_model.model.")], tensor) for n, tensor in weights.items())


def test_merging_says_what_it_loses(arch: Arch, backend: str) -> None:
    model = gated(arch, backend)
    folded = bits(fold(gated(arch, backend), requantize=True))
    with pytest.warns(UserWarning, match="Merging into quantised weights is not exact: rounding moves"):
        merged = model.merge_and_unload()
    assert_same_bits(bits(merged), folded)


def test_a_fold_that_fails_half_way_changes_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = wide("bert")
    model = gated(arch, backend, [METHODS["lora"], METHODS["bottleneck"]])
    before, said = bits(model), output(arch, model)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("half-way")

    monkeypatch.setattr("pelton.compress.fold.recast", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        fold(model, requantize=True)
    assert_same_bits(bits(model), before)
    assert torch.equal(output(arch, model), said)


# ---- what is refused ---------------------------------------------------------------------------------------------


class OddLinear(nn.Linear):
    """A layer of which nothing is known."""


def odd() -> Any:
    arch = ARCHS["bert"]
    model = arch.build()
    query = model.bert.encoder.layer[1].attention.self.query
    new = OddLinear(query.in_features, query.out_features)
    new.load_state_dict(query.state_dict())
    model.bert.encoder.layer[1].attention.self.query = new
    lora = LoRA(rank=2, sites=LINEAR_SITES)
    return wake(get_peft_model(model, PeltonConfig(methods=[lora], gate="scalar"))).eval()


def test_a_layer_of_which_nothing_is_known_is_named() -> None:
    model = odd()
    before = bits(model)
    message = r"layer\.1\.attention\.self\.query is a OddLinear .*Adapters merge into nn\.Linear, .*Keep the adapter"
    for merge in (fold, lambda m: fold(m, requantize=True), lambda m: m.merge_and_unload()):
        with pytest.raises(AdapterError, match=message):
            merge(model)
        assert_same_bits(bits(model), before)


def test_a_layer_that_quantises_at_every_forward_is_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    arch = ARCHS["bert"]
    model = arch.build()
    replace(model, lambda layer: bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=True))
    gated = get_peft_model(model, PeltonConfig(methods=["lora"], gate="scalar"))
    with pytest.raises(AdapterError, match=r"Linear8bitLt \(bitsandbytes 8-bit\) that quantises at every forward"):
        fold(gated, requantize=True)


def test_layers_that_quantise_activations_are_refused() -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    arch = ARCHS["bert"]
    model = arch.build()
    quanto.quantize(model, weights="qint8", activations="qint8", include="*.layer*")
    quanto.freeze(model)
    gated = get_peft_model(model, PeltonConfig(methods=["lora"], gate="scalar"))
    with pytest.raises(AdapterError, match=r"QLinear \(quanto\) that quantises activations too"):
        fold(gated, requantize=True)


# ---- without any backend -----------------------------------------------------------------------------------------


def test_float_weights_need_nothing_and_lose_nothing() -> None:
    plain = fold(attached(ARCHS["bert"], "scalar", [METHODS["lora"]]))
    assert folded_loss(plain) is None
    with pytest.raises(AdapterError, match="was not folded"):
        folded_loss(ARCHS["bert"].build())


def test_losses_add_up() -> None:
    before, wanted = torch.zeros(2, 2), torch.full((2, 2), 3.0)
    one = Rounding.of(before, wanted, wanted + torch.tensor([[0.0, 0.0], [0.0, 0.6]]))
    found = lost([one, None, one])
    assert found is not None
    assert found.layers == 2
    assert found.largest == pytest.approx(0.6)
    assert found.relative == pytest.approx(0.1)
    assert found.of_change == pytest.approx(0.1)
    assert "2 layers by up to 0.6, 10.00% of their norm and 10% of what the adapter changes" in str(found)
    assert lost([None]) is None


def test_folding_float_weights_imports_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr("pelton.tuner.schemes.import_module", refuse)
    arch = ARCHS["bert"]
    model = attached(arch, "scalar", [METHODS["lora"]])
    said = output(arch, model)
    assert far(said, output(arch, fold(model))) <= 1e-5
