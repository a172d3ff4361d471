"""PEFT's configs as specs: plain JSON, what is refused and why, and what does not fit a backbone."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import peft
import pytest
import torch
from peft import FourierFTConfig, LoHaConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from torch import nn

from law import PEFT_METHODS as CONFIGS
from law import peft_method as spec
from law import wake
from pelton import FixedGate, Peft, PeltonConfig
from pelton.errors import AdapterError, AnatomyError, SpecError, UnknownName
from pelton.methods import METHODS as KINDS
from pelton.training.optimizer import parameter_groups
from pelton.training.recipe import TrainingSettings
from zoo import ARCHS

# ---- specs: configs in, plain JSON out ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_spec_is_plain_json_and_comes_back(kind: str) -> None:
    one = spec(kind)
    assert one.kind == kind
    assert isinstance(one, Peft)
    assert type(KINDS[kind]()) is type(one)
    values = json.loads(json.dumps(one.to_dict()))
    assert KINDS.parse(values) == one
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
    theirs = CONFIGS[kind]()
    for name in type(one).fields:  # nothing of PEFT's config is lost
        assert getattr(one.peft_config(), name) == getattr(theirs, name)


def test_a_recipe_names_them_by_their_kinds() -> None:
    config = PeltonConfig(
        methods=[{"kind": "loha", "config": {"r": 4}}, "oft"], gate=FixedGate({"loha": 0.3, "oft": 1})
    )
    assert [m.kind for m in config.specs] == ["loha", "oft"]
    assert config.specs[0] == Peft(config=LoHaConfig(r=4))
    assert TrainingSettings(method_learning_rates={"loha": 1e-3}).method_learning_rates == {"loha": 1e-3}


def test_each_kind_has_a_learning_rate_of_its_own() -> None:
    model = get_peft_model(ARCHS["bert"].build(), PeltonConfig(methods=[spec("loha"), spec("dora"), "lora"]))
    settings = TrainingSettings(learning_rate=1e-3, method_learning_rates={"loha": 2e-3, "dora": 3e-3})
    rates = {group["name"]: group["lr"] for group in parameter_groups(model, settings)}
    assert {"methods.loha": 2e-3, "methods.dora": 3e-3, "methods": 1e-3}.items() <= rates.items()


REFUSED = [
    (LoraConfig(r=4), "PEFT's LORA cannot be gated: Pelton has it.*pelton.LoRA"),
    (peft.IA3Config(), "pelton.IA3"),
    (peft.BOFTConfig(boft_block_size=4), "BOFT.*changes the layer's input and rescales the output"),
    (peft.HRAConfig(), "HRA.*multiplies the backbone's weight matrix again"),
    (peft.PrefixTuningConfig(num_virtual_tokens=3), "PREFIX_TUNING.*no method of a layer.*pelton.Prefix"),
    (peft.PromptTuningConfig(num_virtual_tokens=3), "PROMPT_TUNING.*pelton.Prefix"),
    (peft.LNTuningConfig(), "LN_TUNING.*no linear layers.*modules_to_save"),
    (peft.AdaLoraConfig(total_step=10), "ADALORA.*pelton.shrink"),
    (peft.VBLoRAConfig(), "VBLORA.*nobody has verified.*Gated can be: dora, fourierft, loha, lokr, oft, vera"),
    (PeltonConfig(), "PELTON.*it is Pelton itself"),
    (LoHaConfig(target_modules=["query"]), r"target_modules=.*said by Peft\(sites=…\)"),
    (LoHaConfig(target_modules=["query"], layers_to_transform=[0]), "Peft"),
    (LoHaConfig(modules_to_save=["classifier"]), r"PeltonConfig\(modules_to_save=…\)"),
    (LoHaConfig(rank_pattern={"query": 3}), "rank_pattern"),
    (LoHaConfig(task_type="SEQ_CLS"), r"PeltonConfig\(task_type=…\)"),
    (VeraConfig(bias="all"), "BitFit"),
    (OFTConfig(fan_in_fan_out=True), r"\[out, in\]"),
    (OFTConfig(coft=True), "writes its own weights"),
    (OFTConfig(module_dropout=0.1), "takes no notice"),
    (LoraConfig(use_dora=True, lora_dropout=0.1), "lora_dropout=0.1 .*'dora'.*a second time"),
    (LoraConfig(use_dora=True, init_lora_weights="pissa"), "'pissa' changes the backbone's weights"),
    (LoHaConfig(r=0), "r > 0"),
    (LoHaConfig(rank_dropout=1.5), "0 <= rank_dropout < 1"),
    (FourierFTConfig(n_frequency=0), "n_frequency > 0"),
    ({"r": 3}, r"takes a config of a layer method of PEFT.*\{kind: loha, config: \{r: 8\}\}"),
    (None, "takes a config of a layer method of PEFT"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=lambda v: str(getattr(v, "peft_type", ""))[-14:])
def test_what_cannot_be_gated_is_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Peft(config=config)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"kind": "loha", "config": {"rr": 3}}, UnknownName, "Unknown key of PEFT's LoHaConfig 'rr'. Did you mean 'r'"),
        ({"kind": "loha", "confg": {}}, UnknownName, "Did you mean 'config'"),
        ({"kind": "lohaa"}, UnknownName, "Did you mean 'loha'"),
        ({"kind": "loha", "config": {"r": "four"}}, SpecError, "r of 'loha' is a number"),
        ({"kind": "loha", "config": {"r": 2.5}}, SpecError, "a whole number"),
        ({"kind": "loha", "config": {"init_weights": 3}}, SpecError, "true, false or a name"),
        ({"kind": "lokr", "config": {"decompose_both": 3}}, SpecError, "true or false"),
        ({"kind": "loha", "config": {"peft_type": "OFT"}}, SpecError, "takes PEFT's LOHA, but got peft_type='OFT'"),
        ({"kind": "loha", "config": 4}, SpecError, "is a config of PEFT or its values by name"),
        ({"kind": "loha", "config": {"target_modules": ["q"]}}, SpecError, "target_modules"),
        ({"kind": "dora", "config": {"use_dora": False}}, SpecError, "use_dora"),
        ({"kind": "oft", "config": {"r": 2}}, SpecError, "PEFT refuses 'oft'"),
        ({"kind": "loha", "sites": ["attn"]}, SpecError, "a site of 'loha'"),
    ],
)
def test_bad_values_are_refused(values: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        PeltonConfig(methods=[values])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LoraConfig(r=4, lora_alpha=9, lora_dropout=0.1),
            r"got a LoraConfig of PEFT. Write LoRA\(rank=4, alpha=9, ",
        ),
        (LoraConfig(use_dora=True), r"Write Peft\(config=LoraConfig\(…\)\) and say by `sites`"),
        (LoHaConfig(r=4), r"got a LoHaConfig of PEFT. Write Peft\(config=LoHaConfig\(…\)\) and say by `sites`"),
        (peft.IA3Config(), r"Write IA3\(\)"),
        (peft.PrefixTuningConfig(num_virtual_tokens=7), r"Write Prefix\(prefix_length=7\)"),
    ],
)
def test_a_config_of_peft_is_no_method_but_a_spec_stands_for_it(config: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        PeltonConfig(methods=[config])
    with pytest.raises(SpecError, match=rf"is a list, but got a {type(config).__name__} of PEFT. Write methods="):
        PeltonConfig(methods=config)


@pytest.mark.parametrize(
    ("name", "method", "kind", "message"),
    [
        ("gpt2", lambda: spec("oft"), AnatomyError, "'oft' edits the input.*'attn.q'.*slice of 'attn.c_attn'"),
        ("bert", lambda: Peft(FourierFTConfig(n_frequency=5000)), SpecError, "PEFT cannot make 'fourierft'.*32 → 32"),
    ],
)
def test_what_does_not_fit_the_backbone_is_refused_untouched(name: str, method: Any, kind: Any, message: str) -> None:
    model = ARCHS[name].build()
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(kind, match=message):
        get_peft_model(model, PeltonConfig(methods=[method()]))
    assert [n for n, _ in model.named_modules()] == names


class Packed(nn.Linear):
    """A layer whose weights are not numbers of its matrix, as quantised ones are."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__(other.in_features, other.out_features)
        self.load_state_dict(other.state_dict())
        self.kept = other.weight.detach()
        self.weight = nn.Parameter((self.kept * 100).to(torch.int8).flatten(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.kept, self.bias)


def test_quantised_layers_take_what_needs_no_weights() -> None:
    arch = ARCHS["bert"]

    def build() -> Any:
        model = arch.build()
        attention = model.bert.encoder.layer[0].attention.self
        attention.value = Packed(attention.value)
        return model

    for kind in CONFIGS:
        config = PeltonConfig(methods=[spec(kind, ["attn.v"])], gate=FixedGate(1.0))
        if kind == "dora":
            with pytest.raises(AdapterError, match=r"'dora' computes with the weights.*Packed"):
                get_peft_model(build(), config)
        else:
            model = wake(get_peft_model(build(), config)).eval()
            assert torch.isfinite(arch.run(model, arch.inputs())).all()
