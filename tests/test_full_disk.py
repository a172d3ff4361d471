"""A disk that fills up at any moment: a run stays to the bit what it was, can be loaded, and no litter is left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import files, full_disk
from fits import Make
from law import METHODS, attached
from pelton import to_peft
from pelton.compress.runs import fold_run, freeze_run, prune_run, revive_run, shrink_run
from pelton.compress.together import combine_runs
from pelton.errors import AdapterError
from pelton.training.fit import fit
from pelton.training.run import Run
from zoo import ARCHS

ADAPTER = {"methods": [{"kind": "lora", "rank": 2}, {"kind": "bottleneck", "bottleneck_size": 4}]}


@pytest.fixture
def trained(make: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose gates are constant; what it scores is beside the point."""
    run = fit(make(ADAPTER | {"gate": {"kind": "scalar"}}, max_steps=1))
    monkeypatch.setattr(Run, "evaluate", lambda *_, **__: {"score": 1.0})
    shutil.rmtree(run.folder.checkpoints, ignore_errors=True)
    return run.folder.path


def try_all(act: Callable[[], Any], folder: Path, stride: int = 1) -> int:
    """Does something with the disk full at one moment after another, until it succeeds; returns how many there were."""
    before, at = files(folder), 0
    while True:
        with full_disk(folder, at):
            try:
                act()
                return at
            except AdapterError as error:
                assert "could not be written and is as it was" in str(error)  # noqa: PT017 - one of many turns
                assert "No space left on device" in str(error)  # noqa: PT017
        assert files(folder) == before
        at += stride


@pytest.mark.slow
def test_freezing_pruning_and_reviving(trained: Path) -> None:
    """Files are opened, folders made and things moved: the adapter, its values, what was noted."""
    assert try_all(lambda: freeze_run(trained), trained, stride=2) > 8
    assert try_all(lambda: prune_run(trained, by="gate", keep=2), trained, stride=5) > 8
    assert try_all(lambda: shrink_run(trained, share=0.5), trained, stride=5) > 8
    assert try_all(lambda: revive_run(trained), trained, stride=5) > 8
    assert [change["name"] for change in Run.load(trained).folder.read("changes")] == [
        *("freeze", "prune", "shrink", "revive")
    ]


def test_folding_and_combining(trained: Path, tmp_path: Path) -> None:
    assert try_all(lambda: fold_run(trained, trained / "folded"), trained, stride=2) > 4
    assert {path.name for path in (trained / "folded").iterdir()} == {"model", "adapter"}
    assert try_all(lambda: combine_runs([trained, trained], trained / "both"), trained) > 2
    assert (trained / "both" / "adapter_config.json").is_file()


def test_converting_into_a_folder_that_is_there(tmp_path: Path) -> None:
    model, folder = attached(ARCHS["bert"], "scalar", [METHODS["lora"]]), tmp_path / "peft"
    assert try_all(lambda: to_peft(model, folder), tmp_path) > 3
    (folder / "notes.txt").write_text("mine")
    assert try_all(lambda: to_peft(model, folder), tmp_path) > 3
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_files_that_really_do_not_fit(trained: Path) -> None:
    """The system itself refuses what is written beyond a size, also to libraries in other languages."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = files(trained)
    for size in (0, 700, 5000):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(AdapterError, match="could not be written and is as it was"):
                fold_run(trained, trained / "folded")
            with pytest.raises(AdapterError, match="could not be written and is as it was"):
                freeze_run(trained)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert files(trained) == before
