"""Gates: their formulas, their shapes, pooling under every form of mask, fixed ratios, and penalties."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from typing import Any, cast

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from law import METHODS, attached, far, together, wake
from pelton import FixedGate, FrozenGate, LinearGate, MLPGate, PeltonConfig, ScalarGate, record_gates, set_stage
from pelton.errors import AdapterError, SpecError, UnknownName
from pelton.gates import Gate, GateSpec, Place
from pelton.gates.penalties import penalty
from pelton.gates.pooling import masked_mean, padding_of
from pelton.gates.static import FixedGateModule
from pelton.tuner import GatedBlock
from zoo import ARCHS, Arch

B, T, D, M = 3, 5, 4, 2
PLACE = Place(("lora", "prefix"), D, causal=False)
CAUSAL = Place(("lora", "prefix"), D, causal=True)
LENGTHS = (5, 3, 1)


def _x() -> Tensor:
    return torch.randn(B, T, D)


def _mask() -> Tensor:
    """Row 1 is padded on the right, row 2 on the left."""
    mask = torch.zeros(B, T, dtype=torch.long)
    mask[0] = 1
    mask[1, : LENGTHS[1]] = 1
    mask[2, T - LENGTHS[2] :] = 1
    return mask


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def _affine(layer: nn.Linear, x: list[float]) -> list[float]:
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def _mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _mlp(gate: Any, x: list[float], spec: MLPGate) -> list[float]:
    logits = _affine(gate.out, [max(0.0, h) for h in _affine(gate.hidden, x)])
    if spec.activation == "sigmoid":
        return [_sigmoid(z / spec.temperature) for z in logits]
    powers = [math.exp(z / spec.temperature) for z in logits]
    return [p / sum(powers) for p in powers]


MLPS = [
    MLPGate(hidden_size=6, activation=activation, temperature=temperature, granularity=granularity, init_std=1.0)
    for activation in ("softmax", "sigmoid")
    for temperature in (1.0, 0.25, 3.0)
    for granularity in ("example", "token")
]


@pytest.mark.parametrize("spec", MLPS, ids=lambda s: f"{s.activation}-{s.temperature}-{s.granularity}")
def test_mlp_gate_is_its_formula(spec: MLPGate) -> None:
    gate, x, mask = spec.build(PLACE), _x(), _mask()
    values = gate(x, mask)
    for b in range(B):
        tokens = [x[b, t].tolist() for t in range(T) if mask[b, t]]
        if spec.granularity == "example":
            expected = [_mlp(gate, _mean(tokens), spec)]
            found = values[b]
        else:
            expected = [_mlp(gate, token, spec) for token in tokens]
            found = values[b][mask[b].bool()]
        assert far(found, torch.tensor(expected)) <= 1e-6


@pytest.mark.parametrize("granularity", ["example", "token"])
def test_linear_gate_is_the_mean_of_sigmoids(granularity: Any) -> None:
    gate, x, mask = LinearGate(granularity=granularity).build(PLACE), _x(), _mask()
    nn.init.normal_(gate.out.weight)
    nn.init.normal_(gate.out.bias)
    values = gate(x, mask)
    for b in range(B):
        each = [[_sigmoid(z) for z in _affine(gate.out, x[b, t].tolist())] for t in range(T) if mask[b, t]]
        expected, found = ([_mean(each)], values[b]) if granularity == "example" else (each, values[b][mask[b].bool()])
        assert far(found, torch.tensor(expected)) <= 1e-6


DYNAMIC: list[Any] = [MLPGate, LinearGate]
SHAPES = [
    *[(gate, granularity, PLACE, (B, 1, M)) for gate in DYNAMIC for granularity in ("auto", "example")],
    *[(gate, granularity, CAUSAL, (B, T, M)) for gate in DYNAMIC for granularity in ("auto", "token")],
    *[(gate, "token", PLACE, (B, T, M)) for gate in DYNAMIC],
    (ScalarGate, None, PLACE, (1, 1, M)),
    (ScalarGate, None, CAUSAL, (1, 1, M)),
    (FixedGate, None, CAUSAL, (1, 1, M)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "granularity", "place", "shape"), SHAPES)
def test_values_have_the_shape_of_their_granularity(
    kind: Any, granularity: str | None, place: Place, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    gate = kind(**({} if granularity is None else {"granularity": granularity})).build(place)
    values = gate(_x().to(dtype), _mask())
    assert values.shape == shape
    assert values.dtype == torch.float32
    assert ((values >= 0) & (values <= 1)).all()
    names = {1: "static", B: "example"}
    assert gate.granularity == ("token" if shape[1] > 1 else names[shape[0]])


@pytest.mark.parametrize("kind", DYNAMIC)
def test_pooled_gates_are_refused_in_causal_blocks(kind: Any) -> None:
    with pytest.raises(SpecError, match=r"granularity != 'example'.*causal=True.*sees later tokens"):
        kind(granularity="example").build(CAUSAL)


@pytest.mark.parametrize("init", [0.01, 0.3, 0.9])
def test_scalar_gate_starts_at_its_effective_weight(init: float) -> None:
    gate = ScalarGate(init=init).build(PLACE)
    assert gate(_x(), None).flatten().tolist() == pytest.approx([init] * M, abs=1e-7)
    with torch.no_grad():
        gate.theta.fill_(1.7)
    assert gate.values().tolist() == pytest.approx([_sigmoid(1.7)] * M, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_sigmoid_gate_starts_at_its_init(temperature: float) -> None:
    spec = MLPGate(activation="sigmoid", init=0.2, temperature=temperature, init_std=0.0)
    assert spec.build(PLACE)(_x(), None).flatten().tolist() == pytest.approx([0.2] * B * M, abs=1e-6)


def test_softmax_gate_starts_even() -> None:
    assert far(MLPGate(init_std=0.0).build(PLACE)(_x(), None), torch.full((B, 1, M), 1 / M)) <= 1e-6


# Pooling


def _causal(mask: Tensor) -> Tensor:
    """Who sees whom, [B, 1, T, T], as transformers makes it for decoders."""
    return mask[:, None, None].bool() & torch.ones(T, T).tril().bool()


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _window(mask: Tensor) -> Tensor:
    return _causal(mask) & torch.ones(T, T).triu(-1).bool()


FORMS = {
    "2d-long": lambda m: m,
    "2d-bool": lambda m: m.bool(),
    "2d-float": lambda m: m.float(),
    "4d-bool-row": lambda m: m.bool()[:, None, None],
    "4d-bool-full": lambda m: m.bool()[:, None, None].expand(B, 1, T, T),
    "4d-bool-causal": _causal,
    "4d-bool-window": _window,
    "4d-long": lambda m: _causal(m).long(),
    "4d-additive-row": lambda m: _additive(m.bool()[:, None, None], torch.float32),
    "4d-additive-causal": lambda m: _additive(_causal(m), torch.float32),
    "4d-additive-bfloat16": lambda m: _additive(_causal(m), torch.bfloat16),
    "4d-additive-float16": lambda m: _additive(_window(m), torch.float16),
    "4d-additive-inf": lambda m: torch.zeros(B, 1, T, T).masked_fill(~_causal(m), -torch.inf),
    "4d-additive-zero": lambda m: _additive(_causal(m), torch.float32) * 1.0,
    "4d-heads": lambda m: _causal(m).expand(B, 4, T, T),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_mask_says_what_is_padding(form: str) -> None:
    found = padding_of(FORMS[form](_mask()), T)
    assert found is not None
    assert torch.equal(found.long().expand(B, T), _mask())


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_without_padding_is_like_none(form: str) -> None:
    found, x = padding_of(FORMS[form](torch.ones(B, T, dtype=torch.long)), T), _x()
    assert far(masked_mean(x, found), masked_mean(x, None)) <= 1e-6


def test_no_mask_and_masks_over_a_cache_mean_no_padding() -> None:
    assert padding_of(None, T) is None
    assert padding_of(torch.ones(B, 1, 1, T + 3).bool(), 1) is None


def test_masked_mean_is_the_mean_of_what_is_not_masked() -> None:
    x, mask = _x(), _mask()
    expected = torch.stack([x[b][mask[b].bool()].mean(0) for b in range(B)])[:, None]
    assert far(expected, masked_mean(x, mask)) <= 1e-6
    assert torch.equal(masked_mean(x, mask), masked_mean(torch.where(mask[..., None] == 1, x, 1e4), mask))
    assert far(x.mean(1, keepdim=True), masked_mean(x, None)) <= 1e-6
    assert far(masked_mean(x, mask[:1]), masked_mean(x, None)) <= 1e-6  # one row for the whole batch
    assert torch.equal(masked_mean(x, mask * 0), torch.zeros(B, 1, D))  # nothing to see: zero, not a division by it
    assert masked_mean(x.bfloat16(), mask).dtype == torch.float32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "distilbert", "t5", "bart"])
def test_gates_read_the_mask_that_the_backbone_was_given(name: str, attention: str) -> None:
    """What transformers makes of a 2D mask, whichever its form, gives the values of the unpadded rows."""
    arch, inputs = ARCHS[name], ARCHS[name].inputs()
    model = attached(arch)
    model.get_base_model().set_attn_implementation(attention)
    with torch.no_grad(), record_gates(model) as batch:
        arch.run(model, inputs)
    frame = batch.to_frame()
    for row, count in enumerate(inputs["attention_mask"].sum(1).tolist()):
        short = {k: v[row : row + 1] for k, v in inputs.items()}
        short |= {k: short[k][:, :count] for k in ("input_ids", "attention_mask")}
        with torch.no_grad(), record_gates(model) as alone:
            arch.run(model, short)
        mine = frame[frame.example == row].reset_index(drop=True)
        assert mine.value.tolist() == pytest.approx(alone.to_frame().value.tolist(), abs=1e-6)


# Granularity in models

GRANULARITIES = [
    ("bert", "auto", {"example"}),
    ("bert", "example", {"example"}),
    ("bert", "token", {"token"}),
    ("modernbert", "token", {"token"}),
    ("deberta-v2", "token", {"token"}),
    ("gpt2", "auto", {"token"}),
    ("llama", "auto", {"token"}),
    ("llama", "token", {"token"}),
    ("t5", "auto", {"example", "token"}),  # encoder and decoder
    ("bart", "auto", {"example", "token"}),
    ("bart", "token", {"token"}),
    ("whisper", "auto", {"example", "token"}),
    ("clip", "auto", {"example", "token"}),  # the text tower is causal
    ("vit", "token", {"token"}),
    ("swin", "auto", {"example"}),
    ("swin", "example", {"example"}),
]


@pytest.mark.parametrize("kind", DYNAMIC)
@pytest.mark.parametrize(("name", "granularity", "expected"), GRANULARITIES)
def test_granularity_in_models(name: str, granularity: Any, expected: set[str], kind: Any) -> None:
    arch = ARCHS[name]
    model = attached(arch, kind(granularity=granularity), [METHODS["lora"], METHODS["bottleneck"]])
    gates = [m for m in model.modules() if isinstance(m, Gate)]
    assert {gate.granularity for gate in gates} == expected
    seen: list[tuple[int, ...]] = []
    for gate in gates:
        gate.register_forward_hook(lambda g, a, y: seen.append((g.granularity, tuple(a[0].shape), tuple(y.shape))))
    with torch.no_grad():
        arch.run(model, arch.inputs())
    assert seen
    for held, (rows, tokens, _), shape in seen:
        assert shape == (rows, tokens if held == "token" else 1, 2)


# Fixed ratios


def _fixed(model: nn.Module) -> list[FixedGateModule]:
    return [m for m in model.modules() if isinstance(m, FixedGateModule)]


RATIOS: list[tuple[FixedGate, list[float]]] = [
    (FixedGate(), [1.0, 1.0]),
    (FixedGate(0.5), [0.5, 0.5]),
    (FixedGate(0), [0.0, 0.0]),
    (FixedGate({"lora": 1.0, "bottleneck": 0.2}), [1.0, 0.2]),
    (FixedGate({"bottleneck": 0.2, "lora": 1.0, "prefix": 0.7}), [1.0, 0.2]),
    (FixedGate(stages={"pretrain": 0.01, "finetune": 0.1}), [0.01, 0.01]),
    (FixedGate(stages={"pretrain": 0.01, "finetune": 0.1}, stage="finetune"), [0.1, 0.1]),
    (FixedGate(stages={"a": {"lora": 0.3, "bottleneck": 0.0}, "b": 1.0}), [0.3, 0.0]),
]


@pytest.mark.filterwarnings("ignore:FixedGate holds every gate at 0")
@pytest.mark.parametrize(("spec", "expected"), RATIOS)
def test_fixed_ratios_are_buffers_that_training_leaves_alone(spec: FixedGate, expected: list[float]) -> None:
    arch = ARCHS["bert"]
    config = PeltonConfig(methods=[METHODS["lora"], METHODS["bottleneck"]], gate=spec)
    model = get_peft_model(arch.build(), config).train()
    before = [{k: v.clone() for k, v in gate.state_dict().items()} for gate in _fixed(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        arch.run(model, arch.inputs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(before) == 2
    for gate, held in zip(_fixed(model), before, strict=True):
        assert not list(gate.parameters())
        assert set(dict(gate.named_buffers())) == set(held) == {"value", "ratios"}
        assert not any(b.requires_grad for b in gate.buffers())
        assert all(torch.equal(v, held[k]) for k, v in gate.state_dict().items())
        assert gate(_x(), None).flatten().tolist() == pytest.approx(expected, abs=1e-7)


SHUT = [(FixedGate(0.0), True), (FixedGate({"lora": 0, "bottleneck": 0.0}), True)]
OPEN = [
    FixedGate({"lora": 1.0, "bottleneck": 0.0}),
    FixedGate(stages={"pretrain": 0.0, "finetune": 0.1}),  # a stage is shut on purpose, and another one opens it
    FrozenGate(values={"0": {"lora": 0.0, "bottleneck": 0.0}, "1": {"lora": 0.0, "bottleneck": 0.0}}),
    ScalarGate(0.01),
]


@pytest.mark.parametrize(("spec", "warns"), [*SHUT, *[(spec, False) for spec in OPEN]])
def test_training_behind_shut_gates_warns_once(spec: Any, warns: bool) -> None:
    config = PeltonConfig(methods=[METHODS["lora"], METHODS["bottleneck"]], gate=spec)
    model = get_peft_model(ARCHS["bert"].build().eval(), config)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        model.eval()
        assert not seen
        for _ in range(3):
            model.train()
    assert [w.category for w in seen] == [UserWarning] * warns
    assert all(re.search(r"every gate at 0.*no gradient\. Give it ratios above 0", str(w.message)) for w in seen)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        twin.train()
        twin.train()
    assert len(seen) == 2 * warns  # of each block once, where all filters are off


def test_behind_shut_gates_every_gradient_is_zero() -> None:
    arch = ARCHS["bert"]
    with pytest.warns(UserWarning, match="no gradient"):
        model = wake(get_peft_model(arch.build().eval(), PeltonConfig(gate=FixedGate(0.0)))).train()
    arch.run(model, arch.inputs()).square().sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if ".pelton.methods." in name]
    assert gradients
    assert all(g is not None and not g.any() for g in gradients)


def test_stages_enter_in_every_block() -> None:
    model = attached(ARCHS["bert"], FixedGate(stages={"pretrain": 0.01, "finetune": 0.1}), [METHODS["lora"]])
    set_stage(model, "finetune")
    assert [g.values().tolist() for g in _fixed(model)] == [pytest.approx([0.1])] * 2
    with pytest.raises(UnknownName, match="Did you mean 'pretrain'"):
        set_stage(model, "pretrian")
    assert [g.values().tolist() for g in _fixed(model)] == [pytest.approx([0.1])] * 2


def test_stages_need_a_gate_that_has_them() -> None:
    with pytest.raises(AdapterError, match="No gate of this model has stages"):
        set_stage(attached(ARCHS["bert"], FixedGate(0.3), [METHODS["lora"]]), "finetune")


# Penalties


def _reference(spec: Any, values: list[list[float]]) -> float:
    """The weighted penalties of one block from the values of its examples or tokens, by the formulas."""
    shares = [[v / sum(row) for v in row] for row in values]
    entropy = _mean([[-sum(p * math.log(p) for p in row)] for row in shares])[0]
    l1 = _mean([[sum(row) / len(row)] for row in values])[0]
    mean = _mean(shares)
    balance = sum(p * math.log(len(mean) * p) for p in mean)
    return float(spec.entropy * entropy + spec.l1 * l1 + spec.balance * balance)


WEIGHTS = [{"entropy": 1.0}, {"l1": 1.0}, {"balance": 1.0}, {"entropy": 0.3, "l1": 2.0, "balance": 0.7}]


def _sigmoid_gate(weights: dict[str, float], **more: Any) -> MLPGate:
    return MLPGate(hidden_size=8, activation="sigmoid", init_std=0.5, **weights, **more)


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: "+".join(w))
def test_penalties_are_their_formulas(weights: dict[str, float]) -> None:
    spec, mask = _sigmoid_gate(weights), _mask()
    example, token = torch.rand(B, 1, M), torch.rand(B, T, M)
    kept = token[mask.bool()].tolist()
    assert float(penalty(spec, [(example, mask)])) == pytest.approx(_reference(spec, example[:, 0].tolist()), abs=1e-6)
    assert float(penalty(spec, [(token, mask)])) == pytest.approx(_reference(spec, kept), abs=1e-6)
    blocks = (_reference(spec, example[:, 0].tolist()) + _reference(spec, kept)) / 2
    assert float(penalty(spec, [(example, mask), (token, mask)])) == pytest.approx(blocks, abs=1e-6)
    assert float(penalty(spec, [(token, None)])) == pytest.approx(
        _reference(spec, token.flatten(0, 1).tolist()), abs=1e-6
    )


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: "+".join(w))
def test_padding_does_not_count(weights: dict[str, float]) -> None:
    spec, mask, values = _sigmoid_gate(weights), _mask(), torch.rand(B, T, M)
    other = torch.where(mask[..., None] == 1, values, torch.rand(B, T, M))
    assert torch.equal(penalty(spec, [(values, mask)]), penalty(spec, [(other, mask)]))


def test_penalties_are_at_their_bounds_where_they_should_be() -> None:
    even, one = torch.full((B, 1, M), 0.5), torch.tensor([1.0, 0.0]).expand(B, 1, M)
    assert float(penalty(MLPGate(entropy=1.0), [(even, None)])) == pytest.approx(math.log(M))
    assert float(penalty(MLPGate(entropy=1.0), [(one, None)])) == pytest.approx(0.0, abs=1e-6)
    assert float(penalty(MLPGate(balance=1.0), [(even, None)])) == pytest.approx(0.0, abs=1e-6)
    assert float(penalty(MLPGate(balance=1.0), [(one, None)])) == pytest.approx(math.log(M))
    turns = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # each example its own winner: balanced all the same
    assert float(penalty(MLPGate(balance=1.0), [(turns, None)])) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_shut_gates_have_finite_penalties_and_gradients(activation: Any) -> None:
    values = torch.zeros(B, 1, M, requires_grad=True)
    spec = MLPGate(activation=activation, entropy=1.0, balance=1.0)
    total = penalty(spec, [(values, None)])
    total.backward()
    assert torch.isfinite(total)
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()


def _labelled(arch: Arch) -> dict[str, Tensor]:
    inputs = arch.inputs()
    labels = inputs["input_ids"] if arch.causal else torch.tensor([0, 1, 0])
    return inputs | {"labels": labels}


def _with_penalty(arch: Arch, weights: dict[str, float], **more: Any) -> Any:
    model = attached(arch, _sigmoid_gate(weights, **more), together(arch))
    for module in model.modules():  # training and evaluation may differ by the penalty only
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _loss(model: Any, inputs: dict[str, Tensor]) -> float:
    return float(model(**inputs).loss.item())


PENALISED = [("bert", "example"), ("bert", "token"), ("llama", "token"), ("albert", "example"), ("deberta-v2", "token")]


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: "+".join(w))
@pytest.mark.parametrize(("name", "granularity"), PENALISED)
def test_penalties_join_the_loss_in_training_only(name: str, granularity: Any, weights: dict[str, float]) -> None:
    arch = ARCHS[name]
    model, inputs = _with_penalty(arch, weights, granularity=granularity), _labelled(arch)
    kept: list[Tensor] = []
    gates = [m for m in model.modules() if isinstance(m, Gate)]
    handles = [g.register_forward_hook(lambda _, a, y: kept.append(y.detach())) for g in gates]
    plain = _loss(model.eval(), inputs)
    for handle in handles:
        handle.remove()
    mask = inputs["attention_mask"].bool()
    blocks = [v[:, 0] if v.shape[1] == 1 else v[mask] for v in kept]
    expected = sum(_reference(_gate_spec(model), v.tolist()) for v in blocks) / len(blocks)
    assert _loss(model.train(), inputs) - plain == pytest.approx(expected, abs=2e-5)
    assert model(**inputs)["loss"].item() - plain == pytest.approx(expected, abs=2e-5)
    unlabelled = {k: v for k, v in inputs.items() if k != "labels"}
    with pytest.warns(UserWarning, match="no loss to add the gate penalties to"):
        assert model(**unlabelled).loss is None
    with model.disable_adapter():
        assert _loss(model, inputs) == pytest.approx(_loss(arch.build(), inputs), abs=2e-6)


def _gate_spec(model: Any) -> GateSpec:
    spec = model.peft_config["default"].gate_spec
    assert isinstance(spec, GateSpec)
    return spec


@pytest.mark.parametrize("task", [None, "SEQ_CLS", "FEATURE_EXTRACTION"])
def test_penalties_join_whoever_calls_the_backbone(task: str | None) -> None:
    """PEFT's wrappers call the tuner or the backbone, depending on the task."""
    arch, inputs = ARCHS["bert"], _labelled(ARCHS["bert"])
    model = get_peft_model(
        arch.build(), PeltonConfig(methods=together(arch), gate=MLPGate(entropy=3.0), task_type=task)
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    evaluated = _loss(model.eval(), inputs)
    for caller in (model, model.base_model, model.get_base_model()):
        assert _loss(caller.train(), inputs) - evaluated > 1
    before = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in arch.build().named_modules()}
    plain = model.unload()
    assert {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in plain.named_modules()} == before


