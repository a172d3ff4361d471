"""Several adapters become one: by average, task arithmetic, TIES or DARE, with LoRA cut by its singular values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fits import Make, weights
from law import METHODS, attached, far, together, wake
from pelton import FrozenGate, LoRA, PeltonConfig, ScalarGate, combine, freeze_gates, prune
from pelton.cli.main import run as command
from pelton.errors import AdapterError, PeltonError
from pelton.methods import LINEAR_SITES
from pelton.training.fit import fit
from pelton.training.run import Run
from pelton.tuner import gated_blocks
from test_laws_compress import assert_same, output, tensors
from tiny import sentences, write_jsonl
from zoo import ARCHS, Arch


def two(arch: Arch, methods: Any = None, gate: Any = "scalar", second: Any = None, **more: Any) -> Any:
    model = attached(arch, gate, methods, **more)
    config = model.peft_config["default"]
    model.add_adapter("second", PeltonConfig(methods=second or config.specs, gate=config.gate_spec, **more))
    return wake(model, "second", seed=9).eval()


def products(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """scaling · B A by block and place."""
    return {
        f"{block.block.name}.{key}": (part.scaling * part.B @ part.A).detach()
        for block in gated_blocks(model)
        for key, part in block.methods[adapter]["lora"].items()
    }


def test_an_adapter_with_itself_is_itself(arch: Arch) -> None:
    model = attached(arch, "scalar")
    out = output(arch, model)
    for how in ("average", "ties"):
        found = combine(model, {"default": 0.7}, how, how=how, density=1.0)  # type: ignore[arg-type]
        model.set_adapter(how)
        assert far(out, output(arch, model)) <= 1e-5
        assert found.lost_in_all <= 1e-10
        model.set_adapter("default")


def test_adapters_stay_and_the_new_one_is_saved(arch: Arch, tmp_path: Path) -> None:
    model = two(arch, together(arch))
    before, out = tensors(model), output(arch, model)
    combine(model, {"default": 1.0, "second": 3.0}, "both")
    assert torch.equal(output(arch, model), out)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    model.set_adapter("both")
    small = output(arch, model)
    assert far(small, out) > 1e-4
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    again = PeftModel.from_pretrained(arch.build(), tmp_path / "both").eval()
    assert torch.equal(output(arch, again), small)


def test_loras_average_in_their_products() -> None:
    model = two(
        ARCHS["bert"], [LoRA(rank=3, alpha=6, sites=LINEAR_SITES)], second=[LoRA(rank=2, alpha=8, sites=LINEAR_SITES)]
    )
    found = combine(model, {"default": 1.0, "second": 3.0}, "whole", rank=5)
    first, other, whole = (products(model, name) for name in ("default", "second", "whole"))
    for key, product in whole.items():
        torch.testing.assert_close(product, (first[key] + 3 * other[key]) / 4, atol=1e-5, rtol=1e-4)
    assert found.lost_in_all <= 1e-10
    combine(model, {"default": 1.0, "second": -0.5}, "sum", how="arithmetic", rank=5)
    for key, product in products(model, "sum").items():
        torch.testing.assert_close(product, first[key] - 0.5 * other[key], atol=1e-5, rtol=1e-4)


def test_the_lost_energy_is_that_of_the_singular_values_cut_off() -> None:
    model = two(ARCHS["bert"], [LoRA(rank=3, alpha=6)])
    found = combine(model, {"default": 1.0, "second": 1.0}, "both", rank=2)
    first, other, both = (products(model, name) for name in ("default", "second", "both"))
    for (key, product), lost in zip(both.items(), found.lost.values(), strict=True):
        wanted = (first[key] + other[key]) / 2
        energy = torch.linalg.svdvals(wanted).square()
        assert lost == pytest.approx(float(energy[2:].sum() / energy.sum()), abs=1e-5)
        assert float((product - wanted).square().sum() / energy.sum()) == pytest.approx(lost, abs=1e-5)
    assert 0 < found.lost_in_all < 1


def test_ties_trims_elects_and_averages_what_agrees() -> None:
    """Against the three steps of the paper, written out for single numbers."""
    model = two(ARCHS["bert"], [METHODS["bitfit"]])
    combine(model, {"default": 1.0, "second": 1.0}, "both", how="ties", density=0.5)
    for block in gated_blocks(model):
        for key in block.methods["default"]["bitfit"]:
            a, b, both = (
                next(block.methods[n]["bitfit"][key].parameters()).tolist() for n in ("default", "second", "both")
            )
            trim = lambda xs: [x if sorted(map(abs, xs), reverse=True).index(abs(x)) < len(xs) / 2 else 0.0 for x in xs]  # noqa: E731
            for x, y, z in zip(trim(a), trim(b), both, strict=True):
                sign = (x + y > 0) - (x + y < 0)
                agree = [v for v in (x, y) if v * sign > 0]
                assert z == pytest.approx(sum(agree) / len(agree) if agree else 0.0, abs=1e-6)


def test_dare_drops_and_scales_up_and_a_seed_repeats_it() -> None:
    model = two(ARCHS["bert"], [METHODS["bitfit"]])
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        combine(model, {"default": 1.0}, name, how="dare", density=0.5, seed=seed)
    rows = {
        n: torch.cat([p for b in gated_blocks(model) for p in b.methods[n].parameters()])
        for n in ("default", "a", "b", "c")
    }
    assert torch.equal(rows["a"], rows["b"])
    assert not torch.equal(rows["a"], rows["c"])
    kept = rows["a"] != 0
    assert 0.3 < float(kept.float().mean()) < 0.7
    torch.testing.assert_close(rows["a"][kept], 2 * rows["default"][kept])


def test_frozen_gates_are_averaged_in_config_and_weights() -> None:
    model = two(ARCHS["bert"], gate=ScalarGate(0.5))
    for name in ("default", "second"):
        model.set_adapter(name)
        freeze_gates(model, adapter=name)
    combine(model, {"default": 1.0, "second": 1.0}, "both")
    gate = model.peft_config["both"].gate_spec
    assert isinstance(gate, FrozenGate)
    for block in gated_blocks(model):
        values: Any = block.gates["both"]
        assert values.values().tolist() == pytest.approx(
            [gate.values[str(block.block.index)][k] for k in values.methods]
        )
        mean = sum(block.gates[n].values() for n in ("default", "second")) / 2  # type: ignore[operator]
        torch.testing.assert_close(values.values(), mean)


def test_heads_are_averaged() -> None:
    model = two(ARCHS["bert"], ["lora"], modules_to_save=["classifier"])
    heads = model.get_base_model().classifier.modules_to_save
    with torch.no_grad():
        heads["default"].weight.fill_(1.0)
        heads["second"].weight.fill_(4.0)
    combine(model, {"default": 2.0, "second": 1.0}, "both")
    assert float(heads["both"].weight.unique()) == 2.0


@pytest.mark.parametrize(
    ("second", "arguments", "message"),
    [
        (["bottleneck"], {}, "Adapters 'default' and 'second' differ in their methods"),
        ([LoRA(sites=("attn.k",))], {}, "differ in their methods"),
        ([LoRA(rank=2)], {"name": "second"}, "There is an adapter 'second' already"),
        ([LoRA(rank=2)], {"how": "tie"}, "Did you mean 'ties'"),
        ([LoRA(rank=2)], {"density": 0.0}, "0 < density <= 1"),
        ([LoRA(rank=2)], {"weights": {"default": 1.0, "third": 1.0}}, "There is no adapter 'third'"),
        ([LoRA(rank=2)], {"weights": {"default": 1.0, "second": -1.0}}, "sum of weights > 0"),
    ],
)
def test_what_cannot_be_combined_is_said(second: Any, arguments: dict[str, Any], message: str) -> None:
    model = two(ARCHS["bert"], ["lora"], second=second)
    before = tensors(model)
    values = {"weights": {"default": 1.0, "second": 1.0}, "name": "both"} | arguments
    with pytest.raises(PeltonError, match=message):
        combine(model, **values)
    assert_same(model, before)


def test_the_order_in_which_methods_went_is_no_difference() -> None:
    model = two(ARCHS["bert"], ["lora", "bottleneck", "bitfit"])
    for name, order in (("default", ("lora", "bitfit")), ("second", ("bitfit", "lora"))):
        rows = {
            str(block.block.index): dict.fromkeys(("lora", "bottleneck", "bitfit"), 1.0)
            for block in gated_blocks(model)
        }
        rows["0"] |= {kind: place / 100 for place, kind in enumerate(order)}
        prune(model, importance=rows, adapter=name)
    assert model.peft_config["default"].pruned != model.peft_config["second"].pruned
    combine(model, {"default": 1.0, "second": 1.0}, "both")
    assert sorted(model.peft_config["both"].pruned["0"]) == ["bitfit", "lora"]


def test_other_modules_that_were_trained_whole_are_refused() -> None:
    model = attached(ARCHS["bert"], "scalar", ["lora"])
    config = model.peft_config["default"]
    model.add_adapter("second", PeltonConfig(methods=config.specs, gate=config.gate_spec, modules_to_save=["pooler"]))
    before = tensors(model)
    with pytest.raises(AdapterError, match="'default' and 'second' differ in their modules_to_save"):
        combine(model, {"default": 1.0, "second": 1.0}, "both")
    assert_same(model, before)


def test_a_failure_takes_the_new_adapter_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two(ARCHS["bert"])
    before = tensors(model)

    def fail(*arguments: Any) -> None:
        raise AdapterError("half-way")

    monkeypatch.setattr("pelton.compress.combine.recast", fail)
    with pytest.raises(AdapterError, match="half-way"):
        combine(model, {"default": 1.0, "second": 1.0}, "both")
    assert_same(model, before)
    assert list(model.peft_config) == ["default", "second"]


def test_runs_combine_from_the_command_line(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [fit(make(seed=seed, max_steps=2)) for seed in (0, 1)]
    paths, out = [str(run.folder.path) for run in runs], tmp_path / "both"
    before = {path: path.read_bytes() for run in runs for path in run.folder.path.rglob("*") if path.is_file()}
    assert (
        command(["combine", *paths, "--output", str(out), "--weights", "3,1", "--how", "average", "--rank", "4"]) == 0
    )
    said = capsys.readouterr().out
    assert "0.00% of the energy" in said
    adapter = PeftModel.from_pretrained(Run.load(runs[0].folder.path).model.unload(), out)
    heads = [weights(run)["base_model.model.classifier.weight"] for run in runs]
    torch.testing.assert_close(adapter.get_base_model().classifier.weight.data, (3 * heads[0] + heads[1]) / 4)
    assert {path: path.read_bytes() for path in before} == before
    for arguments, message in (
        ([*paths, "--output", str(out)], "exists. Name a new folder"),
        ([paths[0], "--output", str(tmp_path / "x")], "Expected two or more runs"),
        ([*paths, "--output", str(tmp_path / "x"), "--weights", "a,b"], "expected numbers such as 0.5,0.5"),
        ([*paths, "--output", str(tmp_path / "none" / "x")], "Make it, or name another --output"),
    ):
        assert command(["combine", *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


def test_runs_that_do_not_belong_together_are_refused(
    make: Make, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter fits the weights that it was trained on; heads have a mean where they say the same."""
    adapter = {"methods": ["lora"], "gate": {"kind": "fixed", "value": 1.0}}

    def path(adapter: Any = adapter, task: Any = None, **training: Any) -> str:
        return str(fit(make(adapter, task, max_steps=1, **training)).folder.path)

    other = tmp_path / "other"
    for name, count in (("train", 16), ("validation", 8)):
        other.mkdir(exist_ok=True)
        rows = [{**row, "label": {"warm": "spam", "cold": "ham"}[str(row["label"])]} for row in sentences(count)]
        write_jsonl(other / f"{name}.jsonl", rows)
    one, moved, cases = path(), path(train_backbone=True), []
    cases += [([one, moved], "trained its backbone too"), ([moved, moved], "trained its backbone too")]
    cases += [([one, path(None)], "has no adapter"), ([one, path({"preset": "head"})], "has no adapter")]
    cases += [([one, path(task={"data": str(other)})], "has 2 classes (cold, warm), and")]
    cases += [([one, path(task={"head": "pooler"})], "are of different models: MeanPoolingClassifier and")]
    capsys.readouterr()
    for number, (runs, message) in enumerate(cases):
        assert command(["combine", *runs, "--output", str(tmp_path / f"x{number}")]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("x*"))
