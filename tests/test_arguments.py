"""Arguments: what newcomers and users of PEFT type is refused with the argument, or the type, that was meant."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, TaskType

import pelton
from law import METHODS as SPECS
from law import attached
from pelton import IA3, FixedGate, GumbelGate, LoRA, MLPGate, Peft, PeltonConfig
from pelton.arguments import ADVICE, ALIASES, parameters
from pelton.errors import ArgumentError, PeltonError, SpecError, UnknownArgument, UnknownName
from pelton.gates import GATES
from pelton.methods import LINEAR_SITES, METHODS
from pelton.registry import Spec
from zoo import ARCHS

# Types


SCOPE = {name: getattr(pelton, name) for name in pelton.__all__} | {"nan": math.nan, "peft": peft}


def called(call: str) -> object:
    """What a user typed; a text, which no type checker refuses before Pelton can."""
    return eval(call, dict(SCOPE))


TYPES: list[tuple[str, str]] = [
    ('LoRA(alpha="16")', "`alpha is a finite number` must hold, but got alpha='16'. Write alpha=16."),
    ('LoRA(dropout="0.1")', "`dropout is a finite number` must hold, but got dropout='0.1'. Write dropout=0.1."),
    ("LoRA(dropout=None)", "but got dropout=None. The default is dropout=0.0."),
    ("LoRA(alpha=float('inf'))", "`alpha is a finite number` must hold, but got alpha=inf."),
    ("LoRA(alpha=nan)", "`alpha is a finite number` must hold, but got alpha=nan."),
    ("LoRA(alpha=True)", "but got alpha=True. The default is alpha=16."),
    ("LoRA(rank='eight')", "`rank is a whole number` must hold, but got rank='eight'. The default is rank=8."),
    ("LoRA(rank=True)", "`rank is a whole number` must hold, but got rank=True."),
    ("LoRA(layers=3)", "`layers is a list of whole numbers or None` must hold, but got layers=3. Write layers=[3]."),
    ('LoRA(layers=["0"])', "but got layers=['0']. Write layers=[0]."),
    ('LoRA(layers="0")', "but got layers='0'. Write layers=[0]."),
    ('LoRA(layers="all")', "but got layers='all'. The default is layers=None."),
    ("LoRA(layers=[True])", "but got layers=[True]."),
    ("LoRA(layers=[1.0])", "but got layers=[1.0]."),
    ("LoRA(layers={0: 1})", "but got layers={0: 1}."),
    (
        "LoRA(sites=None)",
        "`sites is a list of sites` must hold, but got sites=None. The default is sites=('attn.q', 'attn.v'",
    ),
    ("LoRA(sites='attn.q')", "but got sites='attn.q'. Write sites=['attn.q']."),
    ("IA3(sites=7)", "`sites is a list of sites` must hold, but got sites=7."),
    ("BitFit(layers='1')", "Write layers=[1]."),
    (
        "Bottleneck(bottleneck_size='48')",
        "`bottleneck_size is a whole number` must hold, but got bottleneck_size='48'. Write",
    ),
    ("Bottleneck(activation=['relu'])", "`activation is a name` must hold, but got activation=['relu']."),
    ("Bottleneck(scaling=[1.0])", "`scaling is a finite number` must hold, but got scaling=[1.0]."),
    ("Bottleneck(mode=3)", "Unknown mode 3. Known: parallel, sequential."),
    (
        "Prefix(init_std='x')",
        "`init_std is a finite number` must hold, but got init_std='x'. The default is init_std=0.02.",
    ),
    ("Prefix(gating=None)", "Unknown gating None. Known: mass, scale."),
    (
        "DilatedAttention(segment='3')",
        "`segment is a whole number or a list of whole numbers` must hold, but got segment='3'",
    ),
    ("DilatedAttention(segment=[4, '8'])", "but got segment=[4, '8']. Write segment=[4, 8]."),
    (
        "DilatedAttention(heads=3)",
        "`heads is a list of whole numbers or None` must hold, but got heads=3. Write heads=[3].",
    ),
    ("DilatedAttention(heads=['a'])", "but got heads=['a']."),
    ("Peft(config=peft.LoHaConfig(), layers=3)", "but got layers=3. Write layers=[3]."),
    ("ScalarGate('0.5')", "`init is a finite number` must hold, but got init='0.5'. Write init=0.5."),
    ("FixedGate('0.5')", "`0 <= ratio <= 1` must hold, but got ratio='0.5'."),
    ("FixedGate(True)", "`0 <= ratio <= 1` must hold, but got ratio=True."),
    ("FixedGate(None)", "`0 <= ratio <= 1` must hold, but got ratio=None."),
    ("FixedGate(nan)", "`0 <= ratio <= 1` must hold, but got ratio=nan."),
    ("FixedGate(stages=0.5)", "`stages are by name` must hold, but got stages=0.5."),
    ("FixedGate(stages=['a'])", "`stages are by name` must hold, but got stages=['a']."),
    ("FixedGate(stages={'a': 0.1}, stage=1)", "`stage is a name or None` must hold, but got stage=1."),
    ("FrozenGate(values=3)", "`values are by block` must hold, but got values=3."),
    ("FrozenGate(stages=3)", "`stages are by name` must hold, but got stages=3."),
    ("FrozenGate(values={0: {'lora': 0.3}})", "`blocks are numbers as text, such as '0'` must hold, but got block=0."),
    (
        "FrozenGate(values={'0': {'lora': True}})",
        "`0 <= value <= 1` must hold, but got block='0', kind='lora', value=True.",
    ),
    (
        'MLPGate(temperature="1")',
        "`temperature is a finite number` must hold, but got temperature='1'. Write temperature=1.",
    ),
    (
        'MLPGate(entropy="x")',
        "`entropy is a finite number` must hold, but got entropy='x'. The default is entropy=0.0.",
    ),
    ("MLPGate(entropy='1e-3')", "Write entropy=0.001."),
    ("MLPGate(granularity=['token'])", "Unknown granularity ['token']."),
    ("LinearGate(l1=None)", "`l1 is a finite number` must hold, but got l1=None."),
    (
        "GumbelGate(straight_through='yes')",
        "`straight_through is true or false` must hold, but got straight_through='yes'.",
    ),
    ("GumbelGate(straight_through='True')", "Write straight_through=True."),
    ("GumbelGate(temperature=nan)", "`temperature is a finite number` must hold"),
    ("GumbelGate(sizes=3)", "`sizes are by method` must hold, but got sizes=3."),
    (
        "LoRA(1, 2, 0, [], None, 6)",
        "LoRA takes each of rank, alpha, dropout, sites, layers once, but got too many positional",
    ),
    ("LoRA(8, rank=3)", "but got multiple values for argument 'rank'. Name them: LoRA(rank=…, alpha=…)."),
]


@pytest.mark.parametrize(("call", "message"), TYPES)
def test_a_wrong_type_is_told_with_the_law_the_value_and_what_was_meant(call: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        called(call)
    assert message in str(error.value)


OWN = [
    *(METHODS[kind] for kind in ("bitfit", "bottleneck", "dilated", "ia3", "lora", "prefix")),
    *map(GATES.__getitem__, GATES),
]


class Foreign:
    """A value of no type that a spec knows."""


VALUES = [Foreign(), Foreign, 1j, b"x", [Foreign()], {1: Foreign()}, "?", "['", math.inf, {}, [], 0, 1]


@pytest.mark.parametrize(
    ("spec", "name"), [(s, f.name) for s in OWN for f in dataclasses.fields(s)], ids=lambda v: getattr(v, "kind", v)
)
@pytest.mark.parametrize("value", VALUES)
def test_no_field_of_any_spec_takes_just_anything(spec: Any, name: str, value: object) -> None:
    """A value of a wrong type never gets as far as Python's own errors; empty lists and mappings are of a right one."""
    try:
        made = spec(**{name: value})
    except SpecError:
        return
    assert getattr(made, name) == value in ({}, [], (), 0, 1)


