"""Batches: by length, by token budget, by class; the same in a resumed run and on every process."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from transformers import TrainerCallback

from fits import At, Make, assert_same, press_ctrl_c, weights
from pelton.errors import RecipeError
from pelton.training.batching import TokenBatches, balanced, feature_lengths
from pelton.training.fit import Interrupted, fit, resume
from tiny import sentences, write_jsonl


def ragged(count: int = 500, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).geometric(0.04, count).clip(3, 128).tolist()


def epoch(sampler: TokenBatches, seed: int) -> list[list[int]]:
    sampler.generator.manual_seed(seed)
    return list(sampler)


@pytest.mark.parametrize("tokens", [128, 200, 1000, 10**6])
@pytest.mark.parametrize("count", [1, 2, 37, 500])
def test_every_example_comes_once_and_no_batch_is_over_the_budget(count: int, tokens: int) -> None:
    lengths = ragged(count)
    sampler = TokenBatches(lengths, tokens)
    for seed in (0, 1):
        batches = epoch(sampler, seed)
        assert len(batches) == len(sampler)
        assert sorted(chain.from_iterable(batches)) == list(range(count))
        assert all(len(batch) * max(lengths[i] for i in batch) <= tokens for batch in batches)


def test_batches_are_full_and_of_like_length() -> None:
    lengths = ragged(3000)
    batches = epoch(TokenBatches(lengths, 1024), 0)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert sum(lengths) / padded > 0.85
    assert padded / (1024 * len(batches)) > 0.85
    order = np.random.default_rng(0).permutation(len(lengths))
    at_random = sum(len(rows) * max(lengths[i] for i in rows) for rows in np.array_split(order, len(batches)))
    assert at_random > 2 * padded


def test_epochs_differ_and_are_drawn_again_from_their_seed() -> None:
    sampler = TokenBatches(ragged(), 256)
    first, second, again = (epoch(sampler, seed) for seed in (3, 4, 3))
    assert first == again
    assert len(first) == len(second)
    assert {tuple(sorted(batch)) for batch in first} != {tuple(sorted(batch)) for batch in second}
    sizes = [max(ragged()[i] for i in batch) for batch in first]
    assert sizes != sorted(sizes)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("count", [1, 5, 500])
def test_processes_share_the_batches_evenly(processes: int, count: int) -> None:
    shards = []
    for index in range(processes):
        sampler = TokenBatches(ragged(count), 256, processes)
        sampler.generator.manual_seed(1)
        shard = BatchSamplerShard(sampler, processes, index)
        shards.append(list(shard))
        assert len(shards[-1]) == len(shard)
    assert len({len(batches) for batches in shards}) == 1
    seen = Counter(chain.from_iterable(chain.from_iterable(shards)))
    assert set(seen) == set(range(count))
    alone = len(TokenBatches(ragged(count), 256))
    assert sum(map(len, shards)) == -(-alone // processes) * processes


def test_an_example_over_the_budget_is_named() -> None:
    with pytest.raises(
        RecipeError, match=r"longest training example, which has 90 tokens \(example 3 of 4\). Raise it"
    ):
        TokenBatches([5, 7, 90, 6], 64)


def test_lengths_are_those_of_the_rows_also_when_rows_were_chosen() -> None:
    rows = [list(range(n)) for n in ragged(40)]
    features = datasets.Dataset.from_dict({"input_ids": rows, "labels": [0] * 40})
    chosen = features.select([3, 1, 17])
    for one, expected in ((features, rows), (chosen, [rows[3], rows[1], rows[17]])):
        found = feature_lengths(one)
        assert found is not None
        assert found.tolist() == [len(row) for row in expected]
    assert feature_lengths(datasets.Dataset.from_dict({"pixel_values": [[1.0]]})) is None


def test_oversampling_draws_every_class_alike() -> None:
    classes = np.array([0] * 900 + [1] * 90 + [2] * 10)
    sampler = balanced(classes)
    sampler.generator.manual_seed(0)
    drawn = list(sampler)
    assert len(drawn) == len(classes)
    shares = np.bincount(classes[drawn]) / len(drawn)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.05)


# ---- in a run ----------------------------------------------------------------------------------------------------


class Seen(TrainerCallback):  # type: ignore[misc]
    """Counts what the model was trained on."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []
        self.labels: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.handle = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.handle.remove()

    def _look(self, model: Any, args: Any, inputs: Any) -> None:
        if model.training:
            self.batches.append(tuple(inputs["input_ids"].shape))
            self.labels += inputs["labels"].tolist()


