"""A MiniGPT that has learned Shakespeare is taught another text: what it learns, and what it forgets.

The backbone is a run of `pelton fit minigpt-shakespeare`. The other text is the questions of GSM8K; characters that
the backbone's tokenizer does not know (digits above all) are read as one unknown token, and their share is reported.
Full fine-tuning, LoRA on every linear site as in its paper, and Pelton's default train the recipe `minigpt-adapt` for
the same steps. Of two learning rates each, the one with the lower loss on held-back questions, with the first seed, is
trained with the others.

Forgetting is the loss on Shakespeare's test part after adaptation less that before, with the adapter on. With an
adapter off it is what the backbone gives, to the bit: that is measured too. Finished runs are lines of an append-only
file.

    python benchmarks/minigpt.py --data FOLDER --backbone RUN/model [--steps 60] [--seeds 0 1 2] [--out FILE.jsonl]
    python benchmarks/minigpt.py --table --out FILE.jsonl

FOLDER has tiny_shakespeare/test.txt.gz and gsm8k/{train,test}.jsonl.gz.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from pelton.methods import LINEAR_SITES
from pelton.tasks.base import Examples
from pelton.training.fit import fit
from pelton.training.loading import load_recipe
from pelton.training.prepare import prepare
from pelton.training.run import Run

LORA = {
    "methods": [{"kind": "lora", "sites": list(LINEAR_SITES)}],
    "gate": {"kind": "fixed", "value": 1.0},
    "init": "random",
}
METHODS: dict[str, tuple[dict[str, Any], str, tuple[float, float]]] = {
    "full": ({"adapter": None}, "training.backbone_learning_rate", (3e-4, 1e-3)),
    "lora": ({"adapter": LORA}, "training.learning_rate", (3e-3, 1e-2)),
    "pelton": ({}, "training.learning_rate", (3e-3, 1e-2)),
}
"""What each method changes in the recipe, the key of its rate, and the rates that it chooses from."""

TRAIN, VALIDATION, TEST = 2000, 100, 100
"""Questions that are used; the first come from GSM8K's training rows, the last from its test rows."""


def main() -> None:
    options = _options()
    if not options.table:
        with tempfile.TemporaryDirectory() as folder, options.out.open("a", buffering=1, encoding="utf-8") as file:
            for line in study(options, Path(folder)):
                print(json.dumps(line), flush=True)
                file.write(json.dumps(line) + "\n")
    print(table(_read(options.out)))


