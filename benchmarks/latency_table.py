"""How well the latency table tells times: of methods it was not measured on, and of whole architectures.

The default grid is measured and a model of times fitted; candidates of a search are estimated by it and then measured;
architectures at half the parameters are put together of the measured candidates, and measured themselves. All times are
ratios to the plain backbone, on one thread by the process's own clock.

    python benchmarks/latency_table.py [--backbone MODEL] [--shape 4 32] [--rounds 21]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)

import torch  # noqa: E402
from peft import get_peft_model  # noqa: E402

from pelton import IA3, Bottleneck, LoRA, Prefix, find_anatomy  # noqa: E402
from pelton.bench.protocol import MINILM  # noqa: E402
from pelton.insight.latency import Stopwatch  # noqa: E402
from pelton.search.architecture import sized  # noqa: E402
from pelton.search.choose import random_architecture, uniform  # noqa: E402
from pelton.search.costs import Choices  # noqa: E402
from pelton.search.profile import profile  # noqa: E402
from pelton.search.supernet import SearchSettings, choosing_gate  # noqa: E402
from pelton.training.backbone import load_plain, quiet  # noqa: E402
from pelton.tuner.twin import twin  # noqa: E402

METHODS = (LoRA(sites=("attn.q", "attn.k", "attn.v", "attn.out", "ffn.in")), Bottleneck(), Prefix(), IA3())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default=MINILM)
    parser.add_argument("--shape", nargs=2, type=int, default=[4, 32])
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with quiet():
        model = load_plain(options.backbone)
    shape, started = tuple(options.shape), time.process_time()
    table = profile(model, shapes=[shape], again=True)
    errors = [abs(error) for error in table.errors()]
    print(f"grid: {len(table.entries)} measurements, {time.process_time() - started:.1f} s of processor time")
    print(
        f"each left out in turn: off by {statistics.mean(errors):.1%} of the backbone's time, {max(errors):.1%} at most"
    )
    gate, anatomy = choosing_gate(METHODS, SearchSettings()), find_anatomy(model)
    probes = [sized(spec, size) for spec in METHODS for size in gate.sizes.get(spec.kind, (None,))]
    blocks = len(anatomy.blocks)
    estimates = [(spec, table.cost(spec, *shape) * blocks) for spec in probes if not table.measured(spec, *shape)]
    table = profile(model, probes, shapes=[shape])
    for spec, estimate in estimates:
        entry = table.measured(spec, *shape)
        assert entry is not None
        size = getattr(spec, spec.size) if spec.size else ""
        print(f"{spec.kind:<11}{size:>4}  estimated {estimate:+.1%}  measured {entry.ratio - 1:+.1%}")
    choices = Choices.of(METHODS, gate, anatomy, table, shape)
    limits = {"parameters": 0.5 * choices.range["parameters"][1]}
    found = [*(random_architecture(choices, limits, seed) for seed in range(3)), uniform(choices, limits), choices.full]
    models = [get_peft_model(twin(model), one.config(anatomy)) for one in found]
    ids = torch.randint(model.config.vocab_size, shape)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ratios = Stopwatch([batch], rounds=options.rounds, clock=time.process_time)(models, model)
    for name, one, ratio in zip(("random", "random", "random", "uniform", "full"), found, ratios, strict=True):
        expected = choices.cost(one)[1]
        print(f"{name:<11}expected {expected:.3f}  measured {ratio}  off {expected / ratio.ratio - 1:+.1%}")


if __name__ == "__main__":
    main()