ORDERS: list[dict[str, Any]] = [
    {"group_by_length": True},
    {"batching": {"tokens": 40}},
    {"batching": {"oversample": True}},
    {"batching": {"tokens": 20}, "gradient_accumulation": 3},
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("step", [2, 9])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(make: Make, order: Any, step: int) -> None:
    settings = {"epochs": 4, "evaluate_every": 3, **order}
    whole = fit(make(**settings))
    with pytest.raises(Interrupted) as stopped:
        fit(make(**settings), callbacks=[At(step, press_ctrl_c)])
    assert_same(weights(whole), weights(resume(stopped.value.folder)))


def test_a_token_budget_bounds_the_batches_of_a_run(make: Make) -> None:
    seen = Seen()
    run = fit(make(batching={"tokens": 40}), callbacks=[seen])
    assert all(rows * width <= 40 for rows, width in seen.batches)
    assert len({rows for rows, _ in seen.batches}) > 1
    assert len(seen.labels) == 2 * 48
    assert run.folder.read("metrics")["steps"] == len(seen.batches)


def test_oversampling_balances_a_run(make: Make, tmp_path: Path) -> None:
    rows = [row for i, row in enumerate(sentences(80)) if row["label"] == "warm" or i % 10 == 1]
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    shares = []
    for oversample in (False, True):
        seen = Seen()
        fit(make(batching={"oversample": oversample}, epochs=6), callbacks=[seen])
        shares.append(float(np.mean(seen.labels)))
    assert shares[0] == pytest.approx(40 / 48)
    assert shares[1] == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"batching": {"tokens": 4, "oversample": True}},
            "training.batching: oversample and tokens exclude each other",
        ),
        ({"batching": {"tokens": 4}, "group_by_length": True}, "group_by_length and batching.tokens exclude"),
        (
            {"batching": {"oversample": True}, "group_by_length": True},
            "group_by_length and batching.oversample exclude",
        ),
        (
            {"batching": {"oversample": True}, "loss": {"class_weights": "inverse"}},
            "batching.oversample and loss.class_weights=inverse both balance the classes",
        ),
        (
            {"batching": {"tokens": 0}},
            "training.batching.tokens: input should be greater than or equal to 1, but got 0",
        ),
        ({"batching": {"token": 9}}, "unknown key 'training.batching.token'. Did you mean 'training.batching.tokens'?"),
    ],
)
def test_orders_that_do_not_go_together(make: Make, change: Any, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        make(**change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_classes_that_examples_do_not_have(make: Make, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": "the film", "label": i / 7} for i in range(24)])
    with pytest.raises(RecipeError, match=r"training.batching.oversample draws examples by their class"):
        fit(make(task={"kind": "text-regression"}, batching={"oversample": True}))


def test_a_budget_that_is_too_small_fails_before_a_step(make: Make) -> None:
    with pytest.raises(RecipeError, match=r"training.batching.tokens=6 holds no batch"):
        fit(make(batching={"tokens": 6}))


def test_two_orders_of_one_seed_differ(make: Make) -> None:
    found = [weights(fit(make(epochs=1, **order))) for order in ({}, *ORDERS[:3])]
    for other in found[1:]:
        assert any(not torch.equal(value, other[name]) for name, value in found[0].items())