def test_numbers_of_numpy_and_lists_become_plain() -> None:
    spec = LoRA(
        rank=np.int64(4),  # type: ignore[arg-type]
        alpha=np.float32(8),  # type: ignore[arg-type]
        sites=["attn.q"],  # type: ignore[arg-type]
        layers=np.arange(2),  # type: ignore[arg-type]
    )
    assert spec == LoRA(rank=4, alpha=8.0, sites=("attn.q",), layers=(0, 1))
    assert json.loads(json.dumps(spec.to_dict())) == spec.to_dict()
    assert LoRA(layers=range(3)).layers == LoRA(layers=(i for i in range(3))).layers == (0, 1, 2)  # type: ignore[arg-type]
    assert type(LoRA(alpha=16).alpha) is int  # a number stays as it was written
    with pytest.raises(SpecError, match="layers is a list of whole numbers"):
        LoRA(layers=torch.tensor([0.5]))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SPECS)
def test_specs_are_copied_pickled_and_replaced(name: str) -> None:
    spec = SPECS[name]
    assert copy.copy(spec) == copy.deepcopy(spec) == pickle.loads(pickle.dumps(spec)) == spec
    assert dataclasses.replace(spec, layers=(1,)).layers == (1,)
    with pytest.raises(TypeError, match="lairs"):
        dataclasses.replace(spec, lairs=(1,))


