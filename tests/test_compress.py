"""Passes over runs and from the command line; importances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fits import At, Make
from law import attached
from pelton import MLPGate, PeltonConfig, ScalarGate, leave_one_out, prune, taylor
from pelton.cli.main import run as command
from pelton.errors import AdapterError
from pelton.tasks.heads import MeanPoolingClassifier
from pelton.training.fit import fit
from pelton.training.run import Run
from pelton.tuner import gated_blocks
from zoo import ARCHS


@pytest.fixture
def trained(make: Make) -> Run:
    return fit(make())


def bits(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "adapter").iterdir() if path.suffix == ".safetensors"}


def test_from_the_command_line(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder, before = trained.folder.path, bits(trained.folder.path)
    said = trained.outputs(trained.examples().inputs)
    assert command(["prune", str(folder), "--keep", "2"]) == 0
    out = capsys.readouterr().out
    assert "before" in out
    assert "after" in out
    assert out.count("gone") == len(json.loads((folder / "changes.json").read_text())[0]["gone"]) > 0
    assert command(["shrink", str(folder), "--share", "0.5"]) == 0
    assert command(["shrink", str(folder)]) == 2
    assert command(["freeze", str(folder), "--statistic", "fit"]) == 0
    assert "parameters" in capsys.readouterr().out
    small = Run.load(folder)
    assert small.model.peft_config["default"].gate_spec.kind == "frozen"
    assert sum(len(b.wirings["default"].methods) for b in gated_blocks(small.model)) == 2
    assert command(["gates", str(folder)]) == 0
    capsys.readouterr()
    assert {path.name for path in (folder / "adapter").glob("removed.*")} == {"removed.json", "removed.safetensors"}
    assert command(["revive", str(folder)]) == 0
    assert bits(folder) == before
    assert not list(folder.glob(".adapter*"))
    again = Run.load(folder)
    for one, other in zip(said, again.outputs(again.examples().inputs), strict=True):
        assert (one == other).all()
    assert command(["revive", str(folder)]) == 2
    assert "has nothing to bring back" in capsys.readouterr().err
    changes = json.loads((folder / "changes.json").read_text())
    assert [change["name"] for change in changes] == ["prune", "shrink", "freeze", "revive"]


def test_pruning_works_without_saying_how_much(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Importances by gradients are small numbers: the default is a share of the largest."""
    assert command(["prune", str(trained.folder.path)]) == 0
    assert "before" in capsys.readouterr().out
    assert command(["prune", str(trained.folder.path), "--threshold", "nan"]) == 2
    assert "threshold is a number" in capsys.readouterr().err


