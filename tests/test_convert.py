"""LoRA to PEFT's folders and back: equal outputs, on every architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from law import METHODS, attached, far
from pelton import LoRA, MLPGate, freeze_gates, from_peft, prune, to_peft
from pelton.errors import AdapterError
from pelton.methods import LINEAR_SITES
from pelton.tuner import gated_blocks
from test_laws_compress import assert_same, output, tensors
from zoo import ARCHS, Arch


def loras(arch: Arch, gate: Any = "mlp", **more: Any) -> Any:
    return attached(arch, gate, [LoRA(rank=3, alpha=6, sites=LINEAR_SITES)], **more)


def test_peft_gives_what_the_frozen_gates_gave(arch: Arch, tmp_path: Path) -> None:
    model = loras(arch, MLPGate(hidden_size=4, activation="sigmoid", init_std=0.5))
    freeze_gates(model, [arch.inputs()])
    if len(gated_blocks(model)) > 1:
        prune(model, keep=len(gated_blocks(model)) - 1)
    folder = to_peft(model, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(arch.build(), folder).eval()
    assert type(next(iter(theirs.peft_config.values()))) is LoraConfig
    assert far(output(arch, model), output(arch, theirs)) <= 1e-5


def test_a_folder_comes_back_as_it_went(arch: Arch, tmp_path: Path) -> None:
    model = loras(arch, "scalar")
    again = from_peft(arch.build(), to_peft(model, tmp_path)).eval()
    assert far(output(arch, model), output(arch, again)) <= 1e-5


@pytest.mark.parametrize("slora", [False, True])
def test_patterns_of_peft_are_taken_over(slora: bool, tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["query", "value", "intermediate.dense"],
        rank_pattern={"layer.0.attention.self.query": 2},
        alpha_pattern={"layer.1.attention.self.value": 30},
        use_rslora=slora,
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    theirs = get_peft_model(arch.build(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = from_peft(arch.build(), tmp_path).eval()
    assert far(output(arch, theirs), output(arch, ours)) <= 1e-5
    assert ours.peft_config["default"].sizes == {"0.lora.attn_q": 2}
    gated = from_peft(arch.build(), tmp_path, methods=[METHODS["bottleneck"]], gate=MLPGate(), adapter_name="more")
    assert {s.kind for b in gated_blocks(gated) for s in b.wirings["more"].methods} == {"lora", "bottleneck"}
    assert any(p.requires_grad for n, p in gated.named_parameters() if ".pelton." in n)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(target_modules=["key"], feedforward_modules=[]), "holds .*IA3, but only LoRA"),
        (LoraConfig(target_modules=["query"], use_dora=True), r"is more than a LoRA \(use_dora\)"),
        (LoraConfig(target_modules=["query"], bias="all"), r"is more than a LoRA \(bias='all'\)"),
        (LoraConfig(target_modules=["pooler.dense"]), "goes to bert.pooler.dense, where Pelton has no site"),
    ],
)
def test_what_is_no_plain_lora_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    get_peft_model(ARCHS["bert"].build(), config).save_pretrained(tmp_path)
    backbone = ARCHS["bert"].build()
    before = tensors(backbone)
    with pytest.raises(AdapterError, match=message):
        from_peft(backbone, tmp_path)
    assert_same(backbone, before)
    with pytest.raises(AdapterError, match=r"is no PEFT adapter: expected adapter_config.json"):
        from_peft(backbone, tmp_path / "nowhere")


def test_a_lora_of_another_size_is_refused(tmp_path: Path) -> None:
    to_peft(loras(ARCHS["bert"], "scalar"), tmp_path)
    backbone = ARCHS["bert"].build()
    backbone.bert.encoder.layer[1].intermediate.dense = nn.Linear(32, 40)
    with pytest.raises(AdapterError, match=r"intermediate.dense is \[\d+, 32\], but the layer is \[40, 32\]"):
        from_peft(backbone, tmp_path)


@pytest.mark.parametrize(
    ("methods", "gate", "message"),
    [
        (["lora", "bottleneck"], "scalar", "holds bottleneck in block 0, which PEFT's LoRA cannot say"),
        (["lora"], "mlp", "Freeze the gates first"),
    ],
)
def test_what_peft_cannot_say_is_refused(methods: list[str], gate: str, message: str, tmp_path: Path) -> None:
    model = attached(ARCHS["bert"], gate, [METHODS[kind] for kind in methods])
    with pytest.raises(AdapterError, match=message):
        to_peft(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