def test_json_of_a_wrong_type_says_which_spec() -> None:
    with pytest.raises(
        SpecError, match=r"'lora' cannot be made from \{'alpha': '8'\}: `alpha is a finite.*Write alpha=8\.$"
    ):
        PeltonConfig(methods=[{"kind": "lora", "alpha": "8"}])


# Names

LORA = "Known: alpha, dropout, layers, rank, sites."
NAMES: list[tuple[str, str]] = [
    ("LoRA(r=8)", f"Unknown argument of LoRA 'r'. Did you mean 'rank'? {LORA}"),
    ("LoRA(lora_alpha=16)", f"Unknown argument of LoRA 'lora_alpha'. Did you mean 'alpha'? {LORA}"),
    ("LoRA(lora_dropout=0.1)", "Did you mean 'dropout'?"),
    (
        "LoRA(target_modules=['q_proj'])",
        f"Did you mean 'sites'? The sites of 'lora' are {', '.join(LINEAR_SITES)}. {LORA}",
    ),
    ("LoRA(layers_to_transform=[0])", "Did you mean 'layers'?"),
    ("LoRA(rnk=8)", "Did you mean 'rank'?"),
    ("LoRA(bias='all')", "Unknown argument of LoRA 'bias'. Biases are a method of their own: put BitFit() into the me"),
    ("LoRA(use_dora=True)", "Peft(config=peft.LoraConfig(use_dora=True))"),
    ("LoRA(modules_to_save=['score'])", "It is an argument of PeltonConfig: PeltonConfig(modules_to_save=…)."),
    ("LoRA(xyz=3)", f"Unknown argument of LoRA 'xyz'. {LORA}"),
    (
        "Bottleneck(reduction_factor=16)",
        "Did you mean 'bottleneck_size'? bottleneck_size is the width of the block",
    ),
    ("Bottleneck(non_linearity='relu')", "Did you mean 'activation'?"),
    ("Bottleneck(target_modules=['ffn'])", "Did you mean 'sites'? The sites of 'bottleneck' are attn.out, ffn.out."),
    ("Prefix(num_virtual_tokens=20)", "Did you mean 'prefix_length'?"),
    (
        "Prefix(prefix_projection=True)",
        "Did you mean 'parametrisation'? prefix_projection=True is parametrisation='mlp'.",
    ),
    ("Prefix(encoder_hidden_size=64)", "Did you mean 'mlp_size'?"),
    ("IA3(target_modules=['k'])", "The sites of 'ia3' are"),
    ("MLPGate(tau=1)", "Unknown argument of MLPGate 'tau'. Did you mean 'temperature'?"),
    ("MLPGate(hidden=3)", "Did you mean 'hidden_size'?"),
    ("FixedGate(values=0.5)", "Did you mean 'value'?"),
    ("PeltonConfig(r=8)", "Unknown argument of PeltonConfig 'r'. Write methods=[LoRA(rank=…)]. Known: auto_mapping, "),
    (
        "PeltonConfig(r=8, lora_alpha=16, target_modules=['q'])",
        "Write methods=[LoRA(rank=…, alpha=…, sites=…)]. The sites of",
    ),
    (
        "PeltonConfig(target_modules=['q'])",
        "Write methods=[LoRA(sites=…)]. The sites of 'lora' are attn.q, attn.k, attn.v",
    ),
    ("PeltonConfig(xyz=1, rank=8)", "Unknown argument of PeltonConfig 'rank'. Write methods=[LoRA(rank=…)]."),
    ("PeltonConfig(num_virtual_tokens=20)", "Write methods=[Prefix(prefix_length=…)]."),
    (
        "PeltonConfig(reduction_factor=16)",
        "Write methods=[Bottleneck(bottleneck_size=…)]. bottleneck_size is the width",
    ),
    ("PeltonConfig(bias='all')", "put BitFit() into the methods."),
    ("PeltonConfig(temperature=2.0, entropy=0.1)", "Write gate=MLPGate(temperature=…, entropy=…)."),
    ("PeltonConfig(stages={})", "Write gate=FixedGate(stages=…)."),
    ("PeltonConfig(method='lora')", "Unknown argument of PeltonConfig 'method'. Did you mean 'methods'?"),
    ("PeltonConfig(gates='mlp')", "Unknown argument of PeltonConfig 'gates'. Did you mean 'gate'?"),
    ("PeltonConfig(xyz=1)", "PeltonConfig got an unexpected keyword argument 'xyz'. Known: auto_mapping, backbone,"),
    ("PeltonConfig.single('lora', r=8)", "Write methods=[LoRA(rank=…)]."),
    ("PeltonConfig.unipelt(method='lora')", "Did you mean 'methods'?"),
]


