"""Recording: what a log holds, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from law import METHODS, attached, together, wake
from pelton import Bottleneck, FixedGate, LinearGate, LoRA, MLPGate, PeltonConfig, ScalarGate, record_gates
from pelton.gates import Gate
from pelton.tuner import GatedBlock
from zoo import ARCHS, SEQ, Arch

COLUMNS = ["adapter", "block", "index", "method", "example", "token", "value"]


def _watch(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Collects what each gate returns, by hooks of its own."""
    seen: list[tuple[str, Tensor]] = []
    for name, module in model.named_modules():
        if isinstance(module, Gate):
            module.register_forward_hook(lambda g, a, y, name=name: seen.append((name, y.detach().clone())))
    return seen


def _hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}


def _record(arch: Arch, model: Any, *batches: dict[str, Tensor]) -> pd.DataFrame:
    with torch.no_grad(), record_gates(model) as log:
        for batch in batches:
            arch.run(model, batch)
    return log.to_frame()


def _rows(frame: pd.DataFrame, **where: Any) -> list[float]:
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return [float(v) for v in frame.value]


@pytest.mark.parametrize("gate", ["mlp", "linear", "scalar"])
def test_frame_holds_the_outputs_of_the_gates(arch: Arch, gate: str) -> None:
    model = attached(arch, gate)
    seen, inputs = _watch(model), arch.inputs()
    with torch.no_grad(), record_gates(model) as log:
        arch.run(model, inputs)
    frame = log.to_frame()
    assert list(frame.columns) == COLUMNS
    assert len(log) == len(seen) > 0
    assert set(frame.adapter) == {"default"}
    assert sorted(set(frame["index"])) == list(range(len(seen)))
    for index, (name, values) in enumerate(seen):
        mine = frame[frame["index"] == index]
        block = model.get_submodule(name.partition(".pelton.")[0]).pelton
        assert set(mine.block) == {name.partition(".pelton.")[0]}
        assert list(dict.fromkeys(mine.method)) == list(block.gates["default"].methods)
        for row in mine.itertuples():
            number = block.gates["default"].methods.index(row.method)
            example, token = max(row.example, 0), max(row.token, 0)
            assert row.value == values[example, token, number].item()
        if "attention_mask" not in inputs:
            assert len(mine) == values.numel()


@pytest.mark.parametrize("name", ["bert", "vit", "swin"])
def test_pooled_gates_have_a_row_per_example(name: str) -> None:
    arch = ARCHS[name]
    frame = _record(arch, attached(arch), arch.inputs())
    blocks, methods = frame.block.nunique(), frame.method.nunique()
    assert len(frame) == blocks * methods * 3
    assert set(frame.token) == {-1}
    assert sorted(set(frame.example)) == [0, 1, 2]
    assert not frame.duplicated(["adapter", "block", "index", "method", "example", "token"]).any()


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "deberta-v2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_has_no_rows(name: str, side: str) -> None:
    arch = ARCHS[name]
    model, inputs = (
        attached(arch, MLPGate(granularity="token"), [METHODS["lora"], METHODS["bottleneck"]]),
        arch.inputs(),
    )
    if side == "left":
        inputs = {k: v.flip(1) for k, v in inputs.items()}
    frame = _record(arch, model, inputs)
    real = [(row, token) for row, token in inputs["attention_mask"].nonzero().tolist()]
    for _, mine in frame.groupby(["block", "method"]):
        assert list(zip(mine.example, mine.token, strict=True)) == real


@pytest.mark.parametrize("gate", [ScalarGate(0.3), FixedGate({"lora": 1.0, "bottleneck": 0.2})])
def test_static_gates_have_a_row_per_forward(gate: Any) -> None:
    arch = ARCHS["bert"]
    model = get_peft_model(arch.build(), PeltonConfig(methods=[LoRA(), Bottleneck()], gate=gate)).eval()
    frame = _record(arch, model, arch.inputs(), arch.inputs())
    assert len(frame) == 2 * 2 * 2  # forwards, blocks, methods
    assert set(frame.example) == set(frame.token) == {-1}
    expected = {"lora": 0.3, "bottleneck": 0.3} if isinstance(gate, ScalarGate) else {"lora": 1.0, "bottleneck": 0.2}
    assert frame.groupby("method").value.mean().to_dict() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["bert", "albert", "llama", "t5", "vit", "swin", "clip"])
def test_examples_count_over_batches(name: str) -> None:
    arch = ARCHS[name]
    model, first, second = attached(arch), arch.inputs(3), arch.inputs(2, seed=4)
    both, alone = _record(arch, model, first, second), _record(arch, model, second)
    assert sorted(set(both.example)) == [0, 1, 2, 3, 4]
    later = both[both.example >= 3]
    assert (later.example - 3).tolist() == alone.example.tolist()
    assert later.value.tolist() == alone.value.tolist()


def test_layers_that_share_a_block_share_its_examples() -> None:
    arch = ARCHS["albert"]
    model, inputs = attached(arch), arch.inputs()
    frame = _record(arch, model, inputs, inputs)
    assert frame.block.nunique() == 1
    assert sorted(set(frame["index"])) == [0, 1]  # two layers
    assert sorted(set(frame.example)) == list(range(6))
    assert not frame.duplicated(["index", "method", "example"]).any()
    assert _rows(frame, index=0) != _rows(frame, index=1)


