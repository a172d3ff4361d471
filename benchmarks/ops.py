"""Where the overhead goes: the single operations that a gated block adds, at 32 × 128 tokens and MiniLM's sizes.

Prints the best of 25 runs of each, in turn, on one thread.

    python benchmarks/ops.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

B, T, D, H, K, R, S, P = 32, 128, 384, 12, 32, 8, 48, 10


def heads(tokens: int) -> torch.Tensor:
    return torch.randn(B, tokens, H, K).transpose(1, 2)


def attention(keys: int) -> Callable[[], object]:
    query, key, mask = heads(T), heads(keys), torch.zeros(B, 1, T, keys)
    return lambda: F.scaled_dot_product_attention(query, key, key, attn_mask=mask)


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    x, wide, square = torch.randn(B, T, D), torch.randn(4 * D, D), torch.randn(D, D)
    a, b, z = torch.randn(R, D), torch.randn(D, R), torch.randn(B * T, R)
    down, up, unit = torch.randn(S, D), torch.randn(D, S), torch.randn(B * T, S)
    y, ones, key, prefix = (
        torch.randn(B * T, D),
        torch.ones(B, T),
        heads(T),
        torch.randn(1, H, P, K).expand(B, -1, -1, -1),
    )
    visible = torch.ones(B, 1, T, T, dtype=torch.bool)
    runs: dict[str, Callable[[], object]] = {
        "backbone: D × D product": lambda: F.linear(x, square),
        "backbone: D × 4D product": lambda: F.linear(x, wide),
        "lora: A x": lambda: F.linear(x, a),
        "lora: y + B z": lambda: torch.addmm(y, z, b.t()),
        "lora: y + B z in place": lambda: y.addmm_(z, b.t()),
        "bottleneck: D x": lambda: F.linear(x, down),
        "bottleneck: y + U z in place": lambda: y.addmm_(unit, up.t()),
        "gate: masked mean": lambda: ones[:, None] @ x,
        "prefix: in front of the keys": lambda: torch.cat([prefix, key], 2),
        "prefix: additive mask": lambda: torch.where(visible, 0.0, -1e9),
        **{f"attention over {n} keys": attention(n) for n in (128, 138, 144, 160)},
    }
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(25):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    for name, seconds in best.items():
        print(f"{name:32s} {1e3 * seconds:6.2f} ms")


if __name__ == "__main__":
    main()