@pytest.mark.parametrize(("call", "message"), NAMES)
def test_an_argument_of_another_name_is_told_by_its_name_here(call: str, message: str) -> None:
    with pytest.raises(UnknownArgument) as error:
        called(call)
    assert message in str(error.value)
    for kind in (UnknownName, SpecError, ArgumentError, PeltonError, ValueError, TypeError):
        assert isinstance(error.value, kind)


def test_every_alias_leads_to_an_argument() -> None:
    ours = {name for spec in OWN for name in parameters(spec)}
    assert set(ALIASES.values()) <= ours
    assert not ours & set(ALIASES)  # or an argument of one spec would be explained away in another
    assert not ours & set(ADVICE)
    for table in (peft.LoraConfig, peft.PrefixTuningConfig):
        assert set(parameters(table)) & set(ALIASES)


def test_a_key_of_another_name_is_told_as_an_argument_is() -> None:
    with pytest.raises(UnknownName, match=r"Unknown key of 'lora' 'r'. Did you mean 'rank'\?"):
        PeltonConfig(methods=[{"kind": "lora", "r": 8}])
    with pytest.raises(UnknownName, match=r"Unknown key of 'lora' 'target_modules'. Did you mean 'sites'\?"):
        PeltonConfig(methods=[{"kind": "lora", "target_modules": ["q"]}])


# What is given to a config