def test_fold_and_convert_from_the_command_line(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = {"methods": ["lora", "bitfit"], "gate": {"kind": "scalar"}}
    trained = fit(make(adapter, task={"head": "pooler", "head_init": "random"}))
    folder, before = trained.folder.path, bits(trained.folder.path)
    said = trained.outputs(trained.examples().inputs)
    assert command(["fold", str(folder)]) == 0
    assert str(folder / "folded") in capsys.readouterr().out.replace("\n", "")
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "folded").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "folded")
    assert not [name for name, _ in plain.named_modules() if "pelton" in name]
    for (text,), one in zip(trained.examples().inputs[:4], said, strict=False):
        with torch.no_grad():
            logits = plain(**tokenizer(text, return_tensors="pt")).logits[0]
        assert torch.allclose(logits, torch.tensor(one), atol=1e-4)
    assert bits(folder) == before
    assert command(["fold", str(folder)]) == 2
    assert "exists. Name a new folder" in capsys.readouterr().err
    assert command(["convert", str(folder)]) == 2
    assert "holds bitfit in block 0, which PEFT's LoRA cannot say" in capsys.readouterr().err
    lora = fit(make({"methods": ["lora"], "gate": {"kind": "scalar"}}))
    assert command(["convert", str(lora.folder.path), "--output", str(tmp_path / "peft")]) == 0
    assert {path.name for path in (tmp_path / "peft").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_what_does_not_fold_is_written_beside(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained.folder.path
    assert command(["fold", str(folder)]) == 2
    assert "Freeze the gates first" in capsys.readouterr().err
    assert not (folder / "folded").exists()
    assert command(["freeze", str(folder)]) == 0
    small = Run.load(folder)
    said = small.outputs(small.examples().inputs)
    assert command(["fold", str(folder)]) == 0
    assert "MeanPoolingClassifier" in capsys.readouterr().out
    backbone = MeanPoolingClassifier.from_pretrained(folder / "folded" / "model")
    model = PeftModel.from_pretrained(backbone, folder / "folded" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "folded" / "model")
    for (text,), one in zip(small.examples().inputs[:4], said, strict=False):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        assert torch.allclose(logits, torch.tensor(one), atol=1e-4)


def test_the_rest_of_a_folded_adapter_names_the_folded_model(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pelton.compress.runs import fold_run

    adapter = {"methods": ["lora", "bottleneck"], "gate": {"kind": "scalar"}}
    run = fit(make(adapter, task={"head": "pooler"}, max_steps=2))
    said = run.outputs(run.examples().inputs)
    monkeypatch.chdir(tmp_path)
    fold_run(run.folder.path, Path("folded"))
    monkeypatch.chdir("/")
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "folded" / "adapter").eval()
    (text,), tokenizer = run.examples().inputs[0], AutoTokenizer.from_pretrained(tmp_path / "folded" / "model")
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
    assert torch.allclose(logits, torch.tensor(said[0]), atol=1e-4)


def test_the_scores_are_those_of_the_run(trained: Run) -> None:
    from pelton.compress.runs import freeze_run, prune_run

    metrics = trained.folder.read("metrics")["validation"]
    change = freeze_run(trained.folder.path)
    assert change.before == pytest.approx({k: metrics[k] for k in change.before})
    assert change.split == "validation"
    pruned = prune_run(trained.folder.path, by="leave-one-out", keep=3)
    assert pruned.before == change.after
    again = Run.load(trained.folder.path)
    assert pruned.parameters[1] == sum(p.numel() for n, p in again.model.named_parameters() if ".pelton." in n)
    weights = [entry.importance for entry in pruned.gone]
    assert weights == sorted(weights)


def test_nothing_is_chosen_on_the_test(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(make(task={"validation": "train", "train": "train", "validation_examples": 0}, max_steps=1))
    assert command(["prune", str(run.folder.path), "--by", "leave-one-out", "--keep", "2"]) == 2
    assert "chooses on validation rows, and the run has none" in capsys.readouterr().err
    assert command(["freeze", str(run.folder.path)]) == 0
    assert (run.folder.adapter.stat().st_mode & 0o777) == 0o755


def test_contributions_of_training_weigh_methods(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, float] = {}

    def note(model: Any) -> None:
        block = gated_blocks(model)[1]
        for number, kind in enumerate(("lora", "bottleneck")):
            norms = [p.grad.norm() for p in block.methods["default"].get_submodule(kind).parameters()]
            seen[kind] = float(torch.stack(norms).norm()) * (0.25 if number else 0.75)

    gate = {"kind": "fixed", "value": {"lora": 0.75, "bottleneck": 0.25}}
    recipe = make({"methods": ["lora", "bottleneck"], "gate": gate}, contribution_window=1, max_steps=3)
    run = fit(recipe, callbacks=[At(3, note, before=True)])
    found = run.folder.read("contributions")
    assert found["1"] == pytest.approx({kind: value / sum(seen.values()) for kind, value in seen.items()}, rel=1e-4)
    assert all(sum(row.values()) == pytest.approx(1.0) for row in found.values())
    least = min((value, index, kind) for index, row in found.items() for kind, value in row.items())
    threshold = str(least[0] * 1.0001)
    assert command(["prune", str(run.folder.path), "--by", "contribution", "--threshold", threshold]) == 0
    assert f"{least[2]} in block {least[1]}" in capsys.readouterr().out
    assert command(["prune", str(fit(make()).folder.path), "--by", "contribution"]) == 2
    assert "training.contribution_window=1000" in capsys.readouterr().err


def test_a_full_disk_leaves_the_run_as_it_was(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from pelton.compress.runs import freeze_run

    before = {path: path.read_bytes() for path in trained.folder.path.rglob("*") if path.is_file()}

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pelton.tuner.config.PeltonConfig.save_pretrained", full)
    with pytest.raises(AdapterError, match=r"could not be written and is as it was .*No space left"):
        freeze_run(trained.folder.path)
    assert {path: path.read_bytes() for path in trained.folder.path.rglob("*") if path.is_file()} == before


def test_taylor_is_the_change_of_the_loss_to_first_order() -> None:
    """Against the loss with each gate a little further closed; one row, so that no signs cancel."""
    arch = ARCHS["bert"]
    model = attached(arch, ScalarGate(0.5))
    inputs = {k: v[:1] for k, v in arch.inputs().items()} | {"labels": torch.tensor([1])}
    model.zero_grad()
    found = taylor(model, [inputs])
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        whole = model(**inputs).loss
        for block in gated_blocks(model):
            gate: Any = block.gates["default"]
            for number, kind in enumerate(gate.methods):
                theta = gate.theta[number].clone()
                gate.theta[number] = torch.logit(torch.sigmoid(theta) * 0.99)
                change = (whole - model(**inputs).loss) / 0.01
                gate.theta[number] = theta
                assert found[str(block.block.index)][kind] == pytest.approx(abs(float(change)), rel=0.1, abs=2e-3)


def test_leaving_one_out_is_what_pruning_it_costs() -> None:
    arch = ARCHS["bert"]
    model = attached(arch, MLPGate(hidden_size=8, activation="sigmoid", init_std=0.5))
    inputs = arch.inputs() | {"labels": torch.tensor([0, 1, 1][: len(arch.inputs()["input_ids"])])}

    def score() -> float:
        with torch.no_grad():
            return -float(model(**inputs).loss)

    whole, found = score(), leave_one_out(model, score)
    kind = found["1"]
    least = min(kind, key=lambda name: kind[name])
    weights = {index: dict.fromkeys(row, 1.0) for index, row in found.items()}
    weights["1"][least] = 0.0
    assert [(entry.block, entry.kind) for entry in prune(model, importance=weights)] == [(1, least)]
    assert whole - score() == pytest.approx(kind[least], abs=1e-6)


def test_importance_needs_a_loss_and_an_adapter_at_work() -> None:
    arch = ARCHS["bert"]
    model = attached(arch)
    with pytest.raises(AdapterError, match="taylor needs batches with labels"):
        taylor(model, [arch.inputs()])
    with pytest.raises(AdapterError, match="Expected batches, each of inputs by name, but got a str for one"):
        taylor(model, arch.inputs())  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="needs at least one batch"):
        taylor(model, [])
    model.add_adapter("second", PeltonConfig(methods=["lora"]))
    with pytest.raises(AdapterError, match="'second' is not active"):
        leave_one_out(model, lambda: 1.0, adapter="second")