def study(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields what the backbone gives, then every run that is not in the file yet."""
    known = _read(options.out)
    plays = gzip.decompress((options.data / "tiny_shakespeare" / "test.txt.gz").read_bytes()).decode()
    questions = write_questions(options.data / "gsm8k", folder / "questions")
    task = Task(str(options.backbone), str(questions), str(folder / "runs"), options.steps, Examples([plays], [plays]))
    before = next((line for line in known if line["stage"] == "before"), None)
    if before is None:
        before = {"stage": "before", **task.before()}
        yield before
    for method, (_, _, rates) in METHODS.items():
        done = {(line["rate"], line["seed"]): line for line in known if line.get("method") == method}
        for rate, seed in [(rate, options.seeds[0]) for rate in rates]:
            if (rate, seed) not in done:
                done[rate, seed] = task.adapt(method, rate, seed, before)
                yield done[rate, seed]
        best = chosen(list(done.values()), options.seeds[0])
        for seed in options.seeds[1:]:
            if (best, seed) not in done:
                yield task.adapt(method, best, seed, before)


class Task:
    """Adapting one backbone to the questions."""

    def __init__(self, backbone: str, data: str, output: str, steps: int, plays: Examples) -> None:
        self.changes = {"backbone": backbone, "task.data": data, "task.text_column": "question", "output": output}
        self.steps, self.plays = steps, plays

    def recipe(self, **changes: Any) -> Any:
        every = {"training.max_steps": self.steps, "training.evaluate_every": self.steps, "training.trackers": "none"}
        return load_recipe(
            "minigpt-adapt", [f"{k}={json.dumps(v)}" for k, v in {**self.changes, **every, **changes}.items()]
        )

    def before(self) -> dict[str, Any]:
        """Judges the backbone on the questions and on the plays."""
        prepared = prepare(self.recipe(adapter=None))
        run = Run(None, prepared.recipe, prepared.data.task, prepared.processor, prepared.model)  # type: ignore[arg-type]
        new = run.evaluate(prepared.data.splits["test"])
        return {
            "new": new["loss_per_char"],
            "unknown": new["unknown"],
            "old": run.evaluate(self.plays)["loss_per_char"],
        }

    def adapt(self, method: str, rate: float, seed: int, before: dict[str, Any]) -> dict[str, Any]:
        """Trains one run, and judges it on the plays."""
        changes, key, _ = METHODS[method]
        run = fit(self.recipe(**changes, **{key: rate, "training.seed": seed}))
        metrics = run.folder.read("metrics")
        off = nullcontext() if method == "full" else run.model.disable_adapter()
        forgotten = run.evaluate(self.plays)["loss_per_char"] - before["old"]
        with off:
            without = None if method == "full" else run.evaluate(self.plays)["loss_per_char"] - before["old"]
        return {
            "stage": "adapted",
            "method": method,
            "rate": rate,
            "seed": seed,
            "steps": metrics["steps"],
            "validation": metrics["validation"]["loss_per_char"],
            "new": metrics["test"]["loss_per_char"],
            "forgetting": forgotten,
            "forgetting_off": without,
            "trainable": metrics["parameters"]["trainable"],
            "train_seconds": metrics["train_seconds"],
        }


def chosen(lines: list[dict[str, Any]], seed: int) -> float:
    """Returns the rate with the lower loss on held-back questions, with one seed."""
    return float(min((line for line in lines if line["seed"] == seed), key=lambda line: line["validation"])["rate"])


def table(lines: list[dict[str, Any]]) -> str:
    """Writes a Markdown table of the chosen rates; ± is the standard deviation over seeds."""
    before = next(line for line in lines if line["stage"] == "before")
    runs = defaultdict(list)
    for line in lines:
        if line["stage"] == "adapted":
            runs[line["method"]].append(line)
    rows = [
        f"Before: {before['new']:.3f} nats a character on the questions ({before['unknown']:.1%} of them unknown), "
        f"{before['old']:.3f} on the plays.",
        "",
        "| method | rate | questions | forgetting, on | forgetting, off | seeds | trainable |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, found in runs.items():
        rate = chosen(found, found[0]["seed"])
        kept = [line for line in found if line["rate"] == rate]
        off = "–" if kept[0]["forgetting_off"] is None else f"{max(abs(line['forgetting_off']) for line in kept):.3g}"
        cells = [method, f"{rate:g}", _spread(kept, "new"), _spread(kept, "forgetting"), off, str(len(kept))]
        rows.append(f"| {' | '.join([*cells, format(kept[0]['trainable'], ',')])} |")
    return "\n".join(rows)


def _spread(lines: list[dict[str, Any]], name: str) -> str:
    values = [line[name] for line in lines]
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def write_questions(source: Path, folder: Path) -> Path:
    """Writes the first questions: train and validation of GSM8K's training rows, test of its test rows."""
    rows = {split: _read(source / f"{split}.jsonl.gz") for split in ("train", "test")}
    parts = {"train": rows["train"][:TRAIN], "validation": rows["train"][TRAIN : TRAIN + VALIDATION]}
    folder.mkdir(parents=True)
    for split, some in {**parts, "test": rows["test"][:TEST]}.items():
        lines = [json.dumps({"question": row["question"]}) + "\n" for row in some]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.decode("utf-8").split("\n") if line]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A MiniGPT is taught another text.")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("minigpt.jsonl"))
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
