"""Losses for unequal classes, L2-SP, and gate penalties beside a loss of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F
from transformers import BartConfig, BartForCausalLM, Trainer, TrainingArguments

from fits import GATED, At, Make, assert_same, press_ctrl_c, weights
from law import attached
from pelton import MLPGate, PeltonConfig, gate_penalty
from pelton.errors import RecipeError
from pelton.tasks.causal import CausalLM
from pelton.tasks.causal_settings import CausalSettings
from pelton.tasks.load import KINDS
from pelton.tasks.seq2seq import Seq2SeqSettings, SequenceToSequence
from pelton.tasks.tokens import TokenSettings
from pelton.training.anchor import Anchor
from pelton.training.fit import Interrupted, fit, resume
from pelton.training.folder import RunFolder
from pelton.training.language import divides_by_tokens
from pelton.training.losses import IGNORED, ClassLoss, count_classes, inverse_frequency, make_loss, require_loss
from pelton.training.prepare import prepare
from pelton.training.recipe import TrainingSettings
from pelton.training.sections import LossSettings
from pelton.training.trainer import GatedTrainer
from tiny import NOUNS, sentences, write_jsonl
from zoo import ARCHS

N, C = 7, 4


def draw(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels = torch.randn(*shape, C, requires_grad=True), torch.randint(C, shape)
    return logits, labels.masked_fill(torch.rand(shape) < 0.3, IGNORED)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 3.0, 0.5, 0.3])], ids=["even", "weighted"])
@pytest.mark.parametrize("shape", [(N,), (3, N)], ids=["examples", "tokens"])
def test_focal_loss_without_gamma_is_cross_entropy(shape: Any, weights: Any, smoothing: float) -> None:
    logits, labels = draw(*shape)
    expected = F.cross_entropy(
        logits.view(-1, C), labels.view(-1), weights, ignore_index=IGNORED, label_smoothing=smoothing
    )
    plain = ClassLoss(LossSettings(label_smoothing=smoothing), weights)
    nearly = ClassLoss(LossSettings(kind="focal", gamma=1e-12, label_smoothing=smoothing), weights)
    torch.testing.assert_close(plain(logits, labels), expected)
    torch.testing.assert_close(nearly(logits, labels), expected)
    torch.testing.assert_close(plain(logits.bfloat16(), labels), expected, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_focal_loss_is_its_formula(gamma: float) -> None:
    logits, labels = draw(N)
    weights = torch.tensor([0.2, 3.0, 0.5, 0.3])
    kept = labels != IGNORED
    p = logits.softmax(-1)[kept, labels[kept]]
    w = weights[labels[kept]]
    expected = (w * (1 - p) ** gamma * -p.log()).sum() / w.sum()
    torch.testing.assert_close(ClassLoss(LossSettings(kind="focal", gamma=gamma), weights)(logits, labels), expected)


def test_focal_loss_has_gradients_where_the_model_is_sure() -> None:
    logits = torch.tensor([[90.0, 0.0], [0.0, 90.0]], requires_grad=True)
    ClassLoss(LossSettings(kind="focal", gamma=0.5), None)(logits, torch.tensor([0, 0])).backward()
    assert torch.isfinite(logits.grad).all()


def test_rare_classes_weigh_more_and_all_weigh_one_on_average() -> None:
    counts = count_classes([0] * 6 + [1] * 2 + [3], 4)
    assert counts.tolist() == [6, 2, 0, 1]
    found = inverse_frequency(counts)
    assert found[2] == 1.0  # does not occur
    seen = found[[0, 1, 3]]
    assert seen.mean() == pytest.approx(1.0)
    np.testing.assert_allclose(seen * [6, 2, 1], (seen * [6, 2, 1])[0])
    assert count_classes([[0, 1, 1], [1]], 3).tolist() == [1, 3, 0]


def test_the_words_of_sentences_are_weighed(backbone: Any) -> None:
    from pelton.tasks.labels import Labels

    task = KINDS[TokenSettings](TokenSettings(), Labels(("O", "B-X", "I-X"), {"O": 0, "B-X": 1, "I-X": 2}))
    loss = make_loss(LossSettings(class_weights="inverse"), task, [[0, 0, 0], [0, 1, 2]])
    assert loss is not None
    assert loss.weights is not None
    np.testing.assert_allclose(loss.weights, [1 / 3, 4 / 3, 4 / 3], rtol=1e-6)


def trainer_of(make: Make, **change: Any) -> tuple[GatedTrainer, dict[str, torch.Tensor]]:
    """A trainer whose model has no dropout, and its first batch."""
    recipe = make(**change)
    prepared = prepare(recipe)
    for module in prepared.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    task, train = prepared.data.task, prepared.data.splits["train"]
    features = task.encode(train.inputs, prepared.processor, train.targets)
    trainer = GatedTrainer(
        recipe.training,
        RunFolder(Path(recipe.output) / "unused"),
        None,
        task=task,
        targets=train.targets,
        model=prepared.model,
        train_dataset=features,
        data_collator=task.collator(prepared.processor),
    )
    batch = trainer.data_collator([features[i] for i in range(6)])
    return trainer, dict(batch)


ENTROPY = {**GATED, "gate": {"kind": "mlp", "entropy": 0.7}}


@pytest.mark.parametrize("loss", [{}, {"kind": "focal"}, {"class_weights": "inverse"}, {"label_smoothing": 0.3}])
@pytest.mark.parametrize("head", ["mean", "pooler"])
def test_every_loss_has_the_gates_penalties(make: Make, loss: Any, head: str) -> None:
    found = []
    for adapter in (GATED, ENTROPY):
        trainer, batch = trainer_of(make, adapter=adapter, loss=loss, task={"head": head})
        trainer.model.train()
        with gate_penalty(trainer.model) as penalty:
            outputs = trainer.model(**batch)
        own = (
            F.cross_entropy(outputs.logits, batch["labels"])
            if trainer.criterion is None
            else trainer.criterion(outputs.logits, batch["labels"])
        )
        total = trainer.compute_loss(trainer.model, dict(batch))
        torch.testing.assert_close(total, own + penalty())
        found.append(penalty().item())
    assert found[0] == 0.0
    assert found[1] == pytest.approx(0.7 * np.log(2), rel=0.05)  # two methods, both open


def test_each_loss_trains_to_another_model(make: Make, tmp_path: Any) -> None:
    rows = sentences(48)
    rare = [row for i, row in enumerate(rows) if row["label"] == "warm" or i % 6 == 1]
    (tmp_path / "data").mkdir()
    for name in ("train", "validation", "test"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rare)
    losses: list[Any] = [{}, {"kind": "focal"}, {"class_weights": "inverse"}, {"label_smoothing": 0.3}]
    found = [weights(fit(make(loss=loss, epochs=1))) for loss in losses]
    for other in found[1:]:
        assert any(not torch.equal(value, other[name]) for name, value in found[0].items())


def test_the_words_of_a_run_are_weighed(make: Make, tmp_path: Path) -> None:
    rows = [{"tokens": ["the", "film", noun], "tags": ["O", "O", "B-X" if noun == "song" else "O"]} for noun in NOUNS]
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", rows * 6)
    write_jsonl(tmp_path / "data" / "validation.jsonl", rows)
    task = {"kind": "token-classification", "head": None}
    recalls = []
    for loss in ({}, {"kind": "focal", "class_weights": "inverse"}):
        run = fit(make(task=task, loss=loss, epochs=5, metric_for_best="recall"))
        recalls.append(run.folder.read("metrics")["validation"]["recall"])
    assert recalls == [0.0, 1.0]  # one word in twelve is an entity


def test_accumulated_batches_average_the_recipes_loss(make: Make) -> None:
    """With equal weights and batches, two halves give the gradient of the whole."""
    gradients = []
    for size in (1, 2):
        trainer, batch = trainer_of(make, adapter=ENTROPY, loss={"kind": "focal"}, gradient_accumulation=size)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = size
        rows = 6 // size
        for start in range(0, 6, rows):
            trainer.training_step(trainer.model, {k: v[start : start + rows] for k, v in batch.items()})
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, atol=1e-6, rtol=1e-4)


# ---- L2-SP -------------------------------------------------------------------------------------------------------


def test_the_anchor_is_its_formula() -> None:
    backbone_, head = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))], [torch.ones(5)]
    anchor = Anchor(backbone_, head, 0.5, 0.25)
    assert anchor().item() == pytest.approx(0.25 * 5)
    with torch.no_grad():
        for parameter in backbone_:
            parameter.add_(2.0)
    assert anchor().item() == pytest.approx(0.5 * 10 * 4 + 0.25 * 5)
    anchor().backward()
    for parameter in backbone_:
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, 2 * 0.5 * 2.0))


def test_l2_sp_holds_the_backbone_and_is_in_the_logged_loss(make: Make) -> None:
    from pelton.training.backbone import load_backbone

    moved = []
    for strength in (0.0, 1.0, 100.0):
        recipe = make(None, l2_sp=strength, weight_decay=0.0)
        run = fit(recipe)
        start, _ = load_backbone(recipe.backbone, run.task, run.processor)
        now = dict(run.model.named_parameters())
        pairs = [(now[n], p) for n, p in start.named_parameters() if n.startswith("backbone.")]
        moved.append(sum((a - b).square().sum().item() for a, b in pairs))
    assert moved[0] > moved[1] > moved[2] > 0
    trainer, batch = trainer_of(make, adapter=None, l2_sp=3.0, l2_head=2.0)
    trainer.model.train()
    before = trainer.compute_loss(trainer.model, dict(batch))
    assert trainer.anchor is not None
    head = sum(p.square().sum().item() for p in trainer.model.classifier.parameters())
    torch.testing.assert_close(before, trainer.model(**batch).loss + 2.0 * head)
    with torch.no_grad():
        next(trainer.model.backbone.parameters()).add_(0.1)
    count = next(trainer.model.backbone.parameters()).numel()
    after = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(after, trainer.model(**batch).loss + 3.0 * 0.01 * count + 2.0 * head)


def test_a_resumed_run_is_held_to_the_pretrained_weights(make: Make) -> None:
    settings = {"l2_sp": 30.0, "weight_decay": 0.0}
    whole = fit(make(None, **settings))
    with pytest.raises(Interrupted) as stopped:
        fit(make(None, **settings), callbacks=[At(8, press_ctrl_c)])
    assert_same(weights(whole), weights(resume(stopped.value.folder)))
    logged = [json.loads(line) for line in whole.folder.history.read_text().splitlines()]
    assert [entry["loss"] for entry in logged if "loss" in entry]


# ---- a loss of one's own, with any trainer -----------------------------------------------------------------------


class Own(Trainer):  # type: ignore[misc]
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        with gate_penalty(model) as penalty:
            outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels) + penalty()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_a_trainer_with_its_own_loss_equals_one_without(task: str | None, tmp_path: Any) -> None:
    results = []
    for kind in (Trainer, Own):
        arch = ARCHS["bert"]
        torch.manual_seed(0)
        model = get_peft_model(
            arch.build(), PeltonConfig(methods=["lora", "bottleneck"], gate=MLPGate(entropy=2.0), task_type=task)
        )
        rows = [{k: v[i] for k, v in arch.inputs().items()} | {"labels": i % 2} for i in range(3)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            report_to="none",
            per_device_train_batch_size=3,
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            learning_rate=1e-2,
        )
        kind(model=model, args=arguments, train_dataset=rows).train()
        results.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


def test_taken_penalties_are_not_in_the_models_loss_too() -> None:
    arch = ARCHS["bert"]
    model = attached(arch, MLPGate(entropy=3.0, hidden_size=8)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = arch.inputs() | {"labels": torch.tensor([0, 1, 0])}
    with gate_penalty(model) as penalty:
        without = model(**inputs).loss
        assert len(penalty.terms) == 1
        model(**inputs)
    once = penalty() / 2
    assert once.item() > 0.1
    torch.testing.assert_close(model(**inputs).loss, without + once)
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], without + once)
    with gate_penalty(model.eval()) as penalty:
        model(**inputs)
    assert penalty().item() == 0.0


def test_a_lost_penalty_is_said() -> None:
    arch = ARCHS["bert"]
    model = attached(arch, MLPGate(entropy=3.0, hidden_size=8)).train()
    for more in ({}, {"return_dict": False}):
        with pytest.warns(UserWarning, match="no loss to add the gate penalties to"):
            model(**arch.inputs(), **more)
    with torch.no_grad():
        model(**arch.inputs())


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "minigpt"])
def test_language_models_are_smoothed(name: str, tmp_path: Any) -> None:
    """By transformers' smoother: a decoder's labels are shifted, an encoder-decoder gets its inputs from them."""
    arch, causal = ARCHS[name], name not in ("t5", "bart")
    task: Any = CausalLM(CausalSettings()) if causal else SequenceToSequence(Seq2SeqSettings())
    model = attached(arch, MLPGate(entropy=0.5, hidden_size=8))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    settings = TrainingSettings(loss={"label_smoothing": 0.3}, trackers=[])
    trainer = GatedTrainer(
        settings, RunFolder(tmp_path), None, task=task, targets=[], model=model, train_dataset=[{"input_ids": [1]}]
    )
    inputs = arch.inputs()
    inputs.pop("decoder_input_ids", None)
    width = inputs["input_ids"].shape[1] if causal else 5
    labels = torch.randint(3, 99, (3, width))
    labels[1, 2:] = labels[0, :1] = IGNORED
    batch = {**inputs, "labels": labels}
    model.train()
    torch.manual_seed(1)  # each time: encoder-decoders drop out by function
    with gate_penalty(model) as penalty:
        logits = model(**batch).logits
    logits, wanted = (logits[:, :-1], labels[:, 1:]) if causal else (logits, labels)
    expected = F.cross_entropy(logits.reshape(-1, 99), wanted.reshape(-1), label_smoothing=0.3)
    torch.manual_seed(1)
    found = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(found, expected + penalty())
    torch.manual_seed(1)
    assert (expected - model(**batch).loss.detach()).abs() > 1e-3
    assert trainer.model_accepts_loss_kwargs == causal
    if causal:  # half of what was accumulated, by its tokens
        tokens = (wanted != IGNORED).sum()
        half = trainer.compute_loss(model, dict(batch), num_items_in_batch=2 * tokens)
        share = 0.5 if name in ("llama", "minigpt") else ((labels != IGNORED).sum() / (2 * tokens)).item()
        torch.testing.assert_close(half, expected / 2 + penalty() * share)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [{"kind": "focal"}, {"class_weights": "inverse"}, {"label_smoothing": 0.1}])
def test_numbers_have_no_classes(make: Make, tmp_path: Any, loss: Any) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": "the film", "label": i / 7} for i in range(24)])
    with pytest.raises(RecipeError, match=r"training.loss is for classes, and text-regression has none"):
        fit(make(task={"kind": "text-regression"}, loss=loss))


def test_a_vocabulary_is_not_weighed() -> None:
    task = SequenceToSequence(Seq2SeqSettings())
    require_loss(LossSettings(label_smoothing=0.1), task)
    for loss, key in (({"kind": "focal"}, "kind=focal"), ({"class_weights": "inverse"}, "class_weights=inverse")):
        with pytest.raises(RecipeError, match=f"training.loss.{key} is for a few classes"):
            require_loss(LossSettings(**loss), task)


def test_a_model_that_takes_its_own_mean_is_not_told_of_tokens() -> None:
    config = BartConfig(vocab_size=20, d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8)
    own = BartForCausalLM(config)
    assert not divides_by_tokens(own)
    assert not divides_by_tokens(get_peft_model(own, PeltonConfig()))
    assert all(divides_by_tokens(ARCHS[name].build()) for name in ("llama", "gpt2", "minigpt"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, 0.5])])
def test_a_batch_without_labels_has_no_loss(kind: Any, smoothing: float, weights: Any) -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = ClassLoss(LossSettings(kind=kind, label_smoothing=smoothing), weights)(logits, torch.full((4,), IGNORED))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros(4, 3))
