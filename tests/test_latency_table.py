"""What methods cost: counted, measured with costs that are given, kept on disk, estimated."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from law import attached
from pelton import IA3, BitFit, Bottleneck, DilatedAttention, FixedGate, LoRA, Prefix
from pelton.anatomy import find_anatomy
from pelton.cli.main import run as command
from pelton.errors import AdapterError, AnatomyError, SpecError, TrainingError
from pelton.insight.latency import Ratio, Stopwatch, Timer
from pelton.methods import LINEAR_SITES, MethodSpec
from pelton.search import profile as profiling
from pelton.search.flops import TimeModel, Work, backbone_flops, fit_times, leave_one_out_errors, parameters_of, work_of
from pelton.search.latency_table import CACHE, Entry, LatencyTable, cache_folder, load_table, plain_spec, table_path
from pelton.search.profile import attached as with_method
from pelton.search.profile import default_probes, kept_bytes, machine_of, profile
from pelton.tuner.block import GatedBlock
from zoo import ARCHS

COST = {"lora": 4e-6, "bottleneck": 6e-6, "ia3": 2e-6, "bitfit": 1e-6, "prefix": 9e-6, "dilated": 2e-5}
BLOCK, FLOP, ELEMENT = 3e-6, 1e-10, 1e-9
REFERENCE = 1e-3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def backbone(name: str = "bert") -> Any:
    return ARCHS[name].build().base_model


def truth(spec: MethodSpec, block: Any, rows: int, tokens: int) -> float:
    work = work_of(spec, block, rows, tokens)
    return BLOCK + COST[spec.kind] * work.parts + FLOP * work.flops + ELEMENT * work.elements


class Machine:
    """Times models as one on which the formula holds would; counts how many it timed."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise, self.timed = noise, 0

    def __call__(self, batches: Sequence[dict[str, torch.Tensor]], rounds: int) -> Timer:
        rows, tokens = batches[0]["input_ids"].shape

        def time(models: Sequence[nn.Module], plain: nn.Module) -> list[Ratio]:
            assert not [m for m in plain.modules() if isinstance(m, GatedBlock)]
            found = []
            for model in models:
                self.timed += 1
                seconds = REFERENCE
                for block in (m for m in model.modules() if isinstance(m, GatedBlock)):
                    seconds += sum(truth(s, block.block, rows, tokens) for s in block.wirings["default"].methods)
                seconds *= 1 + self.noise * (-1) ** self.timed
                found.append(Ratio(seconds / REFERENCE, 0.0, seconds, REFERENCE, rounds))
            return found

        return time


# ---- counting ----------------------------------------------------------------------------------------------------

COUNTED = [
    LoRA(rank=3, sites=LINEAR_SITES),
    Bottleneck(bottleneck_size=5, sites=("ffn.out", "attn.out")),
    Prefix(prefix_length=4),
]


def flops(model: Any, inputs: dict[str, Any]) -> int:
    model.requires_grad_(False)  # torch cannot count where weights that learn pass a part without a gradient
    with FlopCounterMode(display=False) as counter:  # without gradients parts add in place, which torch does not count
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
@pytest.mark.parametrize("spec", COUNTED, ids=lambda spec: spec.kind)
def test_counted_flops_are_those_that_torch_counts(name: str, spec: MethodSpec) -> None:
    arch, inputs = ARCHS[name], {k: v for k, v in ARCHS[name].inputs().items() if k != "attention_mask"}
    plain = arch.build()
    model = attached(arch, FixedGate(1.0), [spec])
    for one in (plain, model):
        one.set_attn_implementation("eager")  # torch counts the products of sdpa's CPU kernel as nothing
    anatomy = find_anatomy(plain)
    rows, tokens = (3, 9) if arch.kind == "text" else (3, 17)
    ours = sum(work_of(spec, block, rows, tokens).flops for block in anatomy.blocks)
    assert flops(model, inputs) - flops(plain, inputs) == ours


def test_backbone_flops_are_those_of_its_blocks() -> None:
    model = backbone()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.long)}
    counted = backbone_flops(find_anatomy(model).blocks, 2, 7)
    pooler = 2 * 2 * 32 * 32
    assert flops(model, inputs) - pooler == counted


def test_parameters_are_those_of_the_parts() -> None:
    for spec in (*COUNTED, IA3(), BitFit(), DilatedAttention(segment=4)):
        model = attached(ARCHS["bert"], FixedGate(1.0), [spec])
        size = sum(p.numel() for n, p in model.named_parameters() if ".pelton.methods." in n)
        assert size == sum(parameters_of(spec, block) for block in find_anatomy(ARCHS["bert"].build()).blocks)


def test_work_grows_with_size_and_inputs() -> None:
    block = find_anatomy(backbone()).blocks[0]
    for small, large in ((LoRA(rank=2), LoRA(rank=8)), (Bottleneck(4), Bottleneck(8)), (Prefix(2), Prefix(8))):
        assert work_of(small, block, 1, 8).flops < work_of(large, block, 1, 8).flops
        assert work_of(small, block, 1, 8).elements < work_of(small, block, 2, 8).elements
    assert work_of(LoRA(), block, 1, 8).parts == 2


