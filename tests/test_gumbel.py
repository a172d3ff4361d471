"""The gate that chooses: its values, its noise, its sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from law import METHODS, attached, far, wake
from pelton import (
    IA3,
    BitFit,
    Bottleneck,
    FixedGate,
    GumbelGate,
    LoRA,
    PeltonConfig,
    Prefix,
    freeze_gates,
    record_gates,
    set_temperature,
)
from pelton.errors import AdapterError, SpecError
from pelton.gates import Place
from pelton.gates.gumbel import GumbelGateModule
from pelton.tuner import gated_blocks
from zoo import ARCHS

SIZED = [
    LoRA(rank=4, alpha=12, sites=("attn.q", "ffn.in")),
    Bottleneck(bottleneck_size=6, activation="gelu"),
    Prefix(prefix_length=5, init_std=1.0),
    IA3(),
]
SIZES = {"lora": (1, 2, 4), "bottleneck": (3, 6), "prefix": (2, 5)}
BY_METHOD = GumbelGate(sizes=SIZES, choose="method")


def module(spec: GumbelGate, *kinds: str) -> GumbelGateModule:
    return spec.build(Place(kinds, 8, causal=False))


X = torch.zeros(4, 3, 8)


def test_in_evaluation_one_candidate_is_open() -> None:
    gate = module(GumbelGate(sizes={"lora": (1, 3)}), "lora", "ia3").eval()
    for number, expected in enumerate(([1, 0, 1, 0, 0], [1, 0, 1, 1, 1], [0, 1, 0, 0, 0]), start=1):
        with torch.no_grad():
            gate.logits.zero_()[number] = 9.0
        assert gate(X, None).flatten().tolist() == expected
    assert gate.units == {"lora": (2, 5)}


def test_sizes_share_their_votes_and_the_median_wins() -> None:
    """Each alone is less likely than nothing, together they are not; ones that are mostly larger are not small."""
    gate = module(GumbelGate(sizes={"lora": (1, 2, 4)}, choose="method"), "lora", "ia3").eval()
    for probabilities, size in (
        ((0.40, 0.2, 0.2, 0.2), 2),
        ((0.40, 0.32, 0.14, 0.14), 1),
        ((0.40, 0.1, 0.1, 0.4), 4),
        ((0.55, 0.1, 0.1, 0.25), 0),
    ):
        with torch.no_grad():
            gate.logits[:4] = torch.tensor(probabilities).log()
        assert gate.picks()[0] == (0, 1, 2, 4).index(size)
        assert int(gate(X, None)[0, 0, 2:6].sum()) == size


def test_shares_of_a_block_sum_to_one_and_units_are_nested() -> None:
    gate = module(GumbelGate(sizes={"lora": (1, 3)}, temperature=0.5), "lora", "ia3").train()
    values = gate(X, None)[:, 0]
    assert values.shape == (4, 5)
    assert (values >= 0).all()
    assert (values[:, :2].sum(dim=1) <= 1 + 1e-6).all()
    assert torch.allclose(values[:, 0], values[:, 2])  # the first unit is in every size
    assert (values[:, 2] > values[:, 3]).all()
    assert torch.equal(values[:, 3], values[:, 4])
    assert not torch.equal(values[0], values[1])  # every example draws for itself


@pytest.mark.parametrize("choose", ["block", "method"])
def test_the_start_is_as_open_as_asked(choose: Any) -> None:
    gate = module(GumbelGate(sizes=SIZES, choose=choose, init=0.3), "lora", "bottleneck", "ia3")
    assert torch.allclose(gate.probabilities()[:, 0], torch.tensor(0.7))
    assert torch.allclose(gate.probabilities().sum(dim=1), torch.tensor(1.0))


def test_noise_follows_the_probabilities() -> None:
    """Gumbel's maximum: the candidate that wins under the noise is a draw from the softmax."""
    gate = module(GumbelGate(straight_through=True), "lora", "ia3").train()
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
    drawn = gate(torch.zeros(40_000, 1, 8), None).mean(dim=0)[0]
    assert torch.allclose(drawn, gate.probabilities()[0, 1:], atol=0.01)


