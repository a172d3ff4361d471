"""Registries: an outsider's method and gate, with one call each, do all that the built-in ones do."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from law import METHODS, attached, far, wake
from pelton import (
    FixedGate,
    LoRA,
    MLPGate,
    PeltonConfig,
    ScalarGate,
    gate_penalty,
    record_gates,
    register_gate,
    register_method,
    set_methods,
)
from pelton.errors import SpecError, UnknownArgument, UnknownName
from pelton.gates import GATES, DynamicGateSpec, Gate, GateSpec, Place, StaticGate
from pelton.gates.pooling import masked_mean
from pelton.methods import LINEAR_SITES, MethodSpec, Part, Shape
from pelton.methods import METHODS as KINDS
from pelton.registry import Registry, Spec, require
from zoo import ARCHS


@dataclasses.dataclass(frozen=True)
class SSF(MethodSpec):
    """Scale and shift of features (Lian et al. 2022, arXiv 2210.08823): y = h + g · ((s − 1) ⊙ h + t)."""

    kind: ClassVar[str] = "ssf"
    foldable: ClassVar[bool] = True

    std: float = 0.0
    sites: tuple[str, ...] = ("ffn.out",)
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.std >= 0, "std >= 0", std=self.std)

    def build(self, shape: Shape) -> SSFPart:
        return SSFPart(self, shape)


class SSFPart(Part):
    def __init__(self, spec: SSF, shape: Shape) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape.out_features) + spec.std * torch.randn(shape.out_features))
        self.shift = nn.Parameter(torch.zeros(shape.out_features))

    def forward(self, y: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        return y + (gate * ((self.scale - 1) * y.float() + self.shift)).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor | None]:
        scale = 1 + gate * (self.scale - 1)
        assert bias is not None
        return weight * scale[:, None], bias * scale + gate * self.shift


@dataclasses.dataclass(frozen=True)
class NormGate(DynamicGateSpec):
    """A gate from the mean square of the input: g = sigmoid(w · mean x² + b)."""

    kind: ClassVar[str] = "norm"

    start: float = 0.0

    def build(self, place: Place) -> NormGateModule:
        return NormGateModule(self, place)


class NormGateModule(Gate):
    def __init__(self, spec: NormGate, place: Place) -> None:
        super().__init__(place.methods, spec.resolve(place))
        self.weight = nn.Parameter(torch.ones(len(place.methods)))
        self.bias = nn.Parameter(torch.full((len(place.methods),), spec.start))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        size = x.float().square().mean(-1, keepdim=True)
        size = masked_mean(size, mask) if self.granularity == "example" else size
        return (self.weight * size + self.bias).sigmoid()


@dataclasses.dataclass(frozen=True)
class SharedGate(GateSpec):
    """One learned value for all methods of a block."""

    kind: ClassVar[str] = "shared"
    static: ClassVar[bool] = True

    def build(self, place: Place) -> SharedGateModule:
        return SharedGateModule(place)


class SharedGateModule(StaticGate):
    def __init__(self, place: Place) -> None:
        super().__init__(place.methods, "static")
        self.theta = nn.Parameter(torch.zeros(1))

    def values(self) -> Tensor:
        return self.theta.sigmoid().expand(len(self.methods))


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register_method(SSF)
    register_gate(NormGate)
    register_gate(SharedGate)
    yield
    KINDS.unregister("ssf")
    GATES.unregister("norm")
    GATES.unregister("shared")


def test_outsiders_are_known_by_name() -> None:
    config = PeltonConfig(methods=["ssf", "lora"], gate="norm")
    assert config.specs == (SSF(), LoRA())
    assert config.gate == NormGate()
    assert "ssf" in list(KINDS)
    assert PeltonConfig(methods=[{"kind": "ssf", "std": 0.1}]).specs == (SSF(std=0.1),)
    with pytest.raises(UnknownName, match=r"Unknown method 'sfs'. Did you mean 'ssf'"):
        PeltonConfig(methods=["sfs"])
    with pytest.raises(UnknownName, match=r"Unknown key of 'ssf' 'stdd'. Did you mean 'std'"):
        PeltonConfig(methods=[{"kind": "ssf", "stdd": 0.1}])
    with pytest.raises(SpecError, match="`std >= 0` must hold, but got std=-1"):
        SSF(std=-1)


def test_outsiders_arguments_are_checked_too() -> None:
    with pytest.raises(UnknownArgument, match=r"Unknown argument of SSF 'stdd'. Did you mean 'std'\? Known: layers, "):
        SSF(stdd=0.1)  # type: ignore[call-arg]
    with pytest.raises(UnknownArgument, match=r"'target_modules'. Did you mean 'sites'\? The sites of 'ssf' are"):
        SSF(target_modules=["query"])  # type: ignore[call-arg]
    with pytest.raises(SpecError, match=r"`std is a finite number` must hold, but got std='0'. Write std=0"):
        SSF(std="0")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="`start is a finite number` must hold, but got start=None"):
        NormGate(start=None)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="`entropy is a finite number` must hold, but got entropy=inf"):
        NormGate(entropy=math.inf)
    assert SSF(sites=["ffn.in"]).sites == ("ffn.in",)  # type: ignore[arg-type]


def test_annotations_that_cannot_be_read_are_not_held_against_values() -> None:
    @dataclasses.dataclass(frozen=True)
    class Local(MethodSpec):
        kind: ClassVar[str] = "local"

        size: Sizes = 3  # type: ignore[name-defined]  # noqa: F821 - as a name for type checkers alone
        sites: tuple[str, ...] = ("ffn.out",)
        layers: tuple[int, ...] | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            require(self.size > 0, "size > 0", size=self.size)

    assert Local(sites=["ffn.in"]).sites == ("ffn.in",)  # type: ignore[arg-type]
    with pytest.raises(UnknownArgument, match=r"Unknown argument of Local 'sise'. Did you mean 'size'"):
        Local(sise=3)  # type: ignore[call-arg]
    with pytest.raises(SpecError, match=r"'local' cannot be made from \{'size': '3'\}: '>' not supported"):
        Local.from_dict({"kind": "local", "size": "3"})


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "gpt2"])
def test_outsiders_train_save_and_load(name: str, tmp_path: Path) -> None:
    arch = ARCHS[name]
    methods = [SSF(sites=("ffn.out", "attn.q")), LoRA(rank=2)]
    config = PeltonConfig(methods=methods, gate=NormGate(start=-1.0, entropy=0.1))
    model = get_peft_model(arch.build(), config).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # LoRA's A has a gradient once B is not zero
        optimizer.zero_grad()
        with gate_penalty(model) as penalties:
            loss = arch.run(model, arch.inputs()).square().sum()
        (loss + penalties()).backward()
        optimizer.step()
    for key, parameter in model.named_parameters():
        assert (".pelton." in key) == (not torch.equal(parameter, before[key])), key
    model.eval().save_pretrained(tmp_path)
    same = PeftModel.from_pretrained(arch.build(), tmp_path, adapter_name="other").eval()
    assert same.peft_config["other"].specs == config.specs
    assert same.peft_config["other"].gate == config.gate
    with torch.no_grad():
        out = arch.run(model, arch.inputs())
        assert torch.equal(out, arch.run(same, arch.inputs()))
        assert far(out, arch.run(arch.build(), arch.inputs())) > 1e-4
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(out, arch.run(twin, arch.inputs()))


def test_outsiders_obey_the_laws() -> None:
    arch = ARCHS["bert"]
    inputs = arch.inputs()
    with torch.no_grad():
        plain = arch.run(arch.build(), inputs)
        closed = attached(arch, FixedGate(0.0), [SSF(sites=LINEAR_SITES)])
        assert far(plain, arch.run(closed, inputs)) <= 1e-6
        opened = attached(arch, FixedGate(1.0), [SSF(sites=LINEAR_SITES)])
        assert far(plain, arch.run(opened, inputs)) > 1e-3
        model = attached(arch, NormGate(), [SSF(), METHODS["prefix-kv"], METHODS["lora"]])
        batch = arch.run(model, inputs)
        alone = torch.cat([arch.run(model, {k: v[i : i + 1] for k, v in inputs.items()}) for i in range(3)])
        assert far(batch, alone) <= 1e-6
        set_methods(model, ssf=False, lora=False, prefix=False)
        assert far(plain, arch.run(model, inputs)) <= 1e-6


def test_outsiders_fold() -> None:
    arch = ARCHS["bert"]
    model = attached(arch, SharedGate(), [SSF(), METHODS["lora"]], std=0.1)
    with torch.no_grad():
        out = arch.run(model, arch.inputs())
        assert far(out, arch.run(model.merge_and_unload(), arch.inputs())) <= 1e-5


def test_outsiders_are_recorded() -> None:
    arch = ARCHS["bert"]
    model = wake(attached(arch, NormGate(), [SSF(), LoRA()]))
    with torch.no_grad(), record_gates(model) as log:
        arch.run(model, arch.inputs())
    frame = log.to_frame()
    assert set(frame.method) == {"ssf", "lora"}
    assert len(frame) == 2 * 2 * 3
    causal = attached(ARCHS["llama"], NormGate(), [SSF()])
    assert {m.granularity for m in causal.modules() if isinstance(m, Gate)} == {"token"}


# What cannot be registered


def _method(name: str, kind: Any = "mine", base: Any = MethodSpec, frozen: bool = True) -> Any:
    made = type(name, (base,), {"kind": kind, "__annotations__": {}, "__module__": __name__, "__doc__": name})
    return dataclasses.dataclass(frozen=True)(made) if frozen else made


class NotASpec:
    """A class that is of no family."""

    kind = "mine"


REFUSED: list[tuple[Registry[Any], Any, str]] = [
    (KINDS, LoRA, r"A method named 'lora' exists already \(pelton.methods.lora.LoRA\). Choose another kind"),
    (KINDS, SSF, r"A method named 'ssf' exists already \(.*SSF\)"),
    (GATES, MLPGate, r"A gate named 'mlp' exists already"),
    (KINDS, _method("Mine", kind="lora"), r"A method named 'lora' exists already"),
    (KINDS, ScalarGate, r"A method must subclass MethodSpec, but got .*ScalarGate"),
    (GATES, LoRA, r"A gate must subclass GateSpec, but got .*LoRA"),
    (KINDS, NotASpec, r"A method must subclass MethodSpec, but got .*NotASpec"),
    (KINDS, LoRA(), r"A method must subclass MethodSpec, but got LoRA\("),
    (KINDS, "lora", r"A method must subclass MethodSpec, but got 'lora'"),
    (KINDS, None, r"A method must subclass MethodSpec, but got None"),
    (KINDS, _method("Mine", kind=3), r"Mine.kind must be a name such as 'lora', but got 3"),
    (KINDS, _method("Mine", kind="my method"), r"must be a name such as 'lora', but got 'my method'"),
    (KINDS, _method("Mine", kind=""), r"must be a name such as 'lora', but got ''"),
    (KINDS, _method("Mine", frozen=False), r"Mine must be decorated with @dataclass\(frozen=True\)"),
    (GATES, _method("Mine", base=GateSpec, frozen=False), r"Mine must be decorated with @dataclass"),
]


@pytest.mark.parametrize(("registry", "spec", "message"), REFUSED, ids=[m[:40] for _, _, m in REFUSED])
def test_what_does_not_fit_is_not_registered(registry: Registry[Any], spec: Any, message: str) -> None:
    before = list(registry)
    with pytest.raises(SpecError, match=message):
        registry.register(spec)
    assert list(registry) == before


def test_a_thawed_dataclass_is_not_registered() -> None:
    with pytest.raises(TypeError, match="non-frozen"):  # Python refuses it before Pelton has to

        @dataclasses.dataclass
        class Thawed(MethodSpec):
            kind: ClassVar[str] = "thawed"


def test_a_kind_can_be_taken_out_and_put_back() -> None:
    GATES.unregister("norm")
    with pytest.raises(UnknownName, match="Unknown gate 'norm'"):
        PeltonConfig(gate="norm")
    with pytest.raises(UnknownName, match="Unknown gate 'norm'"):
        GATES.unregister("norm")
    assert register_gate(NormGate) is NormGate  # it is a decorator
    assert PeltonConfig(gate="norm").gate == NormGate()


@pytest.mark.parametrize("kind", [*KINDS, "ssf"])
def test_specs_survive_their_json(kind: str) -> None:
    for spec in (KINDS[kind](), *(s for s in METHODS.values() if s.kind == kind)):
        assert KINDS.parse(spec.to_dict()) == spec
        assert spec.to_dict()["kind"] == kind


GATE_SPECS: list[Spec] = [
    *(GATES[kind]() for kind in GATES),
    MLPGate(hidden_size=3, activation="sigmoid", l1=0.5, granularity="token"),
    ScalarGate(init=0.01),
    FixedGate({"lora": 1.0, "prefix": 0.2}),
    FixedGate(stages={"pretrain": 0.01, "finetune": {"lora": 0.5}}, stage="finetune"),
    NormGate(start=2.0, balance=0.1),
]


@pytest.mark.parametrize("spec", GATE_SPECS, ids=lambda s: s.kind)
def test_gate_specs_survive_their_json(spec: Any) -> None:
    assert GATES.parse(json.loads(json.dumps(spec.to_dict()))) == spec
