"""Bad input: refused with what came and what was expected, and the backbone is bitwise as before."""

from __future__ import annotations

import csv
import gzip
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from law import METHODS, attached, wake
from pelton import (
    IA3,
    BitFit,
    Bottleneck,
    FixedGate,
    LinearGate,
    LoRA,
    MLPGate,
    PeltonConfig,
    Prefix,
    ScalarGate,
    gated_blocks,
    set_methods,
)
from pelton.errors import AdapterError, AnatomyError, DataError, PeltonError, RecipeError, SpecError, UnknownName
from pelton.gates import GATES
from pelton.methods import METHODS as KINDS
from pelton.methods import SITES
from pelton.tasks.files import read_chunks, read_table
from pelton.tasks.labels import Labels, find_labels
from pelton.tasks.regression import RegressionSettings, TextRegression
from pelton.tasks.tables import Table
from pelton.training.loading import parse_recipe
from tiny import write_csv, write_jsonl
from zoo import ARCHS, Arch

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Before:
    """All of a model that a refused adapter might have touched."""

    def __init__(self, arch: Arch, model: Any) -> None:
        self.arch, self.model = arch, model
        self.state = {k: v.clone() for k, v in model.state_dict().items()}
        self.facts = self._facts()
        self.out = self._run()

    def _run(self) -> Tensor:
        mode = self.model.training
        with torch.no_grad():
            out = self.arch.run(self.model.eval(), self.arch.inputs())
        self.model.train(mode)
        return out

    def _facts(self) -> Any:
        modules = list(self.model.named_modules())
        return (
            [(n, type(m), m.training, sorted(vars(m))) for n, m in modules],
            {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules},
            {n: p.requires_grad for n, p in self.model.named_parameters()},
            {n: m.config._attn_implementation for n, m in modules if hasattr(m, "config")},
            self.model.config.to_dict(),
            list(getattr(self.model, "peft_config", {})),
            getattr(self.model, "active_adapters", None) if isinstance(self.model, PeftModel) else None,
        )

    def assert_same(self) -> None:
        after = self.model.state_dict()
        assert list(after) == list(self.state)
        assert all(torch.equal(v, after[k]) for k, v in self.state.items())
        for now, then in zip(self._facts(), self.facts, strict=True):
            assert now == then
        assert torch.equal(self._run(), self.out)


# Specs

NAMES: list[tuple[Callable[[], Any], str]] = [
    (lambda: PeltonConfig(methods=["loar"]), r"Unknown method 'loar'. Did you mean 'lora'\? Known: "),
    (lambda: PeltonConfig(methods=["lora", {"kind": "prefx"}]), r"Unknown method 'prefx'. Did you mean 'prefix'"),
    (lambda: PeltonConfig(methods=["adapter"]), r"Unknown method 'adapter'.* Known: bitfit, bottleneck, .*ia3, .*lora"),
    (lambda: PeltonConfig(gate="mlpp"), r"Unknown gate 'mlpp'. Did you mean 'mlp'\? Known: .*scalar"),
    (lambda: PeltonConfig(gate={"kind": "fixd"}), r"Unknown gate 'fixd'. Did you mean 'fixed'"),
    (lambda: PeltonConfig(methods=[{"kind": "lora", "rnk": 4}]), r"Unknown key of 'lora' 'rnk'. Did you mean 'rank'\?"),
    (lambda: PeltonConfig(gate={"kind": "mlp", "temprature": 1}), r"'temprature'. Did you mean 'temperature'\?"),
    (lambda: PeltonConfig(gate={"kind": "fixed", "ratio": 1}), r"Unknown key of 'fixed' 'ratio'.*value"),
    (lambda: LoRA(sites=("attn.query",)), r"Unknown site 'attn.query'. Did you mean 'attn.*Known: attn, attn.k"),
    (lambda: Bottleneck(sites=("ffn_out",)), r"Unknown site 'ffn_out'. Did you mean 'ffn.out'"),
    (lambda: Bottleneck(activation="rellu"), r"Unknown activation 'rellu'. Did you mean 'relu'\? Known: gelu, relu"),
    (lambda: Bottleneck(mode="paralel"), r"Unknown mode 'paralel'. Did you mean 'parallel'"),
    (lambda: Prefix(parametrisation="tokens"), r"Unknown parametrisation 'tokens'. Did you mean 'token'"),
    (lambda: Prefix(gating="masses"), r"Unknown gating 'masses'. Did you mean 'mass'"),
    (lambda: MLPGate(activation="softmx"), r"Unknown activation 'softmx'. Did you mean 'softmax'"),
    (lambda: MLPGate(granularity="tokens"), r"Unknown granularity 'tokens'. Did you mean 'token'"),
    (lambda: LinearGate(granularity="static"), r"Unknown granularity 'static'"),
    (lambda: FixedGate(stages={"pretrain": 0.1}, stage="pretrained"), r"'pretrained'. Did you mean 'pretrain'"),
]


