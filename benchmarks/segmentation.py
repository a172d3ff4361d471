"""What pretraining by reconstruction brings to segmentation, and what dilated attention does in both stages.

Each cell trains a small Recon on CamVid and gives the mean IoU of its 60 test images. Fine-tuning is on 24 of the 120
training images, for 20 or 60 epochs, the same for all; pretraining is on all 120, without their masks:

scratch      random weights, fine-tuned
plain        pretrained for 30 epochs, then fine-tuned
long         likewise, pretrained for 150 epochs
0 … 0.1      as `plain`, with dilated attention (3 × 3 patches, every other one) at this share in both stages
learned      likewise, each block's share learned from 0.01 on, in both stages

Models are the last of their training, not the best on validation images. Standard deviations are over seeds: of the
weights, the order, what is hidden, and which images have labels. Pretrained models are kept, and serve both lengths of
fine-tuning. One JSON line each:

    python benchmarks/segmentation.py --data DIR [--seeds 3] [--cells scratch long …] [--epochs 20 60] [--out FILE]
    python benchmarks/segmentation.py --table [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
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
PRETRAINING = {"long": 150}
SHORT = 30
RATES = {20: "1.0e-3", 60: "5.0e-4"}
"""Epochs of fine-tuning → its learning rate."""
LAST = "training.evaluate_every=1000000"
METRICS = ("mean_iou", "pixel_accuracy", "loss")


def adapter(cell: str, stage: str) -> list[str]:
    """Returns what a recipe says of dilated attention."""
    if cell in UNDILATED:
        return []
    fixed = f"{{kind: fixed, value: {{dilated: {cell}}}}}"
    gate = "{kind: scalar, init: 0.01}" if cell == "learned" else fixed
    methods = "[{kind: dilated, kernel: 3, dilation: 2, space: grid}]"
    rate = ["training.gate_learning_rate=1.0e-2"] if cell == "learned" else []
    return [f"adapter={{methods: {methods}, gate: {gate}}}", "training.train_backbone=true", *rate]


def train(name: str, cell: str, seed: int, data: Path, changes: list[str]) -> Run:
    """Trains one stage."""
    more = [f"task.data={data}", f"training.seed={seed}", "training.trackers=none", LAST]
    return fit(load_recipe(name, [*more, *adapter(cell, name), *changes]))


def pretrained(cell: str, seed: int, data: Path, models: Path) -> Path:
    """Returns the run that pretrained a cell's model, which is trained where there is none yet."""
    folder = models / f"{cell}-{seed}"
    done = [path.parent for path in folder.glob("*/state.json") if json.loads(path.read_text())["phase"] == "finished"]
    epochs = PRETRAINING.get(cell, SHORT)
    changes = [f"output={folder}", f"training.epochs={epochs}"]
    return done[0] if done else train("recon-pretrain", cell, seed, data, changes).folder.path


def one(cell: str, seed: int, epochs: int, data: Path, models: Path) -> dict[str, Any]:
    """Fine-tunes one model."""
    first = None if cell == "scratch" else pretrained(cell, seed, data, models)
    start = [] if first is None else [f"backbone={first / 'model'}", "backbone_config={}"]
    budget = ["task.examples=24", f"training.epochs={epochs}", "training.batch_size=4"]
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        rate = f"training.backbone_learning_rate={RATES[epochs]}"
        run = train("camvid-segment", cell, seed, data, [*start, *budget, rate, f"output={folder}"])
        test = run.folder.read("metrics")["test"]
    gates = [] if cell in UNDILATED else gate_summary(run.model).dilated.round(4).tolist()
    loss = None if first is None else json.loads((first / "metrics.json").read_text())["test"]["loss"]
    return {
        "cell": cell,
        "seed": seed,
        "epochs": epochs,
        "pretraining_loss": None if loss is None else round(loss, 4),
        **{name: round(test[name], 4) for name in METRICS},
        "classes": {name.removeprefix("iou_"): round(v, 4) for name, v in test.items() if name.startswith("iou_")},
        "dilated": gates,
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Returns Markdown: a row a cell and length, means and standard deviations over seeds."""
    lines = ["| epochs | | seeds | mean IoU | pixel accuracy | loss | pretraining loss |", "|" + " --- |" * 7]
    for epochs, cell in itertools.product(RATES, CELLS):
        mine = [record for record in records if (record["epochs"], record["cell"]) == (epochs, cell)]
        if not mine:
            continue
        iou, accuracy = (spread([100 * record[name] for record in mine]) for name in METRICS[:2])
        losses = [record["pretraining_loss"] for record in mine if record["pretraining_loss"] is not None]
        loss, before = spread([record["loss"] for record in mine], 3), spread(losses, 3) if losses else "–"
        lines.append(f"| {epochs} | {cell} | {len(mine)} | {iou} | {accuracy} | {loss} | {before} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int = 2) -> str:
    """Writes a mean and a standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with train.zip, validation.zip and test.zip")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--epochs", nargs="+", type=int, default=list(RATES), choices=list(RATES))
    parser.add_argument("--models", type=Path, default=Path("runs/segmentation"), help="where pretrained ones are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/data/segmentation.jsonl"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    journal = Journal(args.out)
    for seed, cell in itertools.product(range(0 if args.table else args.seeds), args.cells):
        with journal.claim(f"{cell}-{seed}") as mine:
            for epochs in args.epochs if mine else ():
                if not any((r["cell"], r["seed"], r["epochs"]) == (cell, seed, epochs) for r in journal.records()):
                    record = one(cell, seed, epochs, args.data.resolve(), args.models)
                    journal.append(record)
                    print(json.dumps(record), flush=True)
    print(table(journal.records()))


if __name__ == "__main__":
    main()
