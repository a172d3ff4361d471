"""Live gates against those of training: the statistics, the verdict, the monitor, the command line."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ks_2samp

from fits import GATED, Make
from law import GATES, attached, together
from pelton import DriftMonitor, MLPGate, freeze_gates, gate_drift, prune, record_gates, revive
from pelton.cli.main import run as command
from pelton.errors import AdapterError, SpecError
from pelton.insight.drift import ALPHA, BINS, Samples, compare, psi, samples_of
from pelton.insight.monitor import Reservoir
from pelton.training.fit import fit
from pelton.training.run import Run
from tiny import sentences, write_jsonl
from zoo import ARCHS

BLOCKS, METHODS = 6, ("lora", "bottleneck")


def frame(values: np.ndarray[Any, Any]) -> pd.DataFrame:
    """A record of gates from values [examples, blocks, methods]."""
    examples, blocks, methods = np.indices(values.shape).reshape(3, -1)
    return pd.DataFrame(
        {
            "adapter": "default",
            "block": [f"encoder.layer.{index}" for index in blocks],
            "index": blocks,
            "method": [METHODS[number] for number in methods],
            "example": examples,
            "token": -1,
            "value": values.flatten(),
        }
    )


def softmax_values(random: np.random.Generator, count: int, shift: float = 0.0) -> np.ndarray[Any, Any]:
    """Gates that compete, whose blocks see the same example and so move together; [examples, blocks, methods]."""
    example = random.normal(size=(count, 1)) + random.normal(size=(count, BLOCKS)) + shift
    first = 1 / (1 + np.exp(-example))
    return np.stack([first, 1 - first], axis=-1)


def softmax_gates(random: np.random.Generator, count: int, shift: float = 0.0) -> pd.DataFrame:
    return frame(softmax_values(random, count, shift))


def samples(values: np.ndarray[Any, Any]) -> Samples:
    """What `samples_of` makes of `frame(values)`."""
    places = [(b, f"encoder.layer.{b}", method) for b in range(BLOCKS) for method in METHODS]
    return dict(zip(places, values.reshape(len(values), -1).T, strict=True))


# ---- statistics --------------------------------------------------------------------------------------------------


def test_psi_by_hand() -> None:
    reference = np.arange(100) / 100
    live = np.concatenate([np.full(30, 0.05), np.full(70, 0.95)])
    found = psi(reference, live)
    shares = [(0.10, 0.30), (0.10, 0.70), *[(0.10, 0.005)] * 8]  # an empty bin counts as half an example
    assert found == pytest.approx(sum((q - p) * np.log(q / p) for p, q in shares))
    assert psi(reference, reference) == 0.0
    assert psi(np.full(50, 0.3), np.full(50, 0.3)) == 0.0  # a gate that is always as open
    assert psi(np.full(50, 0.3), np.full(50, 0.1)) > 1
    assert psi(reference, reference[::2], bins=5) == pytest.approx(0.0)


def test_ks_is_scipys_and_corrected() -> None:
    random = np.random.default_rng(0)
    before, now = random.uniform(size=(300, 2, 2)), random.uniform(size=(200, 2, 2)) ** 1.2
    found = gate_drift(frame(before), frame(now)).table
    raw = []
    for row in found.itertuples():
        number = METHODS.index(str(row.method))
        expected = ks_2samp(before[:, row.index, number], now[:, row.index, number], method="asymp")
        index = row.Index
        assert found.loc[index, "ks"] == expected.statistic
        raw.append(expected.pvalue)
    order = np.argsort(raw)  # Benjamini and Hochberg: p · m / rank, made monotonous from above
    steps = np.minimum.accumulate((np.array(raw)[order] * 4 / np.arange(1, 5))[::-1])[::-1]
    np.testing.assert_allclose(found["p"].to_numpy()[order], np.minimum(steps, 1.0))


@pytest.mark.parametrize("count", [100, 400])
def test_without_drift_nearly_all_comparisons_are_stable(count: int) -> None:
    """Of 40 comparisons of 12 gates at most one may say anything but stable: 5 % of them are two."""
    levels = []
    for seed in range(40):
        random = np.random.default_rng(seed)
        levels.append(compare(samples(softmax_values(random, 512)), samples(softmax_values(random, count))).level)
    assert levels.count("stable") >= 39


def test_a_shift_is_found_and_a_small_one_is_watched() -> None:
    for seed in range(5):
        random = np.random.default_rng(seed)
        found = gate_drift(softmax_gates(random, 512), softmax_gates(random, 200, shift=1.5))
        assert found.level == "act"
        assert "re-training" in found.says
    random = np.random.default_rng(0)
    found = gate_drift(softmax_gates(random, 4000), softmax_gates(random, 4000, shift=0.5))
    assert found.level == "watch"
    assert "compare again" in found.says
    # significant, and too small to matter
    found = gate_drift(softmax_gates(random, 4000), softmax_gates(random, 4000, shift=0.2))
    assert found.level == "stable"
    assert found.table["p"].min() < ALPHA


def test_too_few_examples_are_named() -> None:
    random = np.random.default_rng(0)
    found = gate_drift(softmax_gates(random, 512), softmax_gates(random, 12, shift=5.0))
    assert found.level == "unknown"
    assert found.examples == (512, 12)
    assert found.says.startswith("Too few examples to say: 12 live ones and 512 of reference, where 100 of each")


def test_a_pruned_method_whose_gate_opens_is_worth_reviving() -> None:
    random = np.random.default_rng(0)
    before, now = softmax_gates(random, 512), softmax_gates(random, 512, shift=2.0)
    found = gate_drift(before, now, pruned=[("encoder.layer.1", "lora"), ("encoder.layer.2", "bottleneck")])
    assert found.opened == (("encoder.layer.1", "lora"),)  # the bottleneck's gate closed
    assert "Reviving them is due" in found.says
    assert found.table["pruned"].sum() == 2


def test_samples_are_one_value_an_example() -> None:
    values = softmax_values(np.random.default_rng(0), 7)
    found, expected = samples_of(frame(values)), samples(values)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[place], expected[place]) for place in expected)


def test_tokens_of_one_text_count_once() -> None:
    random = np.random.default_rng(0)
    before, now = softmax_gates(random, 300), softmax_gates(random, 150)
    tokens = [
        part.assign(token=token, value=part["value"] + change)
        for part in (now,)
        for token, change in ((0, 0.1), (1, -0.1))
    ]
    found = gate_drift(before, pd.concat(tokens))
    assert found.examples == (300, 150)
    pd.testing.assert_frame_equal(found.table, gate_drift(before, now).table)


def test_what_cannot_be_compared() -> None:
    random = np.random.default_rng(0)
    one = softmax_gates(random, 100)
    with pytest.raises(AdapterError, match="not the same ones"):
        gate_drift(one, one[one["index"] > 0])
    with pytest.raises(AdapterError, match="a table without adapter, block"):
        gate_drift(one, one[["value"]])
    with pytest.raises(AdapterError, match="got no gate values"):
        gate_drift(one, one[:0])
    with pytest.raises(AdapterError, match="got those of default, other"):
        gate_drift(pd.concat([one, one.assign(adapter="other")]), one)
    with pytest.raises(AdapterError, match="These gates are constant"):
        gate_drift(one.assign(example=-1), one)


# ---- the monitor -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "llama", "t5", "swin"])
@pytest.mark.parametrize("gate", ["mlp", "linear"])
def test_a_monitor_sees_what_a_record_has(name: str, gate: str) -> None:
    """The same inputs on both sides: no distance in any gate, whatever its granularity and padding."""
    arch = ARCHS[name]
    model = attached(arch, GATES[gate])
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    batches = [arch.inputs(batch=3, seed=seed) for seed in range(4)]
    with record_gates(model) as log, torch.no_grad():
        for batch in batches:
            arch.run(model, batch)
    monitor = DriftMonitor(model, log)
    with monitor, torch.inference_mode():
        arch.run(model, batches[0])
    with monitor, torch.no_grad():  # goes on where it was
        for batch in batches[1:]:
            arch.run(model, batch)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    found = monitor.report()
    assert monitor.seen == found.examples[1] == 12
    np.testing.assert_allclose(found.table["live"], found.table["reference"], atol=1e-6)
    assert found.level == "unknown"
    monitor.reset()
    assert monitor.seen == 0
    with pytest.raises(AdapterError, match="No gate was seen to open"):
        monitor.report()


def test_decoding_steps_are_no_examples() -> None:
    arch = ARCHS["llama"]
    model = attached(arch)
    inputs = arch.inputs(batch=2)
    with record_gates(model) as log, torch.no_grad():
        arch.run(model, inputs)
    with DriftMonitor(model, log) as monitor:
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert monitor.seen == 2
    np.testing.assert_allclose(monitor.report().table["psi"], 0.0, atol=1e-6)


def test_a_reservoir_is_bounded_and_fair() -> None:
    counts = np.zeros(40)
    for seed in range(400):
        kept = Reservoir(8, seed)
        for start in range(0, 40, 5):
            kept.add(torch.arange(start, start + 5.0)[:, None])
        assert kept.values().shape == (8, 1)
        assert len(set(kept.values().flatten().tolist())) == 8
        counts[kept.values().flatten().long().numpy()] += 1
    assert abs(counts / 400 - 8 / 40).max() < 0.08  # four standard errors
    assert kept.count == 40
    few = Reservoir(8)
    few.add(torch.ones(3, 2))
    assert few.values().shape == (3, 2)


def test_a_monitor_keeps_no_forward_alive() -> None:
    arch = ARCHS["bert"]
    model = attached(arch, MLPGate(hidden_size=8))
    with record_gates(model) as log:
        arch.run(model, arch.inputs())
    with DriftMonitor(model, log, capacity=2) as monitor:
        for seed in range(5):
            arch.run(model, arch.inputs(seed=seed)).sum().backward()
    assert monitor.seen == 15
    gc.collect()
    kept = [reservoir.rows for reservoir in monitor._kept.values()]
    assert all(rows is not None and rows.shape == (2, len(together(arch))) and rows.grad_fn is None for rows in kept)
    monitor.report()


def test_frozen_gates_do_not_drift() -> None:
    arch = ARCHS["bert"]
    model = attached(arch)
    with record_gates(model) as log:
        arch.run(model, arch.inputs())
    with pytest.raises(AdapterError, match=r"There is no adapter 'other' to watch\. There are: default"):
        DriftMonitor(model, log, adapter="other")
    with pytest.raises(SpecError, match="capacity >= 1"):
        DriftMonitor(model, log, capacity=0)
    freeze_gates(model, [arch.inputs()])
    with pytest.raises(AdapterError, match="These gates are constant"):
        DriftMonitor(model, log)
    with pytest.raises(AdapterError, match="These gates are constant"):
        DriftMonitor(attached(arch, "fixed"), log)


def test_a_monitor_knows_what_was_pruned() -> None:
    """The softmax gate has values for the pruned method; new inputs open it."""
    arch = ARCHS["bert"]
    model, kinds = attached(arch), [spec.kind for spec in together(arch)]
    whole = dict.fromkeys(kinds, 1.0)
    prune(model, keep=2 * len(kinds) - 1, importance={"0": whole | {"bitfit": 0.0}, "1": whole})
    batches = [arch.inputs(batch=4, seed=seed) for seed in range(60)]

    def open_up(value: float) -> None:
        with torch.no_grad():
            gate = model.base_model.model.bert.encoder.layer[0].pelton.gates["default"]
            gate.out.bias[kinds.index("bitfit")] = value

    open_up(-1.0)
    with record_gates(model) as log, torch.no_grad():
        for batch in batches[:30]:
            arch.run(model, batch)
    with DriftMonitor(model, log) as monitor, torch.no_grad():
        for batch in batches[30:]:
            arch.run(model, batch)
    assert monitor.report().level == "stable"
    monitor.reset()
    open_up(2.0)
    with monitor, torch.no_grad():
        for batch in batches[30:]:
            arch.run(model, batch)
    found = monitor.report()
    assert found.level == "act"
    assert [method for _, method in found.opened] == ["bitfit"]
    assert "Reviving" in found.says
    open_up(0.0)
    model.base_model.peft_config["default"].steps = ()  # as if it had gone in training
    assert not monitor.report().opened


# ---- runs and the command line -----------------------------------------------------------------------------------


@pytest.fixture
def trained(make: Make, tmp_path: Path) -> Run:
    from tiny import save_data

    save_data(tmp_path / "data", train=48, validation=16, test=200)
    return fit(make({**GATED, "gate": {"kind": "mlp", "init_std": 0.5}}))


def test_the_command_line(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(trained.folder.path)
    before = {path: path.read_bytes() for path in trained.folder.path.rglob("*") if path.is_file()}
    same = write_jsonl(tmp_path / "same.jsonl", [{"text": row["text"]} for row in sentences(200)])
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "and and very"} for _ in range(150)])
    few = write_jsonl(tmp_path / "few.jsonl", [{"text": "the film was good"}] * 3)
    assert command(["drift", run, "--data", str(same), "--fail-on", "watch"]) == 0
    out = capsys.readouterr().out
    assert "200 then, 200 now" in out
    assert "The gates open as they did: nothing is due." in out
    assert command(["drift", run, "--data", str(other)]) == 0
    assert "re-training with such examples is due" in capsys.readouterr().out
    assert command(["drift", run, "--data", str(other), "--fail-on", "act"]) == 1
    assert command(["drift", run, "--data", str(few), "--fail-on", "act"]) == 1
    assert "Too few examples to say: 3 live ones" in capsys.readouterr().out
    assert command(["drift", run, "--text", "the film was good"]) == 0
    assert command(["drift", run]) == 2
    assert command(["drift", run, "--data", str(tmp_path / "none.jsonl")]) == 2
    assert before == {path: path.read_bytes() for path in trained.folder.path.rglob("*") if path.is_file()}


def test_a_frozen_run_is_compared_by_the_gates_it_had(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(trained.folder.path)
    same = write_jsonl(tmp_path / "same.jsonl", [{"text": row["text"]} for row in sentences(200)])
    assert command(["prune", run, "--keep", "3"]) == 0
    assert command(["freeze", run]) == 0
    (gone,) = json.loads((trained.folder.path / "changes.json").read_text())[0]["gone"]
    capsys.readouterr()
    assert command(["drift", run, "--data", str(same)]) == 0
    out = capsys.readouterr().out
    assert "nothing is due" in out
    assert f"{gone['kind']} (pruned)" in out
    frozen = Run.load(trained.folder.path)
    assert frozen.model.peft_config["default"].gate_spec.kind == "frozen"
    assert revive(frozen.model) == ["freeze", "prune"]


def test_a_record_that_cannot_be_read_is_said(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run, record = str(trained.folder.path), trained.folder.gate_values
    record.write_bytes(b"broken")
    for error in ("ArrowInvalid", "FileNotFoundError"):
        assert command(["drift", run, "--text", "good"]) == 2
        said = "".join(capsys.readouterr().err.split())
        assert f"butcannotberead({error}).Copyit" in said
        record.unlink(missing_ok=True)
    assert command(["shrink", run, "--share", "0.9"]) == 0
    assert command(["drift", run, "--text", "good"]) == 0


def test_a_run_without_gates_that_read(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(make({**GATED, "gate": {"kind": "scalar"}}, max_steps=1))
    assert command(["drift", str(run.folder.path), "--text", "good"]) == 2
    assert "These gates are constant" in capsys.readouterr().err
    plain = fit(make(None, max_steps=1))
    assert command(["drift", str(plain.folder.path), "--text", "good"]) == 2
    assert "no Pelton adapter" in capsys.readouterr().err
    assert BINS == 10
