"""Ten examples a class of BANKING77: full fine-tuning, single methods, all together, and gated.

Every method trains the same recipe (`pelton fit banking77`) at two learning rates with the first seed. The rate with
the better accuracy on held-back training rows, 10 a class that the run was not trained on, is then trained with the
other seeds. The test split is only reported. Runs go to an append-only JSONL: an interrupted benchmark goes on where it
stopped, and several processes can share the work (`--only`).

    python benchmarks/quality.py [--only lora gated] [--seeds 0 1] [--out docs/data/banking77.jsonl]
    python benchmarks/quality.py --table
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

THREE = {"adapter.preset": None, "adapter.methods": ["lora", "bottleneck", "prefix"]}
METHODS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "full": ({"adapter": None, "training.head_learning_rate": 1e-3}, (1e-4, 2e-4)),
    "lora": ({"adapter.preset": "lora"}, (1e-3, 3e-3)),
    "bottleneck": ({"adapter.preset": "bottleneck"}, (1e-3, 3e-3)),
    "prefix": ({"adapter.preset": "prefix"}, (3e-3, 1e-2)),
    "ungated": ({**THREE, "adapter.gate": {"kind": "fixed", "value": 1.0}}, (1e-3, 3e-3)),
    "gated": (THREE, (1e-3, 3e-3)),
    "default": ({}, (1e-3, 3e-3)),
}
"""What each method changes in the recipe, and the two learning rates it chooses from."""

HELD_BACK = 10
"""Training rows a class that choose the learning rate."""


def one(method: str, rate: float, seed: int, extra: list[str]) -> dict[str, Any]:
    """Trains and evaluates one cell."""
    from pelton.tasks.load import load_task
    from pelton.training.fit import fit
    from pelton.training.loading import load_recipe

    changes, _ = METHODS[method]
    key = "training.backbone_learning_rate" if method == "full" else "training.learning_rate"
    settings = {**changes, key: rate, "training.seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"{k}={json.dumps(v)}" for k, v in settings.items()]
        recipe = load_recipe("banking77", [*overrides, f"output={folder}", *extra])
        start = time.perf_counter()
        run = fit(recipe)
        metrics = run.folder.read("metrics")
        drawn = set(load_task(recipe.task, seed).splits["train"].inputs)
        everything = load_task(recipe.task.model_copy(update={"shots": None}), seed).splits["train"]
        rest = [i for i, text in enumerate(everything.inputs) if text not in drawn]
        random.Random(seed).shuffle(rest)
        taken: dict[int, list[int]] = defaultdict(list)
        for i in rest:
            taken[int(everything.targets[i])].append(i)
        rows = [i for some in taken.values() for i in some[:HELD_BACK]]
        held = run.evaluate(everything.take(rows))
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "held_back": round(100 * held["accuracy"], 2),
        "test": round(100 * metrics["test"]["accuracy"], 2),
        "trainable": metrics["parameters"]["trainable"],
        "train_seconds": metrics["train_seconds"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def chosen(method: str, rows: list[dict[str, Any]]) -> float:
    """Returns the rate that was better on held-back rows with the first seed."""
    first = min(r["seed"] for r in rows if r["method"] == method)
    mine = [r for r in rows if r["method"] == method and r["seed"] == first]
    return float(max(mine, key=lambda r: float(r["held_back"]))["rate"])


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the Markdown table: for each method the rate that won on held-back rows, and its test accuracy."""
    lines = [
        "| method | learning rate | held-back accuracy | test accuracy | seeds | trainable |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method in METHODS:
        cells: dict[float, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            if row["method"] == method:
                cells[row["rate"]].append(row)
        if not cells:
            continue
        rate = chosen(method, rows)
        best = cells[rate]
        lines.append(
            f"| {method} | {rate:g} | {_mean(best, 'held_back')} | {_mean(best, 'test')} | {len(best)} | "
            f"{best[0]['trainable']:,} |"
        )
    return "\n".join(lines)


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    values = [r[key] for r in rows]
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--set", nargs="+", default=[], dest="extra", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "data" / "banking77.jsonl")
    parser.add_argument("--table", action="store_true", help="print the table of finished runs, train nothing")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.touch()

    def finished() -> list[dict[str, Any]]:
        return [json.loads(line) for line in args.out.read_text().splitlines()]

    if not args.table:
        for seed, method, which in itertools.product(args.seeds, args.only, (0, 1)):
            rate = METHODS[method][1][which]
            if seed != args.seeds[0] and rate != chosen(method, finished()):
                continue
            if any((r["method"], r["rate"], r["seed"]) == (method, rate, seed) for r in finished()):
                continue
            row = json.dumps(one(method, rate, seed, args.extra))
            print(row, flush=True)
            with args.out.open("a") as file:
                file.write(row + "\n")
    print(table(finished()))


if __name__ == "__main__":
    main()
