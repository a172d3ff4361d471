"""A pass that fails changes nothing, wherever it fails: its model is to the bit what it was before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import Bench, points, some
from law import METHODS, attached, together, wake
from pelton import (
    MLPGate,
    PeltonConfig,
    combine,
    fold,
    freeze_gates,
    from_peft,
    leave_one_out,
    prune,
    revive,
    shrink,
    taylor,
    to_peft,
    unfold,
)
from pelton.compress.steps import adapter_of
from pelton.tuner.recast import adapter_tensors, recast, with_changes
from test_laws_compress import output
from test_laws_fold import foldable
from zoo import ARCHS, Arch

Made = tuple[Any, Callable[[], Any]]


def learned(arch: Arch) -> Any:
    """Gates that read the input, over methods of each sort; a head where the architecture has one of that name."""
    heads = ["classifier"] if hasattr(arch.build(), "classifier") else None
    return attached(arch, MLPGate(hidden_size=4, init_std=0.5), modules_to_save=heads)


def constant(arch: Arch) -> Any:
    return attached(arch, "scalar")


def freezing(arch: Arch, statistic: Any) -> Made:
    model = learned(arch)
    return model, lambda: freeze_gates(model, [arch.inputs()], statistic=statistic)


def pruning(arch: Arch) -> Made:
    model = constant(arch)
    return model, lambda: prune(model, keep=2)


def shrinking(arch: Arch) -> Made:
    model = learned(arch)
    return model, lambda: shrink(model, share=0.4)


def reviving(arch: Arch) -> Made:
    model = learned(arch)
    shrink(model, share=0.4)
    freeze_gates(model, [arch.inputs()])
    prune(model, keep=2)
    return model, lambda: revive(model)


def folding_part(arch: Arch) -> Made:
    methods = ["lora", "bottleneck", *(["prefix-token"] if arch.prefix else [])]
    model = attached(arch, "scalar", [METHODS[kind] for kind in methods])
    return model, lambda: fold(model)


def folding(arch: Arch) -> Made:
    model = foldable(arch)
    return model, lambda: fold(model)


def unfolding_part(arch: Arch) -> Made:
    model, act = folding_part(arch)
    act()
    return model, lambda: unfold(model)


def unfolding(arch: Arch) -> Made:
    plain = folding(arch)[1]()
    return plain, lambda: unfold(plain)


def combining(arch: Arch) -> Made:
    model = learned(arch)
    config = model.peft_config["default"]
    more = PeltonConfig(methods=together(arch), gate=config.gate_spec, modules_to_save=config.modules_to_save)
    model.add_adapter("second", more)
    wake(model, "second").eval()
    return model, lambda: combine(model, {"default": 1.0, "second": 2.0}, "both")


def recasting(arch: Arch) -> Made:
    """As a pass would that takes every method but one out of some blocks, and all from others."""
    model = constant(arch)
    tuner, name = adapter_of(model, None)
    config = with_changes(tuner.peft_config[name], methods=[METHODS["bottleneck"]], gate="frozen")
    tensors = {key: value for key, value in adapter_tensors(tuner, name).items() if ".bottleneck." in key}
    config.gate = type(config.gate_spec)({str(b.block.index): {"bottleneck": 0.5} for b in tuner.blocks()})  # type: ignore[call-arg]
    return model, lambda: recast(tuner, name, config, tensors)


def merging(arch: Arch) -> Made:
    model = foldable(arch)
    return model, model.merge_and_unload


def unloading(arch: Arch) -> Made:
    model = learned(arch)
    return model, model.unload


def taking_over(arch: Arch, folder: Path) -> Made:
    if not folder.exists():
        to_peft(attached(arch, "scalar", [METHODS["lora"]]), folder)
    backbone = arch.build()
    return backbone, lambda: from_peft(backbone, folder)


def weighing(arch: Arch, score: bool) -> Made:
    model, inputs = learned(arch), arch.inputs() | {"labels": torch.tensor([0, 1, 1])}
    if score:
        return model, lambda: leave_one_out(model, lambda: float(output(arch, model).sum()))
    return model, lambda: taylor(model, [inputs])


PASSES: dict[str, Callable[[Arch], Made]] = {
    "freeze": lambda arch: freezing(arch, "mean"),
    "prune": pruning,
    "shrink": shrinking,
    "revive": reviving,
    "fold": folding,
    "fold a part": folding_part,
    "unfold": unfolding,
    "unfold a part": unfolding_part,
    "combine": combining,
}
"""On every architecture."""

MORE: dict[str, Callable[[Arch], Made]] = PASSES | {
    "freeze by a fit": lambda arch: freezing(arch, "fit"),
    "recast": recasting,
    "merge_and_unload": merging,
    "unload": unloading,
    "taylor": lambda arch: weighing(arch, False),
    "leave one out": lambda arch: weighing(arch, True),
}


@pytest.mark.parametrize("name", MORE)
def test_a_fault_anywhere_changes_nothing(name: str) -> None:
    """Lines evenly spread over all that the pass runs, the last ones among them."""
    arch = ARCHS["bert"]
    bench = Bench(lambda: MORE[name](arch), lambda model: output(arch, model))
    nothing, everything = bench.check(some(points(bench.lines), 30))
    assert len(nothing) > 20
    assert not everything or max(nothing) < min(everything)  # the pass was done, and only returned


def test_a_fault_while_a_folder_is_taken_over_changes_nothing(tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    bench = Bench(lambda: taking_over(arch, tmp_path / "lora"), lambda model: output(arch, model))
    nothing, everything = bench.check(some(points(bench.lines), 30))
    assert len(nothing) > 20
    assert not everything or max(nothing) < min(everything)


@pytest.mark.parametrize("name", ["revive", "fold a part", "unfold"])
def test_a_fault_changes_nothing_on_any_architecture(arch: Arch, name: str) -> None:
    """The last lines: there most blocks have been changed."""
    bench = Bench(lambda: PASSES[name](arch), lambda model: output(arch, model), warm=True)
    late = points(bench.lines)[-100:]
    nothing, everything = bench.check(some(late, 5))
    assert len(nothing) + len(everything) == len(some(late, 5))
    assert nothing
