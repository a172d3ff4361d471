"""Searched against uniform and random architectures at half the parameters, on small real tasks.

For every task and seed it trains, with the same rows, head, steps and rates:

full      all methods under the default gate, in every block
search    the supernet; its gates choose within the budget (not scored: its result is `searched`)
searched  what the search chose, from the start
inherited the same, from the weights that it has in the supernet
uniform   the same in every block, within the budget
again     uniform, trained a second time from where the first ended: as long as `search` and `inherited` together
random    three random architectures within the budget; the best on held-back rows counts
taylor    what matters most of `full` by first-order importance, within the budget

`search`, `searched` and `inherited` take three runs, of which the last two compete on held-back rows; so do the three
of random search. With --bilevel the search alone takes two. The latency of the searched model is measured next to the
plain backbone and compared with what the table expects.

    python benchmarks/autopelt.py --data DIR [--tasks mrpc cola sst2 conll2003] [--seeds 3] [--steps 400]
        [--precision bf16 --attention eager] --out FILE

Finished parts are in FILE, one JSON line each, and are not run again. `--report` prints the table of what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)

import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

from pelton.bench.journal import Journal  # noqa: E402
from pelton.bench.protocol import MINILM, TASKS  # noqa: E402
from pelton.compress.importance import taylor  # noqa: E402
from pelton.compress.runs import training_batches  # noqa: E402
from pelton.insight.latency import Stopwatch  # noqa: E402
from pelton.search.architecture import Architecture  # noqa: E402
from pelton.search.autopelt import DERIVED, search  # noqa: E402
from pelton.search.choose import by_importance, random_architecture, uniform  # noqa: E402
from pelton.search.supernet import SearchSettings, prepare_search  # noqa: E402
from pelton.tasks.load import load_task  # noqa: E402
from pelton.training.fit import fit  # noqa: E402
from pelton.training.loading import parse_recipe  # noqa: E402
from pelton.training.recipe import AdapterSettings, Recipe  # noqa: E402
from pelton.tuner.twin import plain_twin  # noqa: E402

ROWS = {"mrpc": 3400, "cola": 2000, "sst2": 2000, "conll2003": 500}
HELD_BACK = 200
FULL: dict[str, Any] = {
    "methods": [
        {"kind": "lora", "rank": 8, "sites": ["attn.q", "attn.k", "attn.v", "attn.out", "ffn.in"]},
        {"kind": "bottleneck", "bottleneck_size": 48},
        {"kind": "prefix", "prefix_length": 10},
        {"kind": "ia3"},
    ],
    "gate": {"kind": "mlp", "activation": "sigmoid", "init": 0.9},
}
RANDOM = ("random-0", "random-1", "random-2")
WAYS = ("search", "searched", "inherited", "uniform", "again", *RANDOM, "full", "taylor")
SHOWN = {"searched": ("searched", "inherited"), "uniform": ("uniform",), "random": RANDOM}
"""What is compared at equal size: each the best on held-back rows of so many trainings."""
START = {"inherited": "search", "again": "uniform"}
"""Whose weights a way begins with."""
SHAPE = (8, 64)


def recipe(options: argparse.Namespace, task: str, seed: int, folder: str) -> Recipe:
    """The full gated model; what is trained in its place has the same rows, head, steps and rates."""
    place = str(Path(options.data).expanduser() / task)
    rows = {
        "examples": options.rows or ROWS[task],
        "validation_examples": HELD_BACK,
        "train": "train",
        "validation": "train",
    }
    values = {
        "name": f"{task}-{seed}",
        "backbone": MINILM,
        "attention": options.attention,
        "task": {**TASKS[task], **rows, "data": place},
        "adapter": FULL,
        "training": {
            "max_steps": options.steps,
            "evaluate_every": max(1, options.steps // 4),
            "batch_size": 16,
            "group_by_length": True,
            "learning_rate": 1e-3,
            "precision": options.precision,
            "seed": seed,
            "trackers": [],
        },
        "output": folder,
    }
    return parse_recipe(values, task)


class Study:
    """One task and seed: every way is trained once; what others need of it is read from the journal."""

    def __init__(self, options: argparse.Namespace, journal: Journal, task: str, seed: int) -> None:
        self.options, self.journal, self.task, self.seed = options, journal, task, seed
        self.settings = SearchSettings(budget_parameters=options.budget, bilevel=options.bilevel, shape=SHAPE)

    def weights(self, way: str) -> Path:
        """Where the adapter lies that a way ended with and another begins with."""
        return Path(f"{self.options.out}.adapters", f"{self.task}-{self.seed}-{way}")

    def done(self) -> dict[str, dict[str, Any]]:
        mine = {"task": self.task, "seed": self.seed, "steps": self.options.steps, "budget": self.options.budget}
        rows = [row for row in self.journal.records() if all(row.get(key) == value for key, value in mine.items())]
        return {row["way"]: row for row in rows}

    def run(self, way: str) -> None:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = self._run(way, recipe(self.options, self.task, self.seed, folder))
        row = {"task": self.task, "seed": self.seed, "way": way, "steps": self.options.steps}
        row |= {
            "budget": self.options.budget,
            "precision": self.options.precision,
            **found,
            "seconds": round(time.perf_counter() - started, 1),
        }
        self.journal.append(row)
        print(json.dumps({key: value for key, value in row.items() if key not in ("blocks", "importance")}), flush=True)

    def _run(self, way: str, full: Recipe) -> dict[str, Any]:
        if way == "full":
            return self._train_full(full)
        if way == "search":
            found = search(full, self.settings)
            shutil.copytree(found.run.folder.path / DERIVED, self.weights("search"), dirs_exist_ok=True)
            passes = 2 if self.options.bilevel else 1
            return {"runs": passes, "parameters": found.parameters, "blocks": found.architecture.to_dict()["blocks"]}
        _, price = prepare_search(full, self.settings)
        choices, limits = price.choices, price.limits
        if way in ("searched", "inherited"):
            blocks = {int(b): choice for b, choice in self.done()["search"]["blocks"].items()}
            architecture = Architecture(choices.methods, blocks)
        elif way in ("uniform", "again"):
            architecture = uniform(choices, limits)
        elif way == "taylor":
            architecture = by_importance(choices, self.done()["full"]["importance"], limits)
        else:
            architecture = random_architecture(choices, limits, seed=100 * self.seed + int(way[-1]))
        return self._train(way, full, architecture, choices.anatomy)

    def _train_full(self, full: Recipe) -> dict[str, Any]:
        run = fit(full)
        data = load_task(run.recipe.task, run.recipe.training.seed)
        importance = taylor(run.model, training_batches(run, data, labelled=True))
        size = sum(p.numel() for n, p in run.model.named_parameters() if ".pelton." in n)
        return {"runs": 1, "parameters": size, "importance": importance, **scores(run)}

    def _train(self, way: str, full: Recipe, architecture: Architecture, anatomy: Any) -> dict[str, Any]:
        start = str(self.weights(START[way])) if way in START else None
        adapter = AdapterSettings(**architecture.settings(anatomy), start=start)
        run = fit(full.model_copy(update={"adapter": adapter}))
        if way in START.values():
            shutil.copytree(run.folder.adapter, self.weights(way), dirs_exist_ok=True)
        blocks = architecture.to_dict()["blocks"]
        found = {"runs": 1, "parameters": architecture.parameters(anatomy), "blocks": blocks, **scores(run)}
        return found | (latency(run.model, architecture, full) if way == "searched" else {})


def scores(run: Any) -> dict[str, float]:
    metrics = run.folder.read("metrics")
    return {"validation": metrics["validation"]["score"], "test": metrics["test"]["score"]}


def latency(model: Any, architecture: Architecture, full: Recipe) -> dict[str, float]:
    """The time of a model as a ratio to its plain backbone's: as the table expects, and measured."""
    _, price = prepare_search(full, SearchSettings(alpha=1.0, shape=SHAPE))
    ids = torch.randint(model.config.vocab_size, SHAPE, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    (ratio,) = Stopwatch([batch], rounds=21, clock=clock)([model], plain_twin(model))
    return {
        "expected_latency": price.choices.cost(architecture)[1],
        "latency": ratio.ratio,
        "latency_spread": ratio.spread,
    }


def report(journal: Journal) -> str:
    """Scores on test rows: means over the seeds for which all ways that are compared are finished."""
    rows = journal.records()
    columns = SHOWN | {"scratch": ("searched",)} | {way: (way,) for way in ("inherited", "again", "full", "taylor")}
    lines = [f"{'task':<11}{'seeds':>6}" + "".join(f"{name:>11}" for name in columns)]
    means: dict[str, list[float]] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        cells = [cell for cell in _cells(rows, task) if all(way in cell for ways in SHOWN.values() for way in ways)]
        if not cells:
            continue
        line = f"{task:<11}{len(cells):>6}"
        for name, ways in columns.items():
            scores = [_best(cell, ways) for cell in cells if all(way in cell for way in ways)]
            if len(scores) < len(cells):
                line += f"{'–':>11}"
                continue
            means.setdefault(name, []).append(100 * statistics.mean(scores))
            line += f"{means[name][-1]:>11.2f}"
        lines.append(line)
        off = [cell["searched"]["expected_latency"] / cell["searched"]["latency"] - 1 for cell in cells]
        lines.append(f"{'':<11}expected ÷ measured latency − 1: {', '.join(f'{x:+.1%}' for x in off)}")
    if not means:
        return "Nothing is finished that can be compared."
    whole = {name: values for name, values in means.items() if len(values) == len(means["searched"])}
    lines.append(
        f"{'mean':<17}"
        + "".join(f"{statistics.mean(whole[c]):>11.2f}" if c in whole else f"{'–':>11}" for c in columns)
    )
    return "\n".join(lines)


def _best(cell: dict[str, dict[str, Any]], ways: Sequence[str]) -> float:
    """Returns the test score of the training that is best on held-back rows."""
    return float(max((cell[way] for way in ways), key=lambda row: row["validation"])["test"])


def _cells(rows: list[dict[str, Any]], task: str) -> Iterator[dict[str, dict[str, Any]]]:
    for seed in sorted({row["seed"] for row in rows if row["task"] == task}):
        yield {row["way"]: row for row in rows if row["task"] == task and row["seed"] == seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="a folder with one folder a task")
    parser.add_argument("--tasks", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--attention", choices=["eager", "sdpa"])
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="in the order of the list above"
    )
    parser.add_argument("--rows", type=int, help="training examples of every task, for a trial")
    parser.add_argument("--bilevel", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", action="store_true", help="print what is finished, and stop")
    options = parser.parse_args()
    logging.set_verbosity_error()
    journal = Journal(options.out)
    if not options.report:
        if options.data is None:
            parser.error("--data DIR is needed to run")
        for seed in range(options.seeds):
            for task in options.tasks:
                study = Study(options, journal, task, seed)
                for way in options.ways:
                    if way not in study.done():
                        study.run(way)
    print(report(journal))


if __name__ == "__main__":
    main()
