"""Law 12, ONNX Runtime: it agrees with eager to 1e-4, with free sizes, whatever passes have left of an adapter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from faults import differences, look
from fits import Make
from law import METHODS, attached, far
from pelton import combine, fold, freeze_gates, prune, revive, shrink, to_onnx
from pelton.cli.main import run as command
from pelton.errors import AdapterError
from pelton.training.fit import fit
from test_laws_compile import _fresh_dynamo, _longer  # noqa: F401 - a fixture
from test_laws_fold import foldable
from zoo import ARCHS, Arch

LIMIT = 1e-4


def exported(model: Any, arch: Arch, folder: Path) -> onnxruntime.InferenceSession:
    file = to_onnx(model, folder / "model.onnx", arch.inputs())
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def said(session: onnxruntime.InferenceSession, arch: Arch, inputs: dict[str, Tensor]) -> Tensor:
    """What the file says, in the form of `Arch.run`."""
    names = [one.name for one in session.get_outputs()]
    taken = {one.name for one in session.get_inputs()}
    values = session.run(names, {k: v.numpy() for k, v in inputs.items() if k in taken})
    outputs = type("Outputs", (), dict(zip(names, map(torch.tensor, values), strict=True)))()
    return arch.run(lambda **_: outputs, inputs)


def agree(model: Any, arch: Arch, folder: Path) -> None:
    """On the inputs that were traced, and on more tokens in fewer rows."""
    before = look(model)
    session = exported(model, arch, folder)
    assert not differences(before, look(model))
    for inputs in (arch.inputs(), _longer(arch.inputs(batch=2, seed=4))):
        with torch.no_grad():
            assert far(arch.run(model, inputs), said(session, arch, inputs)) <= LIMIT


def frozen(model: Any, arch: Arch) -> Any:
    freeze_gates(model, [arch.inputs()])
    return model


def pruned(arch: Arch) -> Any:
    """Gates that read the input, over what is left."""
    model = attached(arch)
    blocks = {index: dict.fromkeys(METHODS, 0.0) for index in "01"}
    blocks["0"] |= {"lora": 1.0, "prefix": 1.0}
    prune(model, threshold=0.5, importance={k: {**v, "prefix": v.get("prefix", 0.0)} for k, v in blocks.items()})
    return model


def shrunk(arch: Arch) -> Any:
    model = attached(arch, methods=[METHODS["lora"], METHODS["prefix-kv"]])
    shrink(model, share=0.4)
    return model


def revived(arch: Arch) -> Any:
    model = shrunk(arch)
    revive(model)
    return model


def folded_in_part(arch: Arch) -> Any:
    return fold(attached(arch, "scalar", [METHODS["lora"], METHODS["bottleneck"], METHODS["prefix-token"]]))


def combined(arch: Arch) -> Any:
    model = attached(arch, methods=[METHODS["lora"], METHODS["bottleneck"]])
    combine(model, {"default": 1.0}, "both")
    model.set_adapter("both")
    return model


def small(arch: Arch) -> Any:
    """The whole way: shrunk, frozen, pruned, folded as far as it folds."""
    kinds = ["lora", "bottleneck", *(["prefix-mlp"] if arch.prefix else [])]
    model = attached(arch, methods=[METHODS[kind] for kind in kinds])
    shrink(model, share=0.5)
    values = frozen(model, arch).peft_config["default"].gate_spec.values
    first = {
        index: {kind: 0.5 - (kind != "lora") * value for kind, value in row.items()} for index, row in values.items()
    }
    prune(model, keep=max(2, len(kinds) * len(values) - 1), importance=first)  # a LoRA stays, to be folded
    return fold(model)


PASSES: dict[str, Callable[[Arch], Any]] = {
    "gated": attached,
    "frozen": lambda arch: frozen(attached(arch), arch),
    "pruned": pruned,
    "shrunk": shrunk,
    "revived": revived,
    "folded in part": folded_in_part,
    "folded": lambda arch: fold(foldable(arch)),
    "combined": combined,
}


@pytest.mark.slow
def test_onnx_runtime_equals_eager(arch: Arch, tmp_path: Path) -> None:
    """All of them export as plain backbones with free sizes, so all of them must with an adapter."""
    agree(small(arch), arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_onnx_runtime_equals_eager_behind_every_pass(name: str, tmp_path: Path) -> None:
    agree(PASSES[name](ARCHS["bert"]), ARCHS["bert"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated", "frozen"])
def test_onnx_runtime_equals_a_causal_model(name: str, tmp_path: Path) -> None:
    agree(PASSES[name](ARCHS["llama"]), ARCHS["llama"], tmp_path)


@pytest.mark.parametrize("name", list(PASSES)[1:])
@pytest.mark.parametrize("of", ["bert", "llama"])
def test_compiled_equals_eager_behind_every_pass(of: str, name: str) -> None:
    arch = ARCHS[of]
    model, inputs = PASSES[name](arch), arch.inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    more = {"use_cache": False} if arch.causal else {}
    with torch.no_grad():
        assert far(arch.run(model, inputs, **more), arch.run(compiled, inputs, **more)) <= LIMIT


@pytest.mark.slow
def test_a_run_becomes_onnx(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    trained = fit(make(max_steps=2))
    assert command(["convert", str(trained.folder.path), "--to", "onnx"]) == 0
    folder = trained.folder.path / "onnx"
    assert str(folder / "model.onnx") in capsys.readouterr().out.replace("\n", "")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), trained.examples().inputs[:4]
    for (text,), wanted in zip(texts, trained.outputs(texts), strict=True):
        fed = {
            k: v for k, v in tokenizer(text, return_tensors="np").items() if k in {i.name for i in session.get_inputs()}
        }
        assert np.allclose(session.run(["logits"], fed)[0][0], np.asarray(wanted), atol=1e-4)
    assert command(["convert", str(trained.folder.path), "--to", "onnx"]) == 2
    assert "exists. Name a new folder" in capsys.readouterr().err


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = ARCHS["bert"]
    model = attached(arch)
    with pytest.raises(AdapterError, match=r"two rows or more, so that the batch stays free, but got .*\(1, 9\)"):
        to_onnx(model, tmp_path / "model.onnx", arch.inputs(batch=1))
    found = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr("pelton.export.onnx.find_spec", lambda name: None if name == "onnxscript" else found(name))
        with pytest.raises(AdapterError, match=r"ONNX needs onnxscript. .*pip install 'pelton\[onnx\]'"):
            to_onnx(model, tmp_path / "model.onnx", arch.inputs())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_that_says_something_else_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("mine")
    with pytest.raises(AdapterError, match=r"ONNX Runtime differs from the model by .*; nothing is written"):
        to_onnx(
            attached(ARCHS["bert"], "fixed", [METHODS["lora"]]),
            tmp_path / "model.onnx",
            ARCHS["bert"].inputs(),
            tolerance=-1.0,
        )
    assert (tmp_path / "model.onnx").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