GIVEN: list[tuple[str, str]] = [
    ("PeltonConfig(methods='lora')", "methods is a list, but got 'lora'. Put it in brackets: methods=['lora']."),
    ("PeltonConfig(methods=LoRA(rank=2))", "Put it in brackets: methods=[LoRA(rank=2, "),
    ("PeltonConfig(methods=LoRA)", "Write methods=[LoRA()]."),
    ("PeltonConfig(methods=[LoRA])", "but got <class 'pelton.methods.lora.LoRA'>. Write LoRA()."),
    ("PeltonConfig(methods={'kind': 'lora'})", "Put it in brackets: methods=[{'kind': 'lora'}]."),
    (
        "PeltonConfig(methods={'lora': {'rank': 4}, 'ia3': None})",
        "Write methods=[{'kind': 'lora', 'rank': 4}, {'kind': 'ia3'}]",
    ),
    (
        "PeltonConfig(methods=3)",
        "methods is a list, but got 3. Name kinds or specs in it: methods=['lora', Bottleneck()].",
    ),
    ("PeltonConfig(methods=MLPGate())", "methods is a list, but got MLPGate("),
    ("PeltonConfig(methods=[])", "`len(methods) >= 1` must hold, but got methods=[]. Leave it out for the default."),
    ("PeltonConfig(methods=['LoRA'])", "Unknown method 'LoRA'. Did you mean 'lora'?"),
    (
        "PeltonConfig(methods=['lora', LoRA()])",
        "got lora twice in ['lora', 'lora']. Give one spec all its sites instead.",
    ),
    ("PeltonConfig(gate='MLPGate')", "Unknown gate 'MLPGate'. Did you mean 'mlp'?"),
    ("PeltonConfig(gate=MLPGate)", "but got <class 'pelton.gates.mlp.MLPGate'>. Write MLPGate()."),
    ("PeltonConfig(gate=0.5)", "but got 0.5. Write gate=FixedGate(0.5)."),
    ("PeltonConfig(gate={'lora': 1.0})", "but got {'lora': 1.0}. Write gate=FixedGate({'lora': 1.0})."),
    ("PeltonConfig(gate=None)", "but got None. Leave it out for the default."),
    ("PeltonConfig(gate={})", "A gate needs a 'kind', but got {}."),
    (
        "PeltonConfig(modules_to_save='classifier')",
        "a list of names, but got 'classifier'. Write a list such as modules_to_save=['classifier'].",
    ),
    ("PeltonConfig(modules_to_save=3)", "modules_to_save is a list of names, but got 3."),
    ("PeltonConfig(modules_to_save=['a', 3])", "modules_to_save is a list of names, but got ['a', 3]."),
    ("PeltonConfig(LoRA())", "It is the first argument: name the others, PeltonConfig(methods=[…], gate=…)."),
    ("PeltonConfig(task_type='cls')", "Unknown task_type 'cls'. Did you mean 'SEQ_CLS'? Known: CAUSAL_LM, "),
    ("PeltonConfig(task_type='seq_cls')", "Unknown task_type 'seq_cls'. Did you mean 'SEQ_CLS'?"),
    ("PeltonConfig(pruned=['lora'])", "`pruned is by block number` must hold, but got pruned=['lora']."),
    ("PeltonConfig(sizes=3)", "`sizes are by block, kind and place` must hold, but got sizes=3."),
    (
        "PeltonConfig.single(LoRA(rank=2), gate='mlp')",
        "settled here, but got gate='mlp'. Write PeltonConfig(methods=[LoRA(rank=2, alpha=",
    ),
    ("PeltonConfig.single('lora', methods=['ia3'])", "Write PeltonConfig(methods=['ia3'], gate=FixedGate(value=1.0, "),
    ("PeltonConfig.unipelt(gate='mlp')", "Methods and gate are settled here, but got gate='mlp'."),
    ("PeltonConfig.unipelt_ap(methods=[])", "Methods and gate are settled here, but got methods=[]."),
    ("PeltonConfig.dilated(gate='mlp')", "Methods and gate are settled here, but got gate='mlp'."),
    ("PeltonConfig.dilated('lora')", "`method is a DilatedAttention` must hold, but got method='lora'."),
    ("PeltonConfig.dilated(others='lora')", "methods is a list, but got 'lora'."),
    ("PeltonConfig.dilated(pretrain_dilated_ratio='x')", "but got pretrain_dilated_ratio='x'."),
]


