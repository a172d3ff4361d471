"""Whether the search finds what is there: tasks that one known method solves, and the others only come near to.

A backbone is random and frozen. The teacher is the same backbone with one method planted in one block; what it computes
is the target. The student has every method in every block under a `GumbelGate`, and pays for parameters. The planted
method lowers the loss to nothing; the others approximate it, for more parameters:

prefix   keys with large norms draw between none and most of the attention, query by query and head by head: no change
         of the weights mixes in a vector by how well its key fits
ia3      every feature of keys, values and activations is rescaled by a factor of its own: a change of full rank
lora     a change of rank 2 of one projection, queries or values by turns
dilated  (with --dilated) half of the attention looks at every other token

A seed counts as found when, in all blocks together, the planted method is kept and no other one; `place` counts those
which also keep it in the planted block alone, `size` those which keep at least as many units as were planted.

    python benchmarks/planted.py [--seeds 10] [--tasks prefix ia3 lora] [--choose method|block] [--out FILE]

Prints one JSON line a seed and a table in the end; finished seeds in FILE are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)

import torch  # noqa: E402
from peft import get_peft_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import BertConfig, BertModel, Trainer, TrainingArguments  # noqa: E402
from transformers.utils import logging  # noqa: E402

from pelton import IA3, BitFit, Bottleneck, DilatedAttention, FixedGate, LoRA, PeltonConfig, Prefix  # noqa: E402
from pelton.anatomy import find_anatomy  # noqa: E402
from pelton.methods import MethodSpec  # noqa: E402
from pelton.search.architecture import Architecture, chosen  # noqa: E402
from pelton.search.costs import Choices  # noqa: E402
from pelton.search.learning import ArchitectureLearning  # noqa: E402
from pelton.search.price import Price  # noqa: E402
from pelton.search.supernet import SearchSettings, choosing_gate  # noqa: E402
from pelton.training.gate_callbacks import TemperatureAnnealing  # noqa: E402
from pelton.training.optimizer import make_optimizer, parameter_groups  # noqa: E402
from pelton.training.recipe import TrainingSettings  # noqa: E402

BLOCKS, WIDTH, VOCAB, TOKENS = 2, 32, 64, 12
ROWS, BATCH = 1024, 32
CANDIDATES: list[MethodSpec] = [
    LoRA(rank=4, alpha=4),
    Bottleneck(bottleneck_size=8),
    Prefix(prefix_length=4, init_std=0.5),
    IA3(),
    BitFit(),
]
TASKS = ("prefix", "ia3", "lora")


@dataclass(frozen=True)
class Settings:
    """How each seed is searched; the same for all tasks."""

    steps: int = 500
    learning_rate: float = 2e-2
    gate_learning_rate: float = 0.05
    beta: float = 1.0
    choose: Any = "method"
    warmup: float = 0.2
    straight_through: bool = False


def backbone(seed: int) -> BertModel:
    """A random encoder without dropout, whose attention and layers differ enough from nothing to matter."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=2 * TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def planted(task: str, seed: int, block: int) -> tuple[MethodSpec, dict[str, Tensor]]:
    """What is planted, and its weights by the end of their names."""
    g = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    if task == "prefix":
        return Prefix(prefix_length=2, layers=(block,)), {
            "keys": 2.0 * normal(2, WIDTH),
            "values": 2.0 * normal(2, WIDTH),
        }
    if task == "ia3":
        return IA3(layers=(block,)), {"l": 1 + 0.8 * normal(4 * WIDTH)}
    if task == "dilated":
        return DilatedAttention(segment=TOKENS, dilation=2, layers=(block,)), {}
    site = ("attn.v", "attn.q")[seed % 2]
    spec = LoRA(rank=2, alpha=2, sites=(site,), layers=(block,))
    return spec, {"A": normal(2, WIDTH) / WIDTH**0.5 * 2, "B": normal(WIDTH, 2)}


def teacher(task: str, seed: int, block: int) -> Any:
    """The backbone with the planted method."""
    spec, values = planted(task, seed, block)
    model = get_peft_model(backbone(seed), PeltonConfig(methods=[spec], gate=FixedGate(1.0))).eval()
    with torch.no_grad():
        start: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            end = name.rsplit(".", 1)[-1]
            if ".pelton.methods." in name:
                value, first = values[end], start.get(end, 0)
                if parameter.dim() == 1:  # vectors at several sites are slices of one
                    value = value[first : first + len(parameter)]
                    start[end] = first + len(parameter)
                parameter.copy_(value)
    return model


