"""What is left of an adapter's inference time once its gates are constant and what folds is folded.

For each adapter it prints one JSON line: the time of the adapted model ÷ that of its backbone, as it is trained (under
the default's gates), with frozen gates, and folded; interleaved in one process, median over rounds. `same` says whether
the folded model has the backbone's module tree and parameter shapes. Adapters have random weights, since values do not
change what a product costs; an all-closed gate would cost the same.

foldable           LoRA on every linear site, (IA)³ and BitFit
bottleneck+prefix  LoRA, a bottleneck of 48 and a prefix of 10: what stays is static
pelton             the default: LoRA and a bottleneck

    python benchmarks/folded.py [--backbone minilm bert-base] [--adapter foldable …] [--rounds 30] [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers.utils import logging

import overhead
from pelton import IA3, BitFit, Bottleneck, LoRA, PeltonConfig, Prefix, Stopwatch, fold, freeze_gates
from pelton.methods import LINEAR_SITES

ADAPTERS: dict[str, Callable[[], PeltonConfig]] = {
    "foldable": lambda: PeltonConfig(methods=[LoRA(sites=LINEAR_SITES), IA3(), BitFit()], task_type="SEQ_CLS"),
    "bottleneck+prefix": lambda: PeltonConfig(methods=[LoRA(), Bottleneck(), Prefix()], task_type="SEQ_CLS"),
    "pelton": lambda: PeltonConfig(task_type="SEQ_CLS"),
}


def measure(name: str, adapter: str, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = overhead.backbone(name).eval()
    model = get_peft_model(copy.deepcopy(plain), ADAPTERS[adapter]()).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".pelton.methods." in parameter_name:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    inputs = overhead.batch(shape, "cpu")
    frozen = copy.deepcopy(model)
    freeze_gates(frozen, [inputs])
    folded = fold(copy.deepcopy(frozen)).eval()
    with torch.inference_mode():
        difference = (folded(**inputs).logits - frozen(**inputs).logits).abs().max().item()
    trained, constant, small = Stopwatch([inputs], rounds=rounds, warm_up=2)([model, frozen, folded], plain)
    times = {"gated": trained, "frozen": constant, "folded": small}
    return {
        "backbone": name,
        "adapter": adapter,
        "shape": list(shape),
        "inference": {key: {"ratio": round(t.ratio, 3), "spread": round(t.spread, 3)} for key, t in times.items()},
        "plain_ms": round(1e3 * small.reference, 1),
        "same": tree(folded) == tree(plain),
        "difference": difference,
    }


def tree(model: nn.Module) -> list[tuple[str, str, list[tuple[str, torch.Size]]]]:
    """Returns every module's name, type and own parameters' shapes."""
    return [
        (name, type(module).__name__, [(key, value.shape) for key, value in module.named_parameters(recurse=False)])
        for name, module in model.named_modules()
    ]


def main() -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["minilm", "bert-base"])
    parser.add_argument("--adapter", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS))
    parser.add_argument("--shape", nargs="+", default=["32x128"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for name in args.backbone:
        for shape in (tuple(map(int, s.split("x"))) for s in args.shape):
            for adapter in args.adapter:
                line = json.dumps(measure(name, adapter, shape, args.rounds))
                print(line, flush=True)
                if args.out:
                    with args.out.open("a") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    main()
