"""What a pass took from one adapter comes back to that adapter only; adapters of different backbones do not mix."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from peft import PeftModel

from law import attached, wake
from pelton import prune, revive
from pelton.compress.together import combine_runs
from pelton.errors import AdapterError
from test_laws_compress import assert_same, tensors
from zoo import ARCHS


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