def test_straight_through_opens_wholly_and_has_gradients() -> None:
    gate = module(GumbelGate(sizes={"lora": (1, 2)}, straight_through=True), "lora", "ia3").train()
    values = gate(X, None)
    assert torch.allclose(values, values.round(), atol=1e-6)
    assert (values == 0).any()
    (values * torch.rand(values.shape)).sum().backward()
    assert gate.logits.grad is not None
    assert gate.logits.grad.abs().min() > 0


def test_low_temperature_makes_shares_sharp() -> None:
    gate = module(GumbelGate(temperature=0.01), "lora", "ia3").train()
    values = gate(torch.zeros(200, 1, 8), None)
    assert float(((values - values.round()).abs() < 0.01).float().mean()) > 0.95


def test_checkpointing_draws_the_same_noise_again() -> None:
    arch = ARCHS["bert"]

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = attached(arch, BY_METHOD, SIZED).train()
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        first, second = arch.run(model, arch.inputs(seed=1)), arch.run(model, arch.inputs(seed=2))
        (first.square().mean() + second.square().mean()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    assert any(".gates." in name for name in plain)
    for name, gradient in plain.items():
        assert torch.allclose(gradient, again[name], atol=1e-6), name


def _choose(model: Any, **chosen: int | None) -> None:
    """Opens in every block the candidates that are named, by kind and size; None is a method with one size."""
    for block in gated_blocks(model):
        gate: Any = block.gates["default"]
        with torch.no_grad():
            gate.logits.fill_(-5.0)
            for row, group in enumerate(gate.groups):
                names = [(c.kind, c.size) for c in group]
                picked = [names.index(pair) + 1 for pair in chosen.items() if pair in names]
                gate.logits[gate.place[row, picked[0] if picked else 0]] = 5.0


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "swin"])
def test_a_chosen_size_is_a_method_of_that_size(name: str) -> None:
    """Of every method the first units, and to 1e-6 nothing of the others."""
    arch = ARCHS[name]
    methods = [SIZED[0], SIZED[1], IA3()] + ([SIZED[2]] if arch.prefix else [])
    model = attached(arch, BY_METHOD, methods)
    _choose(model, lora=2, prefix=5, ia3=None)
    small = {f"{b.block.index}.lora.{key}": 2 for b in gated_blocks(model) for key in b.methods["default"]["lora"]}
    kept = [m for m in methods if m.kind != "bottleneck"]
    other: Any = get_peft_model(arch.build(), PeltonConfig(methods=kept, gate=FixedGate(1.0), sizes=small)).eval()
    theirs = {k: v for k, v in other.state_dict().items() if ".pelton.methods." in k}
    ours = model.state_dict()
    other.load_state_dict({k: ours[k][tuple(slice(n) for n in v.shape)] for k, v in theirs.items()}, strict=False)
    with torch.no_grad():
        assert far(arch.run(model, arch.inputs()), arch.run(other, arch.inputs())) <= 1e-6


def test_units_that_are_shut_get_no_attention() -> None:
    """With every candidate shut the backbone is there to the bit; opening one unit of a prefix changes it."""
    arch = ARCHS["bert"]
    model = attached(arch, GumbelGate(sizes={"prefix": (1, 3)}), [METHODS["prefix-kv"]])
    with torch.no_grad():
        plain = arch.run(arch.build(), arch.inputs())
        _choose(model)
        assert far(plain, arch.run(model, arch.inputs())) <= 1e-6
        _choose(model, prefix=1)
        assert far(plain, arch.run(model, arch.inputs())) > 1e-5


