"""What a pass took from one adapter comes back to that adapter only, and what it learned since stays; adapters of
different backbones do not mix.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fits import GATED
from law import METHODS, attached, wake
from pelton import FixedGate, ScalarGate, fold, prune, revive, set_methods, unfold
from pelton.compress.together import combine_runs
from pelton.errors import AdapterError
from pelton.training.fit import fit
from pelton.training.loading import parse_recipe
from pelton.tuner import gated_blocks
from test_laws_compress import assert_same, output, tensors
from tiny import recipe_values, save_backbone, save_data, sentences, write_jsonl
from zoo import ARCHS, Arch


def test_reviving_onto_another_adapter_is_refused(tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    for name in ("mine", "other"):
        model = attached(arch, "scalar")
        if name == "other":
            wake(model, seed=11)
        prune(model, keep=2, importance={n: {k: float(k == "lora") for k in KINDS} for n in "01"})
        model.save_pretrained(tmp_path / name)
    for file in (tmp_path / "mine").glob("removed.*"):
        shutil.copy(file, tmp_path / "other" / file.name)
    model = PeftModel.from_pretrained(arch.build(), tmp_path / "other").eval()
    before = tensors(model)
    with pytest.raises(AdapterError, match="has changed since the pass 'prune', so what that took away does not fit"):
        revive(model)
    assert_same(model, before)


KINDS = ("lora", "bottleneck", "prefix", "ia3", "bitfit")


def test_what_comes_back_is_off_where_its_method_is_off() -> None:
    arch = ARCHS["bert"]
    model = attached(arch, "scalar", [METHODS["lora"], METHODS["bottleneck"]])
    set_methods(model, lora=False)
    off = output(arch, model)
    prune(model, keep=2, importance={"0": {"lora": 0.0, "bottleneck": 0.0}, "1": {"lora": 1.0, "bottleneck": 1.0}})
    assert len(gated_blocks(model)) == 1
    revive(model)
    assert torch.equal(output(arch, model), off)


def test_runs_of_different_backbones_are_not_combined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(name)
    monkeypatch.setattr(
        "pelton.compress.together.load_recipe", lambda path: SimpleNamespace(backbone=f"backbone-{path.read_text()}")
    )
    with pytest.raises(AdapterError, match=r"different backbones: backbone-one, backbone-two. Combine equal ones"):
        combine_runs([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_runs_that_learned_other_numbers_are_not_combined(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": number % 5} for number, row in enumerate(sentences(24))]
    write_jsonl(save_data(tmp_path / "data", validation=0, test=0) / "train.jsonl", rows)
    task = {"kind": "text-regression", "data": str(tmp_path / "data")}
    values = recipe_values(save_backbone(tmp_path / "backbone"), tmp_path / "data", tmp_path / "runs", epochs=1)
    first = fit(parse_recipe({**values, "task": task, "adapter": GATED}, "test")).folder.path
    like, other = (Path(shutil.copytree(first, tmp_path / name)) for name in ("like", "other"))
    stored = json.loads((first / "task.json").read_text())
    (like / "task.json").write_text(json.dumps({**stored, "mean": stored["mean"] + 0.1 * stored["deviation"]}))
    (other / "task.json").write_text(json.dumps({**stored, "deviation": 20 * stored["deviation"]}))
    with pytest.raises(AdapterError, match=r"other .*: the mean of their heads would say nothing.*the same numbers"):
        combine_runs([first, other], tmp_path / "both")
    assert not (tmp_path / "both").exists()
    combine_runs([first, like], tmp_path / "both")


# ---- what was trained while a part was folded --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "albert"])
def test_what_did_not_fold_keeps_what_it_learned(name: str) -> None:
    arch = ARCHS[name]
    model = attached(arch, "scalar", [METHODS[kind] for kind in ("lora", "prefix-kv", "bottleneck")])
    before = tensors(model)
    fold(model)
    learned = {}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".pelton." in key:
                parameter.add_(1.0)
                learned[key] = parameter.clone()
    assert unfold(model) is model
    after = model.state_dict()
    assert list(after) == list(before)
    assert any(".keys" in key for key in learned)
    for key, value in before.items():
        if key not in learned:
            assert torch.equal(after[key], value)  # what was folded, and the backbone
        elif ".gates." in key:
            assert after[key].tolist() == [value[0], *learned[key].tolist()]  # of LoRA, which was folded; the others
        else:
            assert torch.equal(after[key], learned[key])


def part_folded(arch: Arch, prefix: str = "prefix-mlp") -> Any:
    model = attached(arch, "scalar", [METHODS[kind] for kind in ("lora", prefix, "bottleneck")])
    return fold(model)


@pytest.mark.parametrize("prefix", ["prefix-mlp", "prefix-token"])
def test_a_prefix_that_learned_as_keys_and_values_is_not_unfolded(prefix: str) -> None:
    model = part_folded(ARCHS["bert"], prefix)
    with torch.no_grad():
        next(p for key, p in model.named_parameters() if key.endswith("attn.keys")).add_(1.0)
    before = tensors(model)
    with pytest.raises(AdapterError, match="was trained since the prefix became keys and values"):
        unfold(model)
    assert_same(model, before)


def test_what_was_made_smaller_since_is_revived_before_it_is_unfolded() -> None:
    arch = ARCHS["bert"]
    whole = tensors(attached(arch, "scalar", [METHODS[kind] for kind in ("lora", "prefix-mlp", "bottleneck")]))
    model = part_folded(arch)
    prune(model, keep=2)
    before = tensors(model)
    with pytest.raises(AdapterError, match=r"was made smaller since it was folded. Bring that back first"):
        unfold(model)
    assert_same(model, before)
    revive(model)
    unfold(model)
    assert_same(model, whole)


@pytest.mark.parametrize("rest", [[], ["bottleneck"]])
def test_a_method_that_was_off_is_off_again(rest: list[str]) -> None:
    arch = ARCHS["bert"]
    model = attached(arch, FixedGate(0.5), [METHODS[kind] for kind in ("lora", "ia3", *rest)])
    set_methods(model, ia3=False)
    out = output(arch, model)
    again = unfold(fold(model))
    assert {block.off for block in gated_blocks(again)} == {frozenset({"ia3"})}
    assert torch.equal(output(arch, again), out)


def test_a_method_that_was_turned_off_since_stays_off() -> None:
    arch = ARCHS["bert"]
    model = attached(arch, ScalarGate(0.5), [METHODS[kind] for kind in ("lora", "bottleneck")])
    fold(model)
    set_methods(model, bottleneck=False)
    unfold(model)
    assert {block.off for block in gated_blocks(model)} == {frozenset({"bottleneck"})}
