"""Law 8: folded equals unfolded to 1e-5, and unfolding gives the gated model back, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from law import METHODS, attached, far
from pelton import FrozenGate, LoRA, PeltonConfig, fold, freeze_gates, prune, unfold
from pelton.errors import AdapterError
from pelton.methods import LINEAR_SITES
from pelton.tuner import gated_blocks
from pelton.tuner.taps import Taps
from test_laws_compress import assert_same, output, tensors
from zoo import ARCHS, Arch

FOLDABLE = ("lora", "ia3", "bitfit")


def foldable(arch: Arch, gate: str = "scalar", **more: Any) -> Any:
    """An adapter of methods that fold; without BitFit where a layer has no bias to hold it."""
    layers = [m for m in arch.build().modules() if isinstance(m, nn.Linear)]
    kinds = FOLDABLE if all(layer.bias is not None for layer in layers) else FOLDABLE[:2]
    return attached(arch, gate, [METHODS[kind] for kind in kinds], **more)


@pytest.mark.parametrize("gate", ["scalar", "fixed"])
def test_what_folds_becomes_the_plain_backbone(arch: Arch, gate: str) -> None:
    model = foldable(arch, gate)
    before, out, names = tensors(model), output(arch, model), [n for n, _ in model.named_modules()]
    plain = fold(model)
    backbone = arch.build()
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in backbone.named_modules()]
    assert list(plain.state_dict()) == list(backbone.state_dict())
    assert type(plain) is type(backbone)
    assert far(out, output(arch, plain)) <= 1e-5
    again = unfold(plain)
    assert_same(again, before)
    assert torch.equal(output(arch, again), out)
    assert [n for n, _ in again.named_modules()] == names


@pytest.mark.parametrize("prefix", ["prefix-kv", "prefix-mlp", "prefix-token"])
def test_what_does_not_fold_stays_static(arch: Arch, prefix: str, tmp_path: Path) -> None:
    if not arch.prefix:
        pytest.skip("this attention cannot carry a prefix")
    biased = all(m.bias is not None for m in arch.build().modules() if isinstance(m, nn.Linear))
    kinds = ("lora", "bottleneck", prefix, "ia3", *(("bitfit",) if biased else ()))
    model = attached(arch, "scalar", [METHODS[kind] for kind in kinds])
    before, out = tensors(model), output(arch, model)
    folded = fold(model)
    assert folded is model
    assert {s.kind for b in gated_blocks(model) for s in b.wirings["default"].methods} == {"bottleneck", "prefix"}
    assert far(out, output(arch, model)) <= 1e-5
    small = output(arch, model)
    model.save_pretrained(tmp_path / "adapter")
    assert_same(unfold(model), before)
    assert torch.equal(output(arch, model), out)
    with pytest.raises(AdapterError, match="Part of this adapter was folded into a backbone's weights"):
        PeftModel.from_pretrained(arch.build(), tmp_path / "adapter")
    backbone = fold(model).unload()
    again = PeftModel.from_pretrained(backbone, tmp_path / "adapter").eval()
    assert torch.equal(output(arch, again), small)


def test_frozen_and_pruned_it_folds(arch: Arch) -> None:
    """The whole way: learned gates, frozen on data, bottleneck and prefix pruned, folded; and saved as any model is."""
    model = foldable(arch, "mlp")
    freeze_gates(model, [arch.inputs()])
    prune(model, keep=1 + len(gated_blocks(model)))
    out = output(arch, model)
    assert isinstance(model.peft_config["default"].gate_spec, FrozenGate)
    plain = fold(model)
    assert far(out, output(arch, plain)) <= 1e-5
    fresh = arch.build()
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(output(arch, fresh), output(arch, plain))


def test_a_fold_that_fails_half_way_changes_nothing(arch: Arch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(arch, "scalar", [METHODS["lora"], METHODS["bottleneck"]])
    before, out = tensors(model), output(arch, model)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("half-way")

    with monkeypatch.context() as patch:
        patch.setattr("pelton.compress.fold.recast", fail)
        with pytest.raises(RuntimeError, match="half-way"):
            fold(model)
    assert_same(model, before)
    connect, calls = Taps.connect, []

    def once(taps: Taps, *arguments: Any) -> None:
        calls.append(taps)
        if len(calls) == 1:
            raise RuntimeError("in a block")
        connect(taps, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Taps, "connect", once)
        with pytest.raises(RuntimeError, match="in a block"):
            fold(model)
    assert_same(model, before)
    assert torch.equal(output(arch, model), out)


def test_trained_heads_stay_and_come_back() -> None:
    arch = ARCHS["bert"]
    model = foldable(arch, modules_to_save=["classifier"])
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.add_(1.0)
    before, out = tensors(model), output(arch, model)
    plain = fold(model)
    assert isinstance(plain.classifier, nn.Linear)
    assert far(out, output(arch, plain)) <= 1e-5
    assert_same(unfold(plain), before)


# ---- what is refused ---------------------------------------------------------------------------------------------


def tied(model: Any) -> None:
    layers = model.get_base_model().bert.encoder.layer
    layers[1].attention.self.query.weight = layers[0].attention.self.query.weight


def with_second() -> Any:
    model = attached(ARCHS["bert"], "scalar")
    model.add_adapter("second", PeltonConfig(methods=["lora"]))
    return model


def tie() -> Any:
    model = attached(ARCHS["bert"], "scalar", [LoRA(rank=2, sites=LINEAR_SITES)])
    tied(model)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attached(ARCHS["bert"], "mlp"), "gates that read the input .*Freeze the gates first"),
        (lambda: attached(ARCHS["bert"], "scalar", [METHODS["bottleneck"]]), "Nothing of adapter 'default' folds"),
        (with_second, "Folding 'default' would change what second were trained on"),
        (tie, r"layer.0.attention.self.query.weight and .*layer.1.* are one tied weight"),
    ],
    ids=["dynamic", "nothing", "second", "tied"],
)
def test_what_cannot_be_folded_is_said(make: Any, message: str) -> None:
    model = make()
    before = tensors(model)
    with pytest.raises(AdapterError, match=message):
        fold(model)
    assert_same(model, before)


def test_unfolding_what_was_trained_since_is_refused() -> None:
    plain = fold(foldable(ARCHS["bert"]))
    with torch.no_grad():
        plain.bert.encoder.layer[0].attention.self.query.weight.add_(1e-3)
    with pytest.raises(AdapterError, match="The folded weights have changed since"):
        unfold(plain)
    with pytest.raises(AdapterError, match="was not folded"):
        unfold(ARCHS["bert"].build())


def test_a_folded_model_has_no_hooks() -> None:
    plain = fold(foldable(ARCHS["bert"]))
    assert not [n for n, m in plain.named_modules() if m._forward_hooks or m._forward_pre_hooks]
