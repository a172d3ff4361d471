"""Time and memory of dilated attention against SDPA over all pairs, from 4k to 32k tokens.

One row, 2 heads of 64, causal, inference, on one thread. Times are the best of some rounds over all lengths (of one
for SDPA); memory is what a forward allocates at its peak beyond its inputs, by torch's profiler. Prints the ratios and
the slope of a log-log fit over length (1 is linear, 2 quadratic), and writes a line for each measurement to
docs/data/dilated.jsonl.

    python benchmarks/dilated.py
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from pelton import DilatedAttention
from pelton.methods import Shape, View

H, K = 2, 64
LENGTHS = (4096, 8192, 16384, 32768)
ROUNDS = 8
OUTPUT = Path(__file__).parents[1] / "docs/data/dilated.jsonl"

SPECS = {
    "segment 512, dilation 2": DilatedAttention(segment=512, dilation=2),
    "segments 256 and 1024, dilations 1 and 4": DilatedAttention(segment=(256, 1024), dilation=(1, 4)),
}


def functions() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """What is measured, by name."""
    view = View(K**-0.5, causal=True)
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    }
    for name, spec in SPECS.items():
        part = spec.build(Shape("attn", H * K, H * K, H, K, H))
        found[name] = lambda q, k, v, part=part: part(q, k, v, view)
    return found


def seconds(runs: dict[int, Callable[[], object]], rounds: int) -> dict[int, float]:
    """Returns the best time of each run, over rounds in which all take turns: a busy machine then slows all alike."""
    best = dict.fromkeys(runs, math.inf)
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak(run: Callable[[], object]) -> int:
    """Returns the bytes that a run holds at its peak beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    now = highest = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


def slope(lengths: list[int], values: list[float]) -> float:
    """Returns the slope of a straight line through the logarithms."""
    xs, ys = [math.log(n) for n in lengths], [math.log(v) for v in values]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows: list[dict[str, object]] = []
    table: dict[str, dict[str, list[float]]] = {}
    for name, function in functions().items():
        table[name] = {"seconds": [], "bytes": []}
        runs = {}
        for length in LENGTHS:
            inputs = [torch.randn(1, length, H, K).transpose(1, 2) for _ in range(3)]
            runs[length] = partial(function, *inputs)
        times = seconds(runs, 1 if name == "sdpa" else ROUNDS)
        for length, run in runs.items():
            row = {"seconds": times[length], "bytes": peak(run)}
            rows.append({"what": name, "tokens": length, "heads": H, "head_dim": K, "threads": 1, **row})
            for key, value in row.items():
                table[name][key].append(value)
    for name, values in table.items():
        for key, some in values.items():
            shown = "  ".join(f"{one:10.4f}" if key == "seconds" else f"{one / 2**20:8.1f}Mi" for one in some)
            ratio = table["sdpa"][key][-1] / some[-1]
            print(f"{name:42s} {key:8s} {shown}  slope {slope(list(LENGTHS), some):.2f}  sdpa / this {ratio:.2f}")
    OUTPUT.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