def test_the_fit_finds_the_terms_and_predicts_what_was_left_out() -> None:
    block = find_anatomy(backbone()).blocks[0]
    probes = default_probes()
    works = [work_of(spec, block, rows, tokens) for rows, tokens in ((1, 32), (8, 64)) for spec in probes]
    kinds = [spec.kind for spec in probes] * 2
    seconds = [truth(spec, block, *shape) for shape in ((1, 32), (8, 64)) for spec in probes]
    model = fit_times(kinds, works, seconds, [1e3] * len(kinds))
    for kind, work, value in zip(kinds, works, seconds, strict=True):
        assert model.seconds(kind, work) == pytest.approx(value, rel=0.02)
    errors = leave_one_out_errors(kinds, works, seconds, [1e3] * len(kinds))
    assert len(errors) == len(kinds)
    measured_twice = [e for e, kind in zip(errors, kinds, strict=True) if kind != "dilated"]
    assert max(map(abs, measured_twice)) < 1e-3
    assert TimeModel(1.0, {"lora": 2.0, "ia3": 4.0}, 0.0, 0.0).seconds("new", Work(2, 0, 0)) == 7.0


# ---- measuring ---------------------------------------------------------------------------------------------------


def test_the_default_grid_measures_each_method_and_estimates_other_sizes(cache: Path) -> None:
    model, machine = backbone(), Machine()
    table = profile(model, timer=machine)
    assert {entry.spec["kind"] for entry in table.entries} == set(COST)
    assert {(entry.rows, entry.tokens) for entry in table.entries} == {(1, 32), (8, 64)}
    assert machine.timed == len(table.entries)
    block = find_anatomy(model).blocks[0]
    for spec in (LoRA(rank=16, sites=("attn.v",)), Bottleneck(32), Prefix(8), IA3(sites=("attn.v",))):
        assert table.measured(spec, 8, 64) is None
        assert table.cost(spec, 8, 64) == pytest.approx(truth(spec, block, 8, 64) / REFERENCE, rel=0.05)
    spec = LoRA(rank=8, sites=("attn.q",))
    assert table.cost(spec, 8, 64) == pytest.approx(truth(spec, block, 8, 64) / REFERENCE, rel=1e-3)
    assert table.overhead(8, 64) == pytest.approx(BLOCK / REFERENCE, rel=0.1)
    assert len(table.errors()) == len(table.entries)
    assert dataclasses.replace(table, entries=table.entries[:1]).errors() == []  # SciPy's nnls takes no empty table


def test_several_methods_in_a_block_pay_for_it_once() -> None:
    table = profile(backbone(), timer=Machine())
    one, two = LoRA(rank=8, sites=("attn.q",)), Bottleneck(16)
    d = table.overhead(1, 32)
    both = table.cost(one, 1, 32) + table.cost(two, 1, 32) - d
    assert table.ratio([[one, two], []], 1, 32) == pytest.approx(1 + both)
    assert table.ratio([[one, two], [one, two]], 1, 32) == pytest.approx(1 + 2 * both)
    assert table.ratio([[], []], 1, 32) == 1.0


def test_what_is_in_the_cache_is_not_measured_again(cache: Path) -> None:
    machine, probes = Machine(), [LoRA(), IA3()]
    first = profile(backbone(), probes, shapes=[(1, 8)], timer=machine)
    assert machine.timed == 2
    again = profile(backbone(), probes, shapes=[(1, 8)], timer=machine)
    assert machine.timed == 2
    assert again == first
    assert [path.parent for path in cache.rglob("*.json")] == [cache / "latency"]
    profile(backbone(), [*probes, BitFit()], shapes=[(1, 8)], timer=machine)
    assert machine.timed == 3
    more = profile(backbone(), probes, shapes=[(1, 8)], timer=machine, again=True)
    assert machine.timed == 5
    assert len(more.entries) == 3
    profile(backbone("llama"), probes, shapes=[(1, 8)], timer=machine)
    assert machine.timed == 7  # another backbone has a table of its own
    assert len(list(cache.rglob("*.json"))) == 2


def test_layers_and_weights_do_not_matter_and_nothing_is_changed() -> None:
    model = backbone()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = profile(model, [LoRA(layers=(0,))], shapes=[(1, 8)], timer=Machine())
    assert table.measured(LoRA(layers=(1,)), 1, 8) is not None
    assert table.entries[0].blocks == 2
    assert model.state_dict().keys() == before.keys()
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_is_really_measured() -> None:
    table = profile(backbone(), [LoRA(rank=8)], shapes=[(2, 8)], rounds=3)
    entry = table.entries[0]
    assert entry.ratio > 0
    assert entry.reference > 0
    assert entry.parameters == 2 * 2 * 8 * 64
    assert entry.kept > 0