def test_saving_recording_and_temperature(tmp_path: Any) -> None:
    arch = ARCHS["bert"]
    model = attached(arch, BY_METHOD, SIZED)
    _choose(model, lora=2)
    set_temperature(model, 0.25)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(arch.build(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(arch.run(model, arch.inputs()), arch.run(again, arch.inputs()))
    assert again.peft_config["default"].gate_spec == GumbelGate(sizes=SIZES, choose="method", temperature=0.25)
    with record_gates(again) as log, torch.no_grad():
        arch.run(again, arch.inputs())
        arch.run(again.train(), arch.inputs())  # what it drew, in the mean
    frame = log.to_frame()
    assert set(frame.method) == {"lora", "bottleneck", "prefix", "ia3"}
    assert (frame.example == -1).all()
    assert frame.value.between(0, 1).all()


def test_frozen_without_sizes_and_refused_with() -> None:
    arch = ARCHS["bert"]
    model = attached(arch, "gumbel", [METHODS["lora"], METHODS["ia3"]])
    with torch.no_grad():
        before = arch.run(model, arch.inputs())
        gate = freeze_gates(model, [arch.inputs()])
        assert far(before, arch.run(model, arch.inputs())) <= 1e-6
    assert {value for row in gate.values.values() for value in row.values()} <= {0.0, 1.0}
    with pytest.raises(AdapterError, match=r"choose the sizes of methods.*pelton\.derive"):
        freeze_gates(attached(arch, BY_METHOD, SIZED), [arch.inputs()])


def test_parameters_are_the_candidates_and_nothing() -> None:
    counts = {"method": (3 + 1) + (2 + 1) + (2 + 1) + (1 + 1), "block": 3 + 2 + 2 + 1 + 1}
    for choose, count in counts.items():
        gate: Any = GumbelGate(sizes=SIZES, choose=choose).build(Place(tuple(m.kind for m in SIZED), 8, causal=True))
        assert sum(p.numel() for p in gate.parameters()) == count


BROKEN: list[tuple[Any, str]] = [
    (lambda: GumbelGate(sizes={"lora": (4, 2)}), r"`sizes rise` must hold, but got kind='lora', sizes=\(4, 2\)"),
    (lambda: GumbelGate(sizes={"lora": ()}), "`sizes is a list`"),
    (lambda: GumbelGate(sizes={"lora": (0, 2)}), "`size > 0`"),
    (lambda: GumbelGate(choose="blok"), "Unknown choose 'blok'. Did you mean 'block'"),
    (lambda: GumbelGate(temperature=0.0), "`temperature > 0`"),
    (lambda: GumbelGate(init=1.0), "`0 < init < 1`"),
]


@pytest.mark.parametrize(("make", "message"), BROKEN)
def test_values_that_break_a_law_are_refused(make: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


ATTACHED: list[tuple[list[Any], dict[str, Any], str]] = [
    ([LoRA(rank=4)], {"lora": (2, 8)}, r"largest candidate is rank.*sizes up to 8 for 'lora' with rank=4"),
    ([LoRA(rank=4)], {"prefix": (2,)}, r"Unknown method of this adapter in GumbelGate.sizes 'prefix'. Known: lora"),
    ([BitFit()], {"bitfit": (2,)}, r"'bitfit' has one size only"),
    ([Prefix(prefix_length=3, gating="scale")], {"prefix": (1, 3)}, r"gating='scale'.*Use gating='mass'"),
]


@pytest.mark.parametrize(("methods", "sizes", "message"), ATTACHED)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_attached(
    methods: list[Any], sizes: dict[str, Any], message: str
) -> None:
    backbone = ARCHS["bert"].build()
    with pytest.raises(SpecError, match=message):
        get_peft_model(backbone, PeltonConfig(methods=methods, gate=GumbelGate(sizes=sizes)))
    assert not [name for name, _ in backbone.named_modules() if "pelton" in name]


def test_one_method_a_block_learns_which() -> None:
    """A gate alone, over methods that are there already, finds the one that lowers the loss."""
    arch = ARCHS["bert"]
    teacher = attached(arch, FixedGate({"lora": 1.0, "bottleneck": 0.0}), [METHODS["lora"], METHODS["bottleneck"]])
    model = wake(
        get_peft_model(arch.build(), PeltonConfig(methods=[METHODS["lora"], METHODS["bottleneck"]], gate=GumbelGate()))
    )
    model.load_state_dict({k: v for k, v in teacher.state_dict().items() if ".methods." in k}, strict=False)
    gates = [p for n, p in model.named_parameters() if ".gates." in n]
    with torch.no_grad():
        target = arch.run(teacher, arch.inputs())
        for parameter in gates:
            parameter.zero_()
    optimizer = torch.optim.Adam(gates, lr=0.2)
    model.train()
    for _ in range(60):
        loss = (arch.run(model, arch.inputs()) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert far(target, arch.run(model.eval(), arch.inputs())) <= 1e-5
