"""Pelton in TRL: a small GPT learns sums as sentences, then, with an adapter, to answer questions about them.

There is nothing to download: the model is made from a config and trained from scratch first. With a pretrained one, put
its name where `model` is and leave the first training out.

    pip install pelton trl
    python examples/sft.py [--pretrain-steps 400] [--steps 200] [--output sft]
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

import pelton
from pelton import PeltonConfig

NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
]


def main() -> None:
    options = arguments()
    set_seed(0)
    sums = [(a, b) for a in range(10) for b in range(10)]
    random.Random(0).shuffle(sums)
    seen, unseen = sums[:80], sums[80:]
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)

    sentences = [{"text": f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}"} for a, b in sums]
    train(model, tokenizer, sentences, options.pretrain_steps, 3e-3, options.output / "pretraining")

    config = PeltonConfig(task_type="CAUSAL_LM")  # LoRA, a bottleneck and a prefix in every block, under a gate
    output = options.output / "adapter"
    trainer = train(model, tokenizer, [question(*pair) for pair in seen], options.steps, 5e-3, output, config)
    trainer.save_model(str(output))
    adapted = trainer.model.eval()
    adapted.print_trainable_parameters()

    with adapted.disable_adapter():
        print(f"right without the adapter: {right(adapted, tokenizer, unseen):.0%} of {len(unseen)} unseen questions")
    print(f"right with it: {right(adapted, tokenizer, unseen):.0%}")
    with pelton.record_gates(adapted) as log:
        right(adapted, tokenizer, unseen)
    print(log.to_frame().groupby(["index", "method"]).value.mean().unstack().round(2).to_string())

    loaded = PeftModel.from_pretrained(adapted.unload(), str(output)).eval()
    print(f"right after loading: {right(loaded, tokenizer, unseen):.0%}")


def question(a: int, b: int) -> dict[str, str]:
    """Returns a row in TRL's prompt-completion form: only the completion is learned."""
    return {"prompt": f"what is {NUMBERS[a]} and {NUMBERS[b]} ?", "completion": f" {NUMBERS[a + b]}"}


def train(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, str]],
    steps: int,
    rate: float,
    output: Path,
    config: PeltonConfig | None = None,
) -> SFTTrainer:
    """Trains a model, or an adapter on it, as TRL does it."""
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            max_length=16,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.train()
    return trainer


def right(model: Any, tokenizer: Any, pairs: list[tuple[int, int]]) -> float:
    """Returns the share of questions whose greedy answer is the sum."""
    rows = [question(*pair) for pair in pairs]
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True, padding_side="left")
    ids = model.generate(**batch.to(model.device), max_new_tokens=3, do_sample=False)
    answers = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(said.strip() == row["completion"].strip() for said, row in zip(answers, rows, strict=True)) / len(rows)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of whole words."""
    words = ["<pad>", "<end>", "<unk>", "what", "is", "plus", "and", "?", *NUMBERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<end>", unk_token="<unk>"
    )


def make_model(tokenizer: Any) -> GPT2LMHeadModel:
    """Makes a random GPT-2 of two blocks."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=32,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A small GPT with a Pelton adapter, by TRL.")
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "pelton-sft")
    return parser.parse_args()


if __name__ == "__main__":
    main()