@pytest.mark.parametrize(("make", "message"), NAMES, ids=[m[:40] for _, m in NAMES])
def test_unknown_names_are_named_with_the_nearest_and_the_list(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnknownName, match=message) as error:
        make()
    assert "Known: " in str(error.value)


VALUES: list[tuple[Callable[[], Any], str]] = [
    (lambda: LoRA(rank=0), r"`rank > 0` must hold, but got rank=0"),
    (lambda: LoRA(rank=-3), r"rank=-3"),
    (lambda: LoRA(alpha=0), r"`alpha > 0` must hold, but got alpha=0"),
    (lambda: LoRA(dropout=1.0), r"`0 <= dropout < 1` must hold, but got dropout=1.0"),
    (lambda: LoRA(dropout=-0.1), r"dropout=-0.1"),
    (lambda: LoRA(sites=()), r"at least one site"),
    (lambda: LoRA(sites=("attn.q", "attn.q")), r"`every site is named once` must hold"),
    (lambda: LoRA(sites=("attn",)), r"a site of 'lora' is one of attn.q.*site='attn'"),
    (lambda: Bottleneck(bottleneck_size=0), r"`bottleneck_size > 0` must hold, but got bottleneck_size=0"),
    (lambda: Bottleneck(scaling=0.0), r"`scaling > 0`"),
    (lambda: Bottleneck(sites=("attn.q",)), r"a site of 'bottleneck' is one of attn.out, ffn.out"),
    (lambda: Prefix(prefix_length=0), r"`prefix_length > 0`"),
    (lambda: Prefix(mlp_size=-1), r"`mlp_size > 0` must hold, but got mlp_size=-1"),
    (lambda: Prefix(init_std=0), r"`init_std > 0`"),
    (lambda: Prefix(sites=("attn.k",)), r"a site of 'prefix' is one of attn`"),
    (lambda: IA3(sites=("attn",)), r"a site of 'ia3'"),
    (lambda: BitFit(sites=("attn",)), r"a site of 'bitfit'"),
    (lambda: MLPGate(temperature=0), r"`temperature > 0` must hold, but got temperature=0"),
    (lambda: MLPGate(temperature=-1.5), r"temperature=-1.5"),
    (lambda: MLPGate(hidden_size=0), r"`hidden_size > 0`"),
    (lambda: MLPGate(init=1.0), r"`0 < init < 1`"),
    (lambda: MLPGate(init_std=-1), r"`init_std >= 0`"),
    (lambda: MLPGate(entropy=-1), r"`entropy >= 0` must hold, but got entropy=-1"),
    (lambda: MLPGate(balance=-1), r"`balance >= 0`"),
    (lambda: MLPGate(l1=0.1), r"l1 == 0 or activation == 'sigmoid'.*l1=0.1, activation='softmax'"),
    (lambda: LinearGate(l1=-1), r"`l1 >= 0`"),
    (lambda: ScalarGate(init=0), r"`0 < init < 1` must hold, but got init=0"),
    (lambda: FixedGate(1.5), r"`0 <= ratio <= 1` must hold, but got ratio=1.5"),
    (lambda: FixedGate(-0.1), r"ratio=-0.1"),
    (lambda: FixedGate({"lora": 2.0}), r"ratio=2.0"),
    (lambda: FixedGate(stages={"a": 0.1, "b": 7}), r"ratio=7"),
    (lambda: FixedGate(stages={"a": {"lora": -1}}), r"ratio=-1"),
    (lambda: FixedGate("half"), r"ratio='half'"),  # type: ignore[arg-type]
    (lambda: FixedGate(stages={}), r"stages has at least one entry"),
    (lambda: PeltonConfig(methods=[]), r"`len\(methods\) >= 1` must hold"),
    (lambda: PeltonConfig(methods="lora"), r"methods is a list, but got 'lora'"),
    (lambda: PeltonConfig(methods=["lora", LoRA(rank=2)]), r"lora twice in \['lora', 'lora'\]"),
    (lambda: PeltonConfig(methods=[{"rank": 4}]), r"A method needs a 'kind', but got \{'rank': 4\}"),
    (
        lambda: PeltonConfig(methods=[{"kind": "lora", "rank": "8"}]),
        r"`rank is a whole number` must hold, but got rank='8'",
    ),
    (lambda: PeltonConfig(methods=[{"kind": "lora", "alpha": "8"}]), r"'lora' cannot be made from \{'alpha': '8'\}"),
    (lambda: LoRA(rank=2.5), r"`rank is a whole number` must hold, but got rank=2.5"),
    (lambda: LoRA(sites="attn.q"), r"`sites is a list of sites` must hold, but got sites='attn.q'"),
    (lambda: LoRA(layers=()), r"'lora' has at least one layer"),
    (lambda: PeltonConfig(gate=FixedGate({"lora": 1.0, "loar": 0.5})), r"Unknown method 'loar'. Did you mean 'lora'"),
    (lambda: PeltonConfig(gate={"kind": "mlp", "temperature": None}), r"'mlp' cannot be made from"),
    (lambda: PeltonConfig(methods=[3]), r"A method is a spec, a name or a mapping with a 'kind', but got 3"),
    (lambda: PeltonConfig(methods=[MLPGate()]), r"A method is a spec"),
    (lambda: PeltonConfig(gate=LoRA()), r"A gate is a spec"),
]


