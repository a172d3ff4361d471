"""Laws 6, 9, 10 and 13: gradients, checkpointing, counts and low precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from law import GATES, METHODS, arch_methods, attached, far, together
from pelton import IA3, BitFit, Bottleneck, FixedGate, LinearGate, LoRA, MLPGate, PeltonConfig, Prefix, ScalarGate
from zoo import ARCHS, WIDTH, Arch

CHECKPOINTED = [
    (name, reentrant)
    for name, arch in ARCHS.items()
    for reentrant in (False, True)
    # transformers cannot make the inputs of these require gradients, which reentrant checkpoints need
    if arch.checkpoints and not (reentrant and name in ("clip", "swin"))
]


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _two_forwards(arch: Arch, model: Any) -> dict[str, torch.Tensor]:
    """Both forwards run before either backward."""
    model.zero_grad()
    torch.manual_seed(3)  # the same dropout
    first, second = arch.run(model, arch.inputs(seed=1)), arch.run(model, arch.inputs(seed=2))
    (first.square().mean() + second.square().mean()).backward()
    return _gradients(model)


@pytest.mark.parametrize(("name", "reentrant"), CHECKPOINTED)
def test_checkpointed_gradients_equal_plain_ones(name: str, reentrant: bool) -> None:
    arch = ARCHS[name]
    model = attached(arch).train()
    base = model.get_base_model()
    plain = _two_forwards(arch, model)
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        base.enable_input_require_grads()
    model.config.use_cache = False
    checkpointed = _two_forwards(arch, model)
    assert plain.keys() == checkpointed.keys()
    scale = max(float(g.abs().max()) for g in plain.values())
    for key, grad in plain.items():
        assert float((grad - checkpointed[key]).abs().max()) <= 1e-5 * scale, key


@pytest.mark.parametrize("gate", GATES)
def test_only_the_adapter_gets_gradients_and_all_of_it(arch: Arch, gate: str) -> None:
    model = attached(arch, gate)
    arch.run(model.train(), arch.inputs()).square().sum().backward()
    for name, parameter in model.named_parameters():
        ours = ".pelton." in name
        assert parameter.requires_grad == ours, name
        if ours:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


D, F, L = WIDTH, 48, 2
SITES_IO = {
    "attn.q": (D, D),
    "attn.k": (D, D),
    "attn.v": (D, D),
    "attn.out": (D, D),
    "ffn.in": (D, F),
    "ffn.out": (F, D),
}
COUNTS = [
    (LoRA(rank=3), FixedGate(), 2 * 3 * (D + D)),
    (LoRA(rank=3, sites=tuple(SITES_IO)), FixedGate(), sum(3 * (i + o) for i, o in SITES_IO.values())),
    (Bottleneck(bottleneck_size=5), FixedGate(), D * 5 + 5 + 5 * D),
    (Bottleneck(bottleneck_size=5, sites=("ffn.out", "attn.out")), FixedGate(), 2 * (D * 5 + 5 + 5 * D)),
    (Prefix(prefix_length=4), FixedGate(), 2 * 4 * D),
    (Prefix(prefix_length=4, parametrisation="token"), FixedGate(), 4 * D),
    (
        Prefix(prefix_length=4, parametrisation="mlp", mlp_size=6),
        FixedGate(),
        4 * 6 + 6 * 6 + 6 + 6 * 2 * D + 2 * D,
    ),
    (IA3(), FixedGate(), D + D + F),
    (BitFit(), FixedGate(), sum(o for _, o in SITES_IO.values())),
    (LoRA(rank=3), ScalarGate(), 2 * 3 * (D + D) + 1),
    (LoRA(rank=3), LinearGate(), 2 * 3 * (D + D) + D + 1),
    (LoRA(rank=3), MLPGate(hidden_size=7), 2 * 3 * (D + D) + D * 7 + 7 + 7 + 1),
]


@pytest.mark.parametrize(("method", "gate", "per_block"), COUNTS)
def test_trainable_parameters_are_the_formula(method: Any, gate: Any, per_block: int) -> None:
    model = get_peft_model(ARCHS["bert"].build(), PeltonConfig(methods=[method], gate=gate))
    assert model.get_nb_trainable_parameters()[0] == L * per_block


def test_the_gate_of_the_guide_has_49411_parameters() -> None:
    from pelton.gates import Place

    gate = MLPGate().build(Place(("lora", "bottleneck", "prefix"), 768, causal=False))
    assert sum(p.numel() for p in gate.parameters()) == 49_411


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_backbones_run(arch: Arch, dtype: torch.dtype) -> None:
    model = get_peft_model(arch.build().to(dtype), PeltonConfig(methods=together(arch)))
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in arch.inputs().items()}
    out = arch.run(model, inputs)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    out.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if ".pelton." in name:
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("method", METHODS)
def test_autocast_runs(method: str) -> None:
    arch = ARCHS["vit" if method == "dilated-grid" else "bert"]
    model = attached(arch, methods=[METHODS[method]])
    with torch.autocast("cpu", torch.bfloat16):
        out = arch.run(model, arch.inputs())
    out.float().sum().backward()
    assert far(out.float(), arch.run(model, arch.inputs())) < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_every_gate_value_matters(arch: Arch, method: str) -> None:
    """The derivative of the output with respect to a learned gate is not zero."""
    if method not in arch_methods(arch):
        pytest.skip(f"{arch.name} has no site for it")
    model = attached(arch, ScalarGate(0.5), [METHODS[method]])
    arch.run(model, arch.inputs()).square().sum().backward()
    thetas = [p for n, p in model.named_parameters() if n.endswith("theta")]
    assert thetas
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in thetas)