def test_decoding_counts_each_forward() -> None:
    """A token that comes alone is a token still: its gates are its own."""
    arch = ARCHS["llama"]
    model = attached(arch)
    with torch.no_grad(), record_gates(model) as log:
        ids = arch.inputs()["input_ids"][:1]
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    frame = log.to_frame()
    tokens = frame[(frame["index"] == 0) & (frame.method == "lora")]
    assert tokens.groupby("example").token.apply(list).tolist() == [list(range(SEQ)), [0], [0]]


def test_adapters_have_their_own_rows() -> None:
    arch = ARCHS["bert"]
    model = get_peft_model(arch.build(), PeltonConfig(methods=together(arch)), adapter_name="a")
    model.add_adapter("b", PeltonConfig(methods=[LoRA(layers=(1,))], gate=LinearGate()))
    model.base_model.set_adapter(["a", "b"])
    wake(wake(model, "a"), "b").eval()
    frame = _record(arch, model, arch.inputs())
    assert set(frame.adapter) == {"a", "b"}
    assert frame[frame.adapter == "b"].groupby(["block", "method"]).example.apply(list).tolist() == [[0, 1, 2]]
    assert set(frame[frame.adapter == "b"]["index"]) == {1}
    with torch.no_grad(), record_gates(model) as log:
        arch.run(model, arch.inputs(), adapter_names=["a", "b", "a"])
    mixed = log.to_frame()
    assert mixed[mixed["index"] == 1].groupby("adapter").example.nunique().to_dict() == {"a": 2, "b": 1}


def test_a_log_of_nothing_has_its_columns() -> None:
    with record_gates(attached(ARCHS["bert"])) as log:
        pass
    assert len(log) == 0
    assert list(log.to_frame().columns) == COLUMNS


def test_recording_changes_nothing(arch: Arch) -> None:
    model, inputs = attached(arch), arch.inputs()
    before = _hooks(model)
    with torch.no_grad():
        out = arch.run(model, inputs)
        with record_gates(model):
            assert _hooks(model) != before
            assert torch.equal(out, arch.run(model, inputs))
        assert torch.equal(out, arch.run(model, inputs))
    assert _hooks(model) == before


def test_hooks_go_when_a_forward_fails() -> None:
    arch = ARCHS["bert"]
    model, inputs = attached(arch), arch.inputs()
    before = _hooks(model)
    bad = inputs | {"labels": torch.tensor([0, 1, 9])}
    with pytest.raises(IndexError), record_gates(model) as log:
        model(**bad)
    assert _hooks(model) == before
    with torch.no_grad(), record_gates(model) as log:
        with pytest.raises(IndexError):
            model(**bad)
        arch.run(model, inputs)
    assert sorted(set(log.to_frame().example)) == list(range(6))  # the gates of both had opened
    assert not log.to_frame().duplicated(["index", "method", "example"]).any()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "modernbert", "vit"])
def test_recomputation_is_not_recorded_again(name: str, reentrant: bool) -> None:
    arch, inputs = ARCHS[name], ARCHS[name].inputs()
    model = attached(arch).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    plain = _record(arch, model, inputs)
    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    with record_gates(model) as log:
        arch.run(model, inputs).square().sum().backward()
    pd.testing.assert_frame_equal(plain, log.to_frame())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_parquet_holds_the_frame(name: str, tmp_path: Path) -> None:
    arch = ARCHS[name]
    model = attached(arch)
    with torch.no_grad(), record_gates(model) as log:
        arch.run(model, arch.inputs())
    log.to_parquet(tmp_path / "gates.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "gates.parquet"), log.to_frame().reset_index(drop=True))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from _tensors(each)


def _held(model: nn.Module) -> list[str]:
    """Names of what a gated block, its gates and its parts hold beside parameters and buffers."""
    structure = ("_parameters", "_buffers", "_modules")
    blocks = [m for m in model.modules() if isinstance(m, GatedBlock)]
    return [
        f"{type(module).__name__}.{name}"
        for block in blocks
        for module in block.modules()
        for name, value in vars(module).items()
        if name not in structure and list(_tensors(value))
    ]


PARALLEL = [METHODS["bottleneck-parallel"], METHODS["lora"]]


def test_a_forward_leaves_nothing_behind(arch: Arch) -> None:
    model, inputs = attached(arch, methods=PARALLEL), arch.inputs()
    with torch.no_grad():
        arch.run(model, inputs)
        assert _held(model) == []
        arch.run(model, inputs, adapter_names=["default", "__base__", "default"])
        assert _held(model) == []
    arch.run(model.train(), inputs).square().sum().backward()
    assert _held(model) == []


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_recomputation_leaves_nothing_behind(name: str, reentrant: bool) -> None:
    arch = ARCHS[name]
    model = attached(arch, methods=PARALLEL).train()
    model.config.use_cache = False
    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    arch.run(model, arch.inputs()).square().sum().backward()
    assert _held(model) == []


def test_a_failed_forward_leaves_nothing_behind() -> None:
    arch = ARCHS["bert"]
    model, inputs = attached(arch, methods=PARALLEL), arch.inputs()
    last = model.get_base_model().bert.encoder.layer[1].output.LayerNorm

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = last.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        arch.run(model, inputs)
    handle.remove()
    assert _held(model) == []