@pytest.mark.parametrize(("call", "message"), GIVEN)
def test_what_a_config_is_given_is_refused_with_what_to_write(call: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        called(call)
    assert message in str(error.value)


def test_what_is_right_stays_right() -> None:
    assert PeltonConfig(gate="mlp").gate == MLPGate()
    assert PeltonConfig(methods=(m for m in ("lora", IA3()))).specs == (LoRA(), IA3())  # type: ignore[arg-type]
    assert PeltonConfig(task_type=TaskType.SEQ_CLS).task_type == "SEQ_CLS"
    assert PeltonConfig(modules_to_save=("a", "b")).modules_to_save == ["a", "b"]  # type: ignore[arg-type]
    assert PeltonConfig(modules_to_save=[]).modules_to_save == []
    assert [spec.kind for spec in PeltonConfig.dilated(others=["lora"]).specs] == ["dilated", "lora"]
    assert PeltonConfig.single("lora", task_type="SEQ_CLS", modules_to_save=["score"]).gate == FixedGate(1.0)
    config = PeltonConfig(methods=["lora"], gate=GumbelGate())
    assert dataclasses.replace(config, gate="scalar").specs == config.specs
    with pytest.raises(TypeError, match="gatee"):
        dataclasses.replace(config, gatee="scalar")


# Files that another version wrote


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    attached(ARCHS["bert"], "scalar", [SPECS["lora"]]).save_pretrained(tmp_path)
    return tmp_path


def _read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def _add(folder: Path, **keys: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(_read(folder) | keys))


READERS: dict[str, Callable[[Path], Any]] = {
    "PeltonConfig": lambda folder: PeltonConfig.from_pretrained(str(folder)),
    "PeftConfig": lambda folder: PeftConfig.from_pretrained(str(folder)),
    "PeftModel": lambda folder: PeftModel.from_pretrained(ARCHS["bert"].build(), folder).peft_config["default"],
    "from_peft_type": lambda folder: PeftConfig.from_peft_type(
        **json.loads((folder / "adapter_config.json").read_text())
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_keys_of_a_later_peft_are_left_out_with_a_warning(reader: str, folder: Path) -> None:
    before = READERS[reader](folder)
    assert isinstance(before, PeltonConfig)
    _add(folder, zeta_routing=None, compression_level=3)
    with pytest.warns(
        UserWarning, match=r"\['compression_level', 'zeta_routing'\] for class PeltonConfig, these are ignored"
    ):
        after = READERS[reader](folder)
    assert after.to_dict() == before.to_dict()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("gates", "Did you mean 'gate'"),
        ("method", "Did you mean 'methods'"),
        ("prunned", "Did you mean 'pruned'"),
        ("rank", r"Write methods=\[LoRA\(rank=…\)\]"),
        ("target_modules", r"Write methods=\[LoRA\(sites=…\)\]"),
    ],
)
def test_misspelt_keys_are_refused_also_among_those(key: str, message: str, reader: str, folder: Path) -> None:
    _add(folder, compression_level=3, **{key: None})
    with pytest.raises(UnknownArgument, match=message):
        READERS[reader](folder)


@pytest.mark.parametrize("reader", READERS)
def test_a_wrong_type_in_a_file_is_an_argument_error(reader: str, folder: Path) -> None:
    _add(folder, methods=[{"kind": "lora", "rank": "3"}])
    with pytest.raises(ArgumentError, match=r"'lora' cannot be made from.*Write rank=3"):
        READERS[reader](folder)


def test_arguments_of_wrapped_methods_are_checked_in_their_json() -> None:
    assert issubclass(Peft, Spec)
    with pytest.raises(UnknownName, match=r"Unknown key of 'loha' 'target_modules'. Did you mean 'sites'"):
        PeltonConfig(methods=[{"kind": "loha", "target_modules": ["query"]}])
