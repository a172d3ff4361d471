"""From gated to small: what pruning, freezing and folding a trained adapter costs, in points, parameters and time.

For each task and seed one gated default adapter is trained (2,000 rows of a GLUE task, 10 a class of BANKING77), then
pruned by first-order importance until its methods have a share of the adapter's parameters, frozen, and folded. Scores
are those of the test rows; what is pruned is chosen on training rows. One JSON line each:

score        before, pruned, frozen, folded
parameters   of the adapter: before, pruned, frozen, folded
inference    time of the model ÷ time of the plain backbone, batches of 32 of the test rows, interleaved, median over
             rounds; spread is the interquartile range

    python benchmarks/compress.py --data DIR [--tasks mrpc cola sst2 banking77] [--seeds 3] [--share 0.6] [--out FILE]
    python benchmarks/compress.py --table [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
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
from pelton.compress.steps import adapter_of
from pelton.insight.latency import Stopwatch
from pelton.tasks.load import load_task
from pelton.training.fit import fit
from pelton.training.loading import load_recipe

TASKS = ("mrpc", "cola", "sst2", "banking77")
ROWS = 2000
ROUNDS = 15
STEPS = ("gated", "pruned", "frozen", "folded")


def recipe(task: str, seed: int, data: Path, output: str, extra: list[str]) -> Any:
    changes = [f"output={output}", f"training.seed={seed}", "training.trackers=none", *extra]
    if task == "banking77":
        return load_recipe("banking77", changes)
    glue = [f"task.name={task}", f"task.data={data}", f"task.examples={ROWS}", "task.validation_examples=400"]
    return load_recipe("glue", [*glue, "training.epochs=6", "training.batch_size=16", *changes])


def one(task: str, seed: int, data: Path, share: float, rounds: int, extra: list[str]) -> dict[str, Any]:
    """Trains one adapter and makes it small, step by step."""
    with tempfile.TemporaryDirectory() as folder:
        run = fit(recipe(task, seed, data, folder, extra))
        rows = load_task(run.recipe.task, run.recipe.training.seed)
        examples = rows.splits["test"]
        features = run.task.judged(examples, run.processor)
        tuner, adapter = adapter_of(run.model, None)
        plain = copy.deepcopy(run.model).unload()
        scores, sizes, times = {}, {}, {}

        def note(name: str, model: Any) -> None:
            small = type(run)(run.folder, run.recipe, run.task, run.processor, model)
            scores[name] = round(100 * small.evaluate(examples, features)["score"], 3)
            sizes[name] = adapter_size(tuner, adapter)
            (found,) = watch([model], plain)
            times[name] = {"ratio": round(found.ratio, 3), "spread": round(found.spread, 3)}

        some = examples.take(range(min(256, len(examples))))
        encoded, collate = run.task.encode(some.inputs, run.processor), run.task.collator(run.processor)
        batches = [
            collate([encoded[i] for i in range(s, min(s + 32, len(encoded)))]) for s in range(0, len(encoded), 32)
        ]
        watch = Stopwatch(batches, rounds=rounds)
        note("gated", run.model)
        prune(
            run.model,
            budget_params=int(share * sizes["gated"]),
            importance=taylor(run.model, training_batches(run, rows, labelled=True)),
        )
        note("pruned", run.model)
        freeze_gates(run.model, training_batches(run, rows, labelled=False))
        note("frozen", run.model)
        whole = fold(run.model)
        note("folded", whole)
        if whole is not run.model:
            sizes["folded"] = 0
    return {"task": task, "seed": seed, "share": share, "score": scores, "parameters": sizes, "inference": times}


def table(records: list[dict[str, Any]]) -> str:
    """Returns Markdown: a row a task, means over seeds."""
    lines = [
        "| task | seeds | gated | pruned | frozen | folded | parameters left | inference gated → folded |",
        "|" + " --- |" * 8,
    ]
    for task in dict.fromkeys(record["task"] for record in records):
        mine = [record for record in records if record["task"] == task]
        means = {
            key: {name: statistics.mean(record[key][name] for record in mine) for name in STEPS}
            for key in ("score", "parameters")
        }
        times = {name: statistics.median(r["inference"][name]["ratio"] for r in mine) for name in STEPS}
        scores = " | ".join(f"{means['score'][name]:.2f}" for name in STEPS)
        share = means["parameters"]["frozen"] / means["parameters"]["gated"]
        lines.append(
            f"| {task} | {len(mine)} | {scores} | {share:.0%} | {times['gated']:.3f} → {times['folded']:.3f} |"
        )
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
                    record = one(task, seed, args.data, args.share, args.rounds, args.set)
                    journal.append(record)
                    print(json.dumps(record), flush=True)
    print(table(journal.records()))


if __name__ == "__main__":
    main()