class Student(nn.Module):
    """The supernet, judged by its squared distance from the target, in units of the backbone's."""

    def __init__(self, model: nn.Module, unit: float) -> None:
        super().__init__()
        self.model, self.unit = model, unit

    def forward(self, input_ids: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        out = self.model(input_ids=input_ids).last_hidden_state
        return {"loss": (out - labels).square().mean() / self.unit, "logits": out}


def search(task: str, seed: int, settings: Settings, dilated: bool = False) -> dict[str, Any]:
    """Runs one seed and says what it kept."""
    started, block = time.perf_counter(), seed // 2 % BLOCKS
    ids = torch.randint(VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        plain = backbone(seed)(input_ids=ids).last_hidden_state
        target = teacher(task, seed, block)(input_ids=ids).last_hidden_state
    unit = float((target - plain).square().mean())
    methods = [*CANDIDATES, *([DilatedAttention(segment=TOKENS, dilation=2)] if dilated or task == "dilated" else [])]
    gate = choosing_gate(methods, SearchSettings(choose=settings.choose, straight_through=settings.straight_through))
    model = get_peft_model(backbone(seed), PeltonConfig(methods=methods, gate=gate))
    price = Price(Choices.of(methods, gate, find_anatomy(backbone(seed))), beta=settings.beta)
    loss = train(
        Student(model, unit),
        [{"input_ids": i, "labels": t} for i, t in zip(ids, target, strict=True)],
        price,
        seed,
        settings,
    )
    found = chosen(model)
    spec, _ = planted(task, seed, block)
    return {
        "task": task,
        "seed": seed,
        "block": block,
        "kept": {str(b): dict(choice) for b, choice in found.blocks.items()},
        **verdict(found, spec, block),
        "loss": round(loss, 4),
        "seconds": round(time.perf_counter() - started, 1),
    }


def train(student: Student, rows: list[dict[str, Tensor]], price: Price, seed: int, settings: Settings) -> float:
    """Searches with transformers' own Trainer; returns the loss of what was chosen."""
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=settings.steps,
            per_device_train_batch_size=BATCH,
            lr_scheduler_type="linear",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=settings.steps,
            use_cpu=True,
            seed=seed,
            remove_unused_columns=False,
            label_names=["labels"],
            log_level="error",
        )
        rates = TrainingSettings(
            learning_rate=settings.learning_rate, gate_learning_rate=settings.gate_learning_rate, weight_decay=0.0
        )
        optimizer = make_optimizer(parameter_groups(student, rates))
        learning = ArchitectureLearning(price, warmup=settings.warmup)
        callbacks = [learning, TemperatureAnnealing(1.0, 0.2)]
        trainer = Trainer(student, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=callbacks)
        trainer.log = lambda *args, **kwargs: None  # nothing is printed
        trainer.train()
    student.eval()
    with torch.no_grad():
        ids, target = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
        return float(student(ids, target)["loss"])


def verdict(found: Architecture, spec: MethodSpec, block: int) -> dict[str, bool]:
    """Says whether the planted method was kept and no other, in its block alone, and large enough."""
    kinds = {kind for choice in found.blocks.values() for kind in choice}
    kept = kinds == {spec.kind}
    own = getattr(spec, spec.size) if spec.size else 0
    size = max((choice.get(spec.kind) or 0 for choice in found.blocks.values()), default=0)
    return {"found": kept, "place": kept and set(found.blocks) == {block}, "size": kept and size >= own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=[*TASKS, "dilated"])
    parser.add_argument("--choose", choices=["method", "block"], default="method")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--beta", type=float, default=Settings.beta)
    parser.add_argument("--rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--straight-through", action="store_true")
    parser.add_argument("--out", type=Path, help="finished seeds, one JSON line each")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    done = (
        [json.loads(line) for line in options.out.read_text().splitlines()]
        if options.out and options.out.exists()
        else []
    )
    settings = Settings(
        steps=options.steps,
        beta=options.beta,
        learning_rate=options.rate,
        choose=options.choose,
        straight_through=options.straight_through,
    )
    for task in options.tasks:
        for seed in range(options.seeds):
            if any(row["task"] == task and row["seed"] == seed for row in done):
                continue
            done.append(search(task, seed, settings))
            print(json.dumps(done[-1]), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    print(f"\n{'task':<9}{'found':>8}{'place':>8}{'size':>8}{'seconds':>9}")
    for task in options.tasks:
        rows = [row for row in done if row["task"] == task]
        counts = "".join(f"{sum(row[key] for row in rows):>5}/{len(rows):<2}" for key in ("found", "place", "size"))
        print(f"{task:<9}{counts}{sum(row['seconds'] for row in rows) / len(rows):>9.1f}")


if __name__ == "__main__":
    main()
