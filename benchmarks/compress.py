"""From gated to small: what pruning, freezing and folding a trained adapter costs, in points, parameters and time.

For each task and seed one gated default adapter is trained (2,000 rows of a GLUE task, 10 a class of BANKING77). It is
then made small in each of two ways, to at most a share of the adapter's parameters, frozen, and folded:

prune   whole methods leave blocks, the least important by first-order importance on training rows
shrink  every LoRA loses its smallest singular values, every bottleneck its weakest units; no data is needed

Scores are those of the test rows. One JSON line each:

score        before, smaller, frozen, folded
parameters   of the adapter, its gates among them: before, smaller, frozen, folded
inference    time of the model ÷ time of the plain backbone before and in the end, batches of 32 of the test rows,
             interleaved, median over rounds; spread is the interquartile range

    python benchmarks/compress.py --data DIR [--tasks mrpc cola sst2 banking77] [--seeds 3] [--share 0.6] [--out FILE]
    python benchmarks/compress.py --table [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers.utils import logging

from pelton.bench.journal import Journal
from pelton.compress.fold import fold
from pelton.compress.freeze import freeze_gates
from pelton.compress.importance import taylor
from pelton.compress.prune import prune
from pelton.compress.runs import adapter_size, training_batches
from pelton.compress.shrink import shrink
from pelton.compress.steps import adapter_of
from pelton.insight.latency import Stopwatch
from pelton.tasks.base import Examples
from pelton.tasks.load import Loaded, load_task
from pelton.training.fit import fit
from pelton.training.loading import load_recipe
from pelton.training.run import Run
from pelton.tuner.controls import tuners

TASKS = ("mrpc", "cola", "sst2", "banking77")
ROWS = 2000
ROUNDS = 15
STEPS = ("gated", "smaller", "frozen", "folded")
WAYS = ("prune", "shrink")


def recipe(task: str, seed: int, data: Path, output: str, extra: list[str]) -> Any:
    changes = [f"output={output}", f"training.seed={seed}", "training.trackers=none", *extra]
    if task == "banking77":
        return load_recipe("banking77", changes)
    glue = [f"task.name={task}", f"task.data={data}", f"task.examples={ROWS}", "task.validation_examples=400"]
    return load_recipe("glue", [*glue, "training.epochs=6", "training.batch_size=16", *changes])


def cell(task: str, seed: int, data: Path, share: float, rounds: int, extra: list[str]) -> Iterator[dict[str, Any]]:
    """Trains one adapter and makes it small in each way."""
    with tempfile.TemporaryDirectory() as folder:
        run = fit(recipe(task, seed, data, folder, extra))
        rows = load_task(run.recipe.task, run.recipe.training.seed)
        examples = rows.splits["test"]
        features = run.task.judged(examples, run.processor)
        watch, plain = stopwatch(run, examples, rounds), copy.deepcopy(run.model).unload()
        for way in WAYS:
            small = replace(run, model=copy.deepcopy(run.model))
            tuner, adapter = adapter_of(small.model, None)
            scores, sizes, times = {}, {}, {}

            def note(name: str) -> None:
                scores[name] = round(100 * small.evaluate(examples, features)["score"], 3)  # noqa: B023
                sizes[name] = adapter_size(tuner, adapter)  # noqa: B023

            note("gated")
            make_smaller(small, rows, way, int(share * sizes["gated"]))
            note("smaller")
            freeze_gates(small.model, training_batches(small, rows, labelled=False))
            note("frozen")
            small = replace(small, model=fold(small.model))
            note("folded")
            found = watch([run.model, small.model], plain)
            for name, time in zip(("gated", "folded"), found, strict=True):
                times[name] = {"ratio": round(time.ratio, 3), "spread": round(time.spread, 3)}
            yield {
                "task": task,
                "seed": seed,
                "share": share,
                "way": way,
                "score": scores,
                "parameters": sizes,
                "inference": times,
            }


def make_smaller(run: Run, rows: Loaded, way: str, budget: int) -> None:
    """Prunes or shrinks an adapter until its methods have no more parameters than the budget."""
    if way == "prune":
        prune(run.model, budget_params=budget, importance=taylor(run.model, training_batches(run, rows, labelled=True)))
        return
    (tuner,) = tuners(run.model)
    methods = sum(p.numel() for block in tuner.blocks() for p in block.methods.parameters())
    shrink(run.model, share=math.floor(8 * budget / methods) / 8)  # whole ranks of 8


def stopwatch(run: Run, examples: Examples, rounds: int) -> Stopwatch:
    """Times models on some of the test rows."""
    some = examples.take(range(min(256, len(examples))))
    encoded, collate = run.task.encode(some.inputs, run.processor), run.task.collator(run.processor)
    starts = range(0, len(encoded), 32)
    return Stopwatch(
        [collate([encoded[i] for i in range(s, min(s + 32, len(encoded)))]) for s in starts], rounds=rounds
    )


def table(records: list[dict[str, Any]]) -> str:
    """Returns Markdown: a row a way and task, means over seeds; a row of means over tasks for each way."""
    lines = [
        "| way | task | seeds | gated | smaller | frozen | folded | frozen − gated | parameters | inference |",
        "|" + " --- |" * 10,
    ]
    for way in WAYS:
        changes = []
        for task in TASKS:
            mine = [record for record in records if record["task"] == task and record["way"] == way]
            if not mine:
                continue
            means = {name: statistics.mean(record["score"][name] for record in mine) for name in STEPS}
            lost = [record["score"]["frozen"] - record["score"]["gated"] for record in mine]
            changes.append(statistics.mean(lost))
            share = statistics.mean(r["parameters"]["frozen"] / r["parameters"]["gated"] for r in mine)
            times = {name: statistics.median(r["inference"][name]["ratio"] for r in mine) for name in STEPS[::3]}
            spread = f" ± {statistics.stdev(lost):.2f}" if len(lost) > 1 else ""
            cells = [
                *(f"{means[name]:.2f}" for name in STEPS),
                f"{changes[-1]:+.2f}{spread}",
                f"{share:.0%}",
                f"{times['gated']:.3f} → {times['folded']:.3f}",
            ]
            lines.append(f"| {way} | {task} | {len(mine)} | {' | '.join(cells)} |")
        if changes:
            lines.append(f"| {way} | mean |  |  |  |  |  | {statistics.mean(changes):+.2f} |  |  |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with one folder a task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--set", nargs="*", default=[], help="further changes of the recipes")
    parser.add_argument("--out", type=Path, default=Path("docs/data/compress.jsonl"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    journal = Journal(args.out)
    for seed in range(0 if args.table else args.seeds):
        for task in args.tasks:
            key = f"{task}-{seed}-{args.share}"
            with journal.claim(key) as mine:
                if mine and not any(f"{r['task']}-{r['seed']}-{r['share']}" == key for r in journal.records()):
                    for record in cell(task, seed, args.data, args.share, args.rounds, args.set):
                        journal.append(record)
                        print(json.dumps(record), flush=True)
    print(table([record for record in journal.records() if record["share"] == args.share]))


if __name__ == "__main__":
    main()
