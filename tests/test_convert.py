"""LoRA to PEFT's folders and back: equal outputs, on every architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from law import METHODS, attached, far
from pelton import LoRA, MLPGate, PeltonConfig, freeze_gates, from_peft, prune, set_methods, to_peft
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
        (
            LoraConfig(target_modules=["query", "word_embeddings"]),
            "goes to bert.embeddings.word_embeddings.lora_embedding",
        ),
        (
            LoraConfig(target_modules=["query"], r=4, init_lora_weights="pissa"),
            "on changed weights .*'pissa'.* plain LoRA",
        ),
        (
            LoraConfig(target_modules=["query"], r=4, init_lora_weights="pissa_niter_4"),
            "on changed weights .*'pissa_niter_4'",
        ),
        (
            LoraConfig(target_modules=["query"], r=4, init_lora_weights="olora"),
            "on changed weights .*'olora'.* plain LoRA",
        ),
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


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq"])
def test_loras_on_weights_that_data_or_rounding_changed_are_refused(start: str, tmp_path: Path) -> None:
    to_peft(loras(ARCHS["bert"], "scalar"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    more = {"loftq_config": {"loftq_bits": 4}} if start == "loftq" else {}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": start, **more}))
    with pytest.raises(AdapterError, match=rf"was trained on changed weights of its backbone .*'{start}'"):
        from_peft(ARCHS["bert"].build(), tmp_path)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_what_peft_makes_plain_of_pissa_is_taken_over(tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    config = LoraConfig(target_modules=["query", "value"], r=4, init_lora_weights="pissa")
    theirs = get_peft_model(arch.build(), config).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    wanted = output(arch, theirs)
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert far(wanted, output(arch, from_peft(arch.build(), tmp_path / "plain").eval())) <= 1e-4


@pytest.mark.parametrize("start", [False, "gaussian", "orthogonal", "mica"])
def test_starts_that_leave_the_weights_alone_are_taken_over(start: Any, tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    config = LoraConfig(target_modules=["query", "value"], r=4, init_lora_weights=start)
    theirs = get_peft_model(arch.build(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(tmp_path)
    assert far(output(arch, theirs), output(arch, from_peft(arch.build(), tmp_path).eval())) <= 1e-5


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    backbone = ARCHS["bert"].build()
    before = tensors(backbone)
    theirs = get_peft_model(ARCHS["bert"].build(), LoraConfig(target_modules=["query"]))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(
        AdapterError, match=r"1 tensors are no part of a LoRA, such as bert\.embeddings\.word_embeddings"
    ):
        from_peft(backbone, tmp_path)
    assert_same(backbone, before)


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    get_peft_model(ARCHS["bert"].build(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    found = load_file(file)
    for missing in ("classifier.weight", "layer.0.attention.self.query.lora_B.weight"):
        save_file({key: value for key, value in found.items() if not key.endswith(missing)}, file)
        with pytest.raises(AdapterError, match=rf"adapter_model.safetensors lacks .*{missing}"):
            from_peft(ARCHS["bert"].build(), tmp_path)
    file.write_bytes(file.read_bytes()[:90])
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors cannot be read .*Copy it again"):
        from_peft(ARCHS["bert"].build(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NOPE"}')
    with pytest.raises(AdapterError, match=r"adapter_config.json cannot be read .*Copy it again"):
        from_peft(ARCHS["bert"].build(), tmp_path)


def test_each_adapter_is_written_with_its_own_modules(tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    model = loras(arch, "scalar")
    more = PeltonConfig(methods=[LoRA(rank=3)], gate="scalar", modules_to_save=["classifier"])
    model.add_adapter("more", more)
    for name in ("default", "more"):
        folder = to_peft(model, tmp_path / name, adapter=name)
        model.set_adapter(name)
        theirs = PeftModel.from_pretrained(arch.build(), folder).eval()
        assert far(output(arch, model), output(arch, theirs)) <= 1e-5
        assert any("classifier" in key for key in load_file(folder / "adapter_model.safetensors")) == (name == "more")


def test_methods_that_are_off_are_not_written(tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    model = attached(arch, "scalar", [METHODS["lora"], METHODS["bottleneck"], METHODS["ia3"]])
    set_methods(model, bottleneck=False, ia3=False)
    theirs = PeftModel.from_pretrained(arch.build(), to_peft(model, tmp_path / "lora")).eval()
    assert far(output(arch, model), output(arch, theirs)) <= 1e-5
    set_methods(model, lora=False)
    with pytest.raises(AdapterError, match="is closed or off, so there is nothing to write"):
        to_peft(model, tmp_path / "none")


def test_another_kind_of_adapter_is_not_written_over(tmp_path: Path) -> None:
    model = loras(ARCHS["bert"], "scalar")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(AdapterError, match=r"holds an adapter that is no LoRA \(PELTON\) and would be lost"):
        to_peft(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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