@pytest.mark.parametrize(("make", "message"), VALUES, ids=[m[:40] for _, m in VALUES])
def test_values_that_break_a_law_are_refused_with_both(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_specs_are_frozen() -> None:
    for kind in (*KINDS, *GATES):
        spec: Any = (KINDS if kind in KINDS else GATES)[kind]()
        name = next(iter(vars(spec)))
        with pytest.raises(AttributeError, match="cannot assign"):
            setattr(spec, name, 0)


# Attaching

ATTACHED: list[tuple[str, dict[str, Any], type[PeltonError], str]] = [
    ("llama", {"gate": MLPGate(granularity="example")}, SpecError, r"granularity != 'example'.*causal=True"),
    ("gpt2", {"gate": LinearGate(granularity="example")}, SpecError, r"sees later tokens"),
    ("t5", {"gate": LinearGate(granularity="example")}, SpecError, r"sees later tokens"),
    ("swin", {"gate": MLPGate(granularity="token")}, SpecError, r"granularity != 'token'.*windows.*layers.0.blocks.0"),
    (
        "llama",
        {"methods": [Prefix(gating="scale")]},
        SpecError,
        r"gating='mass' or granularity != 'token'.*gating='scale', granularity='token'",
    ),
    (
        "bert",
        {"methods": [Prefix(gating="scale")], "gate": MLPGate(granularity="token")},
        SpecError,
        r"Use Prefix\(gating='mass'\)",
    ),
    (
        "bert",
        {"methods": [LoRA(layers=(0, 2))]},
        AnatomyError,
        r"`0 <= layer < 2` must hold, but got layer=2 for 'lora'",
    ),
    ("bert", {"methods": ["lora", BitFit(layers=(-1,))]}, AnatomyError, r"layer=-1 for 'bitfit': 'bert' has 2 blocks"),
    (
        "deberta-v2",
        {"methods": ["prefix"]},
        AnatomyError,
        r"prefix needs the site 'attn', but 'deberta-v2' has none",
    ),
    (
        "blip",
        {"methods": ["lora", "prefix"]},
        AnatomyError,
        r"'blip' has none.*It has: attn.q, attn.k.*Leave prefix",
    ),
    (
        "bert",
        {"gate": FixedGate({"lora": 0.5})},
        SpecError,
        r"has no ratio for bottleneck; it has lora",
    ),
]
FITS = [f"{name}-{message[:30]}" for name, _, _, message in ATTACHED]


@pytest.mark.parametrize(("name", "config", "kind", "message"), ATTACHED, ids=FITS)
def test_what_does_not_fit_is_refused_and_the_backbone_untouched(
    name: str, config: dict[str, Any], kind: type[PeltonError], message: str
) -> None:
    model = ARCHS[name].build()
    before = Before(ARCHS[name], model)
    with pytest.raises(kind, match=message):
        get_peft_model(model, PeltonConfig(**config))
    before.assert_same()
    assert not hasattr(model, "peft_config")
    get_peft_model(model, PeltonConfig(methods=["lora"]))  # and it takes a good one


@pytest.mark.parametrize(("name", "config", "kind", "message"), ATTACHED, ids=FITS)
def test_a_second_adapter_that_does_not_fit_leaves_the_first_alone(
    name: str, config: dict[str, Any], kind: type[PeltonError], message: str
) -> None:
    arch = ARCHS[name]
    model = attached(arch, methods=[METHODS["lora"], METHODS["bottleneck"]])
    before = Before(arch, model)
    with pytest.raises(kind, match=message):
        model.add_adapter("second", PeltonConfig(**config))
    before.assert_same()
    model.add_adapter("second", PeltonConfig(methods=["lora"]))


def test_a_default_without_a_place_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pelton.tuner.config.default_methods", lambda: (LoRA(), Prefix(), Bottleneck()))
    with pytest.warns(UserWarning, match="Left 'prefix' out of the default on 'deberta-v2': Disentangled"):
        model = get_peft_model(ARCHS["deberta-v2"].build(), PeltonConfig())
    assert {s.kind for b in gated_blocks(model) for s in b.wirings["default"].methods} == {"lora", "bottleneck"}


def test_a_backbone_without_blocks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    state, x = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(2, 4)
    out = model(x)
    with pytest.raises(AnatomyError, match=r"No transformer blocks are known in Sequential.*found linear layers 0, 2"):
        get_peft_model(model, PeltonConfig())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert torch.equal(out, model(x))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.filterwarnings("ignore:Adapter name '.*' should not be contained in the prefix:UserWarning")  # PEFT's
@pytest.mark.parametrize("name", ["lora", "gates", "methods", "pelton", "hidden", "a.b", ""])
def test_adapter_names_that_clash_are_refused(name: str) -> None:
    arch = ARCHS["bert"]
    model = arch.build()
    before = Before(arch, model)
    with pytest.raises(AdapterError, match=f"cannot be named {name!r}"):
        get_peft_model(model, PeltonConfig(), adapter_name=name)
    before.assert_same()
    good = attached(arch)
    before = Before(arch, good)
    with pytest.raises(AdapterError, match=f"cannot be named {name!r}"):
        good.add_adapter(name, PeltonConfig())
    before.assert_same()


def test_a_name_that_is_taken_is_refused() -> None:
    arch = ARCHS["bert"]
    model = attached(arch)
    before = Before(arch, model)
    with pytest.raises(ValueError, match="'default' already exists"):
        model.add_adapter("default", PeltonConfig())
    before.assert_same()


def test_switching_to_what_is_not_there_changes_nothing() -> None:
    arch = ARCHS["bert"]
    model = attached(arch)
    before = Before(arch, model)
    with pytest.raises(UnknownName, match=r"Unknown method of this model 'prefixes'. Did you mean 'prefix'"):
        set_methods(model, lora=False, prefixes=False)
    with pytest.raises(ValueError, match="Adapter other not found"):
        model.set_adapter("other")
    with pytest.raises(AdapterError, match=r"no adapter 'other' to merge. There are: default"):
        model.merge_and_unload(adapter_names=["other"])
    with pytest.raises(AdapterError, match="call merge_and_unload"):
        model.merge_adapter()
    before.assert_same()
    with pytest.raises(AdapterError, match="BertForSequenceClassification has no Pelton adapter"):
        set_methods(arch.build(), lora=False)


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_adding_and_deleting_an_adapter_leaves_nothing(active: bool, task: str | None) -> None:
    """The second adapter has methods, sites, layers and hooks that the first has not."""
    arch = ARCHS["bert"]
    model = attached(arch, methods=[LoRA(layers=(0,))], task_type=task)
    before = Before(arch, model)
    model.add_adapter("second", PeltonConfig(methods=["lora", "bottleneck", "prefix", IA3()], task_type=task))
    if active:
        model.set_adapter("second")
        with pytest.warns(UserWarning, match="Setting active adapter to default"):
            model.delete_adapter("second")
    else:
        model.delete_adapter("second")
    before.assert_same()


def test_deleting_an_adapter_of_some_blocks_activates_another_in_all() -> None:
    arch = ARCHS["bert"]
    model = attached(arch, methods=[METHODS["lora"]])
    before = Before(arch, model)
    model.add_adapter("second", PeltonConfig(methods=[LoRA(layers=(1,))]))
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("second")
    before.assert_same()
    assert all(block.active_adapters == ["default"] for block in gated_blocks(model))


def test_deleting_the_last_adapter_leaves_the_backbone() -> None:
    arch = ARCHS["bert"]
    model = arch.build()
    with torch.no_grad():
        out = arch.run(model, arch.inputs())
    modules = [name for name, _ in model.named_modules()]
    peft_model = wake(get_peft_model(model, PeltonConfig())).eval()
    peft_model.delete_adapter("default")
    assert [name for name, _ in model.named_modules()] == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(out, arch.run(model, arch.inputs()))
    peft_model.add_adapter("again", PeltonConfig())
    peft_model.set_adapter("again")
    assert len(gated_blocks(peft_model)) == 2


# Loading

Spoil = Callable[[Path], None]


def _edit_weights(change: Callable[[dict[str, Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def _edit_config(change: Callable[[dict[str, Any]], None]) -> Spoil:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        change(values)
        (folder / CONFIG).write_text(json.dumps(values))

    return spoil


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def _corrupt_header(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[8:40] = b"\xff" * 32
    (folder / WEIGHTS).write_bytes(bytes(data))


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _pickle_renamed(folder: Path) -> None:
    _pickle(folder)
    (folder / "adapter_model.bin").rename(folder / WEIGHTS)


def _key(tensors: dict[str, Tensor], part: str) -> str:
    return next(key for key in tensors if part in key)


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors[_key(tensors, "attn_q.A")] = torch.zeros(7, 5)


def _transpose(tensors: dict[str, Tensor]) -> None:
    key = _key(tensors, "attn_v.A")
    tensors[key] = tensors[key].t().contiguous()


SPOILED: dict[str, tuple[Spoil, type[PeltonError], str]] = {
    "truncated": (_truncate, AdapterError, r"not a whole safetensors file \(\d+ bytes\)"),
    "empty": (
        lambda f: (f / WEIGHTS).write_bytes(b"") and None,
        AdapterError,
        r"not a whole safetensors file \(0 bytes\)",
    ),
    "corrupt header": (_corrupt_header, AdapterError, r"not a whole safetensors file"),
    "pickle beside": (
        _pickle,
        AdapterError,
        r"holds no adapter_model.safetensors; it holds .*adapter_model.bin.*never pickled",
    ),
    "pickle renamed": (_pickle_renamed, AdapterError, r"not a whole safetensors file"),
    "no weights": (
        lambda f: (f / WEIGHTS).unlink(),
        AdapterError,
        r"holds no adapter_model.safetensors; it holds README.md",
    ),
    "missing gate": (
        _edit_weights(lambda t: t.pop(_key(t, ".gates."))),
        AdapterError,
        r"1 tensors are missing, such as .*\.gates\.default\.",
    ),
    "missing part": (
        _edit_weights(lambda t: [t.pop(k) for k in list(t) if "layer.1" in k and ".lora." in k]),
        AdapterError,
        r"12 tensors are missing, such as .*layer\.1.*\.lora\.",
    ),
    "all missing": (_edit_weights(lambda t: t.clear()), AdapterError, r"tensors are missing"),
    "extra part": (
        _edit_weights(lambda t: t.update({_key(t, "attn_q.A").replace("attn_q", "attn_z"): torch.zeros(3)})),
        AdapterError,
        r"1 tensors have no place, such as .*attn_z",
    ),
    "extra block": (
        _edit_weights(lambda t: t.update({_key(t, "layer.1").replace("layer.1", "layer.7"): torch.zeros(3)})),
        AdapterError,
        r"1 tensors have no place, such as .*layer\.7",
    ),
    "extra elsewhere": (
        _edit_weights(lambda t: t.update({"base_model.model.bert.stranger.weight": torch.zeros(3)})),
        AdapterError,
        r"1 tensors have no place, such as .*stranger",
    ),
    "wrong shape": (_edit_weights(_reshape), AdapterError, r"is \(7, 5\) in the file, \(3, 32\) in the model"),
    "transposed": (_edit_weights(_transpose), AdapterError, r"is \(32, 3\) in the file, \(3, 32\) in the model"),
    "unknown method": (
        _edit_config(lambda c: c["methods"][0].update(kind="loraa")),
        UnknownName,
        r"Unknown method 'loraa'. Did you mean 'lora'",
    ),
    "unknown gate": (_edit_config(lambda c: c["gate"].update(kind="mlpp")), UnknownName, r"'mlpp'. Did you mean 'mlp'"),
    "unknown method key": (
        _edit_config(lambda c: c["methods"][0].update(rnk=3)),
        UnknownName,
        r"'rnk'. Did you mean 'rank'",
    ),
    "unknown gate key": (_edit_config(lambda c: c["gate"].update(taau=3)), UnknownName, r"Unknown key of 'mlp' 'taau'"),
    "unknown key": (_edit_config(lambda c: c.update(gates={})), UnknownName, r"'gates'. Did you mean 'gate'"),
    "wrong type": (_edit_config(lambda c: c["methods"][0].update(rank="3")), SpecError, r"`rank is a whole number`"),
    "broken law": (_edit_config(lambda c: c["methods"][0].update(rank=0)), SpecError, r"`rank > 0` must hold"),
    "another rank": (
        _edit_config(lambda c: c["methods"][0].update(rank=4)),
        AdapterError,
        r"is \(\d+, \d+\) in the file, \(\d+, \d+\) in the model",
    ),
    "another method": (
        _edit_config(lambda c: c.update(methods=[{"kind": "ia3"}])),
        AdapterError,
        r"tensors are missing.*tensors have no place",
    ),
    "another layer": (_edit_config(lambda c: c["methods"][0].update(layers=[5])), AnatomyError, r"got layer=5"),
    "another architecture": (
        _edit_config(lambda c: c["backbone"].update(model_type="roberta")),
        AdapterError,
        r"made for 'roberta' with 2 blocks of width \[32\], but the backbone is 'bert' with 2 blocks of width \[32\]",
    ),
    "another width": (
        _edit_config(lambda c: c["backbone"].update(hidden_sizes=[64, 64])),
        AdapterError,
        r"2 blocks of width \[64\], but the backbone is 'bert' with 2 blocks of width \[32\]",
    ),
    "another depth": (
        _edit_config(lambda c: c["backbone"].update(hidden_sizes=[32] * 12)),
        AdapterError,
        r"'bert' with 12 blocks of width \[32\], but",
    ),
}
EDITED = [how for how, (spoil, _, _) in SPOILED.items() if "_edit_weights" in spoil.__qualname__]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good adapter on disk."""
    folder = tmp_path_factory.mktemp("saved")
    wake(attached(ARCHS["bert"], methods=[METHODS["lora"], METHODS["bottleneck"]]), seed=8).save_pretrained(folder)
    return folder


def _spoiled(saved: Path, tmp_path: Path, how: str) -> Path:
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    SPOILED[how][0](folder)
    return folder


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_adapter_is_refused_and_nothing_loaded(how: str, saved: Path, tmp_path: Path) -> None:
    arch, (_, kind, message) = ARCHS["bert"], SPOILED[how]
    folder, model = _spoiled(saved, tmp_path, how), arch.build()
    before = Before(arch, model)
    with pytest.raises(kind, match=message):
        PeftModel.from_pretrained(model, folder)
    before.assert_same()
    loaded = PeftModel.from_pretrained(model, saved).eval()  # and it takes the good one
    fresh = PeftModel.from_pretrained(arch.build(), saved).eval()
    with torch.no_grad():
        assert torch.equal(arch.run(loaded, arch.inputs()), arch.run(fresh, arch.inputs()))


@pytest.mark.parametrize("how", SPOILED)
def test_a_good_adapter_survives_a_spoiled_one(how: str, saved: Path, tmp_path: Path) -> None:
    arch, (_, kind, message) = ARCHS["bert"], SPOILED[how]
    folder, model = _spoiled(saved, tmp_path, how), attached(arch)
    before = Before(arch, model)
    with pytest.raises(kind, match=message.replace("default", "second")):
        model.load_adapter(folder, adapter_name="second")
    before.assert_same()
    model.load_adapter(saved, adapter_name="second")
    with torch.no_grad():
        assert torch.equal(before.out, arch.run(model, arch.inputs()))


@pytest.mark.parametrize("origin", ["attached", "loaded"])
@pytest.mark.parametrize(
    "how", [how for how, (spoil, _, _) in SPOILED.items() if "_edit_weights" in spoil.__qualname__]
)
def test_an_adapter_keeps_its_weights_when_others_do_not_fit(
    how: str, origin: str, saved: Path, tmp_path: Path
) -> None:
    arch = ARCHS["bert"]
    if origin == "attached":
        model = attached(arch, methods=[METHODS["lora"], METHODS["bottleneck"]])
    else:
        model = PeftModel.from_pretrained(arch.build(), saved)
    folder, before = _spoiled(saved, tmp_path, how), Before(arch, model)
    with pytest.raises(AdapterError, match=SPOILED[how][2]):
        model.load_adapter(folder, adapter_name="default")
    before.assert_same()


@pytest.mark.parametrize("low", [False, True])
def test_a_spoiled_adapter_is_refused_on_the_meta_device_too(low: bool, saved: Path, tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    folder, model = _spoiled(saved, tmp_path, "wrong shape"), arch.build()
    before = Before(arch, model)
    with pytest.raises(AdapterError, match="in the file"):
        PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=low)
    before.assert_same()


@pytest.mark.parametrize("name", ["roberta", "llama", "vit"])
def test_an_adapter_of_another_architecture_is_refused(name: str, saved: Path) -> None:
    arch = ARCHS[name]
    model = arch.build()
    before = Before(arch, model)
    with pytest.raises(AdapterError, match=r"made for 'bert' with 2 blocks of width \[32\], but the backbone is"):
        PeftModel.from_pretrained(model, saved)
    before.assert_same()


HEADS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(_key(t, "classifier.weight")), r"classifier\.weight"),
    "wrong shape": (lambda t: t.update({_key(t, "classifier.weight"): torch.zeros(5, 32)}), r"\(5, 32\) in the file"),
    "extra": (lambda t: t.update({"base_model.model.classifier.scale": torch.zeros(3)}), r"classifier.*scale"),
}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("how", HEADS)
def test_a_spoiled_head_is_refused(how: str, second: bool, tmp_path: Path) -> None:
    arch, (change, message) = ARCHS["bert"], HEADS[how]
    attached(arch, task_type="SEQ_CLS").save_pretrained(tmp_path)
    _edit_weights(change)(tmp_path)
    model = attached(arch, task_type="SEQ_CLS") if second else arch.build()
    before = Before(arch, model)
    load = partial(model.load_adapter, adapter_name="second") if second else partial(PeftModel.from_pretrained, model)
    with pytest.raises(AdapterError, match=message):
        load(tmp_path)
    before.assert_same()


def test_a_config_that_is_not_json_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG).write_text('{"peft_type": "PELTON",')
    with pytest.raises(AdapterError, match=r"adapter_config.json cannot be read: expected JSON"):
        PeltonConfig.from_pretrained(str(tmp_path / "adapter"))
    arch = ARCHS["bert"]
    model = arch.build()
    before = Before(arch, model)
    with pytest.raises(ValueError, match="Expecting property name"):  # PEFT reads it before Pelton does
        PeftModel.from_pretrained(model, tmp_path / "adapter")
    before.assert_same()


def test_every_site_and_kind_is_in_the_lists() -> None:
    with pytest.raises(UnknownName) as error:
        LoRA(sites=("nowhere",))
    assert str(error.value).endswith(f"Known: {', '.join(sorted(SITES))}.")
    with pytest.raises(UnknownName) as error:
        PeltonConfig(gate="nothing")
    assert str(error.value).endswith(f"Known: {', '.join(sorted(GATES))}.")


# Files

GLUE = [
    ('"Hello there', "1"),
    ('bye now"', "0"),
    ('it is 5" wide', "1"),
    ('he said "no" twice', "0"),
    ('"All of it."', "1"),
]
CELLS = ['two\nlines\n\nand "quotes"', "a\ttab", '"', "plain", "ends in\n"]


@pytest.mark.parametrize("rows", [GLUE, GLUE[:2], GLUE[4:], GLUE[2:], [*GLUE[:2], *GLUE[4:]]])
def test_quotes_in_tsv_are_plain_text(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    table = read_table(path)
    assert list(zip(table.columns["sentence"], table.columns["label"], strict=True)) == rows
    assert next(iter(read_chunks(path, 100))).columns == table.columns


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("columns", [("text",), ("text", "label"), ("label", "text")])
@pytest.mark.parametrize("cells", [CELLS, *([cell, "plain"] for cell in CELLS)])
def test_tsv_that_is_written_with_quotes_is_read_as_it_was(
    tmp_path: Path, quoting: Any, columns: tuple[str, ...], cells: list[str]
) -> None:
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=quoting)
        writer.writerows([columns, *([{"text": cell, "label": "x"}[name] for name in columns] for cell in cells)])
    assert read_table(tmp_path / "a.tsv").columns["text"] == cells


def test_a_tsv_row_of_another_width_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n5" wide\t1\n"two\nlines"\t1\n')
    with pytest.raises(
        DataError, match=r"line 3: expected 2 columns .* but got 1. Write cells with .* to a JSONL file"
    ):
        read_table(tmp_path / "a.tsv")


@pytest.mark.parametrize("text", ['text,label\n"open,a\nb,c\n', 'text,label\n"open,a\nb" more,c\n'])
def test_a_lone_quote_in_csv_is_named_as_the_cause(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=r"line 2: malformed CSV .*probably for a quote without a partner. Enclose"):
        read_table(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_long_cells_are_read_and_the_process_keeps_its_limit(tmp_path: Path, name: str) -> None:
    text, limit = "good " * 40_000, csv.field_size_limit()
    path = write_csv(tmp_path / name, [{"text": text, "label": "a"}])
    assert read_table(path).columns["text"] == [text]
    for chunk in read_chunks(path, 1):
        assert (chunk.columns["text"], csv.field_size_limit()) == ([text], limit)


def test_suffixes_may_be_in_capitals(tmp_path: Path) -> None:
    rows = [{"text": "a, b", "label": "c"}]
    write_csv(tmp_path / "a.tsv", rows).rename(tmp_path / "a.TSV")
    plain = write_csv(tmp_path / "a.csv", rows)
    (tmp_path / "a.CSV.GZ").write_bytes(gzip.compress(plain.read_bytes()))
    for name in ("a.TSV", "a.CSV.GZ"):
        assert read_table(tmp_path / name).columns == {"text": ["a, b"], "label": ["c"]}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt", "a.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf16_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    data = ("" if encoding == "utf-16" else "\ufeff").encode(encoding) + "text,label\nhello,a\n".encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(DataError, match=rf"{name} is UTF-16: expected UTF-8. Save the file as UTF-8"):
        read_table(tmp_path / name)


def test_names_of_columns_are_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,thé\nhello,a\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.csv, line 1, the column's name 'th\\udce9': broken UTF-8 at character 3"):
        read_table(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n{"thé": "a"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"a.jsonl, line 2, the column's name 'th\\udce9': broken UTF-8"):
        read_table(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("line", "reason"),
    [("[" * 100_000, "brackets are nested too deeply"), ('{"a": ' + "7" * 5000 + "}", "Exceeds the limit .*digits")],
)
def test_json_that_python_cannot_hold_is_named_by_its_line(tmp_path: Path, name: str, line: str, reason: str) -> None:
    for before in ("", '{"text": "a"}\n'):
        (tmp_path / name).write_text(before + line + "\n")
        with pytest.raises(DataError, match=rf"{name}, line {1 + bool(before)}: JSON that cannot be read \({reason}"):
            read_table(tmp_path / name)


# Labels and targets


def named(names: tuple[str, ...], values: list[Any]) -> Labels:
    return find_labels(Table("t", {"label": values}, class_names={"label": names}), "label")


@pytest.mark.parametrize(
    ("values", "found"),
    [([0, 1, 2], (0, 1, 2, None)), ([1, 3, 2], (None, 0, 1, 2)), ([0, 1], (0, 1, 2, None)), ([3, 1], (None, 0, 1, 2))],
    ids=["ids", "names", "some ids", "some names"],
)
def test_a_number_means_the_same_in_every_form(values: list[int], found: tuple[int | None, ...]) -> None:
    for form in (int, float, str):
        labels = named(("1", "2", "3"), [form(value) for value in values])
        for number, place in enumerate(found):
            assert [labels.find(number), labels.find(float(number)), labels.find(str(number))] == [place] * 3


def test_numbers_that_may_be_ids_or_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"t, column 'label': the numbers 1, 2 may be ids or names, as .* named 1, 2, 3"
    ):
        named(("1", "2", "3"), [2, 1, 1])
    given = find_labels(Table("t", {"label": [2, 1]}), "label", ["1", "2", "3"])
    assert [given.find(value) for value in (1, 2.0, "3", 0)] == [0, 1, 2, None]
    for names in (("0", "1", "2"), ("a", "2024", "b")):  # every id is clear
        assert [named(names, [1, 0]).find(value) for value in (0, 1.0, "2")] == [0, 1, 2]
    assert named(("a", "2024", "b"), [1, 0]).find(2024) == 1


def test_truth_values_are_names() -> None:
    table = Table("t", {"label": [True, False, "True"]})
    for given in (["False", "True"], None):
        assert find_labels(table, "label", given).encode(table, "label") == [1, 0, 1]
    assert named(("False", "True"), [True, False]).find(True) == 1


def test_names_with_a_decimal_point_are_no_ids() -> None:
    labels = find_labels(Table("t", {"label": [1, 2]}), "label", ["1.0", "2.0"])
    assert (labels.find(1), labels.find("1.0")) == (None, 0)
    assert labels.explain(1) == "unseen label 1. Did you mean '1.0'? Classes of task.labels: 1.0, 2.0."


def regression(tmp_path: Path, targets: list[Any]) -> TextRegression:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": target} for target in targets])
    return TextRegression.plan(RegressionSettings(data=str(path)), read_table(path))


@pytest.mark.parametrize("target", [10**400, -(10**400), math.inf, math.nan])
def test_a_target_that_is_no_number_of_the_machine_is_named(tmp_path: Path, target: float) -> None:
    with pytest.raises(DataError, match="line 2, column 'label': expected a finite number, but got") as error:
        regression(tmp_path, [1, target])
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("targets", [[1e308, -1e308, 1.7e308], [1.0, 2.0, -1e200]])
def test_targets_without_a_finite_scale_are_refused(tmp_path: Path, targets: list[float]) -> None:
    with pytest.raises(DataError, match=r"line 3, .*too far apart .*farthest from 0. Scale the targets") as error:
        regression(tmp_path, targets)
    assert repr(targets[-1]) in str(error.value)
    assert regression(tmp_path, [3, 3]).deviation == 1.0


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("key", ["epochs", "learning_rate", "weight_decay", "loss.gamma", "loss.dice"])
def test_endless_rates_and_weights_are_refused(key: str, value: float) -> None:
    training: dict[str, Any] = {key: value}
    if key.startswith("loss."):
        training = {"loss": {"kind": "focal", key.removeprefix("loss."): value}}
    with pytest.raises(RecipeError, match=rf"{key}.*finite number"):
        parse_recipe({"backbone": "none", "task": {"kind": "text-classification"}, "training": training}, "test")