def test_one_thread_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    batch = {"input_ids": torch.zeros(1, 2)}
    for threads, clock in ((1, time.process_time), (2, time.perf_counter)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        made = profiling._stopwatch([batch], 3)
        assert isinstance(made, Stopwatch)
        assert made.clock is clock


def test_kept_memory_is_counted_by_storage() -> None:
    """A bias keeps nothing; a rescaling keeps what it rescales; a larger LoRA keeps more of its own units."""
    model, batch = backbone().requires_grad_(False), {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    plain = kept_bytes(model, batch)
    kept = {
        name: kept_bytes(with_method(model, spec), batch) - plain
        for name, spec in {
            "bitfit": BitFit(sites=("attn.q",)),
            "ia3": IA3(sites=("attn.k",)),
            "lora4": LoRA(rank=4, sites=("ffn.in",)),
            "lora8": LoRA(rank=8, sites=("ffn.in",)),
        }.items()
    }
    assert 0 <= kept["bitfit"] < 100 < kept["ia3"]
    units = 2 * 2 * 8 * 4 * 4  # blocks, rows, tokens, units, bytes
    assert kept["lora8"] - kept["lora4"] >= units


# ---- reading and refusing ----------------------------------------------------------------------------------------


def test_the_cache_is_where_libraries_keep_theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv(CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "pelton"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "pelton"


CHANGED: list[tuple[str, Any, str]] = [
    ("backbone", "0" * 16, "was measured with backbone"),
    ("device", "an abacus", "device 'an abacus', but here it is"),
    ("versions", {"torch": "0.1"}, "versions"),
]


@pytest.mark.parametrize(("key", "value", "message"), CHANGED)
def test_a_table_of_something_else_is_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    model, path = backbone(), tmp_path / "table.json"
    profile(model, [LoRA()], shapes=[(1, 8)], timer=Machine(), path=path)
    values = json.loads(path.read_text())
    values["machine"][key] = value
    path.write_text(json.dumps(values))
    with pytest.raises(AdapterError, match=message):
        load_table(path, machine_of(model), find_anatomy(model))
    path.write_text("{")
    with pytest.raises(TrainingError, match=r"is no latency table .*Delete it and run pelton profile again"):
        load_table(path, machine_of(model), find_anatomy(model))


def test_what_cannot_be_profiled_or_estimated_is_refused() -> None:
    with pytest.raises(AnatomyError, match="'vit' is neither"):
        profile(backbone("vit"), [LoRA()], timer=Machine())
    with pytest.raises(SpecError, match="tokens <= 64"):
        profile(backbone(), [LoRA()], shapes=[(1, 65)], timer=Machine())
    with pytest.raises(SpecError, match="rows > 0"):
        profile(backbone(), [LoRA()], shapes=[(0, 8)], timer=Machine())
    with pytest.raises(AnatomyError, match="attn"):
        profile(backbone("deberta-v2"), [Prefix()], timer=Machine())
    empty = LatencyTable({}, find_anatomy(backbone()).blocks)
    with pytest.raises(TrainingError, match="needs 6 measurements, and the table has 0"):
        _ = empty.model
    with pytest.raises(TrainingError, match="The table is empty"):
        empty.reference(1, 8)


def test_other_shapes_scale_with_the_backbone() -> None:
    table = profile(backbone(), timer=Machine())
    assert table.reference(1, 32) == REFERENCE
    assert table.reference(16, 64) == pytest.approx(2 * REFERENCE)
    assert table.cost(LoRA(), 16, 64) > 0


def test_entries_take_the_place_of_older_ones() -> None:
    table = LatencyTable({}, find_anatomy(backbone()).blocks)
    entry = Entry(plain_spec(LoRA()), 1, 8, 1.1, 0.0, 1.0, 2, 1, 1)
    newer = Entry(plain_spec(LoRA()), 1, 8, 1.2, 0.0, 1.0, 2, 1, 1)
    assert table.added([entry]).added([newer]).entries == (newer,)
    assert entry.seconds == pytest.approx(0.05)


def test_the_command_profiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = backbone()
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(profiling, "_stopwatch", Machine())
    capsys.readouterr()
    assert command(["profile", str(tmp_path / "model"), "--shapes", "1x8", "--methods", "lora,ia3"]) == 0
    out = capsys.readouterr().out
    assert "lora" in out
    assert "each measurement predicted from the others is off by" in out
    assert out.strip().endswith(str(table_path(machine_of(AutoModel.from_pretrained(tmp_path / "model")))))
    assert command(["profile", str(tmp_path / "model"), "--methods", "lorra"]) == 2
    assert "Did you mean 'lora'" in capsys.readouterr().err
    assert command(["profile", str(tmp_path / "model"), "--shapes", "8"]) == 2
    assert "expected examples x tokens" in capsys.readouterr().err
