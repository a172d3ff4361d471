"""Fewer ranks, units and positions: what does nothing goes without a trace, what does least goes first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from law import METHODS, attached, far, together
from pelton import LoRA, revive, shrink
from pelton.errors import PeltonError
from pelton.tuner import gated_blocks
from test_laws_compress import assert_same, output, tensors
from zoo import ARCHS, Arch


def parts(model: Any, kind: str) -> list[Any]:
    return [part for block in gated_blocks(model) for part in block.methods["default"][kind].values()]


def test_what_does_nothing_goes_without_a_trace(arch: Arch) -> None:
    """A LoRA whose product has rank 1, and bottleneck units whose output is off."""
    model = attached(arch, "scalar", [METHODS["lora"], METHODS["bottleneck"]])
    with torch.no_grad():
        for part in parts(model, "lora"):
            part.A[1:] = part.A[0]
        for part in parts(model, "bottleneck"):
            part.up[:, [0, 3]] = 0.0
    out = output(arch, model)
    found = shrink(model, energy=1 - 1e-6)
    assert {(one.kind, one.before, one.after) for one in found} == {("lora", 3, 1), ("bottleneck", 5, 3)}
    assert far(out, output(arch, model)) <= 1e-5
    assert all(part.A.shape[0] == 1 for part in parts(model, "lora"))
    assert all(part.down.weight.shape[0] == part.up.shape[1] == 3 for part in parts(model, "bottleneck"))


@pytest.mark.parametrize("prefix", ["prefix-kv", "prefix-mlp", "prefix-token"])
def test_a_shrunk_adapter_saves_loads_and_grows_again(arch: Arch, prefix: str, tmp_path: Path) -> None:
    methods = [METHODS[prefix], *together(arch)[:2]] if arch.prefix else together(arch)
    model = attached(arch, "mlp", methods)
    before, whole = tensors(model), output(arch, model)
    found = shrink(model, share=0.5)
    assert {one.after for one in found} == {2, 3}  # of 3 and of 5
    assert all(0 <= one.lost < 1 for one in found)
    small = output(arch, model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(arch.build(), tmp_path).eval()
    assert torch.equal(output(arch, again), small)
    assert revive(again) == ["shrink"]
    assert torch.equal(output(arch, again), whole)
    assert_same(again, before)


def test_loras_are_cut_as_their_singular_values_say() -> None:
    model = attached(ARCHS["bert"], "scalar", [LoRA(rank=6, alpha=12)])
    products = [(part.B @ part.A).detach() for part in parts(model, "lora")]
    found = shrink(model, share=0.5)
    for product, part, one in zip(products, parts(model, "lora"), found, strict=True):
        energy = torch.linalg.svdvals(product).square()
        rest = float((part.B @ part.A).detach().sub(product).square().sum())
        assert rest == pytest.approx(float(energy[3:].sum()), rel=1e-3)
        assert one.lost == pytest.approx(float(energy[3:].sum() / energy.sum()), rel=1e-3)
        assert part.scaling == 2.0


def test_the_strongest_units_stay_in_their_order() -> None:
    model = attached(ARCHS["bert"], "scalar", [METHODS["bottleneck"]])
    (first, *_), rows = parts(model, "bottleneck"), []
    with torch.no_grad():
        first.up[:, 1] *= 100
        first.up[:, 4] *= 50
        rows = [first.down.weight[[1, 4]].clone(), first.up[:, [1, 4]].clone()]
    shrink(model, energy=0.95)
    part = parts(model, "bottleneck")[0]
    assert torch.equal(part.down.weight, rows[0])
    assert torch.equal(part.up, rows[1])


@pytest.mark.parametrize(
    ("methods", "arguments", "message"),
    [
        (["lora"], {}, "Say how much is to stay: energy=0.95"),
        (["lora"], {"energy": 0.9, "share": 0.5}, "Say how much is to stay"),
        (["lora"], {"share": 1.5}, "0 < energy or share <= 1.* must hold, but got share=1.5"),
        (["bitfit"], {"share": 0.5}, "has no parts with units: only lora, bottleneck and prefix have"),
    ],
)
def test_what_cannot_be_shrunk_is_said(methods: list[str], arguments: dict[str, float], message: str) -> None:
    model = attached(ARCHS["bert"], "scalar", [METHODS[kind] for kind in methods])
    before = tensors(model)
    with pytest.raises(PeltonError, match=message):
        shrink(model, **arguments)
    assert_same(model, before)