def _gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_penalties_reach_the_gates_also_when_checkpointed(name: str) -> None:
    arch, weights = ARCHS[name], {"entropy": 1.0, "l1": 1.0, "balance": 1.0}
    inputs = _labelled(arch)
    without = _gradients(_with_penalty(arch, {}).train(), inputs)
    model = _with_penalty(arch, weights).train()
    penalised = _gradients(model, inputs)
    for key, grad in penalised.items():
        if ".gates." in key:
            assert far(grad, without[key]) > 1e-6, key
    model.config.use_cache = False
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    checkpointed = _gradients(model, inputs)
    assert checkpointed.keys() == penalised.keys()
    assert max(far(penalised[key], checkpointed[key]) for key in penalised) <= 1e-5


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # under no_grad
def test_penalties_under_reentrant_checkpoints_are_refused(name: str) -> None:
    arch = ARCHS[name]
    model = _with_penalty(arch, {"entropy": 1.0}).train()
    model.config.use_cache = False
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": True})
    model.get_base_model().enable_input_require_grads()
    with pytest.raises(AdapterError, match="'use_reentrant': False"):
        model(**_labelled(arch))
    with torch.no_grad():  # evaluation in training mode asks for no gradients
        assert torch.isfinite(model(**_labelled(arch)).loss)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_have_penalties_of_their_own(way: str) -> None:
    arch, inputs = ARCHS["bert"], _labelled(ARCHS["bert"])
    model = _with_penalty(arch, {"l1": 5.0})
    held = _loss(model.train(), inputs)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert _loss(twin, inputs) == held
    with torch.no_grad():
        for gate in (m for m in twin.modules() if isinstance(m, Gate)):
            cast(Any, gate).out.bias.fill_(-20)
    assert _loss(twin, inputs) - _loss(twin.eval(), inputs) == pytest.approx(0, abs=1e-5)
    assert _loss(model, inputs) == held


def test_a_failed_forward_leaves_no_values_behind() -> None:
    arch = ARCHS["bert"]
    model = _with_penalty(arch, {"l1": 1.0}).train()
    with pytest.raises(IndexError):
        model(**_labelled(arch) | {"labels": torch.tensor([0, 1, 9])})
    assert all(m.kept is None for m in model.modules() if isinstance(m, GatedBlock))


def test_penalties_of_the_active_adapter_only() -> None:
    arch, inputs = ARCHS["bert"], _labelled(ARCHS["bert"])
    model = _with_penalty(arch, {"entropy": 5.0})
    model.add_adapter("plain", PeltonConfig(methods=together(arch), gate=LinearGate()))
    with_penalty = _loss(model.train(), inputs) - _loss(model.eval(), inputs)
    model.set_adapter("plain")
    without = _loss(model.train(), inputs) - _loss(model.eval(), inputs)
    assert with_penalty > 0.1
    assert without == pytest.approx(0, abs=1e-6)
