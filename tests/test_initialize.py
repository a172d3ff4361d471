"""Factors that start along gradients: the model stays what it was, and steps reach more of the gradient."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from fits import Make
from law import METHODS, far, wake
from pelton import Bottleneck, FixedGate, LoRA, MLPGate, PeltonConfig, Prefix, find_anatomy, initialize_from_gradients
from pelton.errors import AdapterError
from pelton.methods import LINEAR_SITES, MethodSpec
from pelton.training import prepare as prepares
from pelton.training.fit import fit
from tiny import save_data, sentences, write_jsonl
from zoo import ARCHS, Arch


class WithLoss(nn.Module):
    """Any architecture as a model that gives a loss."""

    def __init__(self, arch: Arch, model: Any, scale: float = 1.0) -> None:
        super().__init__()
        self.arch, self.model, self.scale = arch, model, scale

    def forward(self, **inputs: Any) -> SimpleNamespace:
        out = self.arch.run(self.model, inputs)
        target = torch.linspace(-1, 1, out.numel()).view_as(out)
        return SimpleNamespace(loss=self.scale * ((out - target) ** 2).mean())


def fresh(arch: Arch, *methods: MethodSpec, gate: Any = None) -> Any:
    config = PeltonConfig(methods=list(methods), gate=gate or MLPGate(hidden_size=8))
    return get_peft_model(arch.build(), config).eval()


def first_factors(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith((".A", ".down.weight"))}


@pytest.mark.parametrize("name", ["lora", "bottleneck", "bottleneck-parallel"])
def test_the_model_stays_the_backbone_and_every_part_is_turned(arch: Arch, name: str) -> None:
    model, inputs = fresh(arch, METHODS[name]), arch.inputs()
    before = first_factors(model)
    with torch.no_grad():
        plain = arch.run(arch.build(), inputs)
    turned = initialize_from_gradients(WithLoss(arch, model), [inputs])
    after = first_factors(model)
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert turned == len(moved) > 0.8 * len(before)  # the last layers of some models do not reach their output
    with torch.no_grad():
        assert far(plain, arch.run(model, inputs)) <= 1e-6
    length = {key: value.norm(dim=1).mean() for key, value in before.items()}
    assert all(torch.allclose(after[k].norm(dim=1).mean(), length[k], rtol=0.2) for k in moved)


def energy(gradient: Tensor, rows: Tensor) -> float:
    """The share of a gradient [O, I] that lies in the span of rows [R, I]."""
    basis = torch.linalg.qr(rows.t()).Q
    return float((gradient @ basis).square().sum() / gradient.square().sum())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "modernbert"])
def test_factors_hold_nearly_all_of_the_gradient_that_so_many_can(name: str) -> None:
    arch, inputs, rank = ARCHS[name], ARCHS[name].inputs(), 4
    model = fresh(arch, LoRA(rank=rank, sites=LINEAR_SITES), gate=FixedGate(1.0))
    random = first_factors(model)
    initialize_from_gradients(WithLoss(arch, model), [inputs])
    plain = arch.build()
    weights = {key: p for key, p in plain.named_parameters() if p.ndim == 2}
    loss = WithLoss(arch, plain)(**inputs).loss
    gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))
    ours, best, chance = [], [], []
    for block in find_anatomy(plain).blocks:
        gated = model.get_base_model().get_submodule(block.name).pelton
        for site in LINEAR_SITES:
            for i, place in enumerate(block.sites[site]):
                gradient = gradients[f"{block.name}.{place.path}.weight"]
                assert gradient is not None
                if name == "gpt2":
                    gradient = gradient.t()
                gradient = gradient[place.start : place.stop]
                key = site.replace(".", "_") + (f"_{i}" if len(block.sites[site]) > 1 else "")
                s = torch.linalg.svdvals(gradient).square()
                best.append(float(s[:rank].sum() / s.sum()))
                ours.append(energy(gradient, gated.methods["default"]["lora"][key].A.detach()))
                full = next(k for k in random if k.endswith(f"{block.name}.pelton.methods.default.lora.{key}.A"))
                chance.append(energy(gradient, random[full]))
    assert min(o / b for o, b in zip(ours, best, strict=True)) > 0.85
    assert sum(ours) / len(ours) > 2 * sum(chance) / len(chance)


def test_a_bottleneck_gets_each_direction_with_both_signs() -> None:
    arch = ARCHS["bert"]
    model = fresh(arch, Bottleneck(bottleneck_size=5))
    initialize_from_gradients(WithLoss(arch, model), [arch.inputs()])
    for rows in first_factors(model).values():
        assert torch.allclose(rows[0], -rows[1])
        assert torch.allclose(rows[2], -rows[3])
        assert abs(float(rows[0] @ rows[2])) < 1e-5


def test_gradients_random_states_and_modes_are_left_alone() -> None:
    arch = ARCHS["bert"]
    model = fresh(arch, LoRA(rank=2), Prefix(prefix_length=2))
    model.train()
    model.base_model.model.dropout.eval()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    assert initialize_from_gradients(WithLoss(arch, model), [arch.inputs()]) == 4
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert [n for n, p in model.named_parameters() if p.grad is not None and p is not parameter] == []


def test_the_same_data_gives_the_same_start_and_enough_is_enough() -> None:
    arch, found = ARCHS["bert"], []
    for batches in ([arch.inputs()] * 2, [arch.inputs()] * 9):
        model = fresh(arch, LoRA(rank=2))
        initialize_from_gradients(WithLoss(arch, model), batches, examples=6)
        found.append(first_factors(model))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_what_cannot_be_initialized_is_refused_and_nothing_changes() -> None:
    arch, inputs = ARCHS["bert"], ARCHS["bert"].inputs()
    model = fresh(arch, LoRA(rank=2))
    before = first_factors(model)
    with pytest.raises(AdapterError, match="gives no loss"):
        initialize_from_gradients(model, [inputs])
    with pytest.raises(AdapterError, match="at least one batch"):
        initialize_from_gradients(WithLoss(arch, model), [])
    with pytest.raises(AdapterError, match="not active"):
        initialize_from_gradients(WithLoss(arch, model), [inputs], adapter="other")
    with pytest.raises(AdapterError, match="get_peft_model"):
        initialize_from_gradients(arch.build(), [inputs])
    assert all(torch.equal(before[key], value) for key, value in first_factors(model).items())
    with pytest.raises(AdapterError, match="trained already"):
        initialize_from_gradients(WithLoss(arch, wake(model)), [inputs])
    assert initialize_from_gradients(WithLoss(arch, fresh(arch, Prefix(prefix_length=2))), [inputs]) == 0


# ---- in a run ----------------------------------------------------------------------------------------------------


def test_a_run_looks_at_rows_of_all_classes(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sorted(sentences(1200), key=lambda row: row["label"])
    save_data(tmp_path / "data")
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    seen: list[int] = []

    def look(model: Any, batches: Any) -> int:
        seen.extend(label for batch in batches for label in batch["labels"].tolist())
        return 0

    monkeypatch.setattr(prepares, "initialize_from_gradients", look)
    prepares.initialize(prepares.prepare(make(adapter={"preset": "default", "init": "gradient"})))
    assert len(seen) == 512
    assert 200 < sum(seen) < 312


def test_what_cannot_be_seen_is_said() -> None:
    arch = ARCHS["bert"]
    model = get_peft_model(arch.build(), PeltonConfig())
    with torch.inference_mode(), pytest.raises(AdapterError, match="There is no gradient at any part of the adapter"):
        initialize_from_gradients(WithLoss(arch, model), [arch.inputs()])
    with pytest.raises(AdapterError, match="The loss is nan"):
        initialize_from_gradients(WithLoss(arch, model, scale=float("nan")), [arch.inputs()])


def test_the_start_counts_as_training(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pelton.training.fit.initialize", lambda prepared: 5000.0)
    assert fit(make(max_steps=1)).folder.read("metrics")["train_seconds"] > 5000
