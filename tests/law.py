"""What every law needs: adapters with all methods, awake; differences of outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import (
    FourierFTConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor

from pelton import (
    IA3,
    BitFit,
    Bottleneck,
    DilatedAttention,
    FixedGate,
    GumbelGate,
    LinearGate,
    LoRA,
    MLPGate,
    Peft,
    PeltonConfig,
    Prefix,
    ScalarGate,
)
from pelton.gates import GateSpec
from pelton.methods import LINEAR_SITES, MethodSpec
from zoo import Arch

PEFT_METHODS: dict[str, Callable[[], PeftConfig]] = {
    "loha": lambda: LoHaConfig(r=3, alpha=12),
    "lokr": lambda: LoKrConfig(r=2, alpha=4, decompose_both=True),
    "oft": lambda: OFTConfig(oft_block_size=8),
    "vera": lambda: VeraConfig(r=6, projection_prng_key=3),
    "dora": lambda: LoraConfig(r=3, lora_alpha=6, use_dora=True),
    "fourierft": lambda: FourierFTConfig(n_frequency=60, scaling=20.0, random_loc_seed=7),
}
"""A config of each of PEFT's methods that can be gated, as PEFT takes it."""


def peft_method(kind: str, sites: Sequence[str] = LINEAR_SITES) -> MethodSpec:
    """The method under its sites."""
    return Peft(config=PEFT_METHODS[kind](), sites=tuple(sites))


METHODS: dict[str, MethodSpec] = {
    "lora": LoRA(rank=3, alpha=6, sites=LINEAR_SITES),
    "bottleneck": Bottleneck(bottleneck_size=5, activation="gelu", sites=("ffn.out", "attn.out")),
    "bottleneck-parallel": Bottleneck(bottleneck_size=5, mode="parallel", sites=("ffn.out", "attn.out"), scaling=2.0),
    "prefix-kv": Prefix(prefix_length=3, init_std=1.0),
    "prefix-mlp": Prefix(prefix_length=3, parametrisation="mlp", mlp_size=6, init_std=1.0),
    "prefix-token": Prefix(prefix_length=3, parametrisation="token", init_std=1.0),
    "dilated": DilatedAttention(segment=4, dilation=2, space="sequence"),
    "dilated-rates": DilatedAttention(segment=(4, 6), dilation=(2, 1), heads=(0, 3), space="sequence"),
    "dilated-grid": DilatedAttention(kernel=3, dilation=1, space="grid"),
    "ia3": IA3(sites=("attn.k", "attn.v", "ffn.in", "ffn.out")),
    "bitfit": BitFit(),
    "loha": peft_method("loha"),
    "dora": peft_method("dora"),
    "oft": peft_method("oft", ("attn.out", "ffn.out")),
}
"""One spec of every method and form; `arch_methods` gives those that an architecture takes."""

GATES: dict[str, GateSpec] = {
    "mlp": MLPGate(hidden_size=8, init_std=0.5),
    "mlp-sigmoid": MLPGate(hidden_size=8, activation="sigmoid", temperature=0.5, init_std=0.5),
    "linear": LinearGate(),
    "gumbel": GumbelGate(choose="method"),
    "scalar": ScalarGate(init=0.3),
    "fixed": FixedGate(0.4),
}

TOGETHER = ("lora", "bottleneck", "prefix-kv", "dilated", "ia3", "bitfit")


def arch_methods(arch: Arch) -> list[str]:
    lacks = {"prefix": not arch.prefix, "dilated": not arch.prefix or arch.windowed}
    names = [name for name in METHODS if not lacks.get(name.split("-")[0], False)]
    return [name for name in names if arch.grid or name != "dilated-grid"]


def together(arch: Arch) -> list[MethodSpec]:
    return [METHODS[name] for name in TOGETHER if name in arch_methods(arch)]


def wake(model: Any, adapter: str = "default", seed: int = 5, std: float = 0.3) -> Any:
    """Gives every adapter parameter a random value, so that nothing is zero by initialisation."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f".{adapter}." in name and (".pelton.methods." in name or ".pelton.gates." in name):
                p.copy_(torch.randn(p.shape, generator=g).to(p) * std)
    return model


def attached(
    arch: Arch, gate: GateSpec | str = "mlp", methods: list[MethodSpec] | None = None, std: float = 0.3, **more: Any
) -> Any:
    """A fresh backbone with an awake adapter."""
    spec = GATES[gate] if isinstance(gate, str) else gate
    config = PeltonConfig(methods=together(arch) if methods is None else methods, gate=spec, **more)
    return wake(get_peft_model(arch.build(), config), std=std).eval()


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value where that is above 1."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1))
