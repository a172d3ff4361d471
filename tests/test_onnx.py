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
from transformers import LlamaConfig, LlamaForCausalLM

from faults import differences, look
from fits import GATED, Make
from law import METHODS, attached, far
from pelton import combine, fold, freeze_gates, prune, revive, shrink, to_onnx
from pelton.cli.main import run as command
from pelton.errors import AdapterError
from pelton.export.onnx import _real
from pelton.training.fit import fit
from pelton.training.loading import parse_recipe
from pelton.training.run import Run
from test_causal import RAGGED
from test_causal import save_tokenizer as save_letters
from test_laws_compile import _fresh_dynamo, _longer  # noqa: F401 - a fixture
from test_laws_fold import foldable
from test_seq2seq import save_tokenizer as save_words
from test_seq2seq import t5
from tiny import write_jsonl
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


@pytest.mark.slow
def test_what_a_model_says_at_padding_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token in front of which all is padding sees nothing: torch and ONNX Runtime make something else of that."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, max_position_embeddings=64, **sizes)).eval()
    inputs = {"input_ids": torch.randint(3, 30, (2, 5))}
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 0] = 0
    to_onnx(model, tmp_path / "model.onnx", {**inputs, "attention_mask": mask})
    monkeypatch.setattr("pelton.export.onnx._real", lambda _, output, __: torch.ones(len(output), dtype=torch.bool))
    with pytest.raises(AdapterError, match="differs from the model by"):
        to_onnx(model, tmp_path / "model.onnx", {**inputs, "attention_mask": mask})


def test_padding_is_told_by_its_mask() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    inputs = {"input_ids": mask}
    ids = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    assert _real("logits", torch.zeros(*mask.shape, 5), ids).equal(mask.bool())
    assert _real("logits", torch.zeros(len(mask), 5), ids).shape == (len(mask),)  # as many classes as tokens
    begun = {**ids, "decoder_input_ids": inputs["input_ids"]}
    assert _real("logits", torch.zeros(*mask.shape, 5), begun).shape == (len(mask),)
    assert _real("encoder_last_hidden_state", torch.zeros(*mask.shape, 5), begun).equal(mask.bool())


@pytest.mark.slow
def test_runs_that_write_become_onnx(tmp_path: Path) -> None:
    """Prompts of different length are padded in front; a decoder is given what it wrote so far."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        write_jsonl(data / f"{split}.jsonl", [{**row, "source": "a b", "target": "b"} for row in RAGGED])
    ARCHS["llama"].build().save_pretrained(tmp_path / "causal-lm")
    save_letters(tmp_path / "causal-lm")
    t5().save_pretrained(tmp_path / "seq2seq")
    save_words(tmp_path / "seq2seq")
    values = {"adapter": GATED, "training": {"epochs": 1, "batch_size": 4}, "output": str(tmp_path / "runs")}
    for kind in ("causal-lm", "seq2seq"):
        task = {"kind": kind, "data": str(data), "max_new_tokens": 4} | (
            {"max_length": 32} if kind != "seq2seq" else {}
        )
        run = fit(parse_recipe({"name": kind, "backbone": str(tmp_path / kind), "task": task, **values}, "test"))
        assert command(["convert", str(run.folder.path), "--to", "onnx"]) == 0
    reading = run.folder.path
    session = onnxruntime.InferenceSession(str(reading / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert {one.name for one in session.get_inputs()} == {"input_ids", "attention_mask", "decoder_input_ids"}
    model = Run.load(reading).model.cpu().eval()
    for sources, begun in ((5, 1), (2, 6)):
        ids = torch.randint(3, 9, (1, sources))
        written = torch.zeros(1, begun, dtype=torch.long)
        fed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": written}
        with torch.no_grad():
            wanted = model(**fed).logits
        (found,) = session.run(["logits"], {name: value.numpy() for name, value in fed.items()})
        assert np.allclose(found, wanted.numpy(), atol=1e-4)


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


def test_an_example_that_lacks_an_input_is_said(tmp_path: Path) -> None:
    arch = ARCHS["t5"]
    inputs = {name: value for name, value in arch.inputs().items() if not name.startswith("decoder")}
    with pytest.raises(
        AdapterError, match=r"The model does not run on the example \(input_ids.*needs decoder_input_ids"
    ):
        to_onnx(attached(arch), tmp_path / "model.onnx", inputs)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_that_onnx_runtime_cannot_run_is_not_kept(tmp_path: Path) -> None:
    arch = ARCHS["bert"]
    with pytest.raises(AdapterError, match=r"cannot run the exported model .*Export the model in float32"):
        to_onnx(attached(arch).bfloat16(), tmp_path / "model.onnx", arch.inputs())
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
