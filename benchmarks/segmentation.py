"""What pretraining by reconstruction brings to segmentation, and what dilated attention does in both stages.

Each cell trains a small Recon on CamVid and gives the mean IoU of its 60 test images. Fine-tuning is on 24 of the 120
training images, with one budget for all; pretraining is on all 120, without their masks:

scratch      random weights, fine-tuned
plain        pretrained, then fine-tuned
long         likewise, pretrained five times as long
0 … 0.1      as `plain`, with dilated attention (3 × 3 patches, every other one) at this share in both stages
learned      likewise, each block's share learned from 0.01 on, in both stages

Models are the last of their training, not the best on validation images. Standard deviations are over seeds: of the
weights, the order, what is hidden, and which images have labels. One JSON line each:

    python benchmarks/segmentation.py --data DIR [--seeds 3] [--cells scratch plain 0.01 …] [--out FILE]
    python benchmarks/segmentation.py --table [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers.utils import logging

from pelton.bench.journal import Journal
from pelton.training.fit import fit
from pelton.training.loading import load_recipe
from pelton.training.run import Run
from pelton.tuner.summary import gate_summary

RATIOS = ("0", "0.01", "0.05", "0.1")
UNDILATED = ("scratch", "plain", "long")
CELLS = (*UNDILATED, *RATIOS, "learned")
EPOCHS, LONG = 30, 150
LAST = "training.evaluate_every=1000000"
FINE_TUNING = (
    "task.examples=24",
    "training.epochs=60",
    "training.batch_size=4",
    "training.backbone_learning_rate=5.0e-4",
    LAST,
)
METRICS = ("mean_iou", "pixel_accuracy", "loss")


def adapter(cell: str, stage: str) -> list[str]:
    """Returns what a recipe says of dilated attention."""
    if cell in UNDILATED:
        return []
    fixed = f"{{kind: fixed, values: {{dilated: {cell}}}}}"
    gate = "{kind: scalar, init: 0.01}" if cell == "learned" else fixed
    methods = "[{kind: dilated, kernel: 3, dilation: 2, space: grid}]"
    rate = ["training.gate_learning_rate=1.0e-2"] if cell == "learned" else []
    return [f"adapter={{methods: {methods}, gate: {gate}}}", "training.train_backbone=true", *rate]


def train(name: str, cell: str, seed: int, data: Path, changes: list[str]) -> Run:
    """Trains one stage."""
    more = [f"task.data={data}", f"training.seed={seed}", "training.trackers=none"]
    return fit(load_recipe(name, [*more, *adapter(cell, name), *changes]))


def one(cell: str, seed: int, data: Path, extra: tuple[list[str], list[str]]) -> dict[str, Any]:
    """Pretrains and fine-tunes one model."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        first, changes = None, [f"output={folder}"]
        if cell != "scratch":
            epochs = f"training.epochs={LONG if cell == 'long' else EPOCHS}"
            first = train("recon-pretrain", cell, seed, data, [*changes, epochs, LAST, *extra[0]])
            changes += [f"backbone={first.folder.model}", "backbone_config={}"]
        run = train("camvid-segment", cell, seed, data, [*changes, *FINE_TUNING, *extra[1]])
        test = run.folder.read("metrics")["test"]
        gates = [] if cell in UNDILATED else gate_summary(run.model).dilated.round(4).tolist()
        return {
            "cell": cell,
            "seed": seed,
            "pretraining_loss": None if first is None else round(first.folder.read("metrics")["test"]["loss"], 4),
            **{name: round(test[name], 4) for name in METRICS},
            "classes": {name.removeprefix("iou_"): round(v, 4) for name, v in test.items() if name.startswith("iou_")},
            "dilated": gates,
            "cpu_seconds": round(time.process_time() - started, 1),
        }


def table(records: list[dict[str, Any]]) -> str:
    """Returns Markdown: a row a cell, means and standard deviations over seeds."""
    lines = ["| | seeds | mean IoU | pixel accuracy | loss | pretraining loss | CPU s |", "|" + " --- |" * 7]
    for cell in CELLS:
        mine = [record for record in records if record["cell"] == cell]
        if not mine:
            continue
        iou, accuracy = (spread([100 * record[name] for record in mine]) for name in METRICS[:2])
        losses = [record["pretraining_loss"] for record in mine if record["pretraining_loss"] is not None]
        loss = spread([record["loss"] for record in mine], 3)
        seconds = round(statistics.mean(record["cpu_seconds"] for record in mine))
        before = spread(losses, 3) if losses else "–"
        lines.append(f"| {cell} | {len(mine)} | {iou} | {accuracy} | {loss} | {before} | {seconds} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int = 2) -> str:
    """Writes a mean and a standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with train.zip, validation.zip and test.zip")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--set-pretraining", nargs="*", default=[], help="further changes of the first recipe")
    parser.add_argument("--set-finetuning", nargs="*", default=[], help="further changes of the second recipe")
    parser.add_argument("--out", type=Path, default=Path("docs/data/segmentation.jsonl"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    journal = Journal(args.out)
    for seed in range(0 if args.table else args.seeds):
        for cell in args.cells:
            with journal.claim(f"{cell}-{seed}") as mine:
                if mine and not any((r["cell"], r["seed"]) == (cell, seed) for r in journal.records()):
                    record = one(cell, seed, args.data.resolve(), (args.set_pretraining, args.set_finetuning))
                    journal.append(record)
                    print(json.dumps(record), flush=True)
    print(table(journal.records()))


if __name__ == "__main__":
    main()
